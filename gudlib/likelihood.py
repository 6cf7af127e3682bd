r"""Likelihood: negative log-likelihood (NLL) of data under a model, in nats for each image and in bits per dimension.

For every schedule gamma(t) from 0 to 1, with chi_0 the white components of an image and chi_t what becomes of them,

    -log p(data) <= KL(q(chi_1) || N(0, 1))                                  prior term: what is left at t = 1
                    + 1/2 int sum_i (d gamma_i/dt) E(eps_i - eps_hat_i)^2 dt diffusion term
                    - E log p(chi_0 | chi at t = 0)                          reconstruction term, of a decoder
                    + sum_i log S_i                                          log volume: from white to data units

`bound` estimates this negative ELBO with random t and eps; `flow` replaces prior and diffusion terms by the density
that the probability-flow ODE transports. With the exact denoiser the bound depends on the ends of the schedule only;
what it exceeds -log p by is KL(q(chi_1) || N(0, 1)) of the data, if the decoder is the true posterior.

References:
    Variational Diffusion Models, D. P. Kingma et al., 2021, https://arxiv.org/abs/2107.00630, section 4 and appendix
    Score-Based Generative Modeling through Stochastic Differential Equations, Y. Song et al., 2021,
    https://arxiv.org/abs/2011.13456, section 4.3 and appendix D
"""

import hashlib
import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import softplus
from torchdiffeq import odeint

from gudlib import checks
from gudlib.data import scale, to_uint8
from gudlib.doors import door, inner
from gudlib.exact import gaussian_eps
from gudlib.families import Draw
from gudlib.importance import Proposal
from gudlib.process import Batch, Gamma, Model, Process, diffuse
from gudlib.schedules import Schedule, sigma

GREY_LEVEL = 1 / 128  # what dequantisation spreads a grey level over, in units of the data, [-1, 1)
EXACT_TRACE = 64  # components up to which the divergence is exact


@inner  # of a model that has diverged they are not finite, and that is what is told
def bits_per_dim(nats: Tensor | float, dims: int, width: float = GREY_LEVEL) -> Tensor | float:
    """Bits per dimension of `nats` per image: nats / (dims log 2) - log2(width).

    Arguments:
        nats: -log of a density over `dims` numbers in data units.
        dims: numbers in an image, c h w.
        width: of the bins into which the data are sorted, in data units. A density of uniformly dequantised 8-bit data
            in [-1, 1) has 1/128, which adds 7; a probability of discrete data has 1, which adds nothing.

    Raises:
        ValueError: for dims below 1, or a width that is not above 0.
    """
    checks.whole("dims", dims)
    return nats / (dims * math.log(2)) - math.log2(checks.real("width", width, above=0))


