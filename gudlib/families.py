"""Families of schedules to train along: each of n images gets a schedule of its own, `family(n, generator)`.

A network that is told the noise level of every component learns to denoise along all schedules of a family, and can be
sampled along any of them, `family.schedule(a=1.0)`. Parameters are drawn with low discrepancy, so that a batch covers
their range.

A family is known by its name and arguments, `family.spec`, from which `rebuild` makes it again. It is a torch module
without weights: its tables go to a device with `to`, and what it draws there never waits for that device.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from gudlib import checks
from gudlib.bases import Basis, Blocks
from gudlib.doors import door, inner
from gudlib.priors import Prior
from gudlib.schedules import (
    Nest,
    Order,
    PerImage,
    Schedule,
    Shape,
    clipped_lines,
    held,
    offset_lines,
    patch_order,
    sequential,
    shape_of,
    soft_conditioning,
)

Draw = Callable[[int, torch.Generator], Schedule]
Range = tuple[float, float]
FINEST = 1 / 384  # a third of a grey level, in units of the data
BLOCKS = ("columns", "rows", "levels", "patches")
ORDERS = ("raster", "random")
Permutations = Int64[Tensor, "*batch count"]  # [..., k]: number, in reading order, of the patch that is generated k-th


@inner
def stratified_times(n: int, generator: torch.Generator) -> Float[Tensor, " n"]:
    """`n` uniform times in [0, 1) of low discrepancy: one random shift of a regular grid.

    References:
        Variational Diffusion Models, D. P. Kingma et al., 2021, https://arxiv.org/abs/2107.00630, appendix I
    """
    n = checks.whole("n", n)
    shift = torch.rand((), generator=generator, dtype=torch.float64, device=generator.device)
    return (shift + torch.arange(n, dtype=torch.float64, device=generator.device) / n) % 1


class Family(nn.Module, ABC):
    """Schedules with parameters, and how these are drawn in training.

    Attributes:
        shape: of components, (channel, height, width).
        default: the member to use where none is asked for, `{"a": 1.0}` for instance.
    """

    shape: Shape
    default: dict[str, Any]

    @abstractmethod
    def forward(self, n: int, generator: torch.Generator) -> Schedule:
        """A schedule with a batch of n, drawn on the generator's device, where the family must be."""

    @abstractmethod
    def schedule(self, **parameters: Any) -> Schedule:
        """One member: its parameters are numbers, or tensors that hold one for each image of a batch."""

    @abstractmethod
    def moving(self, **parameters: Any) -> float:
        """For what share of the time each component of that member moves, at least."""

    @property
    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """Name and arguments, JSON values."""

    @property
    @abstractmethod
    def ranges(self) -> dict[str, list[Range]]:
        """Lowest and highest value of each parameter in training."""


