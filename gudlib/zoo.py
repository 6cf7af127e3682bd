r"""Other people's diffusion models as choices of basis, prior, schedule and weighting.

Take a model that noises every component of a fixed orthonormal basis for itself, with amplitudes of its own,

    u_i(t) = signal_i(t) u_i(0) + noise_i(t) eps_i,      noise_i / signal_i never falling,

and whose states form a Markov chain. With any scale S_i it is one of ours, in other units:

    chi_i(t) = kappa_i u_i(t) / S_i,    kappa_i = (signal_i^2 + noise_i^2 / S_i^2)^(-1/2),
    gamma_i = 2 log(noise_i / signal_i) - 2 log S_i,

for chi has alpha_i^2 + sigma_i^2 = 1, and a known factor takes transitions and posteriors of one chain to those of the
other. (A model that defines single states and a flow, but no chain, leaves the transitions to us.) The *verdict* says
how far a model is covered: `exact`, the same states and, where it defines one, the same chain; `exact after
rescaling`, by this factor; `limit` of our schedules; `approximate`, but for one step; `not an instance`.

Losses are compared as int_0^1 dt sum_i lambda_i e_i with e_i = E(eps_i - eps_hat_i)^2, where the weight lambda may
depend on gamma_i and on its derivative gamma_i'; lambda / gamma_i' is the weight of a unit of gamma, which does not
care how time is labelled. The likelihood bound has lambda = gamma_i' / 2.

Every function below takes a component shape (or labels and variances of that shape, (c, h, w)), with the published
settings as defaults, and raises ValueError for settings that make no such process.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from gudlib import bases, checks, schedules
from gudlib.doors import door, inner
from gudlib.schedules import PerComponent, Schedule, Shape, rising, shape_of

Verdict = Literal["exact", "exact after rescaling", "limit", "approximate", "not an instance"]


class Rescaled(NamedTuple):
    """A noising u = signal u(0) + noise eps in our terms: gamma, and the factor kappa of chi = kappa u / S."""

    gamma: Tensor
    kappa: Tensor


@door
def rescale(
    signal: Float[Tensor, "..."], noise: Float[Tensor, "..."], scale: Float[Tensor, "..."] | float = 1.0
) -> Rescaled:
    """The rescaling above, for amplitudes of signal and noise and prior scales S that broadcast.

    Raises:
        ValueError: if one of them is not above 0.
    """
    for name, values in {"signal": signal, "noise": noise, "scale": torch.as_tensor(scale)}.items():
        checks.positive(name, values)
    noise = noise / scale
    return Rescaled(2 * (noise / signal).log(), (signal**2 + noise**2).rsqrt())


@dataclass(frozen=True)
class Weighting:
    """The weight lambda of (eps - eps_hat)^2 per unit of t: its formula, and a function of gamma and d gamma / dt."""

    formula: str
    function: Callable[[Tensor, Tensor], Tensor]

    @inner
    def __call__(self, gamma: Tensor, dgamma_dt: Tensor) -> Tensor:
        """The weight lambda, of gamma's shape."""
        return self.function(gamma, dgamma_dt)


PLAIN = Weighting("$1$", lambda gamma, dgamma_dt: torch.ones_like(gamma))
BOUND = Weighting(r"$\gamma' / 2$", lambda gamma, dgamma_dt: dgamma_dt / 2)


@dataclass(frozen=True)
class System:
    """A published model in our terms.

    Attributes:
        name: as known.
        basis: a name for `bases.make`, or what stands for one.
        prior: S, in Markdown.
        gamma: gamma_i(t), in Markdown.
        verdict: how far the model is an instance, see the module.
        why: the reason for the verdict, one sentence.
        reference: title, authors, year, URL.
        schedule: gamma_i(t); of the nearest instance if the model itself is none; None if there is nothing to compare.
        scale: S_i, (c, h, w) or one number, units of the data.
        weight: lambda, of its training loss; None where it is not of this form, or we could not verify it.
    """

    name: str
    basis: str
    prior: str
    gamma: str
    verdict: Verdict
    why: str
    reference: str
    schedule: Schedule | None = None
    scale: PerComponent | float = 1.0
    weight: Weighting | None = None


