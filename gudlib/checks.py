"""What public functions accept: numbers in a range, grey levels, data. Each answers what it was given, or says why not.

A number of numpy or torch counts as Python's. *Grey levels* are uint8, *data* are the floating numbers that models see,
in [-1, 1] for pictures (`gudlib.data`). Data may be anything finite, a field of physics for instance, but not grey
levels with another dtype: whole numbers beyond 1 are refused.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SEEDS = 2**63  # of torch's generators
FEW = 64  # images that tell grey levels from data


def whole(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """A whole number from `least` to `most`.

    Raises:
        ValueError: for anything else; it names the argument.

    >>> import numpy
    >>> whole("steps", numpy.int64(3))
    3
    """
    plain = python(value)
    try:
        number = None if isinstance(plain, bool) else operator.index(plain)
    except TypeError:
        number = None
    if number is None:
        raise ValueError(f"{name} must be a whole number; got {value!r}")
    if number < least or (most is not None and number > most):
        wanted = f"be at least {least}" if most is None else f"lie between {least} and {most}"
        raise ValueError(f"{name} must {wanted}; got {value!r}")
    return number


def seed(name: str, value: Any) -> int:
    """A seed of torch's generators, a whole number below 2^63.

    Raises:
        ValueError: for anything else; it names the argument.
    """
    return whole(name, value, -SEEDS, SEEDS - 1)


def real(
    name: str,
    value: Any,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
) -> float:
    """A finite number in a range, of which `above` and `below` aren't part.

    Raises:
        ValueError: for anything else; it names the argument.
    """
    plain = python(value)
    try:
        number = math.nan if isinstance(plain, str | bytes | bool) else float(plain)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) and above < number < below and least <= number <= most):
        limits = {"above": above, "at least": least, "below": below, "at most": most}
        wanted = " and ".join(f"{word} {limit:g}" for word, limit in limits.items() if math.isfinite(limit))
        if math.isfinite(least + most):
            wanted = f"between {least:g} and {most:g}"
        raise ValueError(f"{name} must be a finite number{f' {wanted}' if wanted else ''}; got {value!r}")
    return number


def flag(name: str, value: Any) -> bool:
    """Yes or no.

    Raises:
        ValueError: for anything but True and False, of numpy or torch too; it names the argument.
    """
    plain = python(value)
    if not isinstance(plain, bool):
        raise ValueError(f"{name} must be True or False; got {value!r}")
    return plain


def python(value: Any) -> Any:
    """A number of numpy or torch as Python's; anything else as it is."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value


def settle(config: Any, found: dict[str, Any]) -> None:
    """Set fields of a frozen dataclass that is being made to what their checks answered."""
    for name, value in found.items():
        object.__setattr__(config, name, value)


def one_of(name: str, value: Any, known: Sequence[str]) -> str:
    """A word that is known.

    Raises:
        ValueError: for another one; it names the argument and what is known.
    """
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be one of {tuple(known)}; got {value!r}")
    return value


def grey(name: str, images: Any, shape: Sequence[int] | None = None, least: int = 1) -> Tensor:
    """Grey levels (n, c, h, w), uint8, at least so many images, of a shape (c, h, w) if one is given.

    Raises:
        ValueError: for anything else; it names the argument.
    """
    right = isinstance(images, Tensor) and images.dtype == torch.uint8 and images.ndim == 4 and len(images) >= least
    if not right or min(images.shape[1:]) < 1 or (shape is not None and tuple(images.shape[1:]) != tuple(shape)):
        wanted = ", ".join(map(str, shape or "chw"))
        number = f", n at least {least}" if least > 1 else ""
        raise ValueError(f"{name} must be uint8 of shape (n, {wanted}){number}; got {what(images)}")
    return images


