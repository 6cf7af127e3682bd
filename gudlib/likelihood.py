r"""Likelihood: the price of data under a model, in nats for each image and in bits per dimension.

For every path gamma(t) from 0 to 1, with chi_0 the white components of an image and chi_t what becomes of them,

    -log p(data) <= KL(q(chi_1) || N(0, 1))                                     prior: what is left at t = 1
                    + 1/2 int sum_i gamma_i' E(eps_i - eps_hat_i)^2 dt          path: what the model pays on the way
                    - E log p(chi_0 | chi at t = 0)                             decoder: the last bit of noise
                    + sum_i log S_i                                             volume: from white to data units

`bound` estimates it with random t and eps; `flow` replaces prior and path by the density that the probability-flow ODE
transports. With the exact denoiser the bound does not depend on the path; what it exceeds -log p by is KL(q(chi_1) ||
N(0, 1)) of the data, if the decoder is the true posterior.

References:
    Variational Diffusion Models, D. P. Kingma et al., 2021, https://arxiv.org/abs/2107.00630, section 4 and appendix
    Score-Based Generative Modeling through Stochastic Differential Equations, Y. Song et al., 2021,
    https://arxiv.org/abs/2011.13456, section 4.3 and appendix D
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torchdiffeq import odeint
from tqdm.auto import tqdm

from gudlib.data import scale, to_uint8
from gudlib.denoiser import read_tensors, write_tensors
from gudlib.exact import gaussian_eps
from gudlib.process import Batch, Gamma, Model, Process, diffuse
from gudlib.schedules import sigma

GREY_LEVEL = 1 / 128  # what dequantisation spreads a grey level over, in units of the data, [-1, 1)
BINS = 32  # in which importance sampling learns
EXACT_TRACE = 64  # components up to which the divergence is exact


def bits_per_dim(nats: Tensor | float, dims: int, width: float = GREY_LEVEL) -> Tensor | float:
    """Bits per dimension of `nats` per image: nats / (dims log 2) - log2(width).

    Arguments:
        nats: -log of a density over `dims` numbers in data units.
        dims: numbers in an image, c h w.
        width: of the bins into which the data are sorted, in data units. A density of uniformly dequantised 8-bit data
            in [-1, 1) has 1/128, which adds 7; a probability of discrete data has 1, which adds nothing.
    """
    return nats / (dims * math.log(2)) - math.log2(width)


@dataclass(frozen=True)
class Likelihood:
    """-log p of n images, or an upper bound of it, in nats: k independent estimates of each part.

    Attributes:
        prior: (k, n), what is left at t = 1.
        path: (k, n, g), by group of components.
        decoder: (k, n), from the lowest noise level to the data.
        volume: sum log S, a number; 0 for discrete data.
        dims: components of an image.
        width: as in `bits_per_dim`.
        nfe: model calls spent on each image.
    """

    prior: Float[Tensor, "k n"]
    path: Float[Tensor, "k n g"]
    decoder: Float[Tensor, "k n"]
    volume: float
    dims: int
    width: float
    nfe: float

    @property
    def nats(self) -> Float[Tensor, "k n"]:
        """-log p of every image by every estimate."""
        return self.prior + self.path.sum(-1) + self.decoder + self.volume

    @property
    def bits(self) -> float:
        """Mean over images and estimates, in bits per dimension."""
        return float(bits_per_dim(self.nats.mean(), self.dims, self.width))

    @property
    def probe_error(self) -> float:
        """Standard error of `bits` for these very images, from the spread of the k estimates; nan if k = 1."""
        return self._standard_error(self.nats.mean(1))

    @property
    def image_error(self) -> float:
        """Standard error of `bits` as a statement about all images like these, from their spread; nan if n = 1."""
        return self._standard_error(self.nats.mean(0))

    def _standard_error(self, values: Float[Tensor, " m"]) -> float:
        if len(values) < 2:
            return math.nan
        return float(values.std() / math.sqrt(len(values)) / (self.dims * math.log(2)))


class Normal:
    """-log p(chi_0 | chi at t = 0) of independent normals around the model's denoised image: a density, in nats.

    Their variance v_i = c_i e^gamma / (c_i + e^gamma) is right if component i is normal, of the data's variance c_i.
    """

    width = GREY_LEVEL

    def __init__(self, process: Process) -> None:
        self.c = _variance(process)
        self.gamma = process.schedule.gamma(torch.zeros((), dtype=torch.float64)).to(self.c)
        self.ratio = self.gamma.exp() / self.c
        self.constant = math.log(2 * math.pi) + self.gamma - self.ratio.log1p()  # log 2 pi v
        self.volume = float(process.prior.log_volume)

    def __call__(self, model: Model, white: Batch, eps: Batch) -> Float[Tensor, " b"]:
        """The price of white data (b, c, h, w) if `eps` is the noise at t = 0."""
        gamma = self.gamma.to(white)[None]
        square = (eps - model(diffuse(white, gamma, eps), gamma)).square()
        return 0.5 * (self.constant.to(white) + square * (1 + self.ratio.to(white))).flatten(1).sum(1)

    def expected(self, white: Batch) -> Float[Tensor, " b"]:
        """The average of that over eps, if the model is the best denoiser of independent normals of variance c."""
        ratio = self.ratio.to(white)
        square = (1 + ratio * white.square() / self.c.to(white)) / (1 + ratio)
        return 0.5 * (self.constant.to(white) + square).flatten(1).sum(1)


class Discrete:
    """-log P(8-bit image | chi at t = 0): for each pixel the softmax over 256 values of -(z - value)^2 / 2 e^floor.

    z is the noised image. This presumes that the noise at t = 0 is white in the *pixels*, of variance e^floor:
    gamma_i(0) + 2 log S_i = floor for all components.

    Raises:
        ValueError: if it is not.
    """

    width, volume = 1.0, 0.0

    def __init__(self, process: Process) -> None:
        self.process, scales = process, process.prior.scale.double()
        self.gamma = process.schedule.gamma(torch.zeros((), dtype=torch.float64)).to(scales)
        pixel = self.gamma + 2 * scales.log()
        low, high = float(pixel.min()), float(pixel.max())
        if high - low > 1e-6:
            raise ValueError(
                "decoder `discrete` needs white noise in the pixels at t = 0, that is gamma_i(0) + 2 log S_i equal for "
                f"all components; here it runs from {low:.3g} to {high:.3g}: dequantise and use `normal`"
            )
        self.floor = low

    def __call__(self, model: Model, white: Batch, eps: Batch) -> Float[Tensor, " b"]:
        """The price of white data (b, c, h, w) if `eps` is the noise at t = 0; the model has no say."""
        noised = self.process.data(white + (0.5 * self.gamma).exp().to(white) * eps)
        level = to_uint8(self.process.data(white)).long()
        values = scale(torch.arange(256, dtype=torch.uint8, device=white.device)).to(white)
        nats = []
        for z, v in zip(noised, level, strict=True):  # one image at a time: 256 numbers for each pixel
            logits = -0.5 * (z[..., None] - values).square() * math.exp(-self.floor)
            nats.append(-logits.log_softmax(-1).gather(-1, v[..., None]).sum())
        return torch.stack(nats)


DECODERS = {"normal": Normal, "discrete": Discrete}


@torch.no_grad()
def bound(
    model: Model,
    process: Process,
    data: Batch,
    draws: int = 4,
    seed: int = 0,
    steps: int | None = None,
    decoder: str = "normal",
    importance: bool = False,
    groups: Int64[Tensor, "c h w"] | None = None,
    chunk: int = 128,
    store: str | Path | None = None,
    progress: bool = False,
) -> Likelihood:
    """The variational bound of each image, from `draws` random (t, eps) each.

    What the best denoiser of independent normals of the data's variances would pay is known in closed form; only the
    difference to it is estimated, with the same noise for both. Within a draw the images' times are a shifted regular
    grid in t, or, with `importance`, in a clock that runs where those normals pay, stretched where the draws before
    found the integrand large. All of this is unbiased, for any model.

    Arguments:
        model: `(white_t, gamma) -> eps_hat`.
        process: the path, and the units.
        data: images (n, c, h, w); for the `normal` decoder dequantised, for `discrete` not (`data.scale`).
        draws: estimates of each image.
        seed: of times and noise; draw j uses (seed, j) alone.
        steps: bound of a sampler of that many ancestral steps; None is the limit of infinitely many.
        decoder: `normal` or `discrete`, see `Normal` and `Discrete`.
        importance: choose times where the integrand is large; for schedules that waste time.
        groups: number of each component's group, for the split of `path` (`bases.groups_by`); default one group.
        chunk: images at a time, which bounds the memory.
        store: file that keeps finished draws; a run that finds its own goes on from there.
        progress: show a bar.

    Raises:
        ValueError: for a decoder that is unknown or does not apply, sizes below 1, or a store of another run.
    """
    white = _checked(process, data, decoder, draws=draws, chunk=chunk, steps=1 if steps is None else steps)
    decode, c = DECODERS[decoder](process), _variance(process).to(white)
    groups = torch.zeros(process.schedule.shape, dtype=torch.long) if groups is None else groups
    member = torch.nn.functional.one_hot(groups.flatten()).to(white)  # (components, groups)
    n = len(white)
    known = 0.5 * _normal_path(process, c, white, steps).flatten(1) @ member
    spent = _paid(process, c) if importance else None

    def normals(chi: Batch, gamma: Gamma) -> Batch:
        return gaussian_eps(chi, gamma, c)

    def one(j: int, before: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        generator = torch.Generator(white.device).manual_seed(_mix(seed, j))
        order = torch.randperm(n, generator=generator, device=white.device)
        u = (torch.rand((), generator=generator, dtype=torch.float64, device=white.device) + order / n) % 1
        place = t = u
        stretch = slope = torch.ones_like(u)
        if spent:
            place, stretch = _learnt(u, before)
            t, slope = _inverse(place, *spent)
        parts = []
        for i in range(0, n, chunk):
            x, when = white[i : i + chunk], t[i : i + chunk]
            eps = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            gamma, speed = _speed(process, when, steps)
            chi = diffuse(x, gamma, eps)
            more = (eps - model(chi, gamma)).square() - (eps - normals(chi, gamma)).square()
            end = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            last = decode(model, x, end)
            if isinstance(decode, Normal):
                last = last - decode(normals, x, end) + decode.expected(x)
            parts.append(((0.5 * speed * more).flatten(1) @ member, last))
        paid, last = (torch.cat(part) for part in zip(*parts, strict=True))
        paid = paid / slope[:, None]
        return {"path": known + paid / stretch[:, None], "decoder": last, "place": place, "size": paid.sum(1)}

    settings = {"what": "bound", "seed": seed, "steps": steps, "decoder": decoder, "importance": importance}
    key = _key(model, process, white, settings | {"groups": groups.tolist()}) if store else ""
    found = _collect(one, draws, store, key, progress)
    end = process.schedule.gamma(torch.ones((), dtype=torch.float64)).to(white)
    left = 0.5 * (torch.sigmoid(-end) * white.square() + torch.sigmoid(end) - 1 + torch.nn.functional.softplus(-end))
    return Likelihood(
        prior=left.flatten(1).sum(1).cpu().expand(draws, n),
        path=torch.stack([draw["path"] for draw in found]),
        decoder=torch.stack([draw["decoder"] for draw in found]),
        volume=decode.volume,
        dims=white[0].numel(),
        width=decode.width,
        nfe=1 + isinstance(decode, Normal),
    )


def flow(
    model: Model,
    process: Process,
    data: Batch,
    draws: int = 1,
    seed: int = 0,
    decoder: str = "normal",
    tolerance: float = 1e-5,
    chunk: int = 64,
    store: str | Path | None = None,
    progress: bool = False,
) -> Likelihood:
    """-log p of the probability-flow ODE (plus the decoder's bound), for each image.

    The image is noised to t = 0, its density there is transported to t = 1 by Dormand and Prince's adaptive method of
    order 5, from kink to kink, and Bayes' rule leads back to the data: an identity if decoder and ODE are exact. The
    divergence is exact up to 64 components, at one backward pass for each; above, Hutchinson's estimate with
    one random sign vector for a whole solve.

    Arguments:
        model: `(white_t, gamma) -> eps_hat`, differentiable.
        process: the path, and the units.
        data: as for `bound`.
        draws: estimates of each image, each with noise and signs of its own.
        seed: of noise and signs.
        decoder: as for `bound`.
        tolerance: relative and absolute, of the solver.
        chunk: images in one solve; store and progress: as for `bound`.

    Raises:
        ValueError: as `bound`.
    """
    white = _checked(process, data, decoder, draws=draws, chunk=chunk)
    decode = DECODERS[decoder](process)
    low = process.schedule.gamma(torch.zeros((), dtype=torch.float64)).to(white)
    parts = white.split(chunk)

    def one(j: int, _: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        x = parts[j % len(parts)]
        generator = torch.Generator(white.device).manual_seed(_mix(seed, j))
        eps = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        signs = torch.randint(0, 2, x.shape, generator=generator, device=x.device).to(x) * 2 - 1
        end, divergence, calls = _transport(model, process, diffuse(x, low, eps), signs, tolerance)
        noising = 0.5 * (math.log(2 * math.pi) + 2 * sigma(low).log() + eps.square()).flatten(1).sum(1)
        with torch.no_grad():
            return {
                "prior": 0.5 * (end.square() + math.log(2 * math.pi)).flatten(1).sum(1),
                "path": -divergence - noising,
                "decoder": decode(model, x, eps),
                "calls": torch.full((len(x),), float(calls + isinstance(decode, Normal))),
            }

    settings = {"what": "flow", "seed": seed, "decoder": decoder, "tolerance": tolerance, "chunk": chunk}
    key = _key(model, process, white, settings) if store else ""
    found = _collect(one, draws * len(parts), store, key, progress)
    whole = {name: torch.cat([part[name] for part in found]).reshape(draws, -1) for name in found[0]}
    return Likelihood(
        prior=whole["prior"],
        path=whole["path"][..., None],
        decoder=whole["decoder"],
        volume=decode.volume,
        dims=white[0].numel(),
        width=decode.width,
        nfe=float(whole["calls"].mean()),
    )


def _transport(
    model: Model, process: Process, start: Batch, signs: Batch, tolerance: float
) -> tuple[Batch, Float[Tensor, " b"], int]:
    """chi at t = 1, the integral of the velocity's divergence, and the number of model calls."""
    d, calls = start[0].numel(), 0
    if d <= EXACT_TRACE:
        probes = torch.eye(d, dtype=start.dtype, device=start.device).reshape(d, 1, *start.shape[1:])
    else:
        probes = signs[None]

    def rate(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        inside = t.clamp(first + 1e-9 * (last - first), last - 1e-9 * (last - first))
        with torch.enable_grad():
            x = state[0].detach().requires_grad_()
            v = process.velocity(x, inside, model(x, process.schedule.gamma(inside)[None]))
            traced = [torch.autograd.grad(v, x, p.expand_as(v), retain_graph=True)[0] * p for p in probes]
        return v.detach(), torch.stack(traced).sum(0).flatten(1).sum(1)

    end, divergence = start, start.new_zeros(len(start))
    for first, last in pairwise([0.0, *process.schedule.kinks.tolist(), 1.0]):
        span = torch.tensor([first, last], dtype=torch.float64, device=start.device)
        solved = odeint(rate, (end, divergence), span, rtol=tolerance, atol=tolerance, method="dopri5")
        end, divergence = (part[-1] for part in solved)
    return end, divergence, calls


def _variance(process: Process) -> Float[Tensor, "c h w"]:
    return process.prior.log_variance.double().exp()


def _checked(process: Process, data: Batch, decoder: str, **sizes: int) -> Batch:
    if decoder not in DECODERS:
        raise ValueError(f"decoder must be one of {sorted(DECODERS)}; got {decoder!r}")
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1; got {size}")
    if tuple(process.schedule.batch):
        raise ValueError(f"the schedule must be one for all images; it has a batch of {tuple(process.schedule.batch)}")
    return process.white(data.double())


def _mix(seed: int, j: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {j}".encode()).digest()[:7], "big")


def _speed(process: Process, t: Tensor, steps: int | None) -> tuple[Gamma, Gamma]:
    """gamma at the times and the weight of the squared error there: gamma', or that of one in `steps` steps."""
    if steps is None:
        return process.schedule.gamma(t), process.schedule.rate(t)
    index = (t * steps).floor()
    now, then = process.schedule.gamma((index + 1) / steps), process.schedule.gamma(index / steps)
    return now, steps * torch.expm1(now - then)


def _normal_path(process: Process, c: Tensor, white: Batch, steps: int | None) -> Tensor:
    """int gamma' E(eps - eps_G)^2 dt of independent normals of variance c, or its sum over steps, (b, c, h, w).

    With s = e^gamma, E(eps - eps_G)^2 = (c^2 + s chi_0^2) / (c + s)^2.
    """
    if steps is None:
        s = process.schedule.gamma(torch.tensor([0.0, 1.0], dtype=torch.float64)).to(white).exp()
        shape, size = (s / (c + s)).log() + c / (c + s), -1 / (c + s)
        return (shape[1] - shape[0]) + (size[1] - size[0]) * white.square()
    gamma = process.schedule.gamma(torch.linspace(0, 1, steps + 1, dtype=torch.float64)).to(white)
    s, weight = gamma[1:].exp(), torch.expm1(gamma.diff(dim=0))
    return (weight * c**2 / (c + s) ** 2).sum(0) + (weight * s / (c + s) ** 2).sum(0) * white.square()


def _paid(process: Process, c: Tensor) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
    """Times, and the share of int [sum_i gamma_i'^2 c_i / (c_i + e^gamma_i)]^(1/2) dt reached by then.

    Normals of variance c pay gamma_i' c_i / (c_i + e^gamma_i); what another model saves scatters by its root at most,
    for each component that moves. A twentieth is spread evenly, so as to miss nothing.
    """
    t = torch.cat([torch.linspace(0, 1, 1025, dtype=torch.float64), process.schedule.kinks.cpu()]).unique().to(c.device)
    cells = []
    for some in t.unfold(0, 2, 1).split(64):
        low, high = (process.schedule.gamma(end) for end in some.unbind(1))
        paid = (high - low).square() * torch.sigmoid(c.double().log() - (low + high) / 2)
        cells.append(paid.flatten(1).sum(1).sqrt())
    share = torch.cat([t[:1], torch.cat(cells).cumsum(0)])
    return t, torch.lerp(share / share[-1] if share[-1] > 0 else t, t, 0.05)


def _inverse(share: Float[Tensor, " n"], t: Float[Tensor, " m"], paid: Float[Tensor, " m"]) -> tuple[Tensor, Tensor]:
    """Where `paid`, linear between the times t, has reached `share`, and its slope there."""
    k = (torch.searchsorted(paid, share, right=True) - 1).clamp(0, len(t) - 2)
    slope = (paid.diff() / t.diff())[k]
    return t[k] + (share - paid[k]) / slope, slope


def _learnt(u: Float[Tensor, " n"], before: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Places of a density for uniform `u`, and that density: flat, or as the draws before suggest."""
    if not before:
        return u, torch.ones_like(u)
    place = (torch.cat([draw["place"] for draw in before]).to(u) * BINS).long().clamp(max=BINS - 1)
    square = torch.cat([draw["size"] for draw in before]).to(u).square()
    count = torch.bincount(place, minlength=BINS)
    mean = torch.bincount(place, square, minlength=BINS) / count.clamp(min=1)
    size = torch.where(count > 0, mean, square.mean()).sqrt()
    density = 0.9 * size / size.mean() + 0.1  # never so small that one image outweighs all
    edges = torch.cat([density.new_zeros(1), density.cumsum(0) / BINS])
    edges[-1] = 1 + 1e-12
    k = torch.searchsorted(edges, u, right=True) - 1
    return (k + (u - edges[k]) * BINS / density[k]) / BINS, density[k]


def _key(model: Model, process: Process, white: Batch, settings: dict) -> str:
    """What tells one run from another: settings, data, path, and what the model says of a first image."""
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    gamma = process.schedule.gamma(t)
    with torch.no_grad():
        answer = model(white[:1], gamma[2:3].to(white))
    seen = [f"{x:.3g}" for x in (answer.mean(), answer.std(), *gamma.mean((1, 2, 3)), *gamma.amax((1, 2, 3)))]
    said = json.dumps([settings, seen], sort_keys=True).encode()
    return hashlib.sha256(said + white.cpu().numpy().tobytes()).hexdigest()


def _collect(
    one: Callable[[int, list[dict[str, Tensor]]], dict[str, Tensor]],
    count: int,
    store: str | Path | None,
    key: str,
    progress: bool,
) -> list[dict[str, Tensor]]:
    """`one(j, those before)` for j = 0 .. count - 1; what is in `store` already is read, what is not is added to it."""
    done: list[dict[str, Tensor]] = []
    if store is not None and Path(store).exists():
        tensors, header = read_tensors(store)
        if header.get("key") != key:
            raise ValueError(f"store {store} is of another model, data or settings: remove it or name another file")
        for name, value in tensors.items():
            j, _, part = name.partition(".")
            done += [{} for _ in range(int(j) + 1 - len(done))]
            done[int(j)][part] = value
    bar = tqdm(total=count, initial=min(len(done), count), desc="likelihood", disable=not progress)
    for j in range(len(done), count):
        done.append({name: value.cpu() for name, value in one(j, done).items()})
        bar.update()
        if store is not None:
            write_tensors(store, {f"{i}.{k}": v for i, d in enumerate(done) for k, v in d.items()}, {"key": key})
    bar.close()
    return done[:count]