# One noise schedule for all components


@door
def ddpm(shape: Shape, steps: int = 1000, beta_min: float = 1e-4, beta_max: float = 0.02) -> System:
    """DDPM: betas on a line; t = n / (steps - 1) for the published steps n = 0 .. steps - 1."""
    steps = checks.whole("steps", steps, 2)
    rising(zero=0.0, beta_min=beta_min, beta_max=beta_max)
    betas = torch.linspace(beta_min, beta_max, steps, dtype=torch.float64)
    return System(
        "DDPM", "pixel", "$1$", r"$\log[(1 - \bar\alpha_n) / \bar\alpha_n]$", "exact",
        r"Its steps are ours on the published grid of times; between them $\gamma$ is a straight line, our choice.",
        "Denoising Diffusion Probabilistic Models, J. Ho, A. Jain, P. Abbeel, 2020, https://arxiv.org/abs/2006.11239",
        _tabulated(-torch.log1p(-betas), shape), weight=PLAIN,
    )  # fmt: skip


@door
def improved_ddpm(shape: Shape, steps: int = 1000, cap: float = 0.999) -> System:
    """Improved DDPM: the cosine schedule at t = 1 / steps, 2 / steps, ..., with betas of at most `cap`."""
    steps = checks.whole("steps", steps, 2)
    rising(zero=0.0, cap=cap, one=1)
    return System(
        "improved DDPM", "pixel", "$1$", r"$\log[f(0) / f(t) - 1]$", "exact",
        r"As DDPM, on the published grid; the last $\beta_n$, which would be 1, is capped.",
        "Improved Denoising Diffusion Probabilistic Models, A. Nichol, P. Dhariwal, 2021, "
        "https://arxiv.org/abs/2102.09672",
        _tabulated(_cosine_decay(steps, cap), shape), weight=PLAIN,
    )  # fmt: skip


_SCORE_SDE = (
    "Score-Based Generative Modeling through Stochastic Differential Equations, Y. Song et al., 2021, "
    "https://arxiv.org/abs/2011.13456"
)


@door
def score_sde_vp(shape: Shape, beta_min: float = 0.1, beta_max: float = 20.0) -> System:
    """The variance-preserving SDE: du = -beta u dt / 2 + sqrt(beta) dB, beta linear in t."""
    return System(
        "score SDE, VP", "pixel", "$1$", r"$\log(e^B - 1),\ B = \int\beta$", "exact",
        r"The same SDE from its smallest time $10^{-5}$ on; with its likelihood weighting $\lambda = \gamma'$.",
        _SCORE_SDE, schedules.vp(shape, beta_min, beta_max), weight=PLAIN,
    )  # fmt: skip


@door
def score_sde_sub_vp(shape: Shape, beta_min: float = 0.1, beta_max: float = 20.0) -> System:
    """The sub-VP SDE: signal as for VP, noise 1 - exp(-B), the square of VP's."""
    vp = schedules.vp(shape, beta_min, beta_max)

    def gamma(t: Tensor) -> Tensor:
        same = vp.gamma(t[..., 0, 0, 0])
        return 2 * same - softplus(same)  # B = softplus(gamma of VP)

    return System(
        "score SDE, sub-VP", "pixel", "$1$", r"$B + 2\log(1 - e^{-B})$", "exact after rescaling",
        "Its variance is below one on the way; a factor known at each time undoes that.",
        _SCORE_SDE, Schedule(gamma, shape, vp.kinks), weight=PLAIN,
    )  # fmt: skip


