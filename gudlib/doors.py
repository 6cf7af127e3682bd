"""Doors of the library: what a public function is handed is compared with its annotations before it does anything.

`door` makes a function that refuses what does not fit, with a ValueError that names the argument, what came and what is
accepted. Numbers of numpy or torch are handed on as Python's. Sizes of one name, `c h w` say, must agree among the
arguments, and with the `shape` (c, h, w) of the object whose method it is.

`inner` does the same for what runs at every step of training or sampling: of tensors it looks at types and shapes
alone, at a cost of microseconds, and never waits for a GPU. Their numbers are taken on trust, NaN in is NaN out; `door`
refuses tensors that are empty, or not finite.
"""

import functools
import inspect
import math
import operator
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import AbstractArray
from torch import Tensor

from gudlib import checks

Function = TypeVar("Function", bound=Callable[..., Any])
Sizes = dict[str, Any]  # of the axes named so far
Fit = Callable[[Any, Sizes], Any]  # what is handed on for a value, or `_NO`
_NO = object()
_OTHER_DEVICE = "same device|device type for generator|indices should be either on"  # torch's words
_WORDS = {"Float": "floating numbers", "UInt8": "uint8", "Bool": "bool", "Real": "real numbers"}


def door(function: Function) -> Function:
    """The function, but it refuses arguments that are not as annotated, or tensors with numbers that are not finite."""
    return _guarded(function, True)


def inner(function: Function) -> Function:
    """The function, but it refuses arguments that are not as annotated."""
    return _guarded(function, False)


def _guarded(function: Any, looks: bool) -> Any:
    parameters = inspect.signature(function).parameters
    rules = {name: _rule(each.annotation) for name, each in parameters.items()}
    endless = [name for name, each in parameters.items() if each.default in (-math.inf, math.inf)]
    rules |= dict.fromkeys(endless, ("a number, or an infinity", _number_or_infinity))
    defaults = {name: each.default for name, each in parameters.items()}
    names = list(parameters)
    of_shape = names[0] == "self" and any(rule and "<h>" in rule[0] for rule in rules.values())

    def fitting(name: str, value: Any, sizes: Sizes) -> Any:
        rule = rules.get(name)
        if rule is None or value is defaults[name]:
            return value
        found = rule[1](value, sizes)
        if found is _NO:
            wanted = re.sub("<(.*?)>(, )?", lambda axis: _axes(sizes.get(axis[1], axis[1]), axis[2] or ""), rule[0])
            grey = "floating" in wanted and "uint8" not in wanted and getattr(value, "dtype", None) == torch.uint8
            hint = "; for grey levels see gudlib.data.scale and dequantise" if grey else ""
            raise ValueError(f"{name} must be {wanted}; got {_shown(value)}{hint}")
        if looks and isinstance(found, Tensor):
            if not found.numel():
                raise ValueError(f"{name} must not be empty; got {_shown(value)}")
            if found.is_floating_point():
                checks.finite(name, found)
        return found

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True  # in notebooks and in tests a traceback shows the function alone
        sizes: Sizes = {}
        if of_shape and isinstance(shape := getattr(args[0], "shape", None), tuple):
            sizes.update(zip("chw", shape, strict=False))
        given = [fitting(name, value, sizes) for name, value in zip(names, args, strict=False)]
        if kwargs:
            kwargs = {name: fitting(name, value, sizes) for name, value in kwargs.items()}
        try:
            return function(*given, *args[len(names) :], **kwargs)
        except (RuntimeError, _Apart) as error:  # the outermost function has the names that its caller knows
            places = _places({**dict(zip(names, args, strict=False)), **kwargs})
            told = isinstance(error, _Apart) or re.search(_OTHER_DEVICE, str(error))
            if not told or not places:
                raise
            found = ", ".join(f"{name} on {place}" for name, place in places.items())
            raise _Apart(f"{' and '.join(places)} must be where all else is; got {found}") from error

    guarded.looks = looks  # type: ignore[attr-defined]
    return guarded


