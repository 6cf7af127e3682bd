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

Beside the published model, ours takes the mean off its tokens and answers through `Denoiser`'s Gaussian skip path; its
head is told the mean of its gamma, not a time step; it has no learnt variance (the bound needs none), and its optimiser
is that of `training`. The loss is along whatever
schedule one gives; `noise` is the cosine as published, cut where its ends would multiply errors (see there).

References:
    Autoregressive Image Generation without Vector Quantization, T. Li, Y. Tian, H. Li, M. Deng, K. He, 2024,
    https://arxiv.org/abs/2406.11838
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
from gudlib.process import Batch, Gamma, Model, Process, diffuse
from gudlib.schedules import Schedule
from gudlib.transformers import KINDS, Cache, Labels, Network, Order, Tokens, patches

GUIDANCES = ("linear", "constant")

Conditional = Callable[[Tokens, Order, int, int, Labels | None], Model]


def patchify(images: Batch, size: int) -> Tokens:
    """Square patches of images (b, c, h, w) in reading order, each flattened from (c, size, size).

    Raises:
        ValueError: if the patch size does not divide height and width.
    """
    patches(images.shape[-2], images.shape[-1], size)
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
    cut = patchify(images, size).reshape(-1, *shape)
    basis = bases.PCA.fit(cut) if pca else bases.Pixel(shape)
    moments = priors.measure(basis, cut)
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
        if (labels is None) != (network.classes == 0):
            raise ValueError(f"labels must be given if the network has classes, only then; it has {network.classes}")
        _labelled(labels, len(images), network.classes)
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
        network: Network = self.average.module  # type: ignore[assignment]
        return Autoregressor(network, self.model.basis, self.model.prior).eval()


@torch.no_grad()
def generate(
    model: Autoregressor,
    schedule: Schedule,
    n: int,
    generator: torch.Generator,
    steps: int | None = None,
    head_steps: int = 50,
    method: str = "ancestral",
    temperature: float = 1.0,
    guidance: float = 1.0,
    guidance_schedule: str = "linear",
    labels: Labels | None = None,
) -> tuple[Batch, Order]:
    """Draw `n` images, some tokens at a time, each token by a sampler of its own; and the order of tokens in each.

    Arguments:
        model: ready to sample (`eval`).
        schedule: of one token.
        n: number of images.
        generator: of all randomness.
        steps: of the trunk, R; those of a masked model take tokens as `unmasking` says. Default one token a step.
        head_steps, method, temperature: as `steps`, `method`, `temperature` of `samplers.sample`.
        guidance: weight w of the label, 1 is without; `linear` grows it from 1 with the share of tokens known after
            the step, 1 + (w - 1) known / L, `constant` does not.
        guidance_schedule: `linear` or `constant`.
        labels: (n,); default none.

    Raises:
        ValueError: for sizes out of range, several tokens a step of a causal model, an unknown schedule of guidance,
            guidance without labels, or labels that do not fit.
    """
    network = model.network
    cuts = unmasking(network.count, network.count if steps is None else steps)
    if network.kind != "masked" and len(cuts) <= network.count:
        raise ValueError(f"a {network.kind} model draws one token a step, steps = {network.count}; got {steps}")
    if guidance_schedule not in GUIDANCES:
        raise ValueError(f"guidance_schedule must be one of {GUIDANCES}; got {guidance_schedule!r}")
    if guidance != 1 and labels is None:
        raise ValueError(f"guidance = {guidance} needs labels")
    _labelled(labels, n, network.classes)
    order = _orders(network.kind == "raster", n, network.count, generator)
    tokens = torch.zeros(n, network.count, math.prod(model.basis.shape), device=generator.device)
    process, cache = model.process(schedule), network.trunk.cache()
    for start, stop in pairwise(cuts):
        w = 1 + (guidance - 1) * (stop / network.count if guidance_schedule == "linear" else 1)
        given = model.given(tokens, order, start, stop, labels, w, cache)
        drawn = samplers.sample(
            given, process, n * (stop - start), head_steps, method, generator, temperature=temperature
        )
        places = order[:, start:stop, None].expand(-1, -1, tokens.shape[-1])
        tokens = tokens.scatter(1, places, drawn.white.float().reshape(places.shape))
    return model.images(tokens), order


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
    shape = process.schedule.shape
    raw = patchify(data, shape[-1])
    generator, rows = torch.Generator(data.device).manual_seed(seed), []
    for some in [slice(i, i + chunk) for i in range(0, n, chunk)] * draws:
        known, each = tokens[some], []
        order = _orders(raster, len(known), count, generator)
        for start, stop in pairwise(cuts):
            model = conditional(known, order, start, stop, None if labels is None else labels[some])
            asked = raw[some].take_along_dim(order[:, start:stop, None], 1).reshape(-1, *shape)
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
    raw = patchify(images, basis.shape[-1])
    return prior.whiten(basis(raw.reshape(-1, *basis.shape))).reshape(raw.shape)


def _orders(raster: bool, n: int, count: int, generator: torch.Generator) -> Order:
    if raster:
        return torch.arange(count, device=generator.device).expand(n, -1)
    return torch.rand(n, count, generator=generator, device=generator.device).argsort(1)


def _labelled(labels: Labels | None, n: int, classes: int) -> None:
    if labels is None:
        return
    fits = tuple(labels.shape) == (n,) and labels.dtype == torch.long
    if not (fits and 0 <= int(labels.min()) and int(labels.max()) < classes):
        raise ValueError(
            f"labels must be {n} integers, 0 to {classes - 1}; got {labels.dtype} of shape {tuple(labels.shape)}, "
            f"{labels.min()} to {labels.max()}"
        )
