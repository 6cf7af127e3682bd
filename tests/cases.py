"""One of everything: bases, priors and schedules for a small shape, and a coupled Gaussian to try them on."""

import torch

from gudlib import bases, priors, schedules

SHAPE = (1, 2, 3)
D = 6


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def times(n=9, low=0.0, high=1.0):
    return torch.linspace(low, high, n, dtype=torch.float64)


_root = randn(D, D, seed=1) + torch.diag(torch.arange(D, 0, -1, dtype=torch.float64))
COVARIANCE = 0.2 * _root @ _root.T  # of images, flattened
MEAN = randn(D, seed=2)  # of images, flattened
COLUMN = bases.Pixel(SHAPE).label("column")

BASES = {
    "pixel": lambda: bases.Pixel(SHAPE),
    "pca": lambda: bases.PCA(torch.linalg.eigh(COVARIANCE)[1].T.flip(0)[None], SHAPE),
    "fourier": lambda: bases.Fourier(SHAPE),
    "dct": lambda: bases.DCT(SHAPE),
    "haar": lambda: bases.Haar(SHAPE, 2),
}


def matrix(basis):
    """Rows of U."""
    return basis(torch.eye(D, dtype=torch.float64).reshape(D, *SHAPE)).reshape(D, D).T


def moments(basis):
    """Exact moments of the coupled Gaussian in a basis."""
    u = matrix(basis)
    return priors.Moments((u @ MEAN).reshape(SHAPE), (u @ COVARIANCE @ u.T).diagonal().reshape(SHAPE))


PRIORS = {
    "isotropic": lambda m: priors.isotropic(m, 0.7),
    "whitened": priors.whitened,
    "interpolated": lambda m: priors.interpolated(m, 0.4),
    "power law": lambda m: priors.power_law(m, bases.DCT(SHAPE).label("wavenumber")),
}

SCHEDULES = {
    "linear": lambda p: schedules.linear(SHAPE),
    "vp": lambda p: schedules.vp(SHAPE),
    "cosine": lambda p: schedules.cosine(SHAPE),
    "soft conditioning": lambda p: schedules.soft_conditioning(p.order, 1.6, p.log_variance),
    "columns": lambda p: schedules.sequential(COLUMN, 0.5),
    "user function": lambda p: schedules.Schedule(lambda t: -6 + 10 * t**2 + t * COLUMN.to(t), SHAPE),
}
