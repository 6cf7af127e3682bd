"""GUD, the generative model that slides from diffusion to autoregression: library of the paper's companion.

Submodules load on first use, so `import gudlib` is quick and `gudlib.schedules` costs what it needs.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

__version__ = "0.1.0"

_SUBMODULES = frozenset(module.name for module in pkgutil.iter_modules(__path__) if module.name[0] != "_")


def __getattr__(name: str) -> ModuleType:
    if name in _SUBMODULES:
        return importlib.import_module(f"gudlib.{name}")
    raise AttributeError(f"module 'gudlib' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES})
