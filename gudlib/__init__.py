"""GUD, the generative model that slides from diffusion to autoregression: library of the paper's companion.

The names below are what most programs need; modules, with all else, load on first use too, so `import gudlib` is quick.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gudlib.bases import DCT, PCA, Fourier, Haar, Pixel
    from gudlib.data import dequantise, load_folder, scale, to_uint8
    from gudlib.denoiser import Denoiser
    from gudlib.likelihood import bound, flow
    from gudlib.model import GUD
    from gudlib.networks import Transformer, UNet
    from gudlib.plotting import sample_grid
    from gudlib.priors import Prior, isotropic, whitened
    from gudlib.process import Process
    from gudlib.samplers import extend, inpaint, sample
    from gudlib.schedules import Schedule, sequential, soft_conditioning
    from gudlib.training import Trainer, TrainingConfig

# Threads of torch's OpenMP sleep while they wait for one another: spinning, two threads on a busy core stop each other
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is first imported

__version__ = "0.3.0"
__all__ = [
    "DCT",
    "GUD",
    "PCA",
    "Denoiser",
    "Fourier",
    "Haar",
    "Pixel",
    "Prior",
    "Process",
    "Schedule",
    "Trainer",
    "TrainingConfig",
    "Transformer",
    "UNet",
    "bound",
    "dequantise",
    "extend",
    "flow",
    "inpaint",
    "isotropic",
    "load_folder",
    "sample",
    "sample_grid",
    "scale",
    "sequential",
    "soft_conditioning",
    "to_uint8",
    "whitened",
]

_HOMES = {
    "bases": ("DCT", "PCA", "Fourier", "Haar", "Pixel"),
    "data": ("dequantise", "load_folder", "scale", "to_uint8"),
    "denoiser": ("Denoiser",),
    "likelihood": ("bound", "flow"),
    "model": ("GUD",),
    "networks": ("Transformer", "UNet"),
    "plotting": ("sample_grid",),
    "priors": ("Prior", "isotropic", "whitened"),
    "process": ("Process",),
    "samplers": ("extend", "inpaint", "sample"),
    "schedules": ("Schedule", "sequential", "soft_conditioning"),
    "training": ("Trainer", "TrainingConfig"),
}
_NAMES = {name: home for home, names in _HOMES.items() for name in names}
_MODULES = frozenset(module.name for module in pkgutil.iter_modules(__path__) if module.name[0] != "_")


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"gudlib.{_NAMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"gudlib.{name}")
    raise AttributeError(f"module 'gudlib' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_NAMES, *_MODULES])
