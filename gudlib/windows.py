"""Drawing images patch by patch: only the patches that move are computed, what finished ones tell others is kept.

For block-causal transformers (`networks.Transformer` with `between`) around references whose patches know nothing of
one another. Along a schedule of softness b, w = b (L - 1) / (1 - b) of the L patches move at once: at w = 1 this is
autoregression with a cache, whose steps cost what one patch costs, and at b = 1 diffusion of the whole image.
Patches come in reading order: in another, what a finished one tells others would change as those above it finish.

References:
    DiSA: Diffusion Step Annealing in Autoregressive Image Generation, Q. Zhao et al., 2025,
    https://arxiv.org/abs/2505.20297 (fewer steps for later tokens)
"""

from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from gudlib import checks, samplers
from gudlib.denoiser import Denoiser
from gudlib.doors import door, inner
from gudlib.networks import Cache, Transformer
from gudlib.process import Process
from gudlib.samplers import Samples
from gudlib.schedules import Schedule

METHODS = ("ancestral", "ddim")  # which ask the model at a step's start alone


@door
def annealed(count: int, first: int, last: int) -> Float[Tensor, " k"]:
    """Times for patches one after another, of which the first gets `first` steps and the last `last`.

    Raises:
        ValueError: if a number is below 1.

    >>> annealed(2, 3, 1)
    tensor([1.0000, 0.8333, 0.6667, 0.5000, 0.0000], dtype=torch.float64)
    """
    numbers = {"count": count, "first": first, "last": last}
    count, first, last = (checks.whole(name, value) for name, value in numbers.items())
    each = torch.linspace(first, last, count, dtype=torch.float64).round().long().tolist()
    turns = [torch.linspace(1, 0, steps + 1, dtype=torch.float64)[1:] for steps in each]
    later = torch.cat([(count - 1 - k + turn) / count for k, turn in enumerate(turns)])
    return torch.cat([later.new_ones(1), later])


class Window(nn.Module):
    """Some patches of an image as a network of their own, for `Denoiser`: (b k, inputs, p, p) to (b k, c, p, p)."""

    @inner
    def __init__(self, network: Transformer, places: Int64[Tensor, " k"], past: Cache) -> None:
        super().__init__()
        self.network, self.places, self.past = network, places, past

    @inner
    def forward(self, images: Tensor, gamma: Tensor) -> Tensor:
        """As `Transformer.window`."""
        images, gamma = (x.unflatten(0, (-1, len(self.places))) for x in (images, gamma))
        return self.network.window(images, gamma, self.places, self.past).flatten(0, 1)


@door
@torch.no_grad()
def generate(
    denoiser: Denoiser,
    schedule: Schedule,
    n: int,
    steps: int = 50,
    method: str = "ancestral",
    generator: torch.Generator | None = None,
    grid: str | Float[Tensor, " k"] = "uniform",
    temperature: float = 1.0,
    progress: bool = False,
) -> Samples:
    """Draw `n` images as `samplers.sample` does, at the cost of the patches that move.

    Given the same start, deterministic methods draw the same images. Noise that steps add is drawn for the patches that
    move, so the others draw other images of the same distribution.

    Arguments:
        denoiser: of a block-causal transformer, around a reference that `patches` takes apart.
        schedule: of patches in reading order, for all images.
        n, steps, generator, grid, temperature, progress: as for `samplers.sample`.
        method: one of `METHODS`.

    Raises:
        ValueError: for another network, method, schedule or reference, or as `samplers.sample`.
    """
    network, prior = denoiser.network, denoiser.prior
    if not isinstance(network, Transformer) or network.between is None:
        raise ValueError("denoiser must have a block-causal transformer, networks.Transformer(between=...)")
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}; got {method!r}")
    if schedule.batch:
        raise ValueError(f"schedule must be for all images; got one for a batch of {tuple(schedule.batch)}")
    n = checks.whole("n", n)
    p, count = network.patch, len(network.place)
    reference, device = denoiser.reference.patches(p), prior.mean.device
    t = samplers.times(Process(denoiser.basis, prior, schedule), steps, grid).to(device)
    levels = functional.pixel_unshuffle(schedule.gamma(t), p).flatten(2).mT  # (times, L, c p p)
    finished, _ = network.states(levels)
    moves = (levels[:-1] - levels[1:]).amax(-1) > 1e-9  # beyond rounding
    if not bool(finished[-1].all()) or not bool((finished.long().diff(dim=1) <= 0).all()):
        raise ValueError("schedule must end, patch by patch in reading order, where the network takes them as finished")
    start = torch.randn(n, *schedule.shape, generator=generator, dtype=torch.float64, device=device)
    x = functional.pixel_unshuffle(start, p).flatten(2).mT.unflatten(2, reference.basis.shape)  # (n, L, c, p, p)
    past: Cache = []
    everywhere, shape = torch.arange(count, device=device), reference.basis.shape
    for i in tqdm(range(len(t) - 1), disable=not progress):
        kept = past[0][0].shape[2] if past else 0
        places = everywhere[moves[i] | (finished[i] & (everywhere >= kept))]
        there, here = (levels[k, places].unflatten(1, shape).repeat(n, 1, 1, 1) for k in (i + 1, i))
        line = Schedule(partial(torch.lerp, there, here), shape, batch=(n * len(places),))
        process = Process(reference.basis, reference.prior, line)
        model = Denoiser(Window(network, places, past), reference.at(places.repeat(n)), denoiser.noised)
        step = samplers.METHODS[method](model, process, x[:, places].flatten(0, 1), *t[[0, -1]])
        noise = torch.randn(step.mean.shape, generator=generator, dtype=x.dtype, device=device)
        x[:, places] = (step.mean + temperature * step.std * noise).unflatten(0, (n, -1))
    white = functional.pixel_shuffle(x.flatten(2).mT.unflatten(2, (schedule.shape[1] // p, -1)), p)
    process = Process(denoiser.basis, prior, schedule)
    none = x.new_empty(0)
    return Samples(process.data(white).float(), white, len(t) - 1, none, none.view(0, *white.shape))
