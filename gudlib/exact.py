r"""Closed forms: data whose score, denoiser and likelihood are known exactly.

They are models like a network, `(white_t, gamma) -> eps_hat`, in white components and for any gamma vector. With
A = diag alpha and N = diag sigma^2, a Gaussian N(m, C) diffuses to N(A m, A C A + N), and

    E[chi_0 | chi_t] = m + C A (A C A + N)^-1 (chi_t - A m).

How much the noise hides is measured by the error of the best prediction, and the error by information (I-MMSE):
I(chi_0; chi at gamma') - I(chi_0; chi at gamma'') = 1/2 int sum_i E(eps_i - eps_hat_i)^2 d gamma_i along *any* path.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gudlib import checks
from gudlib.doors import door, inner
from gudlib.process import Batch, Gamma, to_eps
from gudlib.schedules import PerComponent, Schedule, alpha, sigma

Each = Float[Tensor, "b *components"]  # a number for each of d components, whose axes are (c, h, w) or one


class GaussianMixture:
    """A mixture of `k` normal distributions over `d` components, of any covariance.

    Arguments:
        means: (k, d), white units.
        covariances: (k, d, d), symmetric positive semi-definite.
        weights: (k,), positive; normalised here. Default equal.

    Raises:
        ValueError: if the shapes do not fit, a weight is not positive, or a covariance is none.
    """

    @door
    def __init__(
        self,
        means: Float[Tensor, "k d"],
        covariances: Float[Tensor, "k d d"],
        weights: Float[Tensor, " k"] | None = None,
    ) -> None:
        weights = means.new_ones(len(means)) if weights is None else weights
        checks.positive("weights", weights)
        _definite("covariances", covariances, 10 * means.shape[1] * torch.finfo(covariances.dtype).eps)
        self.means, self.covariances, self.weights = means, covariances, weights / weights.sum()

    @door
    def sample(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, "n d"]:
        """`n` draws (n, d)."""
        n = checks.whole("n", n)
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        options = {"dtype": self.means.dtype, "device": self.means.device}
        noise = torch.randn(n, self.means.shape[1], generator=generator, **options)
        values, vectors = torch.linalg.eigh(self.covariances)
        root = vectors * values.clamp(min=0).sqrt()[:, None, :]
        return self.means[which] + torch.einsum("nij,nj->ni", root[which], noise)

    @inner
    def score(self, white_t: Batch, gamma: Gamma) -> Batch:
        """Gradient of log p(chi_t) with respect to chi_t, (b, c, h, w)."""
        solved, log_joint = self._posterior(white_t, gamma)
        return -(log_joint.softmax(0)[..., None] * solved).sum(0).reshape(white_t.shape)

    @inner
    def __call__(self, white_t: Batch, gamma: Gamma) -> Batch:
        """The best prediction of the noise, E[eps | chi_t]."""
        return to_eps(self.score(white_t, gamma), "score", white_t, gamma)

    @inner
    def log_prob(self, white_t: Batch, gamma: Gamma | None = None) -> Float[Tensor, " b"]:
        """log p(chi_t) in nats for each of the batch; without gamma, that of the data themselves."""
        gamma = white_t.new_full((1, *white_t.shape[1:]), -torch.inf) if gamma is None else gamma
        return self._posterior(white_t, gamma)[1].logsumexp(0)

    @inner
    def covariance(self, gamma: Float[Tensor, "..."]) -> Float[Tensor, "k b d d"]:
        """A C A + N of every mixture component at noise level gamma, (k, b, d, d) with b = 1 for one gamma."""
        level = self._each(gamma)
        a = alpha(level)
        return a[:, :, None] * self.covariances[:, None] * a[:, None, :] + torch.sigmoid(level).diag_embed()

    def _each(self, gamma: Tensor) -> Float[Tensor, "b d"]:
        d = self.means.shape[1]
        if gamma.numel() % d:
            raise ValueError(f"gamma must have {d} components; got shape {tuple(gamma.shape)}")
        return gamma.reshape(-1, d)

    def _posterior(self, white_t: Batch, gamma: Gamma) -> tuple[Tensor, Tensor]:
        """(A C A + N)^-1 (chi_t - A m), shape (k, b, d), and log (weight * density), shape (k, b)."""
        x, d = white_t.flatten(1), self.means.shape[1]
        if x.shape[1] != d:
            raise ValueError(f"white_t must have {d} components; got shape {tuple(white_t.shape)}")
        level = self._each(gamma)
        root = _root(self.covariance(gamma))  # (k, 1 or b, d, d)
        off = x - alpha(level) * self.means[:, None]  # (k, b, d)
        if root.shape[1] == 1:  # one gamma for all: one factorisation serves the whole batch
            solved = torch.cholesky_solve(off.mT, root[:, 0]).mT
        else:
            solved = torch.cholesky_solve(off[..., None], root)[..., 0]
        log_det = 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_density = -0.5 * ((off * solved).sum(-1) + log_det + d * math.log(2 * math.pi))
        return solved, log_density + self.weights.log()[:, None]


@door
def gaussian(mean: Float[Tensor, " d"], covariance: Float[Tensor, "d d"]) -> GaussianMixture:
    """A single normal distribution with full covariance, as a model."""
    return GaussianMixture(mean[None], covariance[None])


@door
def curve(n: int, length: float) -> Float[Tensor, "n n"]:
    """Covariance of the heights of a smooth random curve at n places, exp(-(i - j)^2 / 2 length^2), float64 (n, n)."""
    length = checks.real("length", length, above=0)
    place = torch.arange(checks.whole("n", n), dtype=torch.float64)
    return (-0.5 * ((place[:, None] - place) / length) ** 2).exp()


@inner
def gaussian_eps(white_t: Batch, gamma: Gamma, white_variance: Float[Tensor, "c h w"]) -> Batch:
    """E[eps | chi_t] for independent N(0, c): sigma chi_t / (alpha^2 c + sigma^2)."""
    noise = torch.sigmoid(gamma)
    return noise.sqrt() * white_t / (torch.sigmoid(-gamma) * white_variance + noise)


@inner
def gaussian_error(gamma: Each, covariance: Float[Tensor, "d d"]) -> Each:
    """E(eps_i - eps_hat_i)^2 of the best prediction for N(m, C), any C: 1 - sigma_i^2 [(A C A + N)^-1]_ii.

    Arguments:
        gamma: noise levels, (b, c, h, w) with c h w = d.
        covariance: C of the white data, (d, d).
    """
    noised = _noised(gamma, covariance)
    precision = torch.cholesky_inverse(_root(noised)).diagonal(dim1=-2, dim2=-1)
    return 1 - torch.sigmoid(gamma) * precision.reshape(gamma.shape)


@inner
def linear_eps(gamma: Each, covariance: Float[Tensor, "d d"]) -> Float[Tensor, "b d d"]:
    """The best denoiser of N(0, C) as a matrix, eps_hat = B chi_t: B = diag(sigma) (A C A + N)^-1, for each gamma."""
    noised = _noised(gamma, covariance)
    return sigma(gamma).flatten(1)[:, :, None] * torch.linalg.inv(noised)


@inner
def linear_error(matrix: Float[Tensor, "b d d"], gamma: Each, covariance: Float[Tensor, "d d"]) -> Each:
    """E(eps_i - (B chi_t)_i)^2 of any linear denoiser B for data N(0, C): 1 - 2 sigma_i B_ii + [B (A C A + N) B^T]_ii.

    Arguments:
        matrix: B at each noise level, (b, d, d).
        gamma: the noise levels, (b, c, h, w) with c h w = d.
        covariance: C of the white data, (d, d).
    """
    noised = _noised(gamma, covariance)
    matrix = matrix.to(noised.dtype)
    own = sigma(gamma).flatten(1) * matrix.diagonal(dim1=1, dim2=2)
    return (1 - 2 * own + torch.einsum("bij,bjk,bik->bi", matrix, noised, matrix)).view_as(gamma)


@door
def normal_kl(covariance: Float[Tensor, "d d"], other: Float[Tensor, "d d"]) -> Float[Tensor, ""]:
    """KL(N(0, S) || N(0, V)) in nats, (tr V^-1 S - d - log det V^-1 S) / 2.

    Raises:
        ValueError: if one of the two is no covariance, positive definite.
    """
    covariance, other = _definite("covariance", covariance).double(), _definite("other", other).double()
    ratio = torch.linalg.solve(other, covariance)
    return 0.5 * (ratio.trace() - len(ratio) - torch.logdet(ratio))


@door
def information(
    schedule: Schedule, error: Callable[[Gamma], Batch], points: int = 16, device: torch.device | str = "cpu"
) -> PerComponent:
    r"""What each component adds along a schedule, 1/2 int (d gamma_i/dt) E(eps_i - eps_hat_i)^2 dt, in nats, (c, h, w).

    With the error of the best prediction the sum is I(chi_0; chi(t=0)) - I(chi_0; chi(t=1)), whatever the way between;
    how it falls to the components depends on the way. With that of a network the sum is the diffusion term of the
    likelihood bound. The integral is Gauss-Legendre's on pieces that end at the kinks and over which no gamma moves by
    more than 2: good to ten digits for the schedules here, the steep start of `vp` included.

    Arguments:
        schedule: without a batch of its own.
        error: E(eps_i - eps_hat_i)^2 at noise levels (b, c, h, w), of the same shape, as `gaussian_error`.
        points: nodes in each piece.
        device: of the noise levels that `error` is given.

    References:
        Mutual Information and Minimum Mean-Square Error in Gaussian Channels, D. Guo, S. Shamai, S. Verdu, 2005,
        https://arxiv.org/abs/cs/0412108, theorem 2
        Variational Diffusion Models, D. P. Kingma et al., 2021, https://arxiv.org/abs/2107.00630, section 5.1
    """
    points = checks.whole("points", points)
    edges = torch.cat([torch.zeros(1), schedule.kinks, torch.ones(1)])
    while bool((wide := schedule.gamma(edges).diff(dim=0).flatten(1).amax(1) > 2).any()):
        edges = torch.cat([edges, (edges[:-1] + edges[1:])[wide] / 2]).sort().values
    width = edges.diff()
    nodes, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(points))
    t = (edges[:-1, None] + width[:, None] * (nodes + 1) / 2).flatten().to(device)
    weight = (width[:, None] * weights / 2).flatten().to(device)
    return 0.5 * torch.einsum("t,tchw->chw", weight, schedule.dgamma_dt(t) * error(schedule.gamma(t)))


def _definite(name: str, covariance: Float[Tensor, "*k d d"], slack: float = 0.0) -> Float[Tensor, "*k d d"]:
    """A covariance, symmetric and positive definite but for a slack in units of its largest variance, or of 1."""
    covariance = checks.single(covariance)
    largest = covariance.diagonal(dim1=-2, dim2=-1).amax(-1).clamp(min=1)[..., None, None]
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    uneven = bool(((covariance - covariance.mT).abs() > 1e-5 * largest).any())
    if uneven or bool(torch.linalg.cholesky_ex(covariance + slack * largest * eye)[1].any()):
        raise ValueError(
            f"{name} must be symmetric and have no direction of variance {'below' if slack else 'at or below'} 0"
        )
    return covariance


def _noised(gamma: Each, covariance: Float[Tensor, "d d"]) -> Float[Tensor, "b d d"]:
    """A C A + N at each of the noise levels."""
    if gamma[:1].numel() != len(covariance):
        raise ValueError(f"gamma must have {len(covariance)} components; got shape {tuple(gamma.shape)}")
    level = gamma.reshape(-1, len(covariance))
    a = alpha(level)
    return a[:, :, None] * covariance * a[:, None, :] + torch.sigmoid(level).diag_embed()


def _root(matrix: Float[Tensor, "*b d d"]) -> Float[Tensor, "*b d d"]:
    """Cholesky's, NaN where there is none; no one waits for a GPU."""
    root, failed = torch.linalg.cholesky_ex(matrix)
    return root.masked_fill((failed > 0)[..., None, None], math.nan)