@door
def score_sde_ve(shape: Shape, sigma_min: float = 0.01, sigma_max: float = 50.0) -> System:
    """The variance-exploding SDE: signal 1, noise geometric from sigma_min to sigma_max, in units of the data."""
    rising(zero=0.0, sigma_min=sigma_min, sigma_max=sigma_max)
    return System(
        "score SDE, VE", "pixel", "$1$", r"$2\log\sigma$", "exact after rescaling",
        r"Noise grows while the data stay; shrinking both by $\kappa$ makes it ours, with $\gamma$ a straight line.",
        _SCORE_SDE, schedules.linear(shape, 2 * math.log(sigma_min), 2 * math.log(sigma_max)), weight=PLAIN,
    )  # fmt: skip


@door
def vdm(
    shape: Shape, gamma_min: float = -13.3, gamma_max: float = 5.0, f: Callable[[Tensor], Tensor] = lambda t: t
) -> System:
    """Variational diffusion: gamma rises like f(t), learnt and monotone, which starts as a straight line."""
    rising(gamma_min=gamma_min, gamma_max=gamma_max)

    def gamma(t: Tensor) -> Tensor:
        first, last = f(torch.zeros_like(t)), f(torch.ones_like(t))
        return gamma_min + (gamma_max - gamma_min) * (f(t) - first) / (last - first)

    return System(
        "VDM", "pixel", "$1$", r"$\gamma_\eta(t),\ \mathrm{learnt}$", "exact",
        r"It is written in $\gamma$ from the start, and its loss is the likelihood bound.",
        "Variational Diffusion Models, D. P. Kingma, T. Salimans, B. Poole, J. Ho, 2021, "
        "https://arxiv.org/abs/2107.00630",
        Schedule(gamma, shape), weight=BOUND,
    )  # fmt: skip


@door
def edm(
    shape: Shape, sigma_data: float = 0.5, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0,
    p_mean: float = -1.2, p_std: float = 1.2,
) -> System:  # fmt: skip
    """EDM: t runs along its sampler's grid, sigma^(1/rho) linear; in training log sigma ~ N(p_mean, p_std^2)."""
    rising(zero=0.0, sigma_min=sigma_min, sigma_max=sigma_max)
    rising(zero=0.0, sigma_data=sigma_data)
    rho, p_std = checks.real("rho", rho, above=0), checks.real("p_std", p_std, above=0)
    mean, deviation = 2 * (p_mean - math.log(sigma_data)), 2 * p_std

    def gamma(t: Tensor) -> Tensor:
        sigma = (sigma_min ** (1 / rho) * (1 - t) + sigma_max ** (1 / rho) * t) ** rho
        return rescale(torch.ones_like(t), sigma, sigma_data).gamma

    def weight(gamma: Tensor, dgamma_dt: Tensor) -> Tensor:
        density = (-0.5 * ((gamma - mean) / deviation) ** 2).exp() / (deviation * math.sqrt(2 * math.pi))
        return density * (1 + gamma.exp()) * dgamma_dt

    return System(
        "EDM", "pixel", r"$\sigma_\mathrm{data}$", r"$2\log(\sigma / \sigma_\mathrm{data})$", "exact after rescaling",
        r"Its network is given $c_\mathrm{in} u$, which is our $\hat\chi$, and predicts $-v$.",
        "Elucidating the Design Space of Diffusion-Based Generative Models, T. Karras, M. Aittala, T. Aila, S. Laine, "
        "2022, https://arxiv.org/abs/2206.00364",
        Schedule(gamma, shape), sigma_data,
        Weighting(rf"$\mathcal{{N}}(\gamma; {mean:.2f}, {deviation:.1f}^2)\,(1 + e^\gamma)\,\gamma'$", weight),
    )  # fmt: skip


