r"""Basis, prior and schedule together: the diffusion process (Gerdes, Welling and Cheng 2024).

One point has four names, each a tensor of shape (batch, channel, height, width):

    data --U--> components --(. - m) / S--> white --U^T--> white_data

Diffusion happens in `white`, independently in every component,

    d chi_i = -1/2 beta_i chi_i dt + sqrt(beta_i) dW_i;

networks are given `white_data`, which is an image again. A *model* is any function `(white_t, gamma) -> eps_hat`: a
network, or a closed form of `gudlib.exact`. It gets the vector gamma, never t nor the schedule.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gudlib.bases import Basis, Pixel
from gudlib.doors import door, inner
from gudlib.priors import Moments, Prior, isotropic
from gudlib.schedules import Schedule, Time, alpha, sigma

Batch = Float[Tensor, "b c h w"]
Numbers = Float[Tensor, "..."]  # that broadcast
Gamma = Float[Tensor, "*#batch #c #h #w"]  # broadcasts to a Batch
Model = Callable[[Batch, Gamma], Batch]


@inner
def to_eps(value: Numbers, kind: str, white_t: Numbers, gamma: Numbers) -> Numbers:
    """The noise `eps_hat` that a prediction of another kind amounts to.

    Arguments:
        value: the prediction, same shape as white_t.
        kind: `eps`; `x0` (the white data); `score` = -eps / sigma; `v` = alpha eps - sigma x0.
        white_t: the noised white components (b, c, h, w).
        gamma: their noise level, broadcastable to them.

    Raises:
        ValueError: for an unknown kind.
    """
    if kind == "eps":
        return value
    if kind == "x0":
        return (white_t - alpha(gamma) * value) / sigma(gamma)
    if kind == "score":
        return -sigma(gamma) * value
    if kind == "v":
        return alpha(gamma) * value + sigma(gamma) * white_t
    raise ValueError(f"kind must be one of eps, x0, score, v; got {kind!r}")


@inner
def from_eps(eps: Numbers, kind: str, white_t: Numbers, gamma: Numbers) -> Numbers:
    """What a prediction of the noise amounts to in another kind; the inverse of `to_eps`, with its arguments.

    Raises:
        ValueError: for an unknown kind.
    """
    if kind == "eps":
        return eps
    if kind == "x0":
        return (white_t - sigma(gamma) * eps) / alpha(gamma)
    if kind == "score":
        return -eps / sigma(gamma)
    if kind == "v":
        return (eps - sigma(gamma) * white_t) / alpha(gamma)
    raise ValueError(f"kind must be one of eps, x0, score, v; got {kind!r}")


@inner
def diffuse(white: Numbers, gamma: Numbers, eps: Numbers) -> Numbers:
    """The forward marginal chi(t) = alpha chi(0) + sigma eps."""
    return alpha(gamma) * white + sigma(gamma) * eps


class Process(nn.Module):
    """One diffusion process: a basis, a prior and a schedule for the same components.

    Raises:
        ValueError: if the three are not of one shape.
    """

    @inner
    def __init__(self, basis: Basis, prior: Prior, schedule: Schedule) -> None:
        super().__init__()
        shapes = {"basis": basis.shape, "prior": tuple(prior.mean.shape), "schedule": schedule.shape}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"basis, prior and schedule must have one component shape; got {shapes}")
        self.basis, self.prior, self.schedule = basis, prior, schedule

    @property
    def shape(self) -> tuple[int, ...]:
        """(c, h, w)."""
        return self.basis.shape

    @inner
    def along(self, schedule: Schedule) -> "Process":
        """The same basis and prior with another schedule; tensors are shared."""
        return Process(self.basis, self.prior, schedule)

    @inner
    def white(self, data: Batch) -> Batch:
        """White components of images."""
        return self.prior.whiten(self.basis(data))

    @inner
    def data(self, white: Batch) -> Batch:
        """Images of white components; the inverse of `white`."""
        return self.basis.inverse(self.prior.unwhiten(white))

    @inner
    def reverse_sde(self, white_t: Batch, t: Time, eps: Batch) -> tuple[Batch, Batch]:
        """Drift -beta (chi / 2 + score) and diffusion sqrt(beta) of the process run backwards, with dt < 0.

        References:
            Reverse-time diffusion equation models, B. D. O. Anderson, 1982,
            https://doi.org/10.1016/0304-4149(82)90051-5
        """
        beta = self.schedule.beta(t)
        score = from_eps(eps, "score", white_t, self.schedule.gamma(t))
        return -beta * (0.5 * white_t + score), beta.sqrt().expand_as(white_t)

    @inner
    def velocity(self, white_t: Batch, t: Time, eps: Batch) -> Batch:
        """d chi / dt of the probability-flow ODE, -beta (chi + score) / 2 = (d gamma/dt) sigma (eps - sigma chi) / 2.

        References:
            Score-Based Generative Modeling through Stochastic Differential Equations, Y. Song et al., 2021,
            https://arxiv.org/abs/2011.13456, section 4.3
        """
        s = self.schedule.sigma(t)
        return 0.5 * self.schedule.dgamma_dt(t) * s * (eps - s * white_t)


@door
def plain(schedule: Schedule) -> Process:
    """The process of data that are white components already: nothing is transformed, mean 0 and scale 1, in float64."""
    zero = torch.zeros(schedule.shape, dtype=torch.float64)
    return Process(Pixel(schedule.shape), isotropic(Moments(zero, zero + 1)), schedule)
