r"""Autoregression over continuous tokens with a diffusion loss: MAR, and two causal models to compare it with.

An image is cut into L tokens, patches of D = c p p numbers. Taken in an order pi, the chain rule prices it,

    -log p(x) = -sum_k log p(x_pi(k) | x_pi(1), ..., x_pi(k-1)),

and a diffusion model gives each factor: a transformer, the *trunk*, turns the tokens known so far into a vector z for
one that is not, and a small network, the *head*, denoises that token alone, `eps_hat = head(chi_t, gamma, z)`. A head
with its z is a model like any other here, so noise, samplers and bound are those of the other modules. The loss is
E (eps - eps_hat)^2 / D, and the bounds of the factors add up to one of -log p(x).

    raster   a causal transformer, tokens in reading order
    random   the same in a new order each time; it is told where the next token goes
    masked   MAR: an encoder sees the known tokens, in no order, and a decoder asks for any of the others: several may
             be drawn in one step, as if independent given the known ones

Beside the published model, ours takes the mean off its tokens and answers through `Denoiser`'s Gaussian skip path; it
has no learnt variance (the bound needs none), and its optimiser is that of `training`. The loss is along whatever
schedule one gives; `noise` is the cosine as published, cut where its ends would multiply errors (see there).

References:
    Autoregressive Image Generation without Vector Quantization, T. Li, Y. Tian, H. Li, M. Deng, K. He, 2024,
    https://arxiv.org/abs/2406.11838
    Masked Autoencoders Are Scalable Vision Learners, K. He et al., 2021, https://arxiv.org/abs/2111.06377
    Scalable Diffusion Models with Transformers, W. Peebles, S. Xie, 2022, https://arxiv.org/abs/2212.09748
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional

from gudlib import bases, denoiser, likelihood, priors, samplers, schedules, training
from gudlib.data import dequantise
from gudlib.denoiser import Denoiser
from gudlib.networks import GammaGroups
from gudlib.process import Batch, Gamma, Model, Process, diffuse
from gudlib.schedules import Schedule

KINDS = ("raster", "random", "masked")
GUIDANCES = ("linear", "constant")

Tokens = Float[Tensor, "b l d"]
Order = Int64[Tensor, "b l"]
Labels = Int64[Tensor, " b"]
Conditional = Callable[[Tokens, Order, int, int, Labels | None], Model]
Cache = list[list[Tensor]]


def patchify(images: Batch, size: int) -> Tokens:
    """Square patches of images (b, c, h, w) in reading order, each flattened from (c, size, size).

    Raises:
        ValueError: if the patch size does not divide height and width.
    """
    _divided(images.shape[-2:], size)
    return functional.pixel_unshuffle(images, size).flatten(2).mT


def unpatchify(tokens: Tokens, shape: Sequence[int], size: int) -> Batch:
    """Images of one shape (c, h, w) from their patches; the inverse of `patchify`."""
    return functional.pixel_shuffle(tokens.mT.unflatten(2, (shape[1] // size, shape[2] // size)), size)


def unmasking(count: int, steps: int) -> list[int]:
    """How many of `count` tokens are known before each of `steps` steps, and at the end: few at first, then many.

    Unknown after step s are count cos(pi/2 s/steps), rounded down, and at least one fewer than before.

    Raises:
        ValueError: if there are more steps than tokens, or none.

    >>> unmasking(16, 4)
    [0, 2, 5, 10, 16]
    """
    if not 1 <= steps <= count:
        raise ValueError(f"steps must lie between 1 and the number of tokens, {count}; got {steps}")
    left = [count]
    for s in range(1, steps + 1):
        left.append(min(left[-1] - 1, math.floor(count * math.cos(math.pi / 2 * (s / steps)))))
    return [count - n for n in left]


def mask_ratio(lowest: float, spread: float, generator: torch.Generator) -> float:
    """A share of tokens to mask: normal of mean 1 and standard deviation `spread`, confined to [lowest, 1].

    Published are 0.7 and 0.25. Bounds need a model that has seen every number of known tokens: lowest 0 and a wide
    spread (10 is uniform for all purposes, while 0.25 leaves 1 % of all draws below 0.36).
    """
    low = torch.special.ndtr(torch.tensor((lowest - 1) / spread, dtype=torch.float64))
    u = torch.rand((), generator=generator, dtype=torch.float64, device=generator.device).cpu()
    return 1 + spread * float(torch.special.ndtri(low + (0.5 - low) * u))


class Block(nn.Module):
    """A pre-norm transformer block on (b, l, width).

    With a list `past`, where it keeps keys and values, it takes one new token at a time, which may see all before.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, {heads}; got {width}")
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, causal: bool = False, past: list[Tensor] | None = None) -> Tensor:
        """`x` (b, l, width), changed by what its tokens find among themselves and in the past."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if past is not None:
            past[:] = [torch.cat(pair, 2) for pair in zip(past, (k, v), strict=True)] if past else [k, v]
            k, v = past
        drop = self.dropout if self.training else 0.0
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=causal and past is None, dropout_p=drop)
        x = x + functional.dropout(self.out(y.transpose(1, 2).flatten(2)), drop)
        return x + functional.dropout(self.mlp(self.norm2(x)), drop)


class Causal(nn.Module):
    """The trunk of the causal models: place k of its sequence holds token k - 1 (first the class) and asks for token k.

    Every place is told where its token is and where the next one goes: in reading order the latter adds nothing.

    Arguments:
        count, dim: L and D; classes: labels are 0 .. classes - 1, and `classes` is none.
        width, depth, heads, dropout: of 2 depth transformer blocks.
    """

    def __init__(
        self, count: int, dim: int, classes: int, width: int, depth: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.label, self.embed = nn.Embedding(classes + 1, width), nn.Linear(dim, width)
        self.place, self.target = nn.Embedding(count, width), nn.Embedding(count, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(2 * depth))
        self.norm = nn.LayerNorm(width)

    def cache(self) -> Cache:
        """An empty one, with which tokens start = 0, 1, 2, ... are to be asked for one after another."""
        return [[] for _ in self.blocks]

    def forward(
        self, tokens: Tokens, order: Order, start: int, stop: int, labels: Labels, cache: Cache | None = None
    ) -> Float[Tensor, "b m width"]:
        """z for tokens order[:, start:stop], each from those before it in the order."""
        first = 0 if cache is None else start
        before = order[:, max(first - 1, 0) : stop - 1]
        x = self.embed(tokens.take_along_dim(before[..., None], 1)) + self.place(before)
        x = x if first else torch.cat([self.label(labels)[:, None], x], 1)
        x = x + self.target(order[:, first:stop])
        for i, block in enumerate(self.blocks):
            x = block(x, causal=True, past=cache[i] if cache is not None else None)
        return self.norm(x[:, start - stop :])


class Masked(nn.Module):
    """The trunk of MAR: an encoder of the known tokens, and a decoder that also has a mask for each unknown one.

    Both see a buffer of copies of the class, without which the encoder would have next to nothing to compute with
    while few tokens are known. Places are told three times: to the encoder, to the decoder and to the head.

    Arguments:
        buffer: number of copies; depth: of the encoder, and of the decoder. The others are as for `Causal`.
    """

    def __init__(
        self, count: int, dim: int, classes: int, width: int, depth: int, heads: int, dropout: float, buffer: int
    ) -> None:
        super().__init__()
        self.buffer = buffer
        self.label, self.embed = nn.Embedding(classes + 1, width), nn.Linear(dim, width)
        self.encoder_place, self.decoder_place = (nn.Embedding(buffer + count, width) for _ in range(2))
        self.head_place, self.mask = nn.Embedding(count, width), nn.Embedding(1, width)
        self.encoder, self.decoder = (
            nn.ModuleList(Block(width, heads, dropout) for _ in range(depth)) for _ in range(2)
        )
        self.norm_in, self.norm, self.norm_out = (nn.LayerNorm(width) for _ in range(3))
        self.bridge = nn.Linear(width, width)

    def cache(self) -> None:
        """None: what a token finds changes with every further one that is known."""

    def forward(
        self, tokens: Tokens, order: Order, start: int, stop: int, labels: Labels, cache: None = None
    ) -> Float[Tensor, "b m width"]:
        """z for tokens order[:, start:stop], all from order[:, :start]."""
        b = len(order)
        copies = torch.arange(self.buffer, device=order.device).expand(b, -1)
        places = torch.cat([copies, self.buffer + order], 1)
        now = self.buffer + start
        known = self.embed(tokens.take_along_dim(order[:, :start, None], 1))
        x = torch.cat([self.label(labels)[:, None].expand(-1, self.buffer, -1), known], 1)
        x = self.norm_in(x + self.encoder_place(places[:, :now]))
        for block in self.encoder:
            x = block(x)
        x = self.bridge(self.norm(x))
        x = torch.cat([x, self.mask.weight.expand(b, order.shape[1] - start, -1)], 1) + self.decoder_place(places)
        for block in self.decoder:
            x = block(x)
        return self.norm_out(x[:, now : now + stop - start]) + self.head_place(order[:, start:stop])


class Layer(nn.Module):
    """A residual layer of the head, whose shift, scale and gate a condition sets (AdaLN)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.modulation = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """`x` (n, width) under the condition `y` (n, width)."""
        shift, scale, gate = self.modulation(functional.silu(y)).chunk(3, -1)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