@door
def flow_matching(shape: Shape, sigma_min: float = 0.0, reach: float = 10.0) -> System:
    """Flow matching on straight lines, u = (1 - s) u(0) + (sigma_min + (1 - sigma_min) s) eps; rectified flow at 0.

    gamma = 2 log(noise / signal) has no end at s = 1 and, without sigma_min, none at s = 0. So t runs evenly over the
    times s with -reach <= gamma <= reach. The loss is of the velocity du / ds, whose error is that of eps over 1 - s.

    References:
        Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow, X. Liu, C. Gong, Q. Liu,
        2022, https://arxiv.org/abs/2209.03003
    """
    sigma_min, reach = checks.real("sigma_min", sigma_min, least=0), checks.real("reach", reach, above=0)
    rising(sigma_min=sigma_min, one=1)
    rest = 1 - sigma_min
    line = rf"({sigma_min:g} + {rest:g}\,t)" if sigma_min else "t"
    first, last = (max(0.0, 1 - 1 / (math.exp(end / 2) + rest)) for end in (-reach, reach))

    def gamma(t: Tensor) -> Tensor:
        s = first + (last - first) * t
        return rescale(1 - s, sigma_min + rest * s).gamma

    return System(
        "flow matching", "pixel", "$1$", rf"$2\log[{line} / (1 - t)]$", "exact after rescaling",
        "It defines states and a flow, no chain; its states are ours, and an Euler step of its flow is a DDIM step.",
        "Flow Matching for Generative Modeling, Y. Lipman, R. T. Q. Chen, H. Ben-Hamu, M. Nickel, M. Le, 2022, "
        "https://arxiv.org/abs/2210.02747",
        Schedule(gamma, shape),
        weight=Weighting(rf"$({rest:g} + e^{{\gamma/2}})^2$", lambda gamma, dgamma_dt: (rest + (gamma / 2).exp()) ** 2),
    )  # fmt: skip


# The prior or the schedule differs between components


_FOURIER = "A Fourier Space Perspective on Diffusion Models, F. Falck et al., 2025, https://arxiv.org/abs/2505.11278"


@door
def equal_snr(variance: PerComponent) -> System:
    """EqualSNR: noise with the data's own spectrum, S_i^2 = C_i, the `variance` of the Fourier components."""
    checks.positive("variance", variance)
    return System(
        "EqualSNR", "fourier", r"$\sqrt{C_i}$", "as DDPM", "exact",
        "It is the whitened prior with one schedule for all; we could not verify its weighting.",
        _FOURIER, ddpm(shape_of(variance)).schedule, variance.sqrt(),
    )  # fmt: skip


@door
def flipped_snr(variance: PerComponent) -> System:
    """FlippedSNR: S_i^2 = C_i / C_j, with j the mirror image of i among the ranked variances: weak ones come first."""
    checks.positive("variance", variance)
    place, flat = variance.flatten().argsort(), variance.flatten()
    mirror = torch.empty_like(flat).scatter(0, place, flat[place.flip(0)]).view_as(variance)
    return System(
        "FlippedSNR", "fourier", r"$\sqrt{C_i / C_{\bar\imath}}$", "as DDPM", "exact",
        "A control experiment: an instance like any other, although its authors did not succeed in training it.",
        _FOURIER, ddpm(shape_of(variance)).schedule, (variance / mirror).sqrt(),
    )  # fmt: skip


@door
def blurring(shape: Shape, sigma_blur: float = 20.0, floor: float = 0.001, reach: float = 10.0) -> System:
    """Blurring diffusion: cosines of wavenumber k are damped by h = (1 - floor) exp(-k^2 sigma_B^2 / 2) + floor.

    sigma_B = sigma_blur sin^2(pi t / 2) pixels; without blur gamma would go from -reach to reach.
    """
    rising(zero=0.0, floor=floor, one=1)
    sigma_blur, reach = checks.real("sigma_blur", sigma_blur, least=0), checks.real("reach", reach, above=0)
    k = bases.DCT(shape).label("wavenumber")
    first, last = (math.atan(math.exp(end / 2)) for end in (-reach, reach))

    def gamma(t: Tensor) -> Tensor:
        blur = k.to(t) * sigma_blur * (torch.pi * t / 2).sin() ** 2
        angle = first + (last - first) * t
        return rescale(angle.cos() * ((1 - floor) * (-(blur**2) / 2).exp() + floor), angle.sin()).gamma

    return System(
        "blurring diffusion", "dct", "$1$", r"$\gamma_{\cos} - 2\log h_i$", "exact after rescaling",
        "Blur multiplies each cosine by a factor that never rises; divided out, it means noising fine waves earlier.",
        "Blurring Diffusion Models, E. Hoogeboom, T. Salimans, 2022, https://arxiv.org/abs/2209.05557",
        Schedule(gamma, shape), weight=PLAIN,
    )  # fmt: skip