class SoftConditioning(Family):
    """`schedules.soft_conditioning` along a prior's order, `a` uniform in a range, as in the paper's section 5.1.

    Arguments:
        prior: its order and the variance of its white data are the schedule's.
        a: lowest and highest inverse softness.
        gamma_max_target: -log SNR at which the first component ends.
        gamma_min_target: -log SNR at which the last one starts; by default as `finest` says.
        finest: standard deviation that the noise at t = 0 has at most in a component, in units of the data.

    Raises:
        ValueError: if a is not (lowest, highest), or the targets don't rise.
    """

    @door
    def __init__(
        self,
        prior: Prior,
        a: Range,
        gamma_max_target: float = 5.0,
        gamma_min_target: float | None = None,
        finest: float = FINEST,
    ) -> None:
        super().__init__()
        if not isinstance(a, list | tuple) or len(a) != 2 or checks.real("a", a[0]) > checks.real("a", a[1]):
            raise ValueError(f"a must be (lowest, highest); got {a}")
        for name, target in {"gamma_max_target": gamma_max_target, "gamma_min_target": gamma_min_target}.items():
            if target is not None or name == "gamma_max_target":
                checks.real(name, target)
        finest = checks.real("finest", finest, above=0)
        self.a, self.shape, self.finest = (float(a[0]), float(a[1])), shape_of(prior.mean), finest
        self._targets = gamma_min_target, gamma_max_target
        self.default = {"a": min(max(1.0, self.a[0]), self.a[1])}
        self.order: Tensor
        self.log_variance: Tensor
        self.register_buffer("order", prior.order.double(), persistent=False)
        self.register_buffer("log_variance", prior.log_variance.double(), persistent=False)
        self.ends = float(self.order.min()), float(self.order.max())
        self.schedule(torch.tensor(self.a, dtype=torch.float64))  # checked here, not at every draw

    @inner
    def forward(self, n: int, generator: torch.Generator) -> Schedule:
        """As `Family`."""
        a = self.a[0] + (self.a[1] - self.a[0]) * _shuffled(n, generator)
        lines = partial(offset_lines, self.order, a, self.log_variance, self.gamma_min_target(a), self._targets[1])
        return Schedule(lines, self.shape, batch=(n,))

    @door
    def schedule(self, a: PerImage) -> Schedule:
        """The member of inverse softness `a`; a tensor holds one for each image of a batch."""
        return soft_conditioning(self.order, a, self.log_variance, self.gamma_min_target(a), self._targets[1])

    @door
    def moving(self, a: PerImage) -> float:
        """All of it."""
        return 1.0

    @inner
    def gamma_min_target(self, a: PerImage) -> Float[Tensor, "*batch"]:
        """-log SNR of the last component at t = 0, with which the noise is the finest, if that is what is asked for.

        In units of the data the noise's variance is N_i(0), log N_i(0) = gamma_min_target - l_i + a (l_i - l_max), and
        largest at one end of the ordering.
        """
        (low, high), each = self.ends, torch.as_tensor(a, dtype=torch.float64)
        if self._targets[0] is not None:
            return torch.full_like(each, self._targets[0])
        return 2 * math.log(self.finest) + each * high - torch.maximum((each - 1) * low, (each - 1) * high)

    @property
    def spec(self) -> dict[str, Any]:
        """As `Family`."""
        low, high = self._targets
        start = {"finest": self.finest} if low is None else {"gamma_min_target": low}
        return {"name": "soft_conditioning", "a": list(self.a), "gamma_max_target": high, **start}

    @property
    def ranges(self) -> dict[str, list[Range]]:
        """As `Family`."""
        return {"a": [self.a]}


