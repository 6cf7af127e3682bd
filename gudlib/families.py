"""Families of schedules to train along: `draw(n, generator) -> Schedule`, a schedule of its own for each of n images.

A network that is told the noise level of every component learns to denoise along all schedules of a family, and can be
sampled along any of them. Parameters are drawn with low discrepancy, so that a batch covers their range.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gudlib.schedules import Schedule, held

Draw = Callable[[int, torch.Generator], Schedule]


@dataclass(frozen=True)
class Family:
    """A way to draw schedules, and what it is.

    Attributes:
        draw: `(n, generator) -> Schedule` with a batch of n.
        spec: name and arguments, JSON values; a training run is resumed only if they are the same.
    """

    draw: Draw
    spec: dict[str, Any]

    def __call__(self, n: int, generator: torch.Generator) -> Schedule:
        """Schedules for a batch of n images."""
        return self.draw(n, generator)


def stratified_times(n: int, generator: torch.Generator) -> Float[Tensor, " n"]:
    """`n` uniform times in [0, 1) of low discrepancy: one random shift of a regular grid.

    References:
        Variational Diffusion Models, D. P. Kingma et al., 2021, https://arxiv.org/abs/2107.00630, appendix I
    """
    shift = torch.rand((), generator=generator, dtype=torch.float64, device=generator.device)
    return (shift + torch.arange(n, dtype=torch.float64, device=generator.device) / n) % 1


def uniform_a(schedule: Callable[[Float[Tensor, " n"]], Schedule], a: tuple[float, float]) -> Family:
    """The inverse softness uniform between a[0] and a[1], as in the paper's section 5.1.

    Arguments:
        schedule: of inverse softnesses (n,), such as `FittedDesign.schedule`.
        a: lowest and highest.

    Raises:
        ValueError: if a is not (lowest, highest).
    """
    if len(a) != 2 or not -math.inf < a[0] <= a[1] < math.inf:
        raise ValueError(f"a must be (lowest, highest); got {a}")

    def draw(n: int, generator: torch.Generator) -> Schedule:
        return schedule(a[0] + (a[1] - a[0]) * _shuffled(n, generator))

    return Family(draw, {"name": "uniform_a", "a": list(a)})


def log_uniform_b(schedule: Callable[..., Schedule], smallest: Sequence[float]) -> Family:
    """Softnesses log-uniform between their smallest values and 1, independent of one another.

    Columns or patches one after another have one, `lambda b: fitted.sequential(column, b)`; columns within wavelet
    levels have two, `lambda a, b: fitted.sequential([level, column], [a, b])`.

    Arguments:
        schedule: of as many tensors (n,) as there are softnesses.
        smallest: of each softness, above 0 and at most 1.

    Raises:
        ValueError: if one is out of range.
    """
    if not smallest or not all(0 < b <= 1 for b in smallest):
        raise ValueError(f"smallest must hold softnesses above 0 and at most 1; got {smallest}")

    def draw(n: int, generator: torch.Generator) -> Schedule:
        return schedule(*(b ** _shuffled(n, generator) for b in smallest))

    return Family(draw, {"name": "log_uniform_b", "smallest": list(smallest)})


def with_known(family: Family, masks: Bool[Tensor, "m c h w"], share: float = 0.5) -> Family:
    """The same, but a `share` of the images has known components, which are never noised (`schedules.held`).

    Arguments:
        family: of all components.
        masks: which may be known; one is drawn for each image.
        share: of the images that have any, from 0 to 1.
    """
    _share(share)

    def draw(n: int, generator: torch.Generator) -> Schedule:
        schedule, device = family(n, generator), generator.device
        known = masks.to(device)[torch.randint(len(masks), (n,), generator=generator, device=device)]
        return held(schedule, known & (_shuffled(n, generator) < share)[:, None, None, None])

    return Family(draw, {"name": "with_known", "of": family.spec, "masks": len(masks), "share": share})


def mixed_with(family: Family, schedule: Schedule, share: float) -> Family:
    """The same, but a `share` of the images follows one given schedule, standard diffusion for instance.

    Arguments:
        family: for the other images.
        schedule: without a batch of its own.
        share: of the images that follow it, from 0 to 1.
    """
    _share(share)

    def draw(n: int, generator: torch.Generator) -> Schedule:
        drawn, given = family(n, generator), (_shuffled(n, generator) < share)[:, None, None, None]

        def gamma(t: Tensor) -> Tensor:
            return torch.where(given.to(t.device), *(each.gamma(t[..., 0, 0, 0]) for each in (schedule, drawn)))

        return Schedule(gamma, schedule.shape)

    return Family(draw, {"name": "mixed_with", "of": family.spec, "share": share})


def _shuffled(n: int, generator: torch.Generator) -> Float[Tensor, " n"]:
    """Stratified numbers that know nothing of the images' times and of each other."""
    u = stratified_times(n, generator)
    return u[torch.randperm(n, generator=generator, device=generator.device)]


def _share(share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie between 0 and 1; got {share}")