class _Apart(ValueError):
    """Tensors are on several devices, which torch says without a name."""


def _places(given: dict[str, Any]) -> dict[str, torch.device]:
    return {name: value.device for name, value in given.items() if isinstance(value, Tensor | torch._C.Generator)}


def _axes(size: Any, then: str) -> str:
    """An axis in words, or several, or none."""
    sizes = size if isinstance(size, tuple) else (size,)
    return ", ".join(map(str, sizes)) + then * bool(sizes)


def _shown(value: Any) -> str:
    plain = isinstance(value, str | bytes | int | float | complex | list | tuple | dict | None)
    return repr(value) if plain and len(repr(value)) < 80 else checks.what(value)


def _rule(kind: Any) -> tuple[str, Fit] | None:
    """What an annotation accepts, in words and as a function; nothing for one that says nothing."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if inspect.isclass(kind) and issubclass(kind, AbstractArray):
        return _array(kind)
    if torch.device in parts:
        parts = tuple(part for part in parts if part is not str)  # which may name one
    if origin in (typing.Union, types.UnionType):
        return _either([_rule(part) for part in parts])
    if origin is Literal:
        return f"one of {parts}", lambda value, _: value if value in parts else _NO
    if kind == tuple[int, int, int]:
        return "(channel, height, width), whole numbers, all at least 1", _shape
    if origin is tuple and Ellipsis not in parts:
        return _several(parts)
    if origin in (Sequence, list, tuple):
        return _sequence(_rule(parts[0]))
    if origin is Iterable:
        return "an iterable", lambda value, _: value if isinstance(value, Iterable) else _NO
    if origin in (Mapping, dict):
        return "a mapping", lambda value, _: value if isinstance(value, Mapping) else _NO
    if origin is Callable or kind is Callable:
        return "a function", lambda value, _: value if callable(value) else _NO
    if kind in _PLAIN:
        return _PLAIN[kind]
    if inspect.isclass(kind) and kind not in (Any, inspect.Parameter.empty):
        return f"a {kind.__name__}", lambda value, _: value if isinstance(value, kind) else _NO
    return None


def _number(value: Any, sizes: Sizes) -> Any:
    value = _number_or_infinity(value, sizes)
    return value if value is not _NO and math.isfinite(value) else _NO


def _number_or_infinity(value: Any, _: Sizes) -> Any:
    value = checks.python(value)
    right = isinstance(value, int | float) and not isinstance(value, bool) and value == value
    return value if right else _NO


def _whole(value: Any, _: Sizes) -> Any:
    value = checks.python(value)
    try:
        return _NO if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return _NO


def _shape(value: Any, sizes: Sizes) -> Any:
    found = tuple(_whole(part, sizes) for part in value) if isinstance(value, list | tuple) else ()
    return found if len(found) == 3 and all(part is not _NO and part > 0 for part in found) else _NO


def _flag(value: Any, _: Sizes) -> Any:
    value = checks.python(value)
    return value if isinstance(value, bool) else _NO


def _device(value: Any, _: Sizes) -> Any:
    try:
        return value if torch.device(value) else _NO
    except (RuntimeError, TypeError):
        return _NO


def _path(value: Any, _: Sizes) -> Any:
    return value if isinstance(value, str | PathLike) else _NO


_PLAIN: dict[Any, tuple[str, Fit]] = {
    float: ("a finite number", _number),
    int: ("a whole number", _whole),
    bool: ("True or False", _flag),
    str: ("a text", lambda value, _: value if isinstance(value, str) else _NO),
    Path: ("a path", _path),
    types.NoneType: ("None", lambda value, _: value if value is None else _NO),
    torch.device: ("a device", _device),
    torch.Generator: ("a torch.Generator", lambda x, _: x if isinstance(x, torch._C.Generator) else _NO),
}


def _either(rules: Sequence[tuple[str, Fit] | None]) -> tuple[str, Fit] | None:
    some = sorted((rule for rule in rules if rule), key=lambda rule: " of shape " not in rule[0])
    if len(some) < len(rules):
        return None

    def fit(value: Any, sizes: Sizes) -> Any:
        for _, each in some:
            if (found := each(value, sizes)) is not _NO:
                return found
        return _NO

    return " or ".join(dict.fromkeys(wanted for wanted, _ in some)), fit


def _several(kinds: Sequence[Any]) -> tuple[str, Fit]:
    rules = [_rule(kind) or ("anything", lambda value, _: value) for kind in kinds]

    def fit(value: Any, sizes: Sizes) -> Any:
        if not isinstance(value, list | tuple) or len(value) != len(rules):
            return _NO
        found = tuple(each(part, sizes) for (_, each), part in zip(rules, value, strict=True))
        return _NO if any(part is _NO for part in found) else found

    return f"({', '.join(wanted for wanted, _ in rules)})", fit


def _sequence(rule: tuple[str, Fit] | None) -> tuple[str, Fit]:
    def fit(value: Any, sizes: Sizes) -> Any:
        listed = hasattr(value, "__getitem__") and hasattr(value, "__len__") and getattr(value, "ndim", 1)
        if not listed or isinstance(value, str | bytes | Mapping):  # arrays and tensors are sequences, too
            return _NO
        return _NO if rule and any(rule[1](part, dict(sizes)) is _NO for part in value) else value

    return f"a sequence, each {rule[0]}" if rule else "a sequence", fit


def _array(kind: Any) -> tuple[str, Fit]:
    """A tensor of some types and of a shape in jaxtyping's words: `n c h w`, `*n size size`, `*#batch #c`, `...`."""
    dtypes = {getattr(torch, name, None) for name in kind.dtypes}
    axes = kind.dim_str.split()
    free = next((i for i, axis in enumerate(axes) if axis[0] in "*."), None)
    front, back = (axes, []) if free is None else (axes[:free], axes[free + 1 :])
    named, broad = [axis.lstrip("#") for axis in front + back], {axis[1:] for axis in axes if axis[0] == "#"}
    least, fixed = len(named), {axis: int(axis) for axis in named if axis.isdecimal()}
    loose = free is not None and (axes[free] == "..." or "#" in axes[free])
    prefix = "" if free is None or loose else axes[free]

    def fit(value: Any, sizes: Sizes) -> Any:
        if not isinstance(value, Tensor) or value.dtype not in dtypes:
            return _NO
        shape = value.shape
        if len(shape) < least or (free is None and len(shape) != least):
            return _NO
        found = sizes | fixed
        if free is None:
            own = shape
        else:
            end = len(shape) - len(back)
            lead, own = tuple(shape[len(front) : end]), shape[: len(front)] + shape[end:]
            if (loose and lead and not _broadcasts(lead, found)) or (prefix and found.setdefault(prefix, lead) != lead):
                return _NO
        for axis, size in zip(named, own, strict=True):
            if not (size == 1 and axis in broad) and found.setdefault(axis, size) != size:
                return _NO
        sizes.update(found)
        return value

    word = _WORDS.get(kind.__name__.partition("[")[0], kind.__name__.partition("[")[0].lower())
    shape = ", ".join(f"<{axis.replace('#', '')}>" for axis in axes)
    return f"{word} of shape ({shape}{',' * (len(axes) == 1 and free is None)})", fit


def _broadcasts(lead: tuple[int, ...], sizes: Sizes) -> bool:
    """Whether leading axes of one's own fit those of other arguments, or a batch `b` that is known."""
    known = (sizes["b"],) if "b" in sizes else sizes.get("...")
    if known is None or lead == known:
        sizes["..."] = lead
        return True
    try:
        both = torch.broadcast_shapes(lead, known)
    except RuntimeError:
        return False
    sizes["..."] = both
    return "b" not in sizes or both == known