class Head(nn.Module):
    """A multilayer perceptron that denoises tokens, each given its z and the mean of its gamma.

    Arguments:
        shape: of a token, (c, p, p); context: size of z; width and depth.
    """

    def __init__(self, shape: tuple[int, int, int], context: int, width: int, depth: int) -> None:
        super().__init__()
        dim = math.prod(shape)
        self.shape, self.levels = shape, GammaGroups(torch.zeros(shape, dtype=torch.long, device="cpu"))
        self.level = nn.Sequential(nn.Linear(9, width), nn.SiLU(), nn.Linear(width, width))
        self.context, self.stem = nn.Linear(context, width), nn.Linear(2 * dim, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation, self.out = nn.Linear(width, 2 * width), nn.Linear(width, dim)

    def forward(
        self, images: Float[Tensor, "n inputs p p"], gamma: Float[Tensor, "n c p p"], z: Float[Tensor, "n context"]
    ) -> Float[Tensor, "n c p p"]:
        """As a network of `gudlib.networks`, on patches."""
        y = self.level(self.levels(gamma).flatten(1)) + self.context(z)
        x = self.stem(images.flatten(1))
        for layer in self.layers:
            x = layer(x, y)
        shift, scale = self.modulation(functional.silu(y)).chunk(2, -1)
        return self.out(self.norm(x) * (1 + scale) + shift).unflatten(1, self.shape)


class Network(nn.Module):
    """Trunk and head.

    Arguments:
        kind: `raster`, `random` or `masked`.
        image: image shape (c, h, w); size: side p of a patch.
        classes: number of labels, 0 for none.
        width, depth, heads, dropout: of the trunk, which has 2 depth blocks.
        buffer: copies of the class that a masked trunk sees.
        head: (depth, width) of the head.

    Raises:
        ValueError: for an unknown kind, a patch size that does not divide the image, or heads that don't the width.
    """

    def __init__(
        self, kind: str, image: Sequence[int], size: int, classes: int = 0, width: int = 128, depth: int = 2,
        heads: int = 4, buffer: int = 4, head: Sequence[int] = (3, 128), dropout: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}; got {kind!r}")
        _divided(image[1:], size)
        self.config: dict[str, Any] = {
            "kind": kind, "image": list(image), "size": size, "classes": classes, "width": width, "depth": depth,
            "heads": heads, "buffer": buffer, "head": list(head), "dropout": dropout,
        }  # fmt: skip
        token = (image[0], size, size)
        self.kind, self.image, self.size, self.classes = kind, tuple(image), size, classes
        self.count = image[1] * image[2] // size**2
        options = self.count, math.prod(token), classes, width, depth, heads, dropout
        self.trunk = Masked(*options, buffer) if kind == "masked" else Causal(*options)
        self.head = Head(token, width, head[1], head[0])
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)
            elif isinstance(part, nn.Embedding):
                nn.init.normal_(part.weight, std=0.02)
        for part in (*(layer.modulation for layer in self.head.layers), self.head.modulation, self.head.out):
            nn.init.zeros_(part.weight)  # type: ignore[arg-type]

    def forward(
        self, images: Tensor, gamma: Tensor, tokens: Tokens, order: Order, start: int, labels: Labels, repeats: int
    ) -> Tensor:
        """The head's answers for all tokens from `start` on, each noised `repeats` times: (b m repeats, c, p, p)."""
        z = self.trunk(tokens, order, start, order.shape[1], labels)
        return self.head(images, gamma, z.flatten(0, 1).repeat_interleave(repeats, 0))


