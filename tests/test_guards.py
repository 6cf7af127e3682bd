"""Every public function, class and method of the library is handed what it should not be, argument by argument.

Each call is one of a probe of `test_devices.py`, which calls all of them rightly, or of `MORE`, with one argument
replaced. It ends in an answer that is finite and of the shape that is annotated, or in a ValueError or TypeError that
names an argument: the one replaced, or one that it disagrees with. What runs at every step (`doors.inner`) takes
numbers on trust.
"""

import copy
import dataclasses
import functools
import importlib
import inspect
import io
import math
import pkgutil
import re
import sys
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path

import emulated
import jaxtyping
import matplotlib
import numpy as np
import pytest
import test_devices
import torch
from matplotlib import pyplot as plt
from test_devices import PROBES, SHAPE, gen, normals, pair, photos
from torch import Tensor

import gudlib
from gudlib import bases, data, denoiser, files, lattice, mar, plotting
from gudlib.model import GUD

matplotlib.use("Agg")
SELF = ("self", "cls")
ELSEWHERE = ("__main__", "book")  # commands, which test_runs.py, test_claims.py and others drive
TESTED = ("checks", "doors", "files")  # what looks, and what writes: in test_checks.py and test_files.py

PARTS = {  # of networks, made and called by these with what they have looked at
    "networks.ConvBlock", "networks.Attention", "networks.Doubling", "mar.networks.TransformerBlock",
    "mar.networks.HeadLayer", "mar.networks.Head", "mar.mixtures.MixtureHead",
    "mar.mixtures.MixtureNetwork.forward", "mar.networks.Causal", "mar.networks.Masked",
    "mar.networks.Network.forward", "mar.model.Conditioned", "windows.Window", "networks.GammaGroups.features",
}  # fmt: skip
EXEMPT = {
    "bases.Basis.__init__": "abstract: its kinds are driven",
    "references.Reference.__init__": "abstract: its kinds are driven",
    "families.Derived.__init__": "abstract: its kinds are driven",
    "training.Loop.__init__": "abstract: its kinds are driven",
    "mar.training.TokenTrainer.__init__": "abstract: its kinds are driven",
    "mar.sampling.in_order": "a loop around what the caller draws",
    "schedules.Nest.exchanged": "what `families.Sequential` evaluates, which has looked",
    "metrics.Inception.__init__": "its weights are not in the repository",
    "metrics.Inception.forward": "its weights are not in the repository",
    "model.GUD.train_steps": "a generator: driven in test_doors.py",
    "denoiser.naming": "a block around others",
    "references.Reference.patches": "refuses all; its kinds are driven",
    "training.Trainer.loss": "called by `run`, with the number of the step",
    "mar.training.MarTrainer.loss": "called by `run`, with the number of the step",
    "mar.mixtures.MixtureTrainer.loss": "called by `run`, with the number of the step",
    "training.Loop.stream": "called by `loss`, with the number of the step",
    "training.Loop.weighted": "called by `loss` at every step, with what that has made",
    "training.Loop.seeded": "a block around others",
    "schedules.offset_lines": "what `soft_conditioning` evaluates, which has looked",
    "schedules.clipped_lines": "what `sequential` evaluates, which has looked",
    "plotting.use_style": "takes nothing",
}


def figure():
    return plt.subplots()[1]


MORE = {
    "samplers.ancestral": lambda: PROBES["samplers.ancestral"]("cpu"),  # of one schedule for all
    "plotting.image": lambda: plotting.image(figure(), photos("cpu")[0], "title", (-1.0, 1.0)),
    "plotting.image_rows": lambda: plotting.image_rows([photos("cpu", 2)] * 2, ["a", "b"], ["c", "d"], size=0.5),
    "plotting.sample_grid": lambda: plotting.sample_grid(photos("cpu"), 4, "title", 0.5),
    "plotting.forward_strip": lambda: plotting.forward_strip(
        pair("cpu")[1], photos("cpu")[0], [0.0, 0.5], normals("cpu")[0]
    ),
    "plotting.snr_fan": lambda: plotting.snr_fan(figure(), pair("cpu")[1].schedule, test_devices.COLUMN, "column", 3),
    "plotting.atoms": lambda: plotting.atoms(bases.DCT(SHAPE), [0, 3]),
    "plotting.matrix": lambda: plotting.matrix(figure(), torch.eye(3), "title", (0.0, 1.0)),
    "plotting.trails": lambda: plotting.trails(figure(), torch.randn(5, 2, 2, generator=gen("cpu"))),
    "plotting.describe": lambda: plotting.describe([figure()]),
    "lattice.onsager_energy": lambda: lattice.onsager_energy(2.0),
    "lattice.yang_magnetisation": lambda: lattice.yang_magnetisation(2.0),
    "lattice.kaufman_energy": lambda: lattice.kaufman_energy(2.0, 4),
    "data.load": lambda: data.load("histology", "test"),
    "data.crops": lambda: data.crops("histology", 64),
    "data.locate": lambda: data.locate("histology", "test"),
    "data.load_folder": lambda: data.load_folder(pictures(), 4, "auto", 0, False),
    "denoiser.load": lambda: denoiser.load(saved()),
    "denoiser.card": lambda: denoiser.card(saved()),
    "denoiser.read_saved": lambda: denoiser.read_saved(saved()),
    "model.GUD.load": lambda: GUD.load(saved(), "cpu"),
    "mar.model.load": lambda: mar.load(files.CHECKPOINTS / "fashion_mar_masked.safetensors"),
}