def data(name: str, values: Any, shape: Sequence[int] | None = None, least: int = 1) -> Tensor:
    """Data (n, c, h, w): floating, finite, no grey levels, at least so many, of a shape (c, h, w) if one is given.

    Raises:
        ValueError: for anything else; it names the argument.
    """
    right = isinstance(values, Tensor) and values.is_floating_point() and values.ndim == 4 and len(values) >= least
    if not right or min(values.shape[1:]) < 1 or (shape is not None and tuple(values.shape[1:]) != tuple(shape)):
        wanted, number = ", ".join(map(str, shape or "chw")), f", n at least {least}" if least > 1 else ""
        hint = (
            "; for grey levels see gudlib.data.scale and dequantise"
            if getattr(values, "dtype", 0) == torch.uint8
            else ""
        )
        raise ValueError(f"{name} must be floating numbers of shape (n, {wanted}){number}; got {what(values)}{hint}")
    some = values[:FEW].detach()
    if bool((some.abs().amax() > 1) & (some == some.round()).all()):
        raise ValueError(
            f"{name} must be data, for pictures in [-1, 1]; got whole numbers up to {some.abs().amax().item():g}, grey "
            "levels perhaps: see gudlib.data.scale and dequantise"
        )
    finite(name, values)
    return values


def images(name: str, values: Any, least: int = 1, shape: Sequence[int] | None = None) -> Tensor:
    """Grey levels or data (n, c, h, w), at least so many, of a shape (c, h, w) if one is given.

    Raises:
        ValueError: for anything else; it names the argument.
    """
    floating = isinstance(values, Tensor) and values.is_floating_point()
    return (data if floating else grey)(name, values, shape, least)


def batch(name: str, values: Any) -> Tensor:
    """Numbers (n, c, h, w) of any kind, none of the sizes of an image 0.

    Raises:
        ValueError: for anything else; it names the argument.
    """
    if not isinstance(values, Tensor) or values.ndim != 4 or min(values.shape[1:]) < 1:
        raise ValueError(f"{name} must be a tensor of shape (n, c, h, w); got {what(values)}")
    return values


def lattice(name: str, values: Any) -> Tensor:
    """Finite numbers on square lattices (*n, size, size), at least one; in half precision as float32.

    Raises:
        ValueError: for anything else; it names the argument.
    """
    right = isinstance(values, Tensor) and values.ndim > 1 and values.numel() and not values.is_complex()
    if not right or values.shape[-1] != values.shape[-2]:
        raise ValueError(f"{name} must be numbers of shape (*n, size, size); got {what(values)}")
    return single(finite(name, values))


def single(values: Tensor) -> Tensor:
    """The same, in half precision as float32, in which all operations exist."""
    return values.float() if values.dtype in (torch.half, torch.bfloat16) else values


def levels(name: str, values: Any) -> Tensor:
    """Grey levels, uint8, of any shape.

    Raises:
        ValueError: for anything else; it names the argument.
    """
    if not isinstance(values, Tensor) or values.dtype != torch.uint8:
        raise ValueError(f"{name} must be grey levels, uint8; got {what(values)}")
    return values


def finite(name: str, values: Tensor) -> Tensor:
    """Numbers without NaN and infinities.

    Raises:
        ValueError: if there are some; it names the argument and says how many, and where the first is.
    """
    if not isinstance(values, Tensor):
        raise ValueError(f"{name} must be a tensor of numbers; got {what(values)}")
    if not bool(values.isfinite().all()):
        wrong = (~values.isfinite()).nonzero()
        first = ", ".join(map(str, wrong[0].tolist()))
        raise ValueError(f"{name} must be finite; {len(wrong)} of {values.numel()} numbers are not, first [{first}]")
    return values


def positive(name: str, values: Tensor) -> Tensor:
    """Numbers above 0.

    Raises:
        ValueError: if some are not; it names the argument.
    """
    if not bool((values > 0).all()):
        raise ValueError(f"{name} must be above 0 everywhere; the smallest is {values.min().item():g}")
    return values


def what(value: Any) -> str:
    """What a value is, in a message."""
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
    return f"{type(value).__name__}{shape}"