class Given(nn.Module):
    """A network of images and gamma, with whatever else it wants held fixed: for `Denoiser`."""

    def __init__(self, network: nn.Module, *context: Any) -> None:
        super().__init__()
        self.network, self.context = network, context

    def forward(self, images: Batch, gamma: Gamma) -> Batch:
        """Its answer."""
        return self.network(images, gamma, *self.context)


class Autoregressor(nn.Module):
    """A network with the basis and prior of its tokens: images in, models of tokens out.

    Arguments:
        network: trunk and head.
        basis: U of a patch (c, p, p), the tokens' linear code.
        prior: S of its components, and their variance.
    """

    def __init__(self, network: Network, basis: bases.Basis, prior: priors.Prior) -> None:
        super().__init__()
        self.network, self.basis, self.prior = network, basis, prior

    def process(self, schedule: Schedule) -> Process:
        """The diffusion of one token."""
        return Process(self.basis, self.prior, schedule)

    def tokens(self, images: Batch) -> Tokens:
        """White tokens (b, L, D) of images (b, c, h, w)."""
        return _white(self.basis, self.prior, images)

    def images(self, tokens: Tokens) -> Batch:
        """Images of white tokens; the inverse of `tokens`."""
        data = self.basis.inverse(self.prior.unwhiten(tokens.reshape(-1, *self.basis.shape)))
        return unpatchify(data.reshape(tokens.shape), self.network.image, self.network.size)

    def given(
        self,
        tokens: Tokens,
        order: Order,
        start: int,
        stop: int,
        labels: Labels | None = None,
        guidance: float = 1.0,
        cache: Cache | None = None,
    ) -> Model:
        """The model `(white_t, gamma) -> eps_hat` of tokens order[:, start:stop], as (b (stop - start), c, p, p).

        A causal kind gives each all tokens before it, which must be there; the masked kind gives them order[:, :start].

        Arguments:
            tokens: white tokens (b, L, D); what is not known may be anything.
            order: a permutation of 0 .. L - 1 for each image, (b, L).
            start, stop: places in the order.
            labels: (b,); none if not given.
            guidance: w, of eps_none + w (eps_label - eps_none).
            cache: the trunk's, if tokens are asked for one after another.
        """
        none = order.new_full((len(order),), self.network.classes)
        labels, tokens = none if labels is None else labels, tokens.float()
        if guidance == 1:
            return self._denoiser(self.network.trunk(tokens, order, start, stop, labels, cache))
        both = self.network.trunk(
            torch.cat([tokens, tokens]), torch.cat([order, order]), start, stop, torch.cat([labels, none]), cache
        )
        with_label, without = (self._denoiser(z) for z in both.chunk(2))

        def guided(white_t: Batch, gamma: Gamma) -> Batch:
            base = without(white_t, gamma)
            return base + guidance * (with_label(white_t, gamma) - base)

        return guided

    def _denoiser(self, z: Float[Tensor, "b m width"]) -> Denoiser:
        return Denoiser(Given(self.network.head, z.flatten(0, 1)), self.basis, self.prior)