@door
def mulan(
    quadratic: PerComponent, linear: PerComponent, constant: PerComponent,
    gamma_min: float = -13.3, gamma_max: float = 5.0,
) -> System:  # fmt: skip
    """MuLAN: a pixel's gamma' is proportional to the square of a quadratic in t, with coefficients from a network."""
    rising(gamma_min=gamma_min, gamma_max=gamma_max)

    def rise(t: Tensor) -> Tensor:
        x, y, z = quadratic.to(t), linear.to(t), constant.to(t)
        return t * (z**2 + t * (y * z + t * ((y**2 + 2 * x * z) / 3 + t * (x * y / 2 + t * x**2 / 5))))

    def gamma(t: Tensor) -> Tensor:
        return gamma_min + (gamma_max - gamma_min) * rise(t) / rise(torch.ones_like(t))

    return System(
        "MuLAN", "pixel", "$1$", r"$\gamma_i' \propto (q_{2i} t^2 + q_{1i} t + q_{0i})^2$", "exact",
        r"For each value of its latent $z$, from which a network computes $q$; over all $z$ the model is a mixture.",
        "Diffusion Models With Learned Adaptive Noise, S. S. Sahoo, A. Gokaslan, C. De Sa, V. Kuleshov, 2023, "
        "https://arxiv.org/abs/2312.13236",
        Schedule(gamma, shape_of(quadratic)),
        weight=BOUND,
    )  # fmt: skip


# One after another; `order` is the index of each component's token, higher = generated later


@door
def diffusion_forcing(order: schedules.Order, steps: int = 100, lag: float = 1.0) -> System:
    """Diffusion forcing's pyramid: in row m of sampling, token n is at level clip(steps + lag n - m, 0, steps)."""
    steps, lag = checks.whole("steps", steps), checks.real("lag", lag)
    if not 0 <= lag <= steps:
        raise ValueError(f"lag must lie between 0 (diffusion) and steps = {steps} (one after another); got {lag}")
    return System(
        "diffusion forcing", "token", "$1$", r"$\gamma(\mathrm{level}_i)$", "exact",
        "Its sampler walks along this path (for whole-number lags); its training draws all levels independently, on no "
        "path.",
        "Diffusion Forcing: Next-token Prediction Meets Full-Sequence Diffusion, B. Chen et al., 2024, "
        "https://arxiv.org/abs/2407.01392",
        _staggered(order, steps / (steps + lag * (order.unique().numel() - 1)), schedules.cosine((1, 1, 1))),
    )  # fmt: skip


@door
def rolling(order: schedules.Order, window: int = 4) -> System:
    """Rolling diffusion: frame l is at its own time clip((l + s) / window, 0, 1) while s slides through the film.

    Equations 21 and 23 of the paper, as a public reimplementation gives them: while a window stands still its frame j
    goes from (j + 1) / window to j / window, in the first window from 1 to j / window. Over a film these pieces join:
    s falls from `window` to 1 - frames.
    """
    frames, window = order.unique().numel(), checks.whole("window", window, 0)
    if not 0 < window <= frames:
        raise ValueError(f"window must lie between 1 and the number of frames, {frames}; got {window}")
    return System(
        "rolling diffusion", "frame", "$1$", r"$\gamma(\mathrm{clip}((l_i + s) / w))$", "exact",
        "For a film of finite length: its windows, one after another, join to one path like diffusion forcing's.",
        "Rolling Diffusion Models, D. Ruhe, J. Heek, T. Salimans, E. Hoogeboom, 2024, https://arxiv.org/abs/2402.09470",
        _staggered(order, window / (frames - 1 + window), schedules.cosine((1, 1, 1))),
    )  # fmt: skip


