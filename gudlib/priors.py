r"""Priors: the second choice, what data flow to (Gerdes, Welling and Cheng 2024).

A prior is a normal distribution with one scale for each component, `chi ~ N(m, diag S^2)`. Diffusion is written in the
*white* components in which the prior is standard,

    chi_hat_i = (chi_i - m_i) / S_i,      log p(chi) = log p(chi_hat) - sum_i log S_i,

so that the noise has covariance `U^T S^2 U` in the data. `S = 1` is the usual isotropic noise; `S_i^2 = Sigma_i`, the
data's own variance ("whitening"), gives every white component unit variance at every time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gudlib import checks, statistics
from gudlib.doors import door, inner

Components = Float[Tensor, "b c h w"]
PerComponent = Float[Tensor, "c h w"]


@dataclass(frozen=True)
class Moments:
    """Mean and variance of every component of a data set.

    Attributes:
        mean: (c, h, w), units of the data.
        variance: Sigma_i, (c, h, w), squared units of the data, as measured.
        floor: variances count as at least this share of the largest wherever one divides by them or takes their log.
    """

    mean: PerComponent
    variance: PerComponent
    floor: float = 1e-4

    def __post_init__(self) -> None:
        if not 0 < checks.real("floor", self.floor) < 1:
            raise ValueError(f"floor must lie between 0 and 1, as a share of the largest variance; got {self.floor}")
        for name, values in {"mean": self.mean, "variance": self.variance}.items():
            if not isinstance(values, Tensor) or not values.is_floating_point() or values.ndim != 3:
                raise ValueError(f"{name} must be floating numbers of shape (c, h, w); got {checks.what(values)}")
            checks.finite(name, values)
        if self.mean.shape != self.variance.shape:
            shapes = tuple(self.mean.shape), tuple(self.variance.shape)
            raise ValueError(f"mean and variance must have one shape; got {shapes}")

    @property
    def floored(self) -> PerComponent:
        """max(Sigma_i, floor * max Sigma), (c, h, w)."""
        return self.variance.clamp(min=self.floor * self.variance.max().item())

    @property
    def n_floored(self) -> int:
        """How many components lie below the floor."""
        return int((self.variance < self.floored).sum())


@door
def measure(
    basis: Callable[[Tensor], Tensor], images: statistics.Images, floor: float = 1e-4, symmetries: str = "none"
) -> Moments:
    """Component means and variances of `images` (b, c, h, w) in a basis, accumulated in float64.

    Arguments:
        basis: the map from images to components; of uint8 images, an orthonormal one.
        images: the data, at least two images. Grey levels (uint8) count as dequantised, exactly: at their centres, with
            the variance `statistics.WITHIN_LEVEL` of the noise within a level added to that of every component.
        floor: see `Moments`.
        symmetries: `none`, `mirror` or `all`, measure all mirror images too (`statistics.mirrored`).

    Raises:
        ValueError: if there are fewer than two images, they are neither grey levels nor data, symmetries are unknown,
            or `all` of images that are not square.
    """
    checks.images("images", images, least=2)
    parts = images.split(statistics.CHUNK)
    near = basis(statistics.centres(parts[0])).double().mean(0)  # close to the mean, so that no digits cancel below
    count, first, second = 0, torch.zeros_like(near), torch.zeros_like(near)
    for part in parts:
        away = basis(statistics.mirrored(statistics.centres(part), symmetries)).double() - near
        count, first, second = count + len(away), first + away.sum(0), second + away.square().sum(0)
    variance = (second - first.square() / count) / (count - 1)
    noise = 0.0 if images.is_floating_point() else statistics.WITHIN_LEVEL
    return Moments(near + first / count, variance + noise, floor)


class Prior(nn.Module):
    """`N(m, diag S^2)` over components, and the data in its units.

    Arguments:
        moments: mean and variance of the data's components.
        scale: S_i > 0, (c, h, w), units of the data.

    Raises:
        ValueError: if the scale's shape is not the moments', or a scale is not positive and finite.
    """

    @door
    def __init__(self, moments: Moments, scale: PerComponent) -> None:
        super().__init__()
        if scale.shape != moments.mean.shape:
            raise ValueError(f"scale must have shape {tuple(moments.mean.shape)}; got {tuple(scale.shape)}")
        if not bool(((scale > 0) & scale.isfinite()).all()):
            raise ValueError(f"scale must be positive and finite; its smallest entry is {scale.min().item():g}")
        self.floor = moments.floor
        self.mean: Tensor
        self.scale: Tensor
        self.variance: Tensor
        self.register_buffer("mean", moments.mean)
        self.register_buffer("scale", scale)
        self.register_buffer("variance", moments.variance)

    @property
    def shape(self) -> tuple[int, ...]:
        """(c, h, w)."""
        return tuple(self.mean.shape)

    @property
    def moments(self) -> Moments:
        """The data's moments, in components."""
        return Moments(self.mean, self.variance, self.floor)

    @property
    def white_variance(self) -> PerComponent:
        """c_i = Sigma_i / S_i^2, the variance of the white data, (c, h, w); 1 where the prior whitens."""
        return self.variance / self.scale**2

    @property
    def order(self) -> PerComponent:
        """l_i = -log Sigma_i (floored), the paper's ordering variable for soft-conditioning, (c, h, w).

        Components below the floor share one l, and no inverse softness sets them apart: `ranked` does.
        """
        return -self.moments.floored.log()

    @door
    def ranked(self, step: float) -> Float[Tensor, "c h w"]:
        """The order with ties broken by rank, float64 (c, h, w): where l repeats, it rises by `step` instead.

        Components are ranked by measured variance, the largest first, and equal ones by place; sorted, all later l move
        up along with a step, so that other differences stay as they are.

        Arguments:
            step: above 0, in units of l; (l_max - l_min) / (n - 1) goes on as steeply as l does on average.

        Raises:
            ValueError: if the step is not above 0.

        >>> prior = isotropic(Moments(torch.zeros(1, 1, 4), torch.tensor([[[0.9, 0.2, 0.3, 0.9]]]), floor=0.5))
        >>> prior.ranked(0.25)  # two are floored to 0.45
        tensor([[[0.1054, 1.2985, 1.0485, 0.3554]]], dtype=torch.float64)
        """
        if not 0 < step < math.inf:
            raise ValueError(f"step must be above 0 and finite; got {step}")
        rank = self.variance.flatten().argsort(descending=True, stable=True)
        order = self.order.double().flatten()[rank]
        rise = order.diff()
        risen = torch.cat([order[:1], order[0] + torch.where(rise > 0, rise, step).cumsum(0)])
        return risen[rank.argsort()].view_as(self.order)

    @property
    def log_variance(self) -> PerComponent:
        """log of the white data's variance with the floor applied, (c, h, w): 0 everywhere for the whitened prior."""
        return (self.moments.floored / self.scale**2).log()

    @property
    def log_volume(self) -> Tensor:
        """sum_i log S_i, a scalar: log p(data) = log p(white) - log_volume."""
        return self.scale.log().sum()

    @inner
    def whiten(self, components: Float[Tensor, "... c h w"]) -> Float[Tensor, "... c h w"]:
        """chi_hat = (chi - m) / S."""
        return (components - self.mean.to(components)) / self.scale.to(components)

    @inner
    def unwhiten(self, white: Float[Tensor, "... c h w"]) -> Float[Tensor, "... c h w"]:
        """chi = m + S chi_hat."""
        return self.mean.to(white) + self.scale.to(white) * white

    @door
    def sample(self, n: int, generator: torch.Generator | None = None) -> Components:
        """`n` draws of components (n, c, h, w)."""
        n = checks.whole("n", n)
        noise = torch.randn(n, *self.mean.shape, generator=generator, dtype=self.mean.dtype, device=self.mean.device)
        return self.unwhiten(noise)

    @door
    def log_prob(self, components: Components) -> Float[Tensor, " b"]:
        """Log-density in nats of each of a batch of components (b, c, h, w)."""
        square = self.whiten(components).square().flatten(1).sum(1)
        return -0.5 * square - 0.5 * self.mean.numel() * math.log(2 * math.pi) - self.log_volume.to(components)

    @door
    def kl(self, gamma: PerComponent | None = None) -> PerComponent:
        """KL divergence, in nats for each component (c, h, w), from the data's independent normals to the prior.

        With `gamma` (c, h, w) the data are first diffused that far: what remains between `chi(t)` and the prior.
        """
        c = self.white_variance
        if gamma is not None:
            c = torch.sigmoid(-gamma) * c + torch.sigmoid(gamma)
        return 0.5 * (c - 1 - c.log())