def build(kind: str, images: Batch, size: int, pca: bool = False, **network: Any) -> Autoregressor:
    """An untrained model for images (n, c, h, w), with the mean and one scale of their patches.

    Arguments:
        kind: `raster`, `random` or `masked`.
        images: data, from which the tokens' code is fitted.
        size: side of a patch.
        pca: tokens are principal components of patches, not pixels; by one scale for all, this turns them only.
        network: options of `Network`.

    Raises:
        ValueError: as `Network`.
    """
    inner = Network(kind, images.shape[1:], size, **network)
    shape = (images.shape[1], size, size)
    patches = patchify(images, size).reshape(-1, *shape)
    basis = bases.PCA.fit(patches) if pca else bases.Pixel(shape)
    moments = priors.measure(basis, patches)
    prior = priors.isotropic(moments, float(moments.variance.mean().sqrt()))
    return Autoregressor(inner, basis.float(), prior.float())


def noise(model: Autoregressor, low: float = -10.0, high: float = 7.0) -> Schedule:
    """The published cosine schedule of a token, cut at low and high gamma.

    Its own last step, at gamma = 19.8, makes the first of 100 sampling steps multiply the head's error by 316.
    """
    return schedules.cosine(model.basis.shape, low, high)


def save(model: Autoregressor, path: str | Path, half: bool = False, card: dict[str, Any] | None = None) -> None:
    """Write a model to one safetensors file, as `denoiser.save`, whose arguments these are."""
    denoiser.save(Denoiser(model.network, model.basis, model.prior), path, half, card)


