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
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Int64, Real
from torch import Tensor, nn

from gudlib import checks
from gudlib.doors import door, inner

Time = float | Real[Tensor, "..."]
Levels = Float[Tensor, "... c h w"]  # the axes of t, broadcast against those of the schedule itself, then components
PerComponent = Float[Tensor, "c h w"]
Order = Real[Tensor, "c h w"]
PerImage = float | Float[Tensor, "..."]  # one number, or one for each image of a batch
Shape = tuple[int, int, int]


@inner
def alpha(gamma: Real[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Signal amplitude: alpha^2 = sigmoid(-gamma)."""
    return torch.sigmoid(-gamma).sqrt()


@inner
def sigma(gamma: Real[Tensor, "..."]) -> Float[Tensor, "..."]:
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
        batch: leading axes of the function's own. If given, it is taken on trust, as by the families of
            `gudlib.families`, which are checked when they are made: on a GPU every check waits for the device.

    Attributes:
        kinks: the same, sorted, float64, (k,).

    Raises:
        ValueError: if gamma is not finite at t = 0 or t = 1, falls between them, or does not fit the shape.

    >>> s = linear((1, 2, 2), -7.0, 5.0)
    >>> s.gamma(torch.tensor([0.0, 1.0])).shape, s.dgamma_dt(0.5)[0, 0, 0].item()
    (torch.Size([2, 1, 2, 2]), 12.0)
    """

    @inner
    def __init__(
        self,
        gamma: Callable[[Tensor], Tensor],
        shape: Shape,
        kinks: Tensor | Sequence[float] = (),
        batch: tuple[int, ...] | None = None,
    ) -> None:
        self._gamma = gamma
        times = torch.as_tensor(kinks, dtype=torch.float64).flatten().cpu()
        self.kinks = times[(times > 0) & (times < 1)].round(decimals=12).unique()
        self.shape: Shape = (int(shape[0]), int(shape[1]), int(shape[2]))
        if batch is not None:
            self.batch = tuple(batch)
            return
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
        self.batch = tuple(whole[:-3])

    @inner
    def gamma(self, t: Time) -> Levels:
        """gamma_i(t), always of shape t.shape + shape (t broadcast against the schedule's own batch, if it has one).

        Raises:
            ValueError: for times that don't fit the batch.
        """
        t = _as_time(t)
        try:
            whole = torch.broadcast_shapes(t.shape, self.batch)
        except RuntimeError:
            raise ValueError(f"t must fit a batch of {self.batch}; got times of shape {tuple(t.shape)}") from None
        return self._gamma(t[..., None, None, None]).expand(whole + self.shape)

    @inner
    def dgamma_dt(self, t: Time) -> Levels:
        """d gamma_i / dt. At a kink it is the full slope, not half of it: components move on closed intervals."""
        t = _as_time(t).contiguous()
        return torch.func.jvp(self.gamma, (t,), (torch.ones_like(t),))[1]

    @inner
    def beta(self, t: Time) -> Levels:
        """beta_i(t) = sigma_i^2 d gamma_i / dt, the rate of the Ornstein-Uhlenbeck process, per unit of t."""
        return torch.sigmoid(self.gamma(t)) * self.dgamma_dt(t)

    @inner
    def alpha(self, t: Time) -> Levels:
        """Signal amplitude alpha_i(t)."""
        return alpha(self.gamma(t))

    @inner
    def sigma(self, t: Time) -> Levels:
        """Noise amplitude sigma_i(t)."""
        return sigma(self.gamma(t))

    @inner
    def snr(self, t: Time, white_variance: PerComponent) -> Levels:
        """SNR_i(t) = Var(chi_i(0)) exp(-gamma_i(t)), a ratio of variances."""
        gamma = self.gamma(t)
        return white_variance.to(gamma) * (-gamma).exp()


@door
def linear(shape: Shape, gamma_min: float = -7.0, gamma_max: float = 5.0) -> Schedule:
    """One straight line for all components: gamma(t) = gamma_min + (gamma_max - gamma_min) t."""
    rising(gamma_min=checks.real("gamma_min", gamma_min), gamma_max=checks.real("gamma_max", gamma_max))
    return Schedule(lambda t: gamma_min + (gamma_max - gamma_min) * t, shape)


@door
def vp(shape: Shape, beta_min: float = 0.1, beta_max: float = 20.0) -> Schedule:
    """The linear-beta schedule of score-based SDEs: beta(t) = beta_min + t (beta_max - beta_min).

    gamma = log(exp(B) - 1) with B = int_0^t beta; before t = 1e-5 nothing moves, so that gamma(0) is finite (-13.8).

    References:
        Score-Based Generative Modeling through Stochastic Differential Equations, Y. Song et al., 2021,
        https://arxiv.org/abs/2011.13456, appendix C
    """
    rising(zero=0, beta_min=checks.real("beta_min", beta_min), beta_max=checks.real("beta_max", beta_max))

    def gamma(t: Tensor) -> Tensor:
        t = t.clamp(min=1e-5)
        integral = beta_min * t + 0.5 * (beta_max - beta_min) * t**2
        return integral + (-torch.expm1(-integral)).log()

    return Schedule(gamma, shape, [1e-5])


@door
def cosine(shape: Shape, gamma_min: float = -10.0, gamma_max: float = 10.0, offset: float = 0.008) -> Schedule:
    """The cosine schedule of improved DDPM, alpha^2 = f(t) / f(0), f = cos^2(pi/2 (t + offset) / (1 + offset)).

    It diverges at both ends, so time is confined to where gamma_min <= gamma <= gamma_max. The published discretisation
    spans -10.1 to 12.9 with a last step at 19.8; small networks do not survive ends that far out, whose first step
    multiplies their errors by hundreds.

    References:
        Improved Denoising Diffusion Probabilistic Models, A. Nichol, P. Dhariwal, 2021,
        https://arxiv.org/abs/2102.09672, section 3.2
    """
    rising(gamma_min=checks.real("gamma_min", gamma_min), gamma_max=checks.real("gamma_max", gamma_max))
    checks.real("offset", offset, least=0)
    f0 = math.cos(math.pi / 2 * offset / (1 + offset)) ** 2

    def time(gamma: float) -> float:
        return 2 / math.pi * (1 + offset) * math.acos(math.sqrt(f0 / (1 + math.exp(gamma)))) - offset

    first, last = time(gamma_min), time(gamma_max)

    def gamma(t: Tensor) -> Tensor:
        angle = math.pi / 2 * (t.clamp(first, last) + offset) / (1 + offset)
        signal = angle.cos() ** 2 / f0
        return ((1 - signal) / signal).log()

    return Schedule(gamma, shape, [first, last])


@door
def soft_conditioning(
    order: Order,
    a: PerImage = 1.0,
    log_variance: PerComponent | float = 0.0,
    gamma_min_target: PerImage = -7.0,
    gamma_max_target: float = 5.0,
    gamma_min: float = -math.inf,
    gamma_max: float = math.inf,
) -> Schedule:
    r"""The paper's soft-conditioning schedule: one slope for all, offsets along an ordering `l`.

        gamma_i(t) = g_min + log Var_i + a (l_i - l_max) + t [g_max - g_min + a (l_max - l_min)]

    with g_min, g_max the two targets, so that `-log SNR_i` of the highest component starts at g_min and that of the
    lowest ends at g_max. With `l_i = -log Sigma_i`, a = 0 gives all components one SNR, a = 1 is standard diffusion,
    a > 1 is more hierarchical, up to one component after another. a < 0 reverses the ordering: the extremes are those
    of a l.

    Arguments:
        order: l_i, (c, h, w); higher = noised earlier, generated later.
        a: inverse softness; a tensor holds one for each image of a batch, and so may `gamma_min_target` then.
        log_variance: log Var(chi_i(0)) of the white data, (c, h, w); 0 if the prior whitens (`Prior.log_variance`).
        gamma_min_target: -log SNR at which the last component starts.
        gamma_max_target: -log SNR at which the first one ends.
        gamma_min, gamma_max: lowest and highest gamma; outside them a component waits or is done.

    Raises:
        ValueError: if the targets, or gamma_min and gamma_max, do not rise.
    """
    a = a if isinstance(a, Tensor) else checks.real("a", a)
    rising(gamma_min_target=float(torch.as_tensor(gamma_min_target).max()), gamma_max_target=gamma_max_target)
    rising(gamma_min=gamma_min, gamma_max=gamma_max)

    free = partial(offset_lines, order, a, log_variance, gamma_min_target, gamma_max_target)
    first, last = (free(torch.full((1, 1, 1), t, dtype=torch.float64)) for t in (0.0, 1.0))
    kinks = torch.stack([(end - first) / (last - first) for end in (gamma_min, gamma_max)])
    return Schedule(lambda t: free(t).clamp(gamma_min, gamma_max), shape_of(order), kinks)


@door
def staggered(order: Order, a: float, gamma_min: float = -7.0, gamma_max: float = 5.0) -> Schedule:
    """`soft_conditioning` of white data, cut off at its own targets: components wait, move, and stop.

    All begin at `gamma_max` and end at `gamma_min`, whatever `a`, so that paths of several `a` can be compared.
    """
    return soft_conditioning(order, a, 0.0, gamma_min, gamma_max, gamma_min, gamma_max)


def offset_lines(
    order: Order,
    a: PerImage,
    log_variance: PerComponent | float,
    gamma_min_target: PerImage,
    gamma_max_target: float,
    t: Float[Tensor, "... 1 1 1"],
) -> Levels:
    """gamma of `soft_conditioning` before it is clipped."""
    each, start = (x.to(t)[..., None, None, None] if isinstance(x, Tensor) else x for x in (a, gamma_min_target))
    steep = each * order.to(t)  # a l_i
    low, high = steep.amin((-3, -2, -1), keepdim=True), steep.amax((-3, -2, -1), keepdim=True)
    shift = log_variance.to(t) if isinstance(log_variance, Tensor) else log_variance
    return start + shift + steep - high + t * (gamma_max_target - start + high - low)


@door
def sequential(
    order: Order | Sequence[Order],
    b: PerImage | Sequence[PerImage],
    gamma_min: float | PerComponent = -7.0,
    gamma_max: float | PerComponent = 5.0,
) -> Schedule:
    r"""Components wait, rise with one slope, and stop: columns, rows, patches or any other grouping one after another.

    `b` is the share of the unit time in which each component moves. With the order rescaled to [0, 1],

        start_i = (1 - b) (1 - order_i),
        gamma_i(t) = clip(gamma_min + (gamma_max - gamma_min) (t - start_i) / b, gamma_min, gamma_max)

    b = 1 moves all together (standard diffusion); for K equidistant groups b = 1/K is one group after another without
    gap or overlap (autoregression), and b = w / (K - 1 + w) keeps w groups moving at once.

    Several orderings nest: within the share of time that the first gives a component, the second, rescaled among the
    components that have it in common, decides, and so on: `sequential([level, column], [0.4, 0.3])` runs columns inside
    wavelet levels. Components among which it tells no difference take all of the share.

    The paper (section 5.2) uses column schedules of softness 0.3 and 0.5; we don't know its formula, this one is ours.

    Arguments:
        order: (c, h, w), or several of one shape; higher = noised earlier, generated later.
        b: softness for each ordering, at most 1. Something moves at any time if it is at least g / (1 + g), g the
            largest gap between neighbours in the rescaled order (1/K for K equidistant groups); a tensor holds one for
            each image of a batch.
        gamma_min, gamma_max: gamma before and after, for all components or for each.

    Raises:
        ValueError: if b is not in (0, 1] or nothing would move for part of the time, the numbers of orders and of b
            differ, or gamma_min >= gamma_max.
    """
    orders = [order] if isinstance(order, Tensor) else list(order)
    shares: list[Any] = [b] if isinstance(b, Tensor | str) or not hasattr(b, "__len__") else list(b)  # type: ignore[arg-type]
    low, high = (torch.as_tensor(x, dtype=torch.float64) for x in (gamma_min, gamma_max))
    if not bool((low < high).all()):
        ends = f"{low.max().item():g} and {high.min().item():g}"
        raise ValueError(f"gamma_min must be below gamma_max everywhere; got {ends}")
    if not orders or len(orders) != len(shares):
        raise ValueError(f"b must hold one softness for each ordering; got {len(shares)} for {len(orders)}")
    nest = Nest(orders)
    for each in shares:
        share = torch.as_tensor(each if isinstance(each, Tensor) else checks.real("b", each), dtype=torch.float64)
        if not bool(((share > 0) & (share <= 1)).all()):
            raise ValueError(f"b must be above 0 and at most 1; got {each}")
    start, duration = nest.movement(shares)
    idle = nest.idle(start, duration)
    if idle > 1e-6:  # less is the rounding of b, in float32 for instance
        bounds = ", ".join(f"{b + 4e-7:.6g}" for b in nest.least)  # rounded up
        raise ValueError(f"b must be at least {bounds}, or nothing moves for {idle:.1%} of the time; got {b}")
    kinks = torch.stack([start, start + duration]) if start.ndim == 3 else ()
    return Schedule(partial(clipped_lines, low, high, start, duration), shape_of(orders[0]), kinks)


class Nest(nn.Module):
    """Orderings inside one another, ranked once: what `sequential` needs to know of them.

    Arguments:
        orders: (c, h, w) each, of one shape.

    Attributes:
        least: softness of each ordering below which some time is idle for certain, g / (1 + g), g the largest gap.
    """

    @door
    def __init__(self, orders: Sequence[Order]) -> None:
        super().__init__()
        if not orders or any(order.shape != orders[0].shape for order in orders):
            shapes = [tuple(order.shape) for order in orders]
            raise ValueError(f"orders must be at least one, all of one shape; got {shapes}")
        group = torch.zeros(orders[0].shape, dtype=torch.long, device=orders[0].device)
        ranks, alones, self.least = [], [], []
        for values in orders:
            rank, alone, group, gap = _ranked(values.double(), group)
            ranks.append(rank)
            alones.append(alone)
            self.least.append(gap / (1 + gap))
        one_each = torch.zeros(int(group.max()) + 1, dtype=torch.long, device=group.device)
        one_each[group.flatten()] = torch.arange(group.numel(), device=group.device)
        self.ranks: Tensor  # (k, c, h, w): values rescaled to [0, 1] where the orderings before put all at one place
        self.alone: Tensor  # (k, c, h, w): all are equal there
        self.group: Tensor  # (c, h, w): number of what all orderings put at one place
        self.one_each: Tensor
        tables = {"ranks": torch.stack(ranks), "alone": torch.stack(alones), "group": group, "one_each": one_each}
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    @inner
    def movement(self, shares: Sequence[PerImage]) -> tuple[Levels, Levels]:
        """When each component starts to move and for how long, given the softness of each ordering."""
        if len(shares) != len(self.ranks):
            raise ValueError(f"shares must be {len(self.ranks)}, one for each ordering; got {len(shares)}")
        start, duration = torch.zeros_like(self.ranks[0]), torch.ones_like(self.ranks[0])
        for rank, alone, each in zip(self.ranks, self.alone, shares, strict=True):
            share = torch.as_tensor(each, dtype=torch.float64, device=rank.device)[..., None, None, None]
            share = torch.where(alone, 1.0, share)
            start = start + duration * (1 - share) * (1 - rank)
            duration = duration * share
        return start, duration

    @inner
    def exchanged(
        self, start: Float[Tensor, "*n c h w"], order: Int64[Tensor, "*batch k"]
    ) -> Float[Tensor, "*any c h w"]:
        """Starts of one ordering's groups in another order: group `order[..., k]` has the turn of group k."""
        turns, taken = start.flatten(-3)[..., self.one_each], order.argsort(-1)
        shape = torch.broadcast_shapes(turns.shape, taken.shape)
        return turns.expand(shape).gather(-1, taken.expand(shape))[..., self.group]

    @inner
    def idle(self, start: Float[Tensor, "*n c h w"], duration: Float[Tensor, "*n c h w"]) -> float:
        """For how much of the time nothing moves, at most over a batch."""
        starts, first = start.flatten(-3)[..., self.one_each].sort()
        ends = (start + duration).flatten(-3)[..., self.one_each].gather(-1, first).cummax(-1).values
        return float((starts[..., 1:] - ends[..., :-1]).clamp(min=0).sum(-1).max())


def clipped_lines(
    low: PerComponent | Float[Tensor, ""],
    high: PerComponent | Float[Tensor, ""],
    start: Levels,
    duration: Levels,
    t: Float[Tensor, "... 1 1 1"],
) -> Levels:
    """gamma of `sequential`: low until `start`, then a line to high, reached after `duration`."""
    low, high, start, duration = (x.to(t) for x in (low, high, start, duration))
    return low + (high - low) * ((t - start) / duration).clamp(0, 1)


@door
def held(schedule: Schedule, known: Bool[Tensor, "*batch c h w"]) -> Schedule:
    """The same schedule, but for components that are known: those are never noised, gamma_i(t) = gamma_i(0).

    Sampling along it, from a start that holds the known components as they are at t = 0, fills in the others.

    Arguments:
        schedule: of all components.
        known: which are given; leading axes hold one mask for each image of a batch.

    Raises:
        ValueError: if the mask does not fit the schedule.
    """
    if not isinstance(known, Tensor) or known.dtype != torch.bool or tuple(known.shape[-3:]) != schedule.shape:
        raise ValueError(f"known must be a mask (bool) of shape {schedule.shape}; got {checks.what(known)}")

    def gamma(t: Tensor) -> Tensor:
        clean = schedule.gamma(torch.zeros((), dtype=t.dtype, device=t.device))
        return torch.where(known.to(t.device), clean, schedule.gamma(t[..., 0, 0, 0]))

    try:
        batch = torch.broadcast_shapes(known.shape[:-3], schedule.batch)
    except RuntimeError:
        sizes = f"{tuple(known.shape[:-3])} and {schedule.batch}"
        raise ValueError(f"known and the schedule must be for one batch; they are for {sizes}") from None
    return Schedule(gamma, schedule.shape, schedule.kinks, batch)


@door
def patch_order(shape: Shape, size: int) -> PerComponent:
    """An ordering (c, h, w) by square patches in raster order, 0 = top left, for `sequential`.

    Raises:
        ValueError: if the patch size does not divide height and width.
    """
    c, h, w = shape
    if size < 1 or h % size or w % size:
        raise ValueError(f"size must divide height {h} and width {w}; got {size}")
    index = torch.arange(h // size * (w // size), dtype=torch.float64).reshape(h // size, w // size)
    return index.repeat_interleave(size, 0).repeat_interleave(size, 1).expand(c, h, w)


@door
def rescaled(schedule: Schedule, scale: PerComponent) -> Schedule:
    """The schedule that does with prior scale 1 what `schedule` does with prior scales S: gamma_i + 2 log S_i.

    Prior and schedule are partly redundant: both processes have the same SNR_i(t) and, up to a deterministic factor for
    each component, the same paths.
    """
    checks.positive("scale", scale)
    if tuple(scale.shape) != schedule.shape:
        raise ValueError(f"scale must have the schedule's shape, {schedule.shape}; got {tuple(scale.shape)}")
    gamma = schedule.gamma
    return Schedule(lambda t: gamma(t[..., 0, 0, 0]) + 2 * scale.log().to(t), schedule.shape, schedule.kinks)


def rising(**values: float) -> None:
    """Raise a ValueError unless each value is a number, or an infinity, above the one before; it names both."""
    for name, value in values.items():
        if value not in (-math.inf, math.inf):
            checks.real(name, value)
    for (name, low), (other, high) in pairwise(values.items()):
        if not low < high:
            raise ValueError(f"{other} must be above {name}, {low}; got {high}")


@inner
def shape_of(components: Order) -> Shape:
    """The shape (c, h, w) of a label or a variance of components."""
    c, h, w = components.shape
    return c, h, w


def _as_time(t: Time) -> Tensor:
    """Times as a floating-point tensor, float64 if they had no such type."""
    if isinstance(t, Tensor) and t.is_floating_point():
        return t
    return torch.as_tensor(t, dtype=torch.float64)


def _ranked(
    values: PerComponent, group: Int[Tensor, "c h w"]
) -> tuple[PerComponent, Bool[Tensor, "c h w"], Int[Tensor, "c h w"], float]:
    """Values rescaled to [0, 1] within each group; whether all are equal there; finer groups; the largest gap."""
    pairs, finer = torch.stack([group.double(), values]).flatten(1).unique(dim=1, return_inverse=True)
    coarse, finer = pairs[0].long(), finer.view(values.shape)
    low, high = (
        pairs.new_zeros(int(coarse.max()) + 1).scatter_reduce(0, coarse, pairs[1], extreme, include_self=False)[coarse]
        for extreme in ("amin", "amax")
    )
    within = (pairs[1] - low) / torch.where(high > low, high - low, 1)  # pairs are sorted: by group, then by value
    gaps = torch.where(coarse.diff() == 0, within.diff(), 0)
    return within[finer], (low == high)[finer], finer, float(gaps.max()) if len(gaps) else 0.0