class Sequential(Family):
    """`schedules.sequential`: blocks of components one after another, each softness `b` log-uniform in its range.

    Arguments:
        basis, prior: of the components.
        blocks: `columns`, `rows`, `patches` or `levels` (of `haar`), or several, each inside the one before:
            `("levels", "columns")`. A number gives the size of a block in pixels, `columns 8`; patches have one, 4 if
            not said.
        b: lowest and highest softness for each of the blocks, a pair for all; by default from one after another to 1,
            for several from 1/4 at least.
        gamma_max_target: -log SNR at which components end.
        finest: standard deviation of the noise in all components at t = 0, in units of the data.
        order: `raster`, blocks as they are numbered, patches in reading order; or `random`, for patches that are not
            nested: in training each image has an order of its own, all permutations being as likely.

    Raises:
        ValueError: for unknown blocks or labels that the basis does not have, an order that is unknown or not for these
            blocks, or as `schedules.sequential`.

    References:
        Autoregressive Image Generation without Vector Quantization, T. Li et al., 2024,
        https://arxiv.org/abs/2406.11838 (tokens in random orders)
    """

    @door
    def __init__(
        self,
        basis: Basis,
        prior: Prior,
        blocks: str | Sequence[str],
        b: Range | Sequence[Range] | None = None,
        gamma_max_target: float = 5.0,
        finest: float = FINEST,
        order: str = "raster",
    ) -> None:
        super().__init__()
        self.blocks = [blocks] if isinstance(blocks, str) else list(blocks)
        if not self.blocks:
            raise ValueError(f"blocks must name at least one of {BLOCKS}; got {blocks!r}")
        self.orders = [_order(basis, name) for name in self.blocks]
        self.order = checks.one_of("order", order, ORDERS)
        if order == "random" and [name.partition(" ")[0] for name in self.blocks] != ["patches"]:
            raise ValueError(f"order='random' is for blocks='patches'; got {blocks!r}")
        gamma_max_target = checks.real("gamma_max_target", gamma_max_target)
        finest = checks.real("finest", finest, above=0)
        self.nest, self.shape = Nest(self.orders), shape_of(prior.mean)
        self.b = _ranges(b, self.nest.least)
        self.gamma_max_target, self.finest = gamma_max_target, finest
        self.low: Tensor
        self.high: Tensor
        self.register_buffer("low", 2 * math.log(finest) - 2 * prior.scale.double().log(), persistent=False)
        variance = prior.log_variance.double()
        if isinstance(basis, Blocks):  # one noise level for all components of a block
            variance = variance.exp().mean().log().expand_as(variance)
        self.register_buffer("high", gamma_max_target + variance, persistent=False)
        highest = [high for _, high in self.b]
        self.default = {"b": highest[0] if len(highest) == 1 else highest}
        self.to(prior.mean.device)
        for ends in zip(*self.b, strict=True):
            self.schedule(ends)  # checked here, not at every draw

    @inner
    def forward(self, n: int, generator: torch.Generator) -> Schedule:
        """As `Family`."""
        shares = [high * (low / high) ** _shuffled(n, generator) for low, high in self.b]
        start, duration = self.nest.movement(shares)
        if self.order == "random":
            start = self.nest.exchanged(start, self.random_orders(n, generator))
        return Schedule(partial(clipped_lines, self.low, self.high, start, duration), self.shape, batch=(n,))

    @door
    def schedule(self, b: PerImage | Sequence[PerImage], order: Permutations | None = None) -> Schedule:
        """The member of softness `b`, one for each of the blocks; a tensor holds one for each image of a batch.

        Of random orders it is the one along `order`, (L,) for all images or (n, L) for each of a batch: the patches, by
        their number in reading order, from the first generated to the last. Without it they come in reading order.

        Raises:
            ValueError: as `schedules.sequential`; if an order is given to a family without random ones, or holds
                anything but each patch once; if order and b are for batches of two sizes.
        """
        orders = [each.to(self.low.device) for each in self.orders]
        raster = sequential(orders, _each(b), self.low, self.high)
        if order is None:
            return raster
        order, (start, duration) = self._checked(order), self.nest.movement(_each(b))
        try:
            start = self.nest.exchanged(start, order)
        except RuntimeError:
            sizes = f"{tuple(order.shape[:-1])} and {raster.batch}"
            raise ValueError(f"order and b must be for one batch; they are for {sizes}") from None
        return Schedule(partial(clipped_lines, self.low, self.high, start, duration), self.shape, raster.kinks)

    @inner
    def random_orders(self, n: int, generator: torch.Generator) -> Int64[Tensor, "n count"]:
        """An order of the patches for each of n images, for `schedule`: all permutations are as likely."""
        n = checks.whole("n", n)
        keys = torch.rand(n, self.count, generator=generator, dtype=torch.float64, device=generator.device)
        return keys.argsort(1)

    @property
    def count(self) -> int:
        """The number of blocks, of all that are nested."""
        return len(self.nest.one_each)

    def _checked(self, order: Any) -> Tensor:
        """An order of the patches, on the family's device."""
        if self.order != "random":
            raise ValueError("order is for a family with order='random'; this one has its blocks in one order")
        wanted = f"order must be int64 of shape ({self.count},) or (n, {self.count}), each row 0 to {self.count - 1}"
        if not isinstance(order, Tensor) or order.dtype != torch.int64 or order.shape[-1:] != (self.count,):
            raise ValueError(f"{wanted} in any order; got {checks.what(order)}")
        wrong = (order.sort(-1).values != torch.arange(self.count, device=order.device)).any(-1)
        if bool(wrong.any()):
            raise ValueError(f"{wanted} in any order; got {order[wrong][0].tolist()}")
        return order.to(self.low.device)

    @door
    def moving(self, b: PerImage | Sequence[PerImage]) -> float:
        """The product of the softnesses."""
        return math.prod(float(torch.as_tensor(each).min()) for each in _each(b))

    @property
    def spec(self) -> dict[str, Any]:
        """As `Family`."""
        ends = {"gamma_max_target": self.gamma_max_target, "finest": self.finest}
        order = {"order": self.order} if self.order != "raster" else {}  # as in files from before there was another
        return {"name": "sequential", "blocks": self.blocks, "b": [list(each) for each in self.b], **ends, **order}

    @property
    def ranges(self) -> dict[str, list[Range]]:
        """As `Family`."""
        return {"b": self.b}