@door
def mar(order: schedules.Order, steps: int = 1000, cap: float = 0.999) -> System:
    """MAR at one token a step: each token runs the improved DDPM schedule to its end before the next one starts."""
    steps = checks.whole("steps", steps, 2)
    rising(zero=0.0, cap=cap, one=1)
    return System(
        "MAR", "token", "$1$", "improved DDPM's, in turn", "limit",
        r"Reached when the context carries no noise at all ($\gamma_{\min} \to -\infty$), and tokens come singly "
        "and in a fixed order; several at a time are drawn independently, which no path does.",
        "Autoregressive Image Generation without Vector Quantization, T. Li, Y. Tian, H. Li, M. Deng, K. He, 2024, "
        "https://arxiv.org/abs/2406.11838",
        _staggered(order, 1 / order.unique().numel(), _tabulated(_cosine_decay(steps, cap), (1, 1, 1))), weight=PLAIN,
    )  # fmt: skip


@door
def wavelet(variance: PerComponent, levels: int = 3, share: float | None = None) -> System:
    """Wavelet score models: Haar bands one after another, coarse first, each normalised and with the VP schedule.

    `variance` is that of the components; `share` of the time belongs to each band, 1 / (levels + 1) unless given.
    """
    checks.positive("variance", variance)
    share = share if share is None else checks.real("share", share, above=0, most=1)
    level = bases.Haar(shape_of(variance), levels).label("level").to(variance.device)
    bands = [level == band for band in level.unique()]
    scale = sum(band * variance[band].mean().sqrt() for band in bands)
    return System(
        "wavelet score model", "haar", "deviation of the band", "VP's, band by band", "limit",
        r"Reached when coarser bands carry no noise at all ($\gamma_{\min} \to -\infty$): its networks see clean ones.",
        "Wavelet Score-Based Generative Modeling, F. Guth, S. Coste, V. De Bortoli, S. Mallat, 2022, "
        "https://arxiv.org/abs/2208.05003",
        _staggered(level, share or 1 / len(bands), schedules.vp((1, 1, 1))), torch.as_tensor(scale),
    )  # fmt: skip


# Not instances; a schedule is that of the nearest one


@door
def cascaded(shape: Shape) -> System:
    """Cascades: a low-resolution model, then super-resolution models. Near them: two Haar bands in turn."""
    return System(
        "cascaded diffusion", "two resolutions", "$1$", "(two Haar bands in turn)", "not an instance",
        "Its two resolutions together have more numbers than the image: the second stage draws the coarse image again.",
        "Cascaded Diffusion Models for High Fidelity Image Generation, J. Ho et al., 2021, "
        "https://arxiv.org/abs/2106.15282",
        _staggered(bases.Haar(shape, 1).label("level"), 0.5, schedules.cosine((1, 1, 1))),
    )  # fmt: skip


def subspace() -> System:
    """Subspace diffusion: fine components are dropped at a time t_k, that is, their gamma jumps to infinity."""
    return System(
        "subspace diffusion", "haar", "$1$", r"$\gamma(t),\ \infty\ \mathrm{after}\ t_k$", "approximate",
        r"On the way back, at $t_k$, the dropped components are filled with noise that is chosen, not learnt.",
        "Subspace Diffusion Generative Models, B. Jing, G. Corso, R. Berlinghieri, T. Jaakkola, 2022, "
        "https://arxiv.org/abs/2205.01490",
    )  # fmt: skip