@door
def isotropic(moments: Moments, scale: float = 1.0) -> Prior:
    """The same noise for all components: S_i = scale, in units of the data.

    Raises:
        ValueError: if the scale is not positive and finite.
    """
    return Prior(moments, torch.full_like(moments.mean, checks.real("scale", scale, above=0)))


@door
def whitened(moments: Moments) -> Prior:
    """Noise with the data's own variances: S_i^2 = Sigma_i, floored."""
    return interpolated(moments, 1.0)


@door
def interpolated(moments: Moments, r: float) -> Prior:
    """Between isotropic (r = 0) and whitened (r = 1): S_i = Sigma_i^(r/2), floored.

    The paper sweeps a parameter `r` beside the softness `a` (section 5.1); that it is this exponent is our reading.

    Raises:
        ValueError: if r is not finite, or so large that a scale is not.
    """
    return Prior(moments, moments.floored ** (checks.real("r", r) / 2))


@door
def power_law(moments: Moments, wavenumber: PerComponent, exponent: float = 2.0) -> Prior:
    """Noise of a power-law spectrum: S_i^2 proportional to k_i^-exponent, with the data's total variance.

    Arguments:
        moments: of the data.
        wavenumber: k_i >= 0, (c, h, w); k = 0 counts as the smallest other wavenumber.
        exponent: 0 is white noise, about 2 is natural images.

    Raises:
        ValueError: if the wavenumbers are of another shape, negative, or all zero.
    """
    exponent = checks.real("exponent", exponent)
    if wavenumber.shape != moments.mean.shape or bool((wavenumber < 0).any()) or not bool((wavenumber > 0).any()):
        raise ValueError(
            f"wavenumber must be of shape {tuple(moments.mean.shape)}, not negative and not all zero; "
            f"got shape {tuple(wavenumber.shape)}, smallest {wavenumber.min().item():g}"
        )
    k = wavenumber.to(moments.mean).clamp(min=wavenumber[wavenumber > 0].min().item())
    power = k**-exponent
    return Prior(moments, (power * moments.variance.sum() / power.sum()).sqrt())


@door
def multi_information(covariance: Float[Tensor, "n n"], noise: float = 0.0) -> Float[Tensor, ""]:
    """What normal components lose when taken as independent, KL(N(0, C) || N(0, diag C)), in nats for each of them.

    (sum_i log C_ii - log det C) / 2n: zero for a diagonal C only, and blind to the scale of a component.

    Arguments:
        covariance: C of n components, (n, n).
        noise: standard deviation of white noise added first, C + noise^2, the same in every orthonormal basis.

    Raises:
        ValueError: if C is not positive definite, as with fewer images than components and no noise.
    """
    c = covariance.double() + noise**2 * torch.eye(len(covariance), dtype=torch.float64, device=covariance.device)
    root, failed = torch.linalg.cholesky_ex(c)
    if int(failed):
        raise ValueError(f"covariance of {len(c)} components is not positive definite; add noise or images")
    return 0.5 * (c.diagonal().log() - 2 * root.diagonal().log()).mean()
