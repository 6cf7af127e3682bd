"""What is accepted: numbers of any library in their ranges, grey levels and data; all else is named."""

import numpy as np
import pytest
import torch

from gudlib import checks, training

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.mark.parametrize("value", [3, np.int64(3), np.array(3), torch.tensor(3), True + 2])
def test_whole_numbers_of_all_libraries_become_pythons(value):
    assert checks.whole("n", value) == 3 and type(checks.whole("n", value)) is int


ODD = [
    2.5,
    3.0,
    np.float32(3),
    torch.tensor(2.5),
    "3",
    None,
    True,
    [3],
    np.arange(2),
    np.bool_(True),
    torch.tensor(True),
]


@pytest.mark.parametrize("value", ODD)
def test_what_is_no_whole_number_is_refused(value):
    with pytest.raises(ValueError, match="n must be a whole number; got "):
        checks.whole("n", value)


def test_ranges_of_whole_numbers_are_told():
    for value, options, wanted in ((0, {}, "be at least 1"), (-1, {"least": 0}, "be at least 0")):
        with pytest.raises(ValueError, match=f"n must {wanted}; got {value}"):
            checks.whole("n", value, **options)
    with pytest.raises(ValueError, match="n must lie between 2 and 4; got 5"):
        checks.whole("n", 5, 2, 4)
    assert [checks.whole("n", value, 2, 4) for value in (2, 4)] == [2, 4]


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float64(0.5), torch.tensor(0.5)])
def test_numbers_of_all_libraries_become_pythons(value):
    assert checks.real("x", value) == 0.5 and type(checks.real("x", value)) is float


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", None, True, [1.0], 10**400, b"1", np.array("1")])
def test_what_is_no_finite_number_is_refused(value):
    with pytest.raises(ValueError, match="x must be a finite number; got "):
        checks.real("x", value)


def test_ends_of_a_range_are_in_it_or_not_as_said():
    for options, good, bad, words in (
        ({"above": 0}, [1e-9], [0, -1], "above 0"),
        ({"least": 0, "below": 1}, [0, 0.5], [1, -1e-9], "at least 0 and below 1"),
        ({"least": 0, "most": 1}, [0, 1], [1.5, -0.5], "between 0 and 1"),
    ):
        assert [checks.real("x", value, **options) for value in good] == good
        for value in bad:
            with pytest.raises(ValueError, match=f"x must be a finite number {words}; got {value}"):
                checks.real("x", value, **options)


@pytest.mark.parametrize("value", [1, 0, "yes", None, np.array([True])])
def test_yes_and_no_are_words_of_python(value):
    assert checks.flag("x", np.bool_(True)) is True and checks.flag("x", torch.tensor(False)) is False
    with pytest.raises(ValueError, match="x must be True or False; got "):
        checks.flag("x", value)


GREY = torch.randint(0, 256, (3, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_grey_levels_and_data_are_not_taken_for_one_another():
    data = GREY.float() / 128 - 1
    assert checks.grey("x", GREY, (1, 4, 4)) is GREY and checks.data("x", data, (1, 4, 4)) is data
    assert checks.images("x", GREY) is GREY and checks.images("x", data) is data
    with pytest.raises(ValueError, match=r"x must be uint8 of shape \(n, c, h, w\); got torch.float32 of shape \(3, "):
        checks.grey("x", data)
    with pytest.raises(ValueError, match="x must be floating .*; got torch.uint8 .*; for grey levels see gudlib.data"):
        checks.data("x", GREY)
    with pytest.raises(ValueError, match="x must be data, .*; got whole numbers up to 2.., grey levels perhaps"):
        checks.data("x", GREY.double())
    field = torch.randn(3, 1, 4, 4) * 50
    assert checks.data("x", field) is field  # of whatever size, if it is not whole
    assert len(checks.data("x", torch.zeros(2, 1, 4, 4))) == 2  # black, or a mask


def test_shapes_and_numbers_of_images_are_told():
    for images, words in (
        (GREY[0], r"shape \(n, 1, 4, 5\); got torch.uint8 of shape \(1, 4, 4\)"),
        (GREY, r"shape \(n, 1, 4, 5\); got torch.uint8 of shape \(3, 1, 4, 4\)"),
        (GREY.numpy(), r"shape \(n, 1, 4, 5\); got ndarray of shape \(3, 1, 4, 4\)"),
        (None, "got NoneType"),
    ):
        with pytest.raises(ValueError, match=f"x must be uint8 of {words}" if words[0] == "s" else words):
            checks.grey("x", images, (1, 4, 5))
    with pytest.raises(ValueError, match="n at least 4; got "):
        checks.grey("x", GREY, least=4)


def test_the_first_number_that_is_not_finite_is_told():
    values = torch.zeros(2, 3)
    values[1, 2], values[1, 0] = float("nan"), float("inf")
    with pytest.raises(ValueError, match=r"x must be finite; 2 of 6 numbers are not, first \[1, 0\]"):
        checks.finite("x", values)


def test_gradients_may_be_left_alone():
    assert training.TrainingConfig(clip=float("inf")).clip == float("inf")


def test_settings_of_numpy_are_kept_as_pythons_numbers():
    config = training.TrainingConfig(steps=np.int64(4), lr=np.float32(1e-3), seed=np.int64(3), discrete=np.bool_(True))
    assert [type(value) for value in (config.steps, config.lr, config.seed, config.discrete)] == [int, float, int, bool]


@pytest.mark.parametrize("name", ["steps", "batch", "warmup", "save_every"])
@pytest.mark.parametrize("value", [0, -1, 2.5, "3", None])
def test_sizes_that_are_none_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be "):
        training.TrainingConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 0.0),
        ("lr", float("inf")),
        ("ema", 1.0),
        ("ema", -0.1),
        ("clip", 0.0),
        ("clip", float("nan")),
        ("clip", -1.0),
    ]
    + [("seed", 2**63), ("seed", 0.5), ("discrete", 1), ("weighting", "none"), ("symmetries", None)],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be |{name} must lie "):
        training.TrainingConfig(**{name: value})