class Derived(Family):
    """A family in training of which a `share` of the images differs; its members are those of the family."""

    @door
    def __init__(self, family: Family, share: float) -> None:
        super().__init__()
        share = checks.real("share", share, least=0, most=1)
        self.family, self.share, self.shape, self.default = family, share, family.shape, family.default

    def schedule(self, **parameters: Any) -> Schedule:
        """As the family's."""
        return self.family.schedule(**parameters)

    def moving(self, **parameters: Any) -> float:
        """As the family's."""
        return self.family.moving(**parameters)

    @property
    def ranges(self) -> dict[str, list[Range]]:
        """As the family's."""
        return self.family.ranges


class Known(Derived):
    """The same, but a `share` of the images has known components, which are never noised (`schedules.held`).

    Members are those in which nothing is known; `schedules.held` makes one in which something is.

    Arguments:
        family: of all components.
        masks: which may be known, (m, c, h, w), one drawn for each image; or `rectangles` or `columns`, see `known`.
        share: of the images that have any, from 0 to 1.

    Raises:
        ValueError: if the share is out of range, or the masks don't fit.
    """

    @door
    def __init__(self, family: Family, masks: Bool[Tensor, "m c h w"] | str, share: float = 0.5) -> None:
        super().__init__(family, share)
        drawn = known(masks, family.shape) if isinstance(masks, str) else masks
        if drawn.dtype != torch.bool or drawn.ndim != 4 or tuple(drawn.shape[1:]) != family.shape:
            raise ValueError(
                f"masks must be bool of shape (m, {', '.join(map(str, family.shape))}); "
                f"got {drawn.dtype} of shape {tuple(drawn.shape)}"
            )
        self._which = masks if isinstance(masks, str) else len(masks)
        self.masks: Tensor
        self.register_buffer("masks", drawn, persistent=False)

    @inner
    def forward(self, n: int, generator: torch.Generator) -> Schedule:
        """As `Family`."""
        schedule, device = self.family(n, generator), generator.device
        mask = self.masks[torch.randint(len(self.masks), (n,), generator=generator, device=device)]
        return held(schedule, mask & (_shuffled(n, generator) < self.share)[:, None, None, None])

    @property
    def spec(self) -> dict[str, Any]:
        """As `Family`; masks by their name, or their number if they were given."""
        return {"name": "known", "of": self.family.spec, "masks": self._which, "share": self.share}


class Mixed(Derived):
    """The same, but a `share` of the images follows another family, one schedule of standard diffusion for instance.

    Arguments:
        family: for most images; its members are those of the whole.
        other: for the others.
        share: of the images that follow the other, from 0 to 1.

    Raises:
        ValueError: if the share is out of range, or the families are of different shapes.
    """

    @door
    def __init__(self, family: Family, other: Family, share: float) -> None:
        super().__init__(family, share)
        if family.shape != other.shape:
            raise ValueError(f"the two families must have one shape; got {family.shape} and {other.shape}")
        self.other = other

    @inner
    def forward(self, n: int, generator: torch.Generator) -> Schedule:
        """As `Family`."""
        drawn = self.family(n, generator)
        given = (_shuffled(n, generator) < self.share)[:, None, None, None]
        other = self.other(n, generator)

        def gamma(t: Tensor) -> Tensor:
            return torch.where(given.to(t.device), *(each.gamma(t[..., 0, 0, 0]) for each in (other, drawn)))

        return Schedule(gamma, self.shape, batch=(n,))

    @property
    def spec(self) -> dict[str, Any]:
        """As `Family`."""
        return {"name": "mixed", "of": self.family.spec, "with": self.other.spec, "share": self.share}