def load(path: str | Path) -> Autoregressor:
    """The model of a file written by `save`, in float32 on the CPU, ready to sample.

    Raises:
        ValueError: if the file is not a complete checkpoint, or one of another network.
    """
    tensors, header = denoiser.read_saved(path)
    if header["network"]["kind"] not in KINDS:
        raise ValueError(f"{path} holds a network of kind {header['network']['kind']!r}; use denoiser.load")
    model = Autoregressor(Network(**header["network"]), *denoiser.components(tensors, header))
    model.load_state_dict(tensors)
    return model.eval()


@dataclass(frozen=True)
class Settings(training.LoopSettings):
    """How to train.

    Attributes:
        repeats: draws of noise for each token and z.
        drop: share of images whose label is withheld, for guidance.
        masking: lowest ratio and spread of `mask_ratio`, one ratio a batch (masked only).
    """

    repeats: int = 4
    drop: float = 0.1
    masking: tuple[float, float] = (0.7, 0.25)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1; got {self.repeats}")
        if not 0 <= self.drop <= 1:
            raise ValueError(f"drop must lie between 0 and 1; got {self.drop}")
        if not (0 <= self.masking[0] < 1 and self.masking[1] > 0):
            raise ValueError(f"masking must be (lowest in [0, 1), spread > 0); got {self.masking}")


class Trainer(training.Loop):
    """Trains an autoregressor; the rest is as for `training.Trainer`.

    Arguments:
        model: to be trained in place.
        images: the training data (n, c, h, w), uint8, dequantised with uniform noise at every use.
        labels: their classes (n,), for a network that has some.
        schedule: of one token.
        settings: how to train.
        checkpoint: file to write to every `save_every` steps and at the end, and to resume from if it is there.

    Raises:
        ValueError: as `training.Trainer`; and if labels and the network's classes do not fit.
    """

    settings: Settings

    def __init__(
        self,
        model: Autoregressor,
        images: UInt8[Tensor, "n c h w"],
        labels: Int64[Tensor, " n"] | None,
        schedule: Schedule,
        settings: Settings,
        checkpoint: str | Path | None = None,
    ) -> None:
        network = model.network
        _labelled(labels, len(images), network.classes)
        if (labels is None) != (network.classes == 0):
            raise ValueError(f"labels must be given for {network.classes} classes, and for none must not")
        plain = Denoiser(network, model.basis, model.prior)
        super().__init__(plain, images, network.image, settings, checkpoint)
        self.model, self.schedule = model.to(self.images.device), schedule
        self.labels = None if labels is None else labels.to(self.images.device)

    def loss(self, index: int) -> tuple[Tensor, Tensor]:
        """Weighted loss, and squared noise errors (b m repeats, c, p, p), on the batch of step `index`."""
        s, network, device = self.settings, self.model.network, self.images.device
        generator = self.stream(index)
        which = torch.randint(len(self.images), (s.batch,), generator=generator, device=device)
        tokens = self.model.tokens(dequantise(self.images[which], generator))
        labels = torch.full_like(which, network.classes)
        if self.labels is not None:
            kept = torch.rand(s.batch, generator=generator, device=device) >= s.drop
            labels = torch.where(kept, self.labels[which], labels)
        order = _orders(network.kind == "raster", s.batch, network.count, generator)
        start = 0
        if network.kind == "masked":
            start = network.count - math.ceil(network.count * mask_ratio(*s.masking, generator))
        target = tokens.take_along_dim(order[:, start:, None], 1).repeat_interleave(s.repeats, 1)
        t = training.times(target[..., 0].numel(), generator)
        t = t[torch.randperm(len(t), generator=generator, device=device)].view(target.shape[:2])
        eps = torch.randn(target.shape, generator=generator, device=device)

        mine = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        t, shape = t[mine].flatten(), self.model.basis.shape
        white, eps = target[mine].reshape(-1, *shape), eps[mine].reshape(-1, *shape)
        gamma = self.schedule.gamma(t).float()
        context = tokens[mine], order[mine], start, labels[mine], s.repeats
        given = Denoiser(Given(self.denoiser.network, *context), self.model.basis, self.model.prior)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(generator.initial_seed())  # of dropout
            error = (eps - given(diffuse(white, gamma, eps), gamma)).square()
        return self.weighted(error, self.schedule, t), error

    def averaged(self) -> Autoregressor:
        """A model with the averaged weights, sharing basis and prior; for sampling."""
        return Autoregressor(self.average.module, self.model.basis, self.model.prior).eval()


