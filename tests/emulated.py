"""A GPU that isn't there: tensors that claim to lie on `cuda`, on any machine, with real values.

    with emulated.cuda() as log:
        x = torch.randn(3, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
        trainer = Trainer(...)  # accelerate finds a GPU
        log.clear()
        ...
    assert not log.syncs, log.syncs

Every tensor is an ordinary one in the CPU's memory, so autograd, torch.func and optimisers are torch's own, and each
number is that of a run on the CPU from the same seeds. That it lies on `cuda` is noted down at its storage, which is
shared by views and goes with a parameter, a gradient, or a value inside torch.func. In the block

    Tensor.device, .is_cuda, .to, .cpu, .cuda, .numpy, factories, generators    say and take `cuda`;
    every operation, forward or backward, down to those inside torch            is checked and counted.

An operation raises a RuntimeError where it would on CUDA: for tensors of two devices, unless the one on the CPU is a
number (no dimensions) in an elementwise operation, an index, or source or target of a copy; for a generator of another
device. What is counted, `Log` says.

Not emulated: autocast, which does nothing; CUDA's own random numbers, of which there are the CPU's, with one global
generator for both; more devices than one; sparse tensors; what an operation of torch does otherwise on CUDA.
"""

import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch
from weakref import WeakValueDictionary

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
LIBRARY = str(Path(__file__).parents[1] / "gudlib")
FOREIGN = (__file__, sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"), "<")

FACTORIES = (
    "arange", "empty", "empty_strided", "eye", "full", "hann_window", "linspace", "logspace", "ones", "rand", "randint",
    "randn", "randperm", "scalar_tensor", "tril_indices", "triu_indices", "zeros",
)  # fmt: skip
LIKE = ("empty_like", "full_like", "ones_like", "rand_like", "randint_like", "randn_like", "zeros_like")
NEW = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros")

# Names in aten
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
NUMBERS_TOO = INDEXING | {  # beside those that torch marks as elementwise
    "fill", "fill_", "floor_divide", "floor_divide_", "index_fill", "index_fill_", "masked_fill", "masked_fill_",
    "rsub",
}  # fmt: skip
WAITING = {
    "_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim",
    "unique_consecutive", "unique_dim_consecutive", "bincount", "multinomial", "_linalg_check_errors", "_linalg_eigh",
    "_linalg_svd", "linalg_eig", "linalg_lstsq",
}  # fmt: skip


class Log:
    """What waits for a GPU, or goes to it and fro: `function @ file:line` of the innermost frame inside gudlib.

    Attributes:
        syncs: waits of the host: `.item()` (aten._local_scalar_dense) and what calls it, such as `bool` and `float`;
            `.tolist()`, `.cpu()`; sizes that depend on values (masks as indices, `nonzero`, `unique`, ...); checks of
            torch.linalg.
        copies: between the devices, either way; those to the host are syncs, too.
    """

    def __init__(self) -> None:
        self.syncs: list[str] = []
        self.copies: list[str] = []

    def clear(self) -> None:
        """Forget all."""
        self.syncs.clear()
        self.copies.clear()

    def sync(self, what: str) -> None:
        """The host waits."""
        self.syncs.append(f"{what} @ {_place()}")

    def copy(self, what: str, target: torch.device) -> None:
        """Something goes to a device from the other one."""
        self.copies.append(f"{what} @ {_place()}")
        if target == CPU:
            self.sync(what)


@contextmanager
def cuda() -> Iterator[Log]:
    """A GPU until the end of the block."""
    from torch._decomp import decompositions_for_jvp  # noqa: F401  # it compiles, and must see torch as it is

    log = Log()
    with ExitStack() as stack:
        for state in (PartialState, AcceleratorState, GradientState):  # accelerate chooses a device once for all
            stack.enter_context(patch.dict(state._shared_state, clear=True))
        for owner, replacements in _replacements(log):
            for name, replacement in replacements.items():
                stack.enter_context(patch.object(owner, name, replacement))
        stack.enter_context(_Mode(log))
        yield log


def device_of(x: Tensor) -> torch.device:
    """Where a tensor claims to lie, inside the block or after it."""
    return _claim(x) or CPU


def _claim(x: Tensor) -> torch.device | None:
    """The same; None for what torch made for itself inside an operation, which lies wherever it is used."""
    x = _bare(x)
    real = torch._C.TensorBase.device.__get__(x)
    return getattr(x.untyped_storage(), "claim", CPU) if real == CPU else real


def _put(x: Tensor, device: torch.device | None) -> None:
    _bare(x).untyped_storage().claim = device


def _bare(x: Tensor) -> Tensor:
    """The tensor that torch.func has wrapped."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def _known(device: Any) -> torch.device:
    """A device, which if it is a GPU is the first."""
    device = torch.device(device)
    return CUDA if device.type == "cuda" else device


def _place() -> str:
    """Of the innermost frame inside gudlib, else of the innermost one that is in no package."""
    frame, places = sys._getframe(1), []
    while frame is not None:
        path = frame.f_code.co_filename
        if not path.startswith(FOREIGN):
            places.append(f"{Path(path).parent.name}/{Path(path).name}:{frame.f_lineno}")
            if path.startswith(LIBRARY):
                return places[-1]
        frame = frame.f_back
    return places[0] if places else "?"


class _Mode(TorchDispatchMode):
    """Sees all operations, below autograd and torch.func: checks them, counts, and says where results lie."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self.log = log

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        leaves = tree_leaves((args, kwargs))
        claims = [(x, _claim(x)) for x in leaves if isinstance(x, Tensor)]
        device = self._common(func, name, args, claims)
        for x in leaves:
            if claims and device and isinstance(x, torch._C.Generator):
                _same_generator(x, device)
        if device == CUDA:
            self._count(func, name, args, kwargs)
        result = func(*args, **kwargs)
        settled = {x.untyped_storage()._cdata for x, _ in claims if _claim(x)}
        for x in [*leaves, *tree_leaves(result)]:
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in settled:
                _put(x, device)
        return result

    def _common(
        self, func: Any, name: str, args: tuple, claims: list[tuple[Tensor, torch.device | None]]
    ) -> torch.device | None:
        """The device of an operation, None if no argument has one.

        Raises:
            RuntimeError: if there are two.
        """
        if name == "copy_":
            (_, target), (_, source) = claims[:2]
            if {target, source} == {CPU, CUDA}:
                self.log.copy("aten.copy_", target)
            return target or source
        elementwise = torch.Tag.pointwise in func.tags
        numbers_too = elementwise or name in NUMBERS_TOO or name.startswith(("_foreach", "_fused"))
        indices = {id(x) for x in args[1]} if name in INDEXING else set()
        found, numbers = set(), 0
        for i, (x, claim) in enumerate(claims):
            written = i == 0 and name.endswith("_")
            if claim == CPU and x.ndim == 0 and numbers_too and not written:
                numbers += 1
            elif claim and not (claim == CPU and id(x) in indices):
                found.add(claim)
        if len(found) > 1 and name in INDEXING and claims[0][1] == CPU:
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        if len(found) > 1:
            two = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
            raise RuntimeError(f"{two} ({func})")
        if CUDA in found and elementwise and numbers > 1 and name != "where":
            raise RuntimeError(f"Trying to pass too many CPU scalars to non-CPU kernel! ({func})")
        return found.pop() if found else CPU if claims and all(claim for _, claim in claims) else None

    def _count(self, func: Any, name: str, args: tuple, kwargs: dict) -> None:
        """What an operation on the GPU waits for and copies."""
        unknown_size = func is torch.ops.aten.repeat_interleave.Tensor and kwargs.get("output_size") is None
        if name in WAITING or unknown_size:
            self.log.sync(f"aten.{name}")
        if name in INDEXING:
            indices = [x for x in args[1] if x is not None]
            masked = any(x.dtype in (torch.bool, torch.uint8) for x in indices)
            number = [x for x in args[2:3] if x.ndim == 0 and _claim(x) == CPU]
            if masked and not number:  # with a number it is masked_fill
                self.log.sync(f"aten.{name}")
            for x in indices if masked else indices + number:
                if _claim(x) == CPU:
                    self.log.copy(f"aten.{name}", CUDA)


class _Moved(torch.autograd.Function):
    """A copy on the other device; its gradient goes back."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, device: torch.device, log: Log) -> Tensor:
        log.copy("to", device)
        copied = x.clone()
        _put(copied, device)
        return copied

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, ctx.device, ctx.log = inputs
        ctx.source = device_of(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _Moved.apply(grad, ctx.source, ctx.log), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _Moved.apply(tangent, ctx.device, ctx.log)


class _AnyGenerator(type(torch._C.Generator)):
    def __instancecheck__(cls, x: Any) -> bool:
        return isinstance(x, torch._C.Generator)


class _Generator(torch._C.Generator, metaclass=_AnyGenerator):
    """The CPU's generator, by either name; in the block all of torch calls it torch.Generator."""

    on_cuda: WeakValueDictionary = WeakValueDictionary()

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        self = super().__new__(cls)
        if _known(device) == CUDA:
            cls.on_cuda[self._cdata] = self
        return self

    def __init__(self, device: Any = "cpu") -> None: ...

    @property
    def device(self) -> torch.device:
        return CUDA if self._cdata in self.on_cuda else CPU


def _same_generator(generator: torch.Generator | None, device: torch.device) -> None:
    if generator is not None:
        found = CUDA if generator._cdata in _Generator.on_cuda else CPU
        if found != device:
            raise RuntimeError(f"Expected a '{device.type}' device type for generator but found '{found.type}'")


def _made(make: Callable[..., Tensor], like: bool = False) -> Callable[..., Tensor]:
    """A factory that takes `cuda`; where none is given its device is that of its first argument, if `like`, or cpu."""

    @wraps(make)
    def made(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        device = _known(device) if device is not None else device_of(args[0]) if like else CPU
        if device not in (CPU, CUDA):
            return make(*args, device=device, **kwargs)
        _same_generator(kwargs.get("generator"), device)
        result = make(*args, **kwargs)
        _put(result, device)
        return result

    return made


def _replacements(log: Log) -> list[tuple[Any, dict[str, Any]]]:
    """What is replaced, where and by what."""
    plain_tensor, plain_as_tensor, plain_one_hot = torch.tensor, torch.as_tensor, functional.one_hot
    plain_to, plain_numpy, plain_tolist = Tensor.to, Tensor.numpy, Tensor.tolist
    plain_grouped, plain_parse_to = torch._C._group_tensors_by_device_and_dtype, torch._C._nn._parse_to

    def tensor(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
        source = device_of(data) if isinstance(data, Tensor) else CPU
        target, made = source if device is None else _known(device), plain_tensor(data, **kwargs)
        if source != target:
            log.copy("tensor", target)
        _put(made, target)
        return made

    def as_tensor(data: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        made = plain_as_tensor(data, dtype=dtype)
        return made if device is None else to(made, device)

    def one_hot(index: Tensor, num_classes: int = -1) -> Tensor:
        before = len(log.syncs)
        made = plain_one_hot(index, num_classes)
        del log.syncs[before + (num_classes == -1) :]  # only the CPU looks whether values are in range
        return made

    def parse_to(*args: Any, **kwargs: Any) -> tuple:
        if args and isinstance(args[0], Tensor):
            args = (device_of(args[0]), args[0].dtype, *args[1:])
        return plain_parse_to(*args, **kwargs)

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device, dtype, _, memory_format = parse_to(*args, **kwargs)
        device = device_of(self) if device is None else _known(device)
        if device not in (CPU, CUDA):
            return plain_to(self, *args, **kwargs)
        moved = self if device == device_of(self) else _Moved.apply(self, device, log)
        again = kwargs.get("copy", False) and moved is self
        return plain_to(moved, dtype or self.dtype, copy=again, memory_format=memory_format)

    def numpy(self: Tensor, *, force: bool = False) -> Any:
        if device_of(self) == CUDA and not force:
            how = "Use Tensor.cpu() to copy the tensor to host memory first."
            raise TypeError(f"can't convert cuda:0 device type tensor to numpy. {how}")
        return plain_numpy(to(self, CPU), force=force)

    def tolist(self: Tensor) -> Any:
        if device_of(self) == CUDA:
            log.sync("tolist")
        return plain_tolist(self)

    def clone(self: torch.UntypedStorage) -> torch.UntypedStorage:
        copied = torch.UntypedStorage(self.nbytes())
        copied.claim = getattr(self, "claim", CPU)
        return copied.copy_(self)

    def grouped(lists: list[list[Tensor | None]], with_indices: bool = False) -> dict:
        found = plain_grouped(lists, with_indices)
        return {(device_of(group[0][0]), dtype): (group, where) for (_, dtype), (group, where) in found.items()}

    def always(**values: Any) -> dict[str, Any]:
        return {name: lambda *_, value=value, **__: value for name, value in values.items()}

    return [
        (torch, {name: _made(getattr(torch, name)) for name in FACTORIES}),
        (torch, {name: _made(getattr(torch, name), like=True) for name in LIKE}),
        (torch, {"tensor": tensor, "as_tensor": as_tensor, "Generator": _Generator}),
        (torch.fft, {name: _made(getattr(torch.fft, name)) for name in ("fftfreq", "rfftfreq")}),
        (functional, {"one_hot": one_hot}),
        (torch.UntypedStorage, {"clone": clone}),
        (torch._C, {"_group_tensors_by_device_and_dtype": grouped}),
        (torch._C._nn, {"_parse_to": parse_to}),
        (Tensor, {name: _made(getattr(Tensor, name), like=True) for name in NEW}),
        (Tensor, {
            "to": to,
            "type_as": to,
            "cpu": lambda self, **_: to(self, CPU),
            "cuda": lambda self, *_, **__: to(self, CUDA),
            "numpy": numpy,
            "tolist": tolist,
            "new_tensor": lambda self, data, **how: tensor(data, **{"dtype": self.dtype, "device": self.device} | how),
            "device": property(device_of),
            "is_cuda": property(lambda self: device_of(self) == CUDA),
            "is_cpu": property(lambda self: device_of(self) == CPU),
            "get_device": lambda self: 0 if device_of(self) == CUDA else -1,
        }),
        (torch.cuda, always(
            is_available=True, is_bf16_supported=True, device_count=1, current_device=0, get_device_name="emulated",
            get_device_capability=(9, 0), set_device=None, empty_cache=None, manual_seed=None, manual_seed_all=None,
        )),
        (torch.cuda, {
            "synchronize": lambda *_, **__: log.sync("synchronize"),
            "get_rng_state": lambda *_, **__: torch.get_rng_state(),
            "set_rng_state": lambda new_state, *_, **__: torch.set_rng_state(new_state),
        }),
    ]  # fmt: skip