@dataclass(frozen=True)
class Likelihood:
    """-log p of n images, or an upper bound of it, in nats: k independent estimates of each part.

    Attributes:
        prior: (k, n), prior term, what is left at t = 1.
        diffusion: (k, n, g), diffusion term, by group of components.
        reconstruction: (k, n), reconstruction term, from the lowest noise level to the data.
        log_volume: sum log S, a number; 0 for discrete data.
        dims: components of an image.
        width: as in `bits_per_dim`.
        nfe: network evaluations for each image.
    """

    prior: Float[Tensor, "k n"]
    diffusion: Float[Tensor, "k n g"]
    reconstruction: Float[Tensor, "k n"]
    log_volume: float
    dims: int
    width: float
    nfe: float

    @property
    def nats(self) -> Float[Tensor, "k n"]:
        """-log p of every image by every estimate."""
        return self.prior + self.diffusion.sum(-1) + self.reconstruction + self.log_volume

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

    @door
    def __init__(self, process: Process) -> None:
        self.c, self.shape = _variance(process), process.shape
        self.gamma = process.schedule.gamma(0.0).to(self.c)
        self.ratio = self.gamma.exp() / self.c
        self.constant = math.log(2 * math.pi) + self.gamma - self.ratio.log1p()  # log 2 pi v
        self.log_volume = float(process.prior.log_volume)

    @inner
    def __call__(self, model: Model, white: Batch, eps: Batch) -> Float[Tensor, " b"]:
        """NLL of white data (b, c, h, w) if `eps` is the noise at t = 0."""
        gamma = self.gamma.to(white)[None]
        square = (eps - model(diffuse(white, gamma, eps), gamma)).square()
        return 0.5 * (self.constant.to(white) + square * (1 + self.ratio.to(white))).flatten(1).sum(1)

    @inner
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

    width, log_volume = 1.0, 0.0

    @door
    def __init__(self, process: Process) -> None:
        self.process, self.shape, scales = process, process.shape, process.prior.scale.double()
        self.gamma = process.schedule.gamma(0.0).to(scales)
        pixel = self.gamma + 2 * scales.log()
        low, high = float(pixel.min()), float(pixel.max())
        if high - low > 1e-6:
            raise ValueError(
                "decoder `discrete` needs white noise in the pixels at t = 0, that is gamma_i(0) + 2 log S_i equal for "
                f"all components; here it runs from {low:.3g} to {high:.3g}: dequantise and use `normal`"
            )
        self.floor = low

    @inner
    def __call__(self, model: Model, white: Batch, eps: Batch) -> Float[Tensor, " b"]:
        """NLL of white data (b, c, h, w) if `eps` is the noise at t = 0; it does not depend on the model."""
        noised = self.process.data(white + (0.5 * self.gamma).exp().to(white) * eps)
        level = to_uint8(self.process.data(white)).long()
        values = scale(torch.arange(256, dtype=torch.uint8, device=white.device)).to(white)
        nats = []
        for z, v in zip(noised, level, strict=True):  # one image at a time: 256 numbers for each pixel
            logits = -0.5 * (z[..., None] - values).square() * math.exp(-self.floor)
            nats.append(-logits.log_softmax(-1).gather(-1, v[..., None]).sum())
        return torch.stack(nats)


DECODERS = {"normal": Normal, "discrete": Discrete}


@door
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
    schedules: Draw | None = None,
) -> Likelihood:
    """The variational bound of each image, from `draws` random (t, eps) each.

    The diffusion term of the best denoiser of independent normals of the data's variances is known in closed form; only
    the difference to it is estimated, with the same noise for both (a control variate). Within a draw the images' times
    are a shifted regular grid in t, or, with `importance`, drawn from a proposal density (`gudlib.importance`). All of
    this is unbiased, for any model.

    Arguments:
        model: `(white_t, gamma) -> eps_hat`.
        process: the schedule, and the units.
        data: images (n, c, h, w); for the `normal` decoder dequantised, for `discrete` not (`data.scale`).
        draws: estimates of each image.
        seed: of times and noise; draw j uses (seed, j) alone.
        steps: bound of a sampler of that many ancestral steps; None is the limit of infinitely many.
        decoder: `normal` or `discrete`, see `Normal` and `Discrete`.
        importance: choose times where the integrand is large; for schedules that waste time.
        groups: number of each component's group, for the split of `diffusion` (`bases.groups_by`); default one group.
        chunk: images at a time, which bounds the memory.
        schedules: `(n, generator) -> Schedule`, as a family: a schedule for each image and draw in the place of the
            process's, with its ends. The bound is then the average over them, patches in random orders for instance.

    Raises:
        ValueError: for a decoder that is unknown or does not apply, sizes below 1, or images that are not data
            (`checks.data`); for schedules that don't end where the process's does, or together with `steps`.
    """
    if schedules and steps is not None:
        raise ValueError(f"steps must be None along schedules for each image; got {steps}")
    white = _checked(process, data, decoder, draws=draws, chunk=chunk, steps=1 if steps is None else steps)
    decode, c, n = DECODERS[decoder](process), _variance(process).to(white), len(white)
    groups = torch.zeros(process.schedule.shape, dtype=torch.long) if groups is None else groups
    member = torch.nn.functional.one_hot(groups.flatten()).to(white)  # (components, groups)
    control = 0.5 * _normal_diffusion(process, c, white, steps).flatten(1) @ member
    proposal = Proposal(process, c) if importance else None

    def normals(chi: Batch, gamma: Gamma) -> Batch:
        return gaussian_eps(chi, gamma, c)

    diffusion, reconstruction = [], []
    for j in range(draws):
        generator = torch.Generator(white.device).manual_seed(_mix(seed, j))
        permutation = torch.randperm(n, generator=generator, device=white.device)
        u = (torch.rand((), generator=generator, dtype=torch.float64, device=white.device) + permutation / n) % 1
        t, density = proposal.times(u) if proposal else (u, torch.ones_like(u))
        parts = []
        for i in range(0, n, chunk):
            x = white[i : i + chunk]
            path = process.along(_ending_alike(schedules(len(x), generator), process)) if schedules else process
            eps = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            gamma, weight = _weighted_levels(path, t[i : i + chunk], steps)
            chi = diffuse(x, gamma, eps)
            difference = (eps - model(chi, gamma)).square() - (eps - normals(chi, gamma)).square()
            eps_0 = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            decoded = decode(model, x, eps_0)
            if isinstance(decode, Normal):
                decoded = decoded - decode(normals, x, eps_0) + decode.expected(x)
            parts.append(((0.5 * weight * difference).flatten(1) @ member, decoded))
        integrand, decoded = (torch.cat(part) for part in zip(*parts, strict=True))
        diffusion.append((control + integrand / density[:, None]).cpu())
        reconstruction.append(decoded.cpu())
        if proposal:
            proposal.learn(integrand.sum(1))
    gamma = process.schedule.gamma(1.0).to(white)
    prior = 0.5 * (torch.sigmoid(-gamma) * white.square() + torch.sigmoid(gamma) - 1 + softplus(-gamma))
    return Likelihood(
        prior=prior.flatten(1).sum(1).cpu().expand(draws, n),
        diffusion=torch.stack(diffusion),
        reconstruction=torch.stack(reconstruction),
        log_volume=decode.log_volume,
        dims=white[0].numel(),
        width=decode.width,
        nfe=1 + isinstance(decode, Normal),
    )