@door
def heat_dissipation(shape: Shape, blur_min: float = 0.5, blur_max: float = 20.0, noise: float = 0.01) -> System:
    """Inverse heat dissipation: ever more blur, and noise drawn afresh at every level. Near it: its marginals."""
    rising(zero=0.0, blur_min=blur_min, blur_max=blur_max)
    rising(zero=0.0, noise=noise)
    k = bases.DCT(shape).label("wavenumber")

    def gamma(t: Tensor) -> Tensor:
        return 2 * math.log(noise) + (k.to(t) * blur_min * (blur_max / blur_min) ** t) ** 2

    return System(
        "heat dissipation", "dct", "$1$", rf"$(2\log {noise:g} + k_i^2\sigma_B^2)$", "not an instance",
        "Noise is drawn anew at every level, so the levels form no Markov chain like ours; the mean grey never drowns.",
        "Generative Modelling With Inverse Heat Dissipation, S. Rissanen, M. Heinonen, A. Solin, 2022, "
        "https://arxiv.org/abs/2206.13397",
        Schedule(gamma, shape),
    )  # fmt: skip


@door
def everything(shape: Shape, variance: Callable[[bases.Basis], PerComponent]) -> list[System]:
    """All systems with their published settings, for images of `shape`; a quarter of its height must divide both sides.

    `variance` is the data's, positive, in a given basis: `lambda basis: priors.measure(basis, images).floored`.
    """
    column = bases.Pixel(shape).label("column")
    right = column / column.max()  # for MuLAN's coefficients, which a network provides
    waves = variance(bases.Fourier(shape))
    return [
        ddpm(shape), improved_ddpm(shape), score_sde_vp(shape), score_sde_sub_vp(shape), score_sde_ve(shape),
        vdm(shape), edm(shape), flow_matching(shape), equal_snr(waves), flipped_snr(waves), blurring(shape),
        mulan(2 * (1 - right), -right, 0.2 + right), diffusion_forcing(column), rolling(column),
        mar(schedules.patch_order(shape, shape[1] // 4)), wavelet(variance(bases.Haar(shape, 2)), 2),
        cascaded(shape), subspace(), heat_dissipation(shape),
    ]  # fmt: skip


def _tabulated(decay: Tensor, shape: Shape) -> Schedule:
    """gamma_n = log(e^(sum of decays) - 1) at t = n / (steps - 1), straight between; decay = -log(1 - beta)."""
    if len(decay) < 2 or not bool(((decay > 0) & decay.isfinite()).all()):
        raise ValueError(f"steps must be at least 2, with betas between 0 and 1; got {len(decay)} steps")
    table = decay.cumsum(0).expm1().log()

    def gamma(t: Tensor) -> Tensor:
        place, levels = (len(table) - 1) * t, table.to(t)
        left = place.floor().clamp(0, len(table) - 2)
        i = left.long()
        return levels[i] + (place - left) * (levels[i + 1] - levels[i])

    return Schedule(gamma, shape, torch.linspace(0, 1, len(table), dtype=torch.float64))


def _cosine_decay(steps: int, cap: float) -> Tensor:
    inner = torch.linspace(0, 1, steps + 1, dtype=torch.float64)[1:-1]
    total = softplus(schedules.cosine((1, 1, 1), -30.0, 30.0).gamma(inner)).flatten()  # -log alpha^2
    return torch.cat([inner.new_zeros(1), total, inner.new_full((1,), math.inf)]).diff().clamp(max=-math.log1p(-cap))


def _staggered(order: PerComponent, b: float, base: Schedule) -> Schedule:
    """Each component runs through all of `base` within its own share b of the time, as in `schedules.sequential`."""
    local = schedules.sequential(order, b, 0.0, 1.0)
    starts = (1 - b) * (order.max() - order).double().unique() / (order.max() - order.min()).double().clamp(min=1e-12)
    kinks = starts[:, None].cpu() + b * torch.cat([torch.zeros(1), base.kinks, torch.ones(1)])
    return Schedule(lambda t: base.gamma(local.gamma(t[..., 0, 0, 0]))[..., 0, 0, 0], local.shape, kinks)