def saved():
    return files.CHECKPOINTS / "fashion_pca.safetensors"


def pictures():
    from PIL import Image

    Path("pictures").mkdir(exist_ok=True)
    for i in range(3):
        Image.fromarray(np.full((6, 6), 40 * i, np.uint8)).save(f"pictures/{i}.png")
    return Path("pictures")


# All of them


def public():
    """Functions and methods of the library that take something, and whose they are."""
    for info in pkgutil.walk_packages(gudlib.__path__, "gudlib."):
        place = info.name.removeprefix("gudlib.")
        if place.split(".")[0] in ELSEWHERE + TESTED:
            continue
        for name, value in vars(importlib.import_module(info.name)).items():
            if name[0] == "_" or getattr(value, "__module__", "") != info.name:
                continue
            if inspect.isfunction(value):
                yield f"{place}.{name}", value
            elif inspect.isclass(value):
                fields = dataclasses.is_dataclass(value) and not hasattr(value, "__post_init__")
                for key, member in vars(value).items():
                    function = getattr(member, "__func__", member)
                    called = key[0] != "_" or key == "__call__" or (key == "__init__" and not fields)
                    if called and inspect.isfunction(function) and not getattr(function, "__isabstractmethod__", False):
                        yield f"{place}.{name}.{key}", function


def takes(function):
    return [name for name in inspect.signature(function).parameters if name not in SELF]


PUBLIC = {
    name: function
    for name, function in public()
    if takes(function) and name not in EXEMPT and not any(f"{name}.".startswith(f"{part}.") for part in PARTS)
}


@functools.cache
def recorded():
    """Of each of them one call, as its arguments."""
    codes = {inspect.unwrap(function).__code__: name for name, function in PUBLIC.items()}
    calls = {}

    def note(frame, event, _):
        if event == "call" and (name := codes.get(frame.f_code)) and name not in calls:
            code, at = frame.f_code, frame.f_locals
            count = code.co_argcount + code.co_kwonlyargcount
            calls[name] = {key: kept(at[key]) for key in code.co_varnames[:count]}
            if code.co_flags & inspect.CO_VARKEYWORDS:
                calls[name] |= at[code.co_varnames[count + bool(code.co_flags & inspect.CO_VARARGS)]]

    with ExitStack() as stack:
        stack.enter_context(test_devices.no_gpu())
        for probe in [*MORE.values(), *(functools.partial(probe, "cpu") for probe in PROBES.values())]:
            sys.setprofile(note)
            try:
                probe()
            finally:
                sys.setprofile(None)
                plt.close("all")
    return calls


def kept(value):
    if isinstance(value, list):
        return [kept(part) for part in value]
    if isinstance(value, torch.Generator):
        return torch.Generator().manual_seed(0)
    return value.detach().clone() if isinstance(value, Tensor) else value


def copied(value):
    try:
        return copy.deepcopy(value)
    except (RuntimeError, TypeError, NotImplementedError):  # tensors with a history, generators, axes
        return value


# What they are handed

WORDS = (None, "nothing", 3)
NUMBERS = (0, -1, 1, 2, 3, 2.5, math.nan, math.inf, -math.inf, True, None, "3", [1], np.int64(2), np.float32(0.5))


def odd(value):
    """What else might come, by name."""
    if isinstance(value, Tensor):
        yield from {"none": None, "word": "images", "number": 0.5, "list": [1, 2]}.items()
        if value.ndim:
            yield "numpy", value.numpy()
        yield from tensors(value)
    elif isinstance(value, bool):
        yield from ((repr(other), other) for other in (None, "yes", 2, [1]))
    elif isinstance(value, int | float):
        yield from ((repr(other), other) for other in NUMBERS)
    elif isinstance(value, str):
        yield from ((repr(other), other) for other in (None, 3, "nothing", ["a"]))
    elif isinstance(value, list | tuple):
        yield from zip(
            ("none", "number", "word", "empty", "nones", "twice"),
            (None, 3, "nothing", [], [None] * len(value), [*value, *value]),
            strict=True,
        )
    elif value is not None and not isinstance(value, torch.Generator):
        yield from ((f"a {type(other).__name__}", other) for other in (*WORDS, normals("cpu")))