@door
def flow(
    model: Model,
    process: Process,
    data: Batch,
    draws: int = 1,
    seed: int = 0,
    decoder: str = "normal",
    tolerance: float = 1e-5,
    chunk: int = 64,
) -> Likelihood:
    """-log p of the probability-flow ODE (plus the decoder's bound), for each image.

    The image is noised to t = 0, its density there is transported to t = 1 by Dormand and Prince's adaptive method of
    order 5, from kink to kink, and Bayes' rule leads back to the data: an identity if decoder and ODE are exact. The
    divergence is exact up to 64 components, at one backward pass for each; above, Hutchinson's estimate with
    one random sign vector for a whole solve.

    Arguments:
        model: `(white_t, gamma) -> eps_hat`, differentiable.
        process: the schedule, and the units.
        data: as for `bound`.
        draws: estimates of each image, each with noise and signs of its own.
        seed: of noise and signs.
        decoder: as for `bound`.
        tolerance: relative and absolute, of the solver.
        chunk: images in one solve.

    Raises:
        ValueError: as `bound`, and for a tolerance not above 0.
    """
    tolerance = checks.real("tolerance", tolerance, above=0)
    white = _checked(process, data, decoder, draws=draws, chunk=chunk)
    decode, gamma = DECODERS[decoder](process), process.schedule.gamma(0.0).to(white)
    prior, diffusion, reconstruction, nfe = [], [], [], []
    for j, x in enumerate(white.split(chunk) * draws):
        generator = torch.Generator(white.device).manual_seed(_mix(seed, j))
        eps = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        signs = torch.randint(0, 2, x.shape, generator=generator, device=x.device).to(x) * 2 - 1
        end, divergence, evaluations = _transport(model, process, diffuse(x, gamma, eps), signs, tolerance)
        noising = 0.5 * (math.log(2 * math.pi) + 2 * sigma(gamma).log() + eps.square()).flatten(1).sum(1)
        prior.append(0.5 * (end.square() + math.log(2 * math.pi)).flatten(1).sum(1))
        diffusion.append(-divergence - noising)
        with torch.no_grad():
            reconstruction.append(decode(model, x, eps))
        nfe += [evaluations + isinstance(decode, Normal)] * len(x)
    whole = (torch.cat(part).cpu().reshape(draws, -1) for part in (prior, diffusion, reconstruction))
    prior, diffusion, reconstruction = whole
    return Likelihood(
        prior=prior,
        diffusion=diffusion[..., None],
        reconstruction=reconstruction,
        log_volume=decode.log_volume,
        dims=white[0].numel(),
        width=decode.width,
        nfe=sum(nfe) / len(nfe),
    )


