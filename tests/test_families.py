"""Families: what is drawn for each image is what the family says, unrelated to its time and to what else is drawn."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gudlib import bases, families, priors, schedules
from gudlib.families import Known, Mixed, Sequential, SoftConditioning

SHAPE = (1, 4, 4)
PIXEL, HAAR = bases.Pixel(SHAPE), bases.Haar(SHAPE, 2)
VARIANCE = torch.linspace(2, 0.1, 16, dtype=torch.float64).view(SHAPE)
PRIOR = priors.interpolated(priors.Moments(torch.zeros(SHAPE, dtype=torch.float64), VARIANCE), 0.5)
N = 512
NESTED = (("levels", "columns"), ((0.5, 1.0), (0.5, 0.8)))
HALF = torch.tensor([0.5], dtype=torch.float64)

FAMILIES = {
    "soft": lambda: SoftConditioning(PRIOR, (0.4, 1.6)),
    "soft, from a level": lambda: SoftConditioning(PRIOR, (0.4, 1.6), 6.0, gamma_min_target=-7.0),
    "columns": lambda: Sequential(PIXEL, PRIOR, "columns"),
    "rows": lambda: Sequential(PIXEL, PRIOR, ["rows"], (0.3, 0.9)),
    "columns of 2": lambda: Sequential(PIXEL, PRIOR, "columns 2"),
    "patches": lambda: Sequential(PIXEL, PRIOR, "patches 2"),
    "patches in random orders": lambda: Sequential(PIXEL, PRIOR, "patches 2", order="random"),
    "levels, columns": lambda: Sequential(HAAR, PRIOR, *NESTED),
    "known": lambda: Known(Sequential(PIXEL, PRIOR, "columns"), "rectangles", 0.25),
    "mixed": lambda: Mixed(Sequential(HAAR, PRIOR, *NESTED), SoftConditioning(PRIOR, (1.0, 1.0)), 1 / 8),
}
MEMBERS = {"soft": {"a": 0.7}, "soft, from a level": {"a": 0.7}, "levels, columns": {"b": [0.6, 0.5]}}
MEMBERS["mixed"] = MEMBERS["levels, columns"]


def basis_of(name):
    return HAAR if name in ("levels, columns", "mixed") else PIXEL


def one_in_each_cell(u):
    return torch.equal((u * len(u)).floor().sort().values, torch.arange(len(u), dtype=torch.float64))


def correlation(a, b):
    return abs(torch.corrcoef(torch.stack([a, b]))[0, 1].item())


@pytest.mark.parametrize("n", [1, 7, 64])
def test_stratified_times_are_one_regular_grid_with_a_random_shift(n, generator):
    t = families.stratified_times(n, generator)
    assert t.dtype == torch.float64 and (t >= 0).all() and (t < 1).all() and one_in_each_cell(t)
    torch.testing.assert_close((t * n) % 1, ((t * n) % 1)[:1].expand(n), rtol=0, atol=1e-9)


# What is drawn


def test_a_is_uniform_between_its_ends_and_unrelated_to_time(generator):
    family = SoftConditioning(PRIOR, (0.5, 2.5))
    t = families.stratified_times(N, generator)
    drawn = family(N, generator)
    gamma = drawn.gamma(HALF)
    # gamma_i - log c_i rises along the order with slope a
    level = (gamma - PRIOR.log_variance).flatten(1)
    steep = (level[:, -1] - level[:, 0]) / (PRIOR.order.max() - PRIOR.order.min())
    assert drawn.batch == (N,) and one_in_each_cell((steep - 0.5) / 2) and correlation(steep, t) < 0.15
    same = SoftConditioning(PRIOR, (1.0, 1.0))(3, generator).gamma(HALF)
    torch.testing.assert_close(same, family.schedule(a=1.0).gamma(0.5).expand(3, *SHAPE), rtol=1e-12, atol=1e-12)


def test_softnesses_are_log_uniform_and_independent_also_of_their_neighbours(generator):
    family = Sequential(HAAR, PRIOR, *NESTED)
    t = families.stratified_times(N, generator)
    drawn, seen = family(N, generator), []
    moves = family.nest.movement
    family.nest.movement = lambda shares: seen.extend(shares) or moves(shares)
    family(N, generator)
    for b, (low, high) in zip(seen, NESTED[1], strict=True):
        assert b.max() <= high and b.min() >= low
        assert one_in_each_cell(1 - (b / high).log() / math.log(low / high) - 1e-12)
        assert correlation(b.log(), t) < 0.15
        assert correlation(b[1:].log(), b[:-1].log()) < 0.15  # neighbours in a batch have nothing in common
    assert correlation(seen[0].log(), seen[1].log()) < 0.15 and drawn.batch == (N,)


@pytest.mark.parametrize("name", ["columns", "rows", "patches", "levels, columns"])
def test_what_is_drawn_are_members_of_the_family(name, generator, monkeypatch):
    family, seen = FAMILIES[name](), []
    moves = family.nest.movement
    monkeypatch.setattr(family.nest, "movement", lambda shares: seen.extend(shares) or moves(shares))
    gamma = family(16, generator).gamma(HALF)
    monkeypatch.undo()
    each = [family.schedule(b=[float(b[i]) for b in seen]).gamma(0.5) for i in range(16)]
    torch.testing.assert_close(gamma, torch.stack(each), rtol=1e-12, atol=1e-12)


def test_a_share_of_the_images_has_known_components_that_never_move(generator):
    column = PIXEL.label("column")
    masks = torch.stack([column < 1, column < 3, column < 0])
    family = Known(Sequential(PIXEL, PRIOR, "columns"), masks, 0.25)
    drawn = family(N, generator)
    start, end = (drawn.gamma(torch.tensor([t], dtype=torch.float64)) for t in (0.0, 1.0))
    known = (start == end).flatten(1)
    counts = {int(mask.sum()): (known == mask.flatten()).all(1).sum().item() for mask in masks}
    assert sum(counts.values()) == N  # nothing but these masks, or none at all
    assert 0.15 * N < counts[4] + counts[12] < 0.2 * N + 20 and min(counts[4], counts[12]) > 20


@pytest.mark.parametrize("which", ["rectangles", "columns"])
def test_masks_by_name(which):
    masks = families.known(which, (3, 8, 12))
    assert masks.dtype == torch.bool and torch.equal(masks, families.known(which, (3, 8, 12)))
    assert torch.equal(masks, masks[:, :1].expand_as(masks))  # all colours of a pixel
    if which == "columns":
        assert masks.sum((1, 2, 3)).tolist() == [24 * k for k in range(12)]
        assert all(bool(mask[..., :k].all()) for k, mask in enumerate(masks))
        return
    assert len(masks) == 512
    for i, mask in enumerate(masks[:, 0]):
        box = mask if i % 4 == 3 else ~mask
        rows, columns = box.any(1).nonzero()[:, 0], box.any(0).nonzero()[:, 0]
        filled = box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert bool(filled.all()) and filled.sum() == box.sum() and len(rows) >= 2 and len(columns) >= 3


def test_a_share_of_the_images_follows_another_family(generator):
    usual = SoftConditioning(PRIOR, (1.0, 1.0))
    family = Mixed(Sequential(HAAR, PRIOR, *NESTED), usual, 1 / 8)
    drawn, t = family(N, generator), torch.tensor([0.4], dtype=torch.float64)
    expected = usual.schedule(a=1.0)
    same = ((drawn.gamma(t) - expected.gamma(t)).abs() < 1e-9).flatten(1).all(1)
    assert same.sum() == N // 8 and drawn.batch == (N,)
    torch.testing.assert_close(drawn.dgamma_dt(t)[same], expected.dgamma_dt(t).expand(N // 8, *SHAPE))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_generator_draws_the_same(name):
    family = FAMILIES[name]()
    first, again, other = (family(5, torch.Generator().manual_seed(k)).gamma(0.3) for k in (4, 4, 5))
    assert torch.equal(first, again) and not torch.equal(first, other)


# Members


@given(st.floats(0.0, 2.0))
def test_the_finest_noise_is_what_was_asked_for(a):
    family = SoftConditioning(PRIOR, (0.0, 2.0), finest=0.01)
    noise = PRIOR.scale.square() * family.schedule(a=a).gamma(0.0).exp()
    assert noise.max().item() == pytest.approx(1e-4, rel=1e-9)
    columns = Sequential(PIXEL, PRIOR, "columns", finest=0.01).schedule(b=0.5)
    assert (PRIOR.scale.square() * columns.gamma(0.0).exp()).flatten().tolist() == pytest.approx([1e-4] * 16)


def test_both_kinds_end_at_the_same_signal_to_noise_ratio():
    last = Sequential(PIXEL, PRIOR, "columns", gamma_max_target=6.0).schedule(b=0.5)
    assert (-last.snr(1.0, PRIOR.white_variance).log()).flatten().tolist() == pytest.approx([6.0] * 16)
    soft = SoftConditioning(PRIOR, (1.0, 1.0), 6.0).schedule(a=1.0)
    assert (-soft.snr(1.0, PRIOR.white_variance).log()).min().item() == pytest.approx(6.0)


def test_blocks_by_name_are_the_orders_they_say():
    column, row, level = (HAAR.label(name) for name in ("column", "row", "level"))
    for blocks, b, orders in (
        ("columns", 0.4, column),
        ("rows", 0.4, row),
        ("levels", 0.4, level),
        (("levels", "columns 2"), (0.5, 0.6), [level, (column / 2).floor()]),
    ):
        family = Sequential(HAAR, PRIOR, blocks)
        expected = schedules.sequential(
            orders, b, 2 * math.log(families.FINEST) - 2 * PRIOR.scale.log(), 5.0 + PRIOR.log_variance
        )
        assert torch.equal(family.schedule(b=b).gamma(HALF), expected.gamma(HALF))
    patches = Sequential(PIXEL, PRIOR, "patches 2").schedule(b=0.25)
    moving = patches.dgamma_dt(torch.tensor([0.9], dtype=torch.float64))[0, 0] > 0  # first made, last noised
    assert moving.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_the_default_range_reaches_from_one_after_another_to_all_at_once():
    assert Sequential(PIXEL, PRIOR, "columns").b == [(0.25, 1.0)]
    assert Sequential(PIXEL, PRIOR, "patches 2").b == [(0.25, 1.0)]
    assert Sequential(PIXEL, PRIOR, "patches 4").b == [(1.0, 1.0)]  # a single block
    (first, _), (second, _) = Sequential(HAAR, PRIOR, ("levels", "columns")).b
    assert first == pytest.approx(1 / 3) and second >= 0.25
    assert Sequential(HAAR, PRIOR, *NESTED).moving(b=[0.5, torch.tensor([0.7, 0.6])]) == pytest.approx(0.3)
    assert SoftConditioning(PRIOR, (0.0, 2.0)).moving(a=0.3) == 1.0


def test_the_default_member_is_standard_diffusion_or_the_nearest():
    ranges = {(0.4, 1.6): 1.0, (1.2, 1.6): 1.2, (0.0, 0.5): 0.5}
    for a, default in ranges.items():
        assert SoftConditioning(PRIOR, a).default == {"a": default}
    assert Sequential(PIXEL, PRIOR, "columns", (0.3, 0.9)).default == {"b": 0.9}
    assert Sequential(HAAR, PRIOR, *NESTED).default == {"b": [1.0, 0.8]}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_made_again_from_its_spec(name):
    family = FAMILIES[name]()
    again = families.rebuild(json.loads(json.dumps(family.spec)), basis_of(name), PRIOR)
    assert again.spec == family.spec and again.ranges == family.ranges and again.default == family.default
    one, other = (f(9, torch.Generator().manual_seed(1)).gamma(0.3) for f in (family, again))
    assert torch.equal(one, other)
    member = MEMBERS.get(name, {"b": 0.6})
    assert torch.equal(family.schedule(**member).gamma(HALF), again.schedule(**member).gamma(HALF))
    assert family.moving(**member) == again.moving(**member) and not family.state_dict()


def test_a_tensor_of_parameters_is_a_schedule_for_each_image():
    a = torch.tensor([0.5, 1.5], dtype=torch.float64)
    both = SoftConditioning(PRIOR, (0.4, 1.6)).schedule(a=a)
    each = [SoftConditioning(PRIOR, (0.4, 1.6)).schedule(a=x).gamma(0.3) for x in a.tolist()]
    torch.testing.assert_close(both.gamma(0.3), torch.stack(each), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("unchecked")
def test_impossible_families_are_refused_with_their_values():
    soft, columns = SoftConditioning(PRIOR, (1.0, 1.0)), Sequential(PIXEL, PRIOR, "columns")
    patches = FAMILIES["patches in random orders"]()
    wide = priors.isotropic(priors.Moments(torch.zeros(1, 4, 8), torch.ones(1, 4, 8)))
    for make, message in (
        (lambda: SoftConditioning(PRIOR, (2, 1)), r"a must be \(lowest, highest\); got \(2, 1\)"),
        (lambda: SoftConditioning(PRIOR, (1.0, math.nan)), "a must be .*finite number.*; got \\(1.0, nan\\)"),
        (lambda: SoftConditioning(PRIOR, (1.0,)), r"got \(1.0,\)"),
        (lambda: SoftConditioning(PRIOR, (1.0, 1.0), gamma_min_target=9.0), "gamma_max_target must be above"),
        (lambda: Sequential(PIXEL, PRIOR, []), r"blocks must name at least one of .*; got \[\]"),
        (lambda: Sequential(PIXEL, PRIOR, "stripes"), "blocks must be of .*; got 'stripes'"),
        (lambda: Sequential(PIXEL, PRIOR, "columns two"), "got 'columns two'"),
        (lambda: Sequential(PIXEL, PRIOR, "columns 0"), "got 'columns 0'"),
        (lambda: Sequential(PIXEL, PRIOR, "levels"), "Pixel has no label 'level'"),
        (lambda: Sequential(HAAR, PRIOR, "patches 2"), "are of pixels, or of the basis of such blocks; it is 'haar'"),
        (lambda: Sequential(PIXEL, PRIOR, "patches 3"), "size must divide height 4 and width 4; got 3"),
        (lambda: Sequential(PIXEL, PRIOR, "columns", (0.5, 0.0)), r"in \(0, 1\]; got \(0.5, 0.0\)"),
        (lambda: Sequential(HAAR, PRIOR, ("levels", "columns"), ((0.5, 1.0),) * 3), "for each of 2 blocks"),
        (lambda: Sequential(PIXEL, PRIOR, "columns", (0.1, 1.0)), "b must be at least 0.25"),
        (lambda: Sequential(PIXEL, PRIOR, "patches 2", order="spiral"), r"\('raster', 'random'\); got 'spiral'"),
        (lambda: Sequential(PIXEL, PRIOR, "columns", order="random"), "is for blocks='patches'; got 'columns'"),
        (
            lambda: Sequential(PIXEL, PRIOR, ("patches 2", "patches 1"), order="random"),
            "got \\('patches 2', 'patches 1",
        ),
        (lambda: columns.schedule(0.5, torch.arange(4)), "order is for a family with order='random'"),
        (lambda: patches.schedule(0.1, torch.arange(4)), "b must be at least 0.25"),
        (lambda: patches.schedule(0.5, torch.arange(3)), r"order must be int64 of shape \(4,\) .*of shape \(3,\)"),
        (lambda: patches.schedule(0.5, torch.arange(4.0)), "order must be int64 of shape .*; got torch.float32"),
        (lambda: patches.schedule(0.5, [0, 1, 2, 3]), "order must be int64 of shape .*; got \\[0, 1, 2, 3\\]"),
        (lambda: patches.schedule(0.5, torch.tensor(0)), r"got torch.int64 of shape \(\)"),
        (lambda: patches.schedule(0.5, torch.tensor([[0, 1, 2, 3], [0, 1, 1, 3]])), r"got \[0, 1, 1, 3\]"),
        (
            lambda: patches.schedule(torch.tensor([0.5, 0.6, 0.7]), torch.arange(4).expand(2, 4)),
            r"for one batch; they are for \(2,\) and \(3,\)",
        ),
        (
            lambda: Known(soft, PIXEL.label("column")[None] > 1, 1.5),
            "share must be a finite number between 0 and 1; got 1.5",
        ),
        (lambda: Known(soft, PIXEL.label("column")[None]), r"masks must be bool of shape \(m, c, h, w\)"),
        (lambda: Known(soft, "holes"), "rectangles or columns, or a tensor; got 'holes'"),
        (lambda: Mixed(soft, columns, -0.1), "got -0.1"),
        (lambda: Mixed(soft, SoftConditioning(wide, (1.0, 1.0)), 0.5), "must have one shape"),
        (lambda: families.rebuild({"name": "linear"}, PIXEL, PRIOR), "a family must be soft_conditioning"),
        (lambda: families.rebuild({"name": "known", "masks": 3}, PIXEL, PRIOR), "known with masks by name"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_all_components_of_a_block_have_one_noise_level():
    basis = bases.Blocks.waves((2, 3, 4))
    uneven = priors.Moments(torch.zeros(2, 3, 4), torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)) + 0.1)
    family = families.Sequential(basis, priors.isotropic(uneven), "columns")
    gamma = family.schedule(0.5).gamma(torch.linspace(0, 1, 5, dtype=torch.float64))
    torch.testing.assert_close(gamma, gamma[:, :1, :1].expand_as(gamma))
    top = family.gamma_max_target + uneven.variance.double().mean().log()
    torch.testing.assert_close(gamma[-1], torch.full_like(gamma[-1], top))