@dataclass(frozen=True)
class Generated:
    """What `generate` returns.

    Attributes:
        data: images (n, c, h, w), in units of the data, float32.
        order: in which the tokens of each were drawn, (n, L).
        cuts: numbers of tokens known before each step and at the end.
    """

    data: Tensor
    order: Order
    cuts: list[int]


@torch.no_grad()
def generate(
    model: Autoregressor,
    schedule: Schedule,
    n: int,
    steps: int | None = None,
    head_steps: int = 50,
    method: str = "ancestral",
    temperature: float = 1.0,
    guidance: float = 1.0,
    guidance_schedule: str = "linear",
    labels: Labels | None = None,
    generator: torch.Generator | None = None,
) -> Generated:
    """Draw `n` images, some tokens at a time, each token by a sampler of its own.

    Arguments:
        model: ready to sample (`eval`).
        schedule: of one token.
        n: number of images.
        steps: of the trunk, R; those of a masked model take tokens as `unmasking` says. Default one token a step.
        head_steps, method, temperature: as `steps`, `method`, `temperature` of `samplers.sample`.
        guidance: weight w of the label, 1 is without; `linear` grows it from 1 with the share of tokens known after
            the step, 1 + (w - 1) known / L, `constant` does not.
        guidance_schedule: `linear` or `constant`.
        labels: (n,); default none.
        generator: of all randomness.

    Raises:
        ValueError: for sizes out of range, several tokens a step of a causal model, an unknown schedule of guidance,
            guidance without labels, or labels that do not fit.
    """
    network, device = model.network, model.prior.mean.device
    cuts = unmasking(network.count, network.count if steps is None else steps)
    if network.kind != "masked" and len(cuts) <= network.count:
        raise ValueError(f"a {network.kind} model draws one token a step, steps = {network.count}; got {steps}")
    if guidance_schedule not in GUIDANCES:
        raise ValueError(f"guidance_schedule must be one of {GUIDANCES}; got {guidance_schedule!r}")
    if guidance != 1 and labels is None:
        raise ValueError(f"guidance = {guidance} needs labels")
    _labelled(labels, n, network.classes)
    generator = torch.Generator(device) if generator is None else generator
    order = _orders(network.kind == "raster", n, network.count, generator)
    tokens = torch.zeros(n, network.count, math.prod(model.basis.shape), device=device)
    process, cache = model.process(schedule), network.trunk.cache()
    for start, stop in pairwise(cuts):
        w = 1 + (guidance - 1) * (stop / network.count if guidance_schedule == "linear" else 1)
        given = model.given(tokens, order, start, stop, labels, w, cache)
        drawn = samplers.sample(
            given, process, n * (stop - start), head_steps, method, generator, temperature=temperature
        )
        places = order[:, start:stop, None].expand(-1, -1, tokens.shape[-1])
        tokens = tokens.scatter(1, places, drawn.white.float().reshape(places.shape))
    return Generated(model.images(tokens), order, cuts)