def tensors(x):
    yield "one axis more", x[None]
    if x.ndim:
        yield from {"empty": x[:0], "narrow": x[..., :-1], "wide": torch.cat([x, x], -1), "flat": x.flatten()}.items()
    if x.ndim and len(x):
        yield "one axis less", x[0]
    if x.ndim and x.numel():
        yield "of size 1", x.flatten()[:1].view([1] * x.ndim)
    for dtype in (torch.uint8, torch.bool, torch.int64, torch.half, torch.bfloat16, torch.float32, torch.complex64):
        if dtype != x.dtype:
            yield f"{dtype}", x.to(dtype)
    if x.is_floating_point():
        for number in (math.nan, math.inf):
            y = x.clone().contiguous()
            y.view(-1)[-1:] = number
            yield f"{number}", y
        yield from {"huge": x * 1e30, "zeros": x * 0, "constant": x * 0 + 0.5, "negative": -x.abs() - 1}.items()


AFTER = "must|is|are|needs?|has|have|holds?|belongs?|and|of|for|in"  # comes after the name of an argument
TRUSTED = ("nan", "inf", "huge", f"{torch.half}", "zeros", "constant", "negative")  # by what does not look
NOT_FINITE = {  # as documented
    "designs.score": ["draws, 1"],  # without an error
    "training.TrainingConfig.__init__": ["clip, inf"],  # gradients may be left alone
    "mar.training.MarTrainingConfig.__init__": ["clip, inf"],
}
ALIASES = {  # what the message calls it
    "baselines.of": "images",
    "bases.Basis.label": "label",
    "data.crops": "image set",
    "data.load": "image set|split",
    "data.locate": "image set|split",
    "designs.score": "images",
    "families.known": "masks",
    "likelihood.Discrete.__call__": "values",
    "mar.likelihood.chain_rule_bound": "height",
    "mar.model.Autoregressor.tokens": "height",
    "mar.model.white_tokens": "height",
    "samplers.ancestral": "z",  # of the network that it calls
    "references.fit": "reference",
    "references.rebuild": "reference",
    "training.Loop.data": "images",
}


def answered(name, call):
    """The call, and for a generator its first two."""
    function = PUBLIC[name]
    parameters = inspect.signature(function).parameters
    arguments = dict(call)
    torch.manual_seed(0)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        if name.endswith(".__init__"):
            function = type(arguments.pop("self"))
        elif first := [key for key in SELF if key in arguments]:
            function = function.__get__(copied(arguments.pop(first[0])))
        given = [arguments.pop(key) for key, each in parameters.items()
                 if key in arguments and each.kind is each.POSITIONAL_OR_KEYWORD]  # fmt: skip
        answer = function(*given, **arguments)
        return [part for part, _ in zip(answer, range(2), strict=False)] if inspect.isgenerator(answer) else answer


def wrong(name, argument, kind, value):
    """What is wrong with how a call ends whose argument is another; nothing if it is right."""
    call = {key: kept(each) for key, each in recorded()[name].items()} | {argument: value}
    try:
        answer = answered(name, call)
    except (ValueError, TypeError) as error:
        names, told = "|".join([*takes(PUBLIC[name]), *call]), str(error)
        named = re.search(rf"(^|\W)({names})s?\W+({AFTER})\b|^({names})\W|above ({names}),", told)
        return (
            None if named or any(alias in told for alias in ALIASES.get(name, "").split("|") if alias) else repr(error)
        )
    except OSError as error:
        return None if argument == "path" else repr(error)
    except Exception as error:
        return repr(error)
    finally:
        plt.close("all")
    listed = "Sequence" in str(inspect.signature(PUBLIC[name]).parameters.get(argument))
    if (
        kind == "word"
        or (kind == "numpy" and not listed)
        or (kind == "list" and isinstance(call[argument], list) and not listed)
    ):
        return "taken for a tensor"
    annotated = inspect.signature(PUBLIC[name]).return_annotation
    if inspect.isclass(annotated) and issubclass(annotated, jaxtyping.AbstractArray) and "{" not in annotated.dim_str:
        if not isinstance(answer, annotated):
            return f"an answer of shape {tuple(answer.shape)}, {answer.dtype}"
    silent = getattr(PUBLIC[name], "looks", True) is False and kind in TRUSTED
    silent |= f"{argument}, {kind}" in NOT_FINITE.get(name, [])
    return None if silent or all(map(finite, test_devices.values(answer))) else "an answer that is not finite"


def finite(value):
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    return not isinstance(value, float) or math.isfinite(value)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PUBLIC)
def test_whatever_comes_is_answered_finitely_or_refused_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures()
    call = recorded()[name]
    found = {}
    for argument, value in call.items():
        if argument not in SELF:
            found |= {f"{argument}, {kind}": wrong(name, argument, kind, other) for kind, other in odd(value)}
    assert not {kind: fault for kind, fault in found.items() if fault}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PUBLIC)
def test_a_tensor_from_another_device_is_answered_or_refused_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures()
    call = recorded()[name]
    with emulated.cuda():
        there = {key: value.to("cuda") for key, value in call.items() if isinstance(value, Tensor)}
        found = {key: wrong(name, key, "elsewhere", value) for key, value in there.items()}
    assert not {kind: fault for kind, fault in found.items() if fault}
