"""What a door makes of annotations: kinds, shapes and sizes that must agree, numbers, and the words of a refusal."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from gudlib.doors import door, inner

pytestmark = pytest.mark.usefixtures("unchecked")


def handed(annotation, value, make=door):
    """What a function gets of a value for an argument of this annotation."""

    def function(x):
        return x

    function.__annotations__ = {"x": annotation}
    return make(function)(value)


@pytest.mark.parametrize(
    "annotation, right, wrong",
    [
        (int, [3, np.int64(3), torch.tensor(3), -2], [2.5, True, "3", None, [3], math.nan]),
        (float, [3, 2.5, np.float32(0.5), torch.tensor(0.5)], [True, "3", None, [3.0], math.nan, math.inf]),
        (bool, [True, np.bool_(False), torch.tensor(True)], [0, 1, "yes", None]),
        (str, ["a"], [3, None, ["a"]]),
        (float | None, [3, None], ["3", math.nan]),
        (str | Path, ["a", Path("a")], [3, None]),
        (Literal["a", "b"], ["a"], ["c", 3]),
        (tuple[int, int, int], [(1, 2, 3), [1, 2, 3]], [(1, 2), (1, 2, 0), (1, 2, "3"), 3]),
        (tuple[float, float], [(1, 2.5)], [(1,), (1, "a"), 3.0]),
        (Sequence[int], [[1, 2], (1,), np.arange(3), torch.arange(3)], [3, "12", [1, "a"], {1: 2}]),
        (Mapping[str, int], [{"a": 1}], [[1], 3]),
        (Callable[[int], int], [abs], [3, "abs"]),
        (torch.Generator | None, [torch.Generator(), None], [3, "seed"]),
        (Float[Tensor, "n c h w"], [torch.zeros(2, 1, 3, 3)], [torch.zeros(2, 3, 3), np.zeros((2, 1, 3, 3)), None]),
        (UInt8[Tensor, "n c h w"], [torch.zeros(2, 1, 3, 3).byte()], [torch.zeros(2, 1, 3, 3), torch.zeros(1).byte()]),
        (Int64[Tensor, " n"], [torch.arange(3)], [torch.zeros(3), torch.arange(3)[None], torch.arange(3).int()]),
        (Bool[Tensor, "*b h w"], [torch.ones(3, 3).bool(), torch.ones(2, 2, 3, 3).bool()], [torch.ones(3).bool()]),
        (Float[Tensor, "..."], [torch.zeros(()), torch.zeros(3, 3)], [3.0, torch.arange(3)]),
    ],
)
def test_kinds(annotation, right, wrong):
    for value in right:
        handed(annotation, value)
    for value in wrong:
        with pytest.raises(ValueError, match="^x must be .*; got "):
            handed(annotation, value)


@given(st.lists(st.integers(1, 4), min_size=0, max_size=6))
def test_a_shape_is_that_of_the_annotation(sizes):
    x = torch.zeros(sizes)
    for axes, fits in (("n c h w", len(sizes) == 4), ("*n c h w", len(sizes) >= 3), ("n n", len(sizes) == 2)):
        fits = fits and (axes != "n n" or sizes[0] == sizes[1])
        if fits:
            assert handed(Float[Tensor, axes], x) is x
        else:
            with pytest.raises(ValueError, match="x must be floating numbers of shape"):
                handed(Float[Tensor, axes], x)


def test_numbers_of_numpy_and_torch_are_handed_on_as_pythons():
    for annotation, value, kind in (
        (int, np.int64(3), int),
        (float, torch.tensor(2.5), float),
        (bool, np.bool_(1), bool),
    ):
        assert type(handed(annotation, value)) is kind
    assert handed(tuple[int, int, int], [np.int64(1), 2, 3]) == (1, 2, 3)


@door
def agreeing(images: Float[Tensor, "n c h w"], mask: Bool[Tensor, "h w"], labels: Int64[Tensor, " n"] | None = None):
    return images, mask, labels


def test_sizes_of_one_name_agree_among_arguments():
    images, mask = torch.zeros(2, 1, 3, 4), torch.ones(3, 4).bool()
    agreeing(images, mask, torch.arange(2))
    with pytest.raises(ValueError, match=r"mask must be bool of shape \(3, 4\); got torch.bool of shape \(4, 3\)"):
        agreeing(images, mask.T)
    with pytest.raises(ValueError, match=r"labels must be int64 of shape \(2,\) or None; got .* \(3,\)"):
        agreeing(images, mask, labels=torch.arange(3))


class Thing:
    shape = (1, 3, 4)

    @inner
    def __call__(self, x: Float[Tensor, "b c h w"]) -> Tensor:
        return x


def test_sizes_are_those_of_the_object_too():
    Thing()(torch.zeros(5, 1, 3, 4))
    with pytest.raises(ValueError, match=r"x must be floating numbers of shape \(b, 1, 3, 4\); got .*\(5, 1, 4, 3\)"):
        Thing()(torch.zeros(5, 1, 4, 3))


def test_a_door_looks_at_the_numbers_and_what_runs_at_every_step_does_not():
    for number in (math.nan, math.inf):
        x = torch.full((1, 1, 2, 2), number)
        assert handed(Float[Tensor, "n c h w"], x, inner) is x
        with pytest.raises(ValueError, match="x must be finite; 4 of 4 numbers are not"):
            handed(Float[Tensor, "n c h w"], x)
    with pytest.raises(ValueError, match="x must not be empty"):
        handed(Float[Tensor, "n c h w"], torch.zeros(0, 1, 2, 2))


def test_grey_levels_where_data_are_meant_say_what_to_do():
    with pytest.raises(ValueError, match="for grey levels see gudlib.data.scale and dequantise"):
        handed(Float[Tensor, "n c h w"], torch.zeros(1, 1, 2, 2).byte())


def test_defaults_and_what_has_no_annotation_pass_as_they_are():
    @door
    def function(x: float = math.inf, *rest, other: "int | None" = None, free=None, **more):
        return x, rest, other, free, more

    assert function(2, "a", other=None, free="b", extra=[]) == (2, ("a",), None, "b", {"extra": []})
    assert function() == (math.inf, (), None, None, {})
    assert function(math.inf)[0] == math.inf  # where it is the default it means something
    with pytest.raises(ValueError, match="x must be a number, or an infinity; got nan"):
        function(math.nan)


def test_a_door_changes_neither_name_nor_signature():
    assert agreeing.__name__ == "agreeing" and list(inspect.signature(agreeing).parameters) == [
        "images",
        "mask",
        "labels",
    ]


def test_errors_of_the_function_itself_stay_as_they_are():
    @door
    def function(x: int):
        raise RuntimeError("of its own")

    with pytest.raises(RuntimeError, match="^of its own$"):
        function(3)