@dataclass(frozen=True)
class Chain(likelihood.Likelihood):
    """A bound by the chain rule; `path` has its groups by place in the order.

    Attributes:
        tokens: all that each place pays, in nats: prior, path, decoder and volume, (k, n, L).
    """

    tokens: Float[Tensor, "k n l"]

    @property
    def curve(self) -> Float[Tensor, " l"]:
        """Bits per dimension of each place in the order; their mean is `bits`."""
        nats = self.tokens.mean((0, 1))
        return torch.as_tensor(likelihood.bits_per_dim(nats, self.dims // len(nats), self.width))


@torch.no_grad()
def chain(
    conditional: Conditional,
    process: Process,
    data: Batch,
    cuts: Sequence[int],
    raster: bool = False,
    draws: int = 1,
    seed: int = 0,
    decoder: str = "normal",
    steps: int | None = None,
    labels: Labels | None = None,
    chunk: int = 256,
) -> Chain:
    """The variational bound of images by the chain rule: `likelihood.bound` of each token given others.

    Averaged over random orders it is a bound still. Where several tokens fall between two cuts and the model gives
    each only what is before the first cut, it prices that, too: a product of conditionals, which knows less.

    Arguments:
        conditional: `(tokens, order, start, stop, labels) -> model` of tokens order[:, start:stop], as
            `Autoregressor.given`, or anything else.
        process: basis, prior and schedule of one token, whose shape is the patch's.
        data: images (n, c, h, w), as for `likelihood.bound`.
        cuts: 0, ..., L, rising: between two of them tokens are asked for together.
        raster: take tokens in reading order, not in a random one of each image and draw.
        draws: estimates of each image.
        seed: of orders, times and noise.
        decoder, steps: as for `likelihood.bound`.
        labels: (n,).
        chunk: images at a time, which bounds the memory.

    Raises:
        ValueError: if cuts do not rise from 0 to L; and as `likelihood.bound`.
    """
    tokens = _white(process.basis, process.prior, data.double())
    n, count = tokens.shape[:2]
    if [cuts[0], cuts[-1]] != [0, count] or any(a >= b for a, b in pairwise(cuts)):
        raise ValueError(f"cuts must rise from 0 to the number of tokens, {count}; got {list(cuts)}")
    patches, shape = patchify(data, process.schedule.shape[-1]), process.schedule.shape
    generator, rows = torch.Generator(data.device).manual_seed(seed), []
    for some in [slice(i, i + chunk) for i in range(0, n, chunk)] * draws:
        known, each = tokens[some], []
        order = _orders(raster, len(known), count, generator)
        for start, stop in pairwise(cuts):
            model = conditional(known, order, start, stop, None if labels is None else labels[some])
            asked = patches[some].take_along_dim(order[:, start:stop, None], 1).reshape(-1, *shape)
            own = int(torch.randint(2**31, (), generator=generator, device=generator.device))
            found = likelihood.bound(
                model, process, asked, draws=1, seed=own, steps=steps, decoder=decoder, chunk=len(asked)
            )
            nats = torch.stack([found.prior[0], found.path[0, :, 0], found.decoder[0]])
            each.append(nats.view(3, len(known), -1))
        rows.append(torch.cat(each, 2))
    prior, path, last = torch.cat(rows, 1).view(3, draws, n, count)
    return Chain(
        prior=prior.sum(-1),
        path=path,
        decoder=last.sum(-1),
        volume=count * found.volume,
        dims=data[0].numel(),
        width=found.width,
        nfe=count * found.nfe,
        tokens=prior + path + last + found.volume,
    )


def _white(basis: bases.Basis, prior: priors.Prior, images: Batch) -> Tokens:
    patches = patchify(images, basis.shape[-1])
    return prior.whiten(basis(patches.reshape(-1, *basis.shape))).reshape(patches.shape)


def _orders(raster: bool, n: int, count: int, generator: torch.Generator) -> Order:
    if raster:
        return torch.arange(count, device=generator.device).expand(n, -1)
    return torch.rand(n, count, generator=generator, device=generator.device).argsort(1)


def _divided(sides: Sequence[int], size: int) -> None:
    if size < 1 or any(side % size for side in sides):
        raise ValueError(f"size of a patch must divide height {sides[0]} and width {sides[1]}; got {size}")


def _labelled(labels: Labels | None, n: int, classes: int) -> None:
    if labels is None:
        return
    fits = tuple(labels.shape) == (n,) and labels.dtype == torch.long
    if not (fits and 0 <= int(labels.min()) and int(labels.max()) < classes):
        raise ValueError(
            f"labels must be {n} integers, 0 to {classes - 1}; got {labels.dtype} of shape {tuple(labels.shape)}, "
            f"{labels.min()} to {labels.max()}"
        )
