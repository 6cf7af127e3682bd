r"""Noise schedules: the third choice, one for every component (Gerdes, Welling and Cheng 2024).

Each white component `i` has its own variance-preserving process on `t` in [0, 1], from data (0) to noise (1),

    chi_i(t) = alpha_i chi_i(0) + sigma_i eps_i,     alpha_i^2 = sigmoid(-gamma_i),   sigma_i^2 = sigmoid(gamma_i),
    gamma_i(t) = log(sigma_i^2 / alpha_i^2),         beta_i = sigma_i^2 d gamma_i / dt,
    SNR_i(t) = Var(chi_i(0)) exp(-gamma_i(t)).

`gamma` rises with noise. Orderings point one way everywhere: a component with a *higher* order is noised earlier, that
is, generated later. Column schedules therefore generate from left to right when ordered by the column number.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Time = Float[Tensor, "*t"]
PerComponent = Float[Tensor, "c h w"]
Share = float | Float[Tensor, " batch"]
Shape = tuple[int, int, int]


def alpha(gamma: Tensor) -> Tensor:
    """Signal amplitude: alpha^2 = sigmoid(-gamma)."""
    return torch.sigmoid(-gamma).sqrt()


def sigma(gamma: Tensor) -> Tensor:
    """Noise amplitude: sigma^2 = sigmoid(gamma)."""
    return torch.sigmoid(gamma).sqrt()


class Schedule:
    """gamma_i(t) for components of one shape; all else follows from it, derivatives by automatic differentiation.

    Arguments:
        gamma: any function, not decreasing in t (only the ends are checked), written with torch operations. It receives
            t with three trailing axes of size one, and its result must broadcast to t.shape + shape. It may carry
            leading axes of its own (one softness for each image of a batch); t is then broadcast against them.
        shape: component shape (channel, height, width).
        kinks: times at which a slope jumps, for integrals over t; those outside (0, 1) are dropped.

    Attributes:
        kinks: the same, sorted, float64, (k,).

    Raises:
        ValueError: if gamma is not finite at t = 0 or t = 1, falls between them, or does not fit the shape.

    >>> s = linear((1, 2, 2), -7.0, 5.0)
    >>> s.gamma(torch.tensor([0.0, 1.0])).shape, s.rate(torch.tensor(0.5))[0, 0, 0].item()
    (torch.Size([2, 1, 2, 2]), 12.0)
    """

    def __init__(self, gamma: Callable[[Tensor], Tensor], shape: Shape, kinks: Tensor | Sequence[float] = ()) -> None:
        self._gamma = gamma
        times = torch.as_tensor(kinks, dtype=torch.float64).flatten()
        self.kinks = times[(times > 0) & (times < 1)].round(decimals=12).unique()
        self.shape: Shape = (int(shape[0]), int(shape[1]), int(shape[2]))
        start, end = (gamma(torch.full((1, 1, 1), t, dtype=torch.float64)) for t in (0.0, 1.0))
        for t, value in ((0, start), (1, end)):
            if not bool(value.isfinite().all()):
                raise ValueError(f"gamma must be finite at both ends; at t = {t} it is not: clip it")
        if bool((end < start).any()):
            raise ValueError("gamma must not fall from t = 0 (data) to t = 1 (noise)")
        misfit = f"gamma has shape {tuple(start.shape)}, which does not fit components {self.shape}"
        try:
            whole = torch.broadcast_shapes(start.shape, self.shape)
        except RuntimeError:
            raise ValueError(misfit) from None
        if whole[-3:] != self.shape:
            raise ValueError(misfit)
        self.batch = whole[:-3]

    def gamma(self, t: Time) -> Float[Tensor, "*t c h w"]:
        """gamma_i(t), always of shape t.shape + shape (t broadcast against the schedule's own batch, if it has one)."""
        value = self._gamma(t[..., None, None, None])
        return value.expand(torch.broadcast_shapes(t.shape, self.batch) + self.shape)

    def rate(self, t: Time) -> Float[Tensor, "*t c h w"]:
        """d gamma_i / dt. At a cap it is the full slope, not half of it: a component is active on a closed interval."""
        return torch.func.jvp(self.gamma, (t,), (torch.ones_like(t),))[1]

    def beta(self, t: Time) -> Float[Tensor, "*t c h w"]:
        """beta_i(t) = sigma_i^2 gamma_i', the rate of the Ornstein-Uhlenbeck process, per unit of t."""
        return torch.sigmoid(self.gamma(t)) * self.rate(t)

    def alpha(self, t: Time) -> Float[Tensor, "*t c h w"]:
        """Signal amplitude alpha_i(t)."""
        return alpha(self.gamma(t))

    def sigma(self, t: Time) -> Float[Tensor, "*t c h w"]:
        """Noise amplitude sigma_i(t)."""
        return sigma(self.gamma(t))

    def snr(self, t: Time, white_variance: PerComponent) -> Float[Tensor, "*t c h w"]:
        """SNR_i(t) = Var(chi_i(0)) exp(-gamma_i(t)), a ratio of variances."""
        return white_variance.to(t) * (-self.gamma(t)).exp()


def linear(shape: Shape, low: float = -7.0, high: float = 5.0) -> Schedule:
    """One straight line for all components: gamma(t) = low + (high - low) t."""
    _rising(low, high)
    return Schedule(lambda t: low + (high - low) * t, shape)


def vp(shape: Shape, beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-5) -> Schedule:
    """The linear-beta schedule of score-based SDEs: beta(t) = beta_min + t (beta_max - beta_min) for t >= t_min.

    gamma = log(exp(B) - 1) with B = int_0^t beta; before `t_min` nothing moves, so that gamma(0) is finite (-13.8).

    References:
        Score-Based Generative Modeling through Stochastic Differential Equations, Y. Song et al., 2021,
        https://arxiv.org/abs/2011.13456, appendix C
    """
    if not 0 < t_min < 1:
        raise ValueError(f"t_min must lie between 0 and 1; got {t_min}")
    _rising(0, beta_min, "beta_min")
    _rising(beta_min, beta_max, "beta_max")

    def gamma(t: Tensor) -> Tensor:
        t = t.clamp(min=t_min)
        integral = beta_min * t + 0.5 * (beta_max - beta_min) * t**2
        return integral + (-torch.expm1(-integral)).log()

    return Schedule(gamma, shape, [t_min])


def cosine(shape: Shape, low: float = -10.0, high: float = 10.0, offset: float = 0.008) -> Schedule:
    """The cosine schedule of improved DDPM, alpha^2 = f(t) / f(0), f = cos^2(pi/2 (t + offset) / (1 + offset)).

    It diverges at both ends, so time is confined to where low <= gamma <= high. The published discretisation spans
    -10.1 to 12.9 with a last step at 19.8; small networks do not survive ends that far out, whose first step
    multiplies their errors by hundreds.

    References:
        Improved Denoising Diffusion Probabilistic Models, A. Nichol, P. Dhariwal, 2021,
        https://arxiv.org/abs/2102.09672, section 3.2
    """
    _rising(low, high)
    f0 = math.cos(math.pi / 2 * offset / (1 + offset)) ** 2

    def time(gamma: float) -> float:
        return 2 / math.pi * (1 + offset) * math.acos(math.sqrt(f0 / (1 + math.exp(gamma)))) - offset

    first, last = time(low), time(high)

    def gamma(t: Tensor) -> Tensor:
        angle = math.pi / 2 * (t.clamp(first, last) + offset) / (1 + offset)
        signal = angle.cos() ** 2 / f0
        return ((1 - signal) / signal).log()

    return Schedule(gamma, shape, [first, last])


def soft_conditioning(
    order: PerComponent,
    a: float | Float[Tensor, " batch"] = 1.0,
    log_variance: PerComponent | float = 0.0,
    denoise: float | Float[Tensor, " batch"] = -7.0,
    noise: float = 5.0,
    caps: tuple[float, float] | None = None,
) -> Schedule:
    r"""The paper's soft-conditioning schedule: one slope for all, offsets along an ordering `l`.

        gamma_i(t) = denoise + log Var_i + a (l_i - l_max) + t [noise - denoise + a (l_max - l_min)]

    so that `-log SNR_i` of the highest component starts at `denoise` and that of the lowest ends at `noise`. With
    `l_i = -log Sigma_i`, a = 0 gives all components one SNR, a = 1 is standard diffusion, a > 1 is more hierarchical,
    up to one component after another. a < 0 reverses the ordering: the extremes are those of a l.

    Arguments:
        order: l_i, (c, h, w); higher = noised earlier, generated later.
        a: inverse softness; a tensor holds one for each image of a batch, and so may `denoise` then.
        log_variance: log Var(chi_i(0)) of the white data, (c, h, w); 0 if the prior whitens (`Prior.log_variance`).
        denoise, noise: the values of -log SNR at which the last component starts and the first one ends.
        caps: (lowest, highest) gamma; outside them a component waits or is done.

    Raises:
        ValueError: if denoise >= noise, or caps do not rise.
    """
    _rising(float(torch.as_tensor(denoise).max()), noise, "noise")
    if caps is not None:
        _rising(*caps)

    def free(t: Tensor) -> Tensor:
        each, start = (x.to(t)[..., None, None, None] if isinstance(x, Tensor) else x for x in (a, denoise))
        steep = each * order.to(t)  # a l_i
        low, high = steep.amin((-3, -2, -1), keepdim=True), steep.amax((-3, -2, -1), keepdim=True)
        shift = log_variance.to(t) if isinstance(log_variance, Tensor) else log_variance
        return start + shift + steep - high + t * (noise - start + high - low)

    shape = (order.shape[0], order.shape[1], order.shape[2])
    if caps is None:
        return Schedule(free, shape)
    first, last = (free(torch.full((1, 1, 1), t, dtype=torch.float64)) for t in (0.0, 1.0))
    kinks = torch.stack([(cap - first) / (last - first) for cap in caps])
    return Schedule(lambda t: free(t).clamp(*caps), shape, kinks)


def sequential(
    order: PerComponent | Sequence[PerComponent],
    b: Share | Sequence[Share],
    low: float | PerComponent = -7.0,
    high: float | PerComponent = 5.0,
) -> Schedule:
    r"""Components wait, rise with one slope, and stop: columns, rows, patches or any other grouping one after another.

    `b` is the share of the unit time in which each component is active. With the order rescaled to [0, 1],

        start_i = (1 - b) (1 - order_i),    gamma_i(t) = clip(low + (high - low) (t - start_i) / b, low, high)

    b = 1 moves all together (standard diffusion); for K equidistant groups b = 1/K is one group after another without
    gap or overlap (autoregression), and b = w / (K - 1 + w) keeps w groups moving at once.

    Several orderings nest: within the share of time that the first gives a component, the second decides, and so on:
    `sequential([level, column], [0.4, 0.3])` runs columns inside wavelet levels.

    The paper (section 5.2) uses column schedules of softness 0.3 and 0.5; we don't know its formula, this one is ours.

    Arguments:
        order: (c, h, w), or several of one shape; higher = noised earlier, generated later.
        b: softness in [1/K, 1] for each ordering, K its number of distinct values; a tensor holds one for each image
            of a batch.
        low, high: gamma before and after, for all components or for each.

    Raises:
        ValueError: if b is out of range (below 1/K nothing would move for part of the time), the numbers of orders and
            of b differ, or low >= high.
    """
    orders = [order] if isinstance(order, Tensor) else list(order)
    shares = [b] if isinstance(b, int | float | Tensor) else list(b)
    low, high = (torch.as_tensor(x, dtype=torch.float64) for x in (low, high))
    if not bool((low < high).all()):
        raise ValueError(f"low must be below high everywhere; got {low.max().item():g} and {high.min().item():g}")
    if not orders or len(orders) != len(shares):
        raise ValueError(f"b must hold one softness for each ordering; got {len(shares)} for {len(orders)}")
    start, duration = torch.zeros_like(orders[0], dtype=torch.float64), torch.ones((), dtype=torch.float64)
    for values, each in zip(orders, shares, strict=True):
        share = torch.as_tensor(each, dtype=torch.float64)[..., None, None, None]
        groups = values.unique().numel()
        if bool((share < 1 / groups - 1e-12).any() or (share > 1).any()):
            raise ValueError(f"b must lie between 1/{groups} (one of {groups} groups after another) and 1; got {each}")
        span = (values.max() - values.min()).double()
        rank = (values - values.min()).double() / (span if span > 0 else 1)
        start = start + duration * (1 - share) * (1 - rank)
        duration = duration * share

    def gamma(t: Tensor) -> Tensor:
        first, last, begun, lasting = (x.to(t) for x in (low, high, start, duration))
        return first + (last - first) * ((t - begun) / lasting).clamp(0, 1)

    kinks = torch.stack([start, start + duration]) if start.ndim == 3 else ()
    return Schedule(gamma, (start.shape[-3], start.shape[-2], start.shape[-1]), kinks)


def held(schedule: Schedule, known: Bool[Tensor, "*batch c h w"]) -> Schedule:
    """The same schedule, but for components that are known: those are never noised, gamma_i(t) = gamma_i(0).

    Sampling along it, from a start that holds the known components as they are at t = 0, fills in the others.

    Arguments:
        schedule: of all components.
        known: which are given; leading axes hold one mask for each image of a batch.

    Raises:
        ValueError: if the mask does not fit the schedule.
    """
    if known.dtype != torch.bool or tuple(known.shape[-3:]) != schedule.shape:
        raise ValueError(f"known must be a mask (bool) of shape {schedule.shape}; got {known.dtype}, {known.shape}")

    def gamma(t: Tensor) -> Tensor:
        clean = schedule.gamma(torch.zeros((), dtype=t.dtype, device=t.device))
        return torch.where(known.to(t.device), clean, schedule.gamma(t[..., 0, 0, 0]))

    return Schedule(gamma, schedule.shape, schedule.kinks)


def patches(shape: Shape, size: int) -> PerComponent:
    """An ordering (c, h, w) by square patches in raster order, 0 = top left, for `sequential`.

    Raises:
        ValueError: if the patch size does not divide height and width.
    """
    c, h, w = shape
    if size < 1 or h % size or w % size:
        raise ValueError(f"size must divide height {h} and width {w}; got {size}")
    index = torch.arange(h // size * (w // size), dtype=torch.float64).reshape(h // size, w // size)
    return index.repeat_interleave(size, 0).repeat_interleave(size, 1).expand(c, h, w)


def rescaled(schedule: Schedule, scale: PerComponent) -> Schedule:
    """The schedule that does with prior scale 1 what `schedule` does with prior scales S: gamma_i + 2 log S_i.

    Prior and schedule are partly redundant: both processes have the same SNR_i(t) and, up to a deterministic factor for
    each component, the same paths.
    """
    gamma = schedule.gamma
    return Schedule(lambda t: gamma(t[..., 0, 0, 0]) + 2 * scale.log().to(t), schedule.shape, schedule.kinks)


def _rising(low: float, high: float, name: str = "high") -> None:
    if not low < high:
        raise ValueError(f"{name} must be above {low}; got {high}")
