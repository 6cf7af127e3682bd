"""One of everything: bases, priors and schedules for a small shape, and a coupled Gaussian to try them on."""

import torch
from torch import nn

from gudlib import bases, priors, schedules

PATIENCE = 1200  # seconds: against waiting for ever, on however busy a machine; nothing is expected to take as long
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


class MLP(nn.Module):
    """A residual multilayer perceptron of images and gamma: a network that is quick to train."""

    def __init__(self, shape, inputs, width=128, depth=3):
        super().__init__()
        self.config = {"kind": "mlp", "width": width, "depth": depth}
        self.shape = shape
        c, h, w = shape
        self.stem = nn.Linear((inputs + c) * h * w, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(depth)
        )
        self.head = nn.Linear(width, c * h * w)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images, gamma):
        x = self.stem(torch.cat([images.flatten(1), gamma.flatten(1) / 10], dim=1))
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x).reshape(-1, *self.shape)