@door
def rebuild(spec: dict[str, Any], basis: Basis, prior: Prior) -> Family:
    """The family of a `spec`, for the basis and prior it was made for.

    Raises:
        ValueError: for an unknown name, or masks that were not given by name.
    """
    options: dict[str, Any] = dict(spec)
    name = options.pop("name", None)
    if name == "soft_conditioning":
        low, high = options.pop("a")
        return SoftConditioning(prior, (low, high), **options)
    if name == "sequential":
        b: list[Range] = [(low, high) for low, high in options.pop("b")]
        return Sequential(basis, prior, b=b, **options)
    if name == "known" and isinstance(options["masks"], str):
        return Known(rebuild(options["of"], basis, prior), options["masks"], options["share"])
    if name == "mixed":
        first, other = (rebuild(options[which], basis, prior) for which in ("of", "with"))
        return Mixed(first, other, options["share"])
    raise ValueError(f"a family must be soft_conditioning, sequential, mixed, or known with masks by name; got {spec}")


@door
def stopping_at(spec: dict[str, Any], finest: float) -> dict[str, Any]:
    """The `spec` of the same family with another `finest`, the noise at t = 0 in units of the data."""
    inner = {key: stopping_at(value, finest) for key, value in spec.items() if isinstance(value, dict)}
    return spec | inner | ({"finest": finest} if "finest" in spec else {})


@door
def known(which: str, shape: Shape) -> Bool[Tensor, "m c h w"]:
    """Masks of what is known in training for filling and growing, the same ones always.

    `rectangles`: all but a rectangle of at least a quarter of each side, in every fourth of 512 a rectangle only.
    `columns`: the first 0, 1, ... w - 1 columns.

    Raises:
        ValueError: for another name.
    """
    _, h, w = shape
    if which == "columns":
        return (torch.arange(w) < torch.arange(w)[:, None])[:, None, None].expand(-1, *shape)
    if which != "rectangles":
        raise ValueError(f"masks must be rectangles or columns, or a tensor; got {which!r}")
    generator, masks = torch.Generator().manual_seed(0), torch.ones(512, *shape, dtype=torch.bool)
    for i, mask in enumerate(masks):
        height, width = (int(torch.randint(n // 4, n + 1, (), generator=generator)) for n in (h, w))
        y = int(torch.randint(h - height + 1, (), generator=generator))
        x = int(torch.randint(w - width + 1, (), generator=generator))
        mask[:, y : y + height, x : x + width] = False
        mask ^= i % 4 == 3
    return masks


def _order(basis: Basis, block: str) -> Order:
    """The ordering (c, h, w) of blocks by name and, in pixels, size."""
    name, _, size = block.partition(" ")
    if name not in BLOCKS or (size and (not size.isdecimal() or name == "levels" or size == "0")):
        raise ValueError(f"blocks must be of {BLOCKS}, with a size in pixels if any, `columns 8`; got {block!r}")
    if name == "patches":
        if basis.name != "pixel" and not (isinstance(basis, Blocks) and basis.size == int(size or 4)):
            raise ValueError(f"blocks {block!r} are of pixels, or of the basis of such blocks; it is {basis.name!r}")
        return patch_order(basis.shape, int(size or 4))
    order = basis.label(name[:-1])
    return (order / int(size)).floor() if size else order


def _each(b: PerImage | Sequence[PerImage]) -> list[PerImage]:
    return [b] if isinstance(b, int | float | Tensor) else list(b)


def _ranges(b: Range | Sequence[Range] | None, least: Sequence[float]) -> list[Range]:
    """A range for each of the blocks."""
    if b is None:
        return [(max(each, 0.25) if len(least) > 1 else each, 1.0) if each else (1.0, 1.0) for each in least]
    pairs: Any = b if isinstance(b[0], list | tuple) else [b]
    pairs = [pairs[0]] * len(least) if len(pairs) == 1 else pairs
    if len(pairs) != len(least) or not all(len(pair) == 2 and 0 < pair[0] <= pair[1] <= 1 for pair in pairs):
        raise ValueError(f"b must be (lowest, highest) for each of {len(least)} blocks, in (0, 1]; got {b}")
    return [(float(low), float(high)) for low, high in pairs]


def _shuffled(n: int, generator: torch.Generator) -> Float[Tensor, " n"]:
    """Stratified numbers that know nothing of the images' times and of each other."""
    u = stratified_times(n, generator)
    return u[torch.randperm(n, generator=generator, device=generator.device)]
