r"""Importance sampling of time, for the diffusion term of a likelihood bound.

With t drawn from a proposal density q on [0, 1], E f(t) / q(t) is the integral of f for any q that is nowhere zero; its
variance is least for q proportional to the root of E f^2. The proposal here has two factors: one is known beforehand,
from what independent normals of the data's variances contribute at each time; the other is a histogram over quantiles
of the first, learnt from the integrand of earlier draws. A draw depends on earlier ones only through its proposal, so
all stays unbiased.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from gudlib import checks
from gudlib.doors import door, inner
from gudlib.process import Process

BINS = 32  # of the histogram


class Proposal:
    """A density of times that learns.

    Arguments:
        process: its schedule, without a batch of its own, is what is integrated over.
        c: variances of the white data, (c, h, w).
    """

    @door
    def __init__(self, process: Process, c: Float[Tensor, "c h w"]) -> None:
        if tuple(c.shape) != process.schedule.shape or process.schedule.batch:
            raise ValueError(f"c must have the shape of one schedule's components; got {checks.what(c)}")
        edges = [torch.linspace(0, 1, 1025, dtype=torch.float64), process.schedule.kinks.cpu()]
        self.t = torch.cat(edges).unique().to(c.device)
        self.cumulative = _cumulative(process, c, self.t)
        self.quantiles, self.squares, self._asked = (c.new_empty(0).double() for _ in range(3))

    @inner
    def times(self, u: Float[Tensor, " n"]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Times for uniform `u`, and the proposal's density there."""
        self._asked, learnt = self._quantiles(u)
        k = (torch.searchsorted(self.cumulative, self._asked, right=True) - 1).clamp(0, len(self.t) - 2)
        self._known = (self.cumulative.diff() / self.t.diff())[k]
        return self.t[k] + (self._asked - self.cumulative[k]) / self._known, self._known * learnt

    @inner
    def learn(self, integrand: Float[Tensor, " n"]) -> None:
        """Take into account the integrand at the times given last.

        Raises:
            ValueError: for another number of them.
        """
        if integrand.shape != self._asked.shape:
            raise ValueError(f"integrand must be at the {len(self._asked)} times given last; got {len(integrand)}")
        self.quantiles = torch.cat([self.quantiles, self._asked])
        self.squares = torch.cat([self.squares, (integrand / self._known).square()])

    def _quantiles(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Quantiles of the known factor for uniform `u`, and the histogram's density there, at first 1."""
        if not len(self.quantiles):
            return u, torch.ones_like(u)
        place = (self.quantiles * BINS).long().clamp(max=BINS - 1)
        count = torch.bincount(place, minlength=BINS)
        mean = torch.bincount(place, self.squares, minlength=BINS) / count.clamp(min=1)
        size = torch.where(count > 0, mean, self.squares.mean()).sqrt()
        size = torch.exp2((2 * size.log2()).round() / 2)  # coarse, or rounding errors would grow from draw to draw
        density = 0.9 * size / size.mean() + 0.1  # never so small that one image outweighs all
        edges = torch.cat([density.new_zeros(1), density.cumsum(0) / BINS])
        edges[-1] = 1 + 1e-12
        k = (torch.searchsorted(edges, u, right=True) - 1).clamp(0, BINS - 1)
        return (k + (u - edges[k]) * BINS / density[k]) / BINS, density[k]


def _cumulative(process: Process, c: Tensor, t: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    """The share of int [sum_i (d gamma_i/dt)^2 c_i / (c_i + e^gamma_i)]^(1/2) dt reached by the times t.

    Normals of variance c contribute (d gamma_i/dt) c_i / (c_i + e^gamma_i) to the diffusion term; what another model
    saves scatters by its root at most, for each component that moves. A twentieth is spread evenly, to miss nothing.
    """
    cells = []
    for some in t.unfold(0, 2, 1).split(64):
        start, end = (process.schedule.gamma(edge) for edge in some.unbind(1))
        square = (end - start).square() * torch.sigmoid(c.double().log() - (start + end) / 2)
        cells.append(square.flatten(1).sum(1).sqrt())
    total = torch.cat([t[:1], torch.cat(cells).cumsum(0)])
    return torch.lerp(total / total[-1] if total[-1] > 0 else t, t, 0.05)
