"""Training steps of other libraries, each as its own examples train, for `run.py`.

A builder returns the number of parameters and a function that makes one step with a batch of Fashion-MNIST, or raises
ImportError.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gudlib import data

Turn = Callable[[], object]


def parameters(network: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in network.parameters())


def diffusers_unet(images: Tensor, batch: int) -> tuple[int, Turn]:
    """UNet2DModel with DDPMScheduler, as in diffusers' tutorial on unconditional generation."""
    from diffusers import DDPMScheduler, UNet2DModel

    network = UNet2DModel(
        sample_size=28, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32, 64),
        norm_num_groups=8, down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    scheduler, optimizer = DDPMScheduler(), torch.optim.AdamW(network.parameters(), lr=1e-4)
    pictures = data.scale(images)

    def step() -> None:
        clean = pictures[torch.randint(len(pictures), (batch,))]
        noise, t = torch.randn_like(clean), torch.randint(1000, (batch,))
        predicted = network(scheduler.add_noise(clean, noise, t), t, return_dict=False)[0]
        nn.functional.mse_loss(predicted, noise).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return parameters(network), step


def smalldiffusion_unet(images: Tensor, batch: int) -> tuple[int, Turn]:
    """smalldiffusion's U-Net, schedule and training loop, as in its Fashion-MNIST example, in small."""
    from smalldiffusion import Scaled, ScheduleLogLinear, Unet, training_loop

    network = Scaled(Unet)(28, 1, 1, ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, attn_resolutions=(14,))
    pictures = data.scale(images)[: len(images) // batch * batch].split(batch)
    run = training_loop(pictures, network, ScheduleLogLinear(sigma_min=0.01, sigma_max=20, N=800), epochs=10**6)
    return parameters(network), lambda: next(run)


def authors_unet(images: Tensor, batch: int, path: Path | None) -> tuple[int, Turn]:
    """The tutorial network and loss of the paper's authors (github.com/mathisgerdes/unified-diffusion), in JAX."""
    if path is not None:
        sys.path += [str(path / "src"), str(path / "tutorials")]
    import gud
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx
    from utils import UNet

    pictures = data.scale(images).flatten(1).numpy()[..., None]
    variance = ((jnp.abs(jnp.fft.fft2(pictures.reshape(-1, 28, 28), norm="ortho")) ** 2).mean(0)).reshape(-1, 1)
    labels = {"labels": -jnp.log(variance), "gamma_min_target": -7, "gamma_max_target": 7, "softness": 1}
    schedule = gud.soft_conditioning_schedule(**labels)
    space = gud.FourierSpace((28, 28), scale=jnp.sqrt(variance))
    keys = nnx.Rngs(0)
    network = UNet((28, 28), rngs=keys, base_channels=24, channel_multipliers=(1, 2, 4), attention_heads=2)
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-4))
    optimizer = nnx.Optimizer(model=network, tx=chain, wrt=nnx.Param)

    def loss(network: Any, clean: Any, key: Any) -> Any:
        t = (jnp.arange(batch) + jax.random.uniform(key, (batch,))) / batch
        state = schedule(t, shape=clean.shape)
        noised, eps = gud.ou_process(key, clean, state)
        predicted = space.wrap(data=network(state.t, noised.data))
        return jnp.mean(jnp.abs(predicted.comp_white + noised.comp_white - eps.comp_white) ** 2)

    @nnx.jit
    def update(optimizer: Any, network: Any, clean: Any, key: Any) -> Any:
        value, slope = nnx.value_and_grad(loss)(network, space.wrap(data=clean), key)
        optimizer.update(grads=slope, model=network)
        return value

    def step() -> None:
        update(optimizer, network, pictures[torch.randint(len(pictures), (batch,))], keys()).block_until_ready()

    return sum(x.size for x in jax.tree.leaves(nnx.state(network, nnx.Param))), step