def _transport(
    model: Model, process: Process, start: Batch, signs: Batch, tolerance: float
) -> tuple[Batch, Float[Tensor, " b"], int]:
    """chi at t = 1, the integral of the velocity's divergence, and the number of network evaluations."""
    d, nfe = start[0].numel(), 0
    if d <= EXACT_TRACE:
        probes = torch.eye(d, dtype=start.dtype, device=start.device).reshape(d, 1, *start.shape[1:])
    else:
        probes = signs[None]

    def velocity(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal nfe
        nfe += 1
        inside = t.clamp(first + 1e-9 * (last - first), last - 1e-9 * (last - first))
        with torch.enable_grad():
            x = state[0].detach().requires_grad_()
            v = process.velocity(x, inside, model(x, process.schedule.gamma(inside)[None]))
            traced = [torch.autograd.grad(v, x, p.expand_as(v), retain_graph=True)[0] * p for p in probes]
        return v.detach(), torch.stack(traced).sum(0).flatten(1).sum(1)

    end, divergence = start, start.new_zeros(len(start))
    for first, last in pairwise([0.0, *process.schedule.kinks.tolist(), 1.0]):
        span = torch.tensor([first, last], dtype=torch.float64, device=start.device)
        solved = odeint(velocity, (end, divergence), span, rtol=tolerance, atol=tolerance, method="dopri5")
        end, divergence = (part[-1] for part in solved)
    return end, divergence, nfe


def _variance(process: Process) -> Float[Tensor, "c h w"]:
    return process.prior.log_variance.double().exp()


def _checked(process: Process, data: Batch, decoder: str, **sizes: int) -> Batch:
    checks.one_of("decoder", decoder, sorted(DECODERS))
    for name, size in sizes.items():
        checks.whole(name, size)
    checks.data("data", data, process.schedule.shape)
    if tuple(process.schedule.batch):
        raise ValueError(f"the schedule must be one for all images; it has a batch of {tuple(process.schedule.batch)}")
    return process.white(data.double())


def _ending_alike(schedule: Schedule, process: Process) -> Schedule:
    """A schedule that ends where the process's does: all but the diffusion term depends on the ends alone."""
    for t in (0.0, 1.0):
        apart = float((schedule.gamma(t) - process.schedule.gamma(t)).abs().max())
        if apart > 1e-6:
            raise ValueError(f"schedules must have the ends of the process's; at t = {t:g} gamma is {apart:.3g} apart")
    return schedule


def _mix(seed: int, j: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {j}".encode()).digest()[:7], "big")


def _weighted_levels(process: Process, t: Tensor, steps: int | None) -> tuple[Gamma, Gamma]:
    """gamma at times t and the weight of the squared error there: d gamma/dt, or that of one in `steps` steps."""
    if steps is None:
        return process.schedule.gamma(t), process.schedule.dgamma_dt(t)
    index = (t * steps).floor()
    gamma_t, gamma_s = process.schedule.gamma((index + 1) / steps), process.schedule.gamma(index / steps)
    return gamma_t, steps * torch.expm1(gamma_t - gamma_s)


def _normal_diffusion(process: Process, c: Tensor, white: Batch, steps: int | None) -> Tensor:
    """int (d gamma/dt) E(eps - eps_G)^2 dt of independent normals of variance c, or its sum over steps, (b, c, h, w).

    With s = e^gamma, E(eps - eps_G)^2 = (c^2 + s chi_0^2) / (c + s)^2.
    """
    if steps is None:
        s = process.schedule.gamma(torch.tensor([0.0, 1.0], dtype=torch.float64)).to(white).exp()
        shape, size = (s / (c + s)).log() + c / (c + s), -1 / (c + s)
        return (shape[1] - shape[0]) + (size[1] - size[0]) * white.square()
    gamma = process.schedule.gamma(torch.linspace(0, 1, steps + 1, dtype=torch.float64)).to(white)
    s, weight = gamma[1:].exp(), torch.expm1(gamma.diff(dim=0))
    return (weight * c**2 / (c + s) ** 2).sum(0) + (weight * s / (c + s) ** 2).sum(0) * white.square()
