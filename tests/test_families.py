"""Families: what is drawn for each image is what the family says, unrelated to its time and to what else is drawn."""

import math

import pytest
import torch

from gudlib import bases, families, schedules
from gudlib.training import TrainingConfig

SHAPE = (1, 2, 4)
COLUMN = bases.Pixel(SHAPE).label("column")
LEVEL = bases.Pixel(SHAPE).label("row")
N = 512


def kept(values):
    """A schedule of given numbers, which it keeps."""

    def schedule(*given):
        values.append(given)
        return schedules.soft_conditioning(COLUMN, given[0])

    return schedule


def one_in_each_cell(u):
    return torch.equal((u * len(u)).floor().sort().values, torch.arange(len(u), dtype=torch.float64))


def correlation(a, b):
    return abs(torch.corrcoef(torch.stack([a, b]))[0, 1].item())


@pytest.mark.parametrize("n", [1, 7, 64])
def test_stratified_times_are_one_regular_grid_with_a_random_shift(n, generator):
    t = families.stratified_times(n, generator)
    assert t.dtype == torch.float64 and (t >= 0).all() and (t < 1).all() and one_in_each_cell(t)
    torch.testing.assert_close((t * n) % 1, ((t * n) % 1)[:1].expand(n), rtol=0, atol=1e-9)


def test_a_is_uniform_between_its_ends_and_unrelated_to_time(generator):
    seen = []
    family = families.uniform_a(kept(seen), (0.5, 2.5))
    t = families.stratified_times(N, generator)
    assert family(N, generator).batch == (N,)
    ((a,),) = seen
    assert one_in_each_cell((a - 0.5) / 2) and correlation(a, t) < 0.15
    assert family.spec == {"name": "uniform_a", "a": [0.5, 2.5]}
    families.uniform_a(kept(seen), (1.0, 1.0))(3, generator)
    assert seen[-1][0].tolist() == [1, 1, 1]


def test_softnesses_are_log_uniform_and_independent_also_of_their_neighbours(generator):
    seen = []
    family = families.log_uniform_b(kept(seen), [1 / 4, 1 / 28])
    t = families.stratified_times(N, generator)
    family(N, generator)
    ((first, second),) = seen
    for b, smallest in ((first, 1 / 4), (second, 1 / 28)):
        assert b.max() <= 1 and b.min() >= smallest and one_in_each_cell(1 - b.log() / math.log(smallest) - 1e-12)
        assert correlation(b.log(), t) < 0.15
        assert correlation(b[1:].log(), b[:-1].log()) < 0.15  # neighbours in a batch have nothing in common
    assert correlation(first.log(), second.log()) < 0.15


def test_a_share_of_the_images_has_known_components_that_never_move(generator):
    masks = torch.stack([COLUMN < 1, COLUMN < 3, COLUMN < 0])
    family = families.with_known(
        families.log_uniform_b(lambda b: schedules.sequential(COLUMN, b), [1 / 4]), masks, 0.25
    )
    gamma = family(N, generator).gamma(torch.tensor([1.0], dtype=torch.float64))
    known = (gamma == -7.0).flatten(1)
    counts = {int(mask.sum()): (known == mask.flatten()).all(1).sum().item() for mask in masks}
    assert sum(counts.values()) == N  # nothing but these masks, or none at all
    assert 0.15 * N < counts[2] + counts[6] < 0.2 * N + 20 and min(counts[2], counts[6]) > 20
    assert family.spec["of"]["name"] == "log_uniform_b" and family.spec["share"] == 0.25


def test_a_share_of_the_images_follows_another_schedule(generator):
    usual = schedules.linear(SHAPE, -3.0, 3.0)
    nested = families.log_uniform_b(lambda a, b: schedules.sequential([LEVEL, COLUMN], [a, b]), [1 / 2, 1 / 4])
    drawn, t = families.mixed_with(nested, usual, 1 / 8)(N, generator), torch.tensor([0.4], dtype=torch.float64)
    same = (drawn.gamma(t) == usual.gamma(t)).flatten(1).all(1)
    assert same.sum() == N // 8 and drawn.batch == (N,)
    assert (drawn.gamma(1.0)[~same] - 5).abs().max() < 1e-12
    moves = drawn.dgamma_dt(t).flatten(1)
    assert (moves[same] == 6).all() and (moves[~same] != 6).any()


def test_the_same_generator_draws_the_same_family():
    family = families.uniform_a(lambda a: schedules.soft_conditioning(COLUMN, a), (0.4, 1.6))
    first, again = (family(5, torch.Generator().manual_seed(k)).gamma(0.3) for k in (4, 4))
    assert torch.equal(first, again) and TrainingConfig().seed == 0


@pytest.mark.usefixtures("unchecked")
def test_impossible_families_are_refused_with_their_values():
    schedule = schedules.linear(SHAPE)
    family = families.uniform_a(lambda a: schedules.soft_conditioning(COLUMN, a), (1.0, 1.0))
    for make, message in (
        (lambda: families.uniform_a(kept([]), (2, 1)), r"a must be \(lowest, highest\); got \(2, 1\)"),
        (lambda: families.uniform_a(kept([]), (1.0, math.nan)), r"got \(1.0, nan\)"),
        (lambda: families.uniform_a(kept([]), (1.0,)), r"got \(1.0,\)"),
        (lambda: families.log_uniform_b(kept([]), []), r"got \[\]"),
        (lambda: families.log_uniform_b(kept([]), [0.5, 0.0]), r"above 0 and at most 1; got \[0.5, 0.0\]"),
        (lambda: families.with_known(family, COLUMN > 1, 1.5), "share must lie between 0 and 1; got 1.5"),
        (lambda: families.mixed_with(family, schedule, -0.1), "got -0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
