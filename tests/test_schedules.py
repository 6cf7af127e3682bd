"""Schedules: the paper's formulas, the authors' numbers where they follow them, and none of their traps."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gudlib import bases, schedules

SHAPE = (1, 4, 6)
COLUMN = bases.Pixel(SHAPE).label("column")
ROW = bases.Pixel(SHAPE).label("row")
LEVEL = bases.Haar(SHAPE, 2).label("level")
generator = torch.Generator().manual_seed(6)
LOG_VARIANCE = torch.randn(SHAPE, generator=generator, dtype=torch.float64) * 2
ORDER = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
KNOWN = torch.rand(SHAPE, generator=generator) < 0.4

FACTORIES = {
    "linear": lambda: schedules.linear(SHAPE, -9.0, 4.0),
    "vp": lambda: schedules.vp(SHAPE),
    "cosine": lambda: schedules.cosine(SHAPE),
    "soft conditioning": lambda: schedules.soft_conditioning(ORDER, 1.3, LOG_VARIANCE),
    "soft conditioning with caps": lambda: schedules.soft_conditioning(ORDER, 2.0, gamma_min=-6.0, gamma_max=4.0),
    "columns": lambda: schedules.sequential(COLUMN, 0.4),
    "columns one by one": lambda: schedules.sequential(COLUMN, 1 / 6),
    "patches": lambda: schedules.sequential(schedules.patch_order(SHAPE, 2), 0.3),
    "columns within levels": lambda: schedules.sequential([LEVEL, COLUMN], [0.5, 0.6]),
    "columns with ends of their own": lambda: schedules.sequential(COLUMN, 0.4, ORDER - 8, ORDER.exp() - 1),
    "columns, some held": lambda: schedules.held(schedules.sequential(COLUMN, 0.4), KNOWN),
    "user function": lambda: schedules.Schedule(lambda t: -6 + 10 * t**2 + 0.1 * ORDER.exp().to(t) * t, SHAPE),
    "rescaled": lambda: schedules.rescaled(schedules.linear(SHAPE), (0.5 * LOG_VARIANCE).exp()),
}
each_factory = pytest.mark.parametrize("name", FACTORIES)


def grid(n=101):
    return torch.linspace(0, 1, n, dtype=torch.float64)


def close(got, wanted, tolerance=1e-10):
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


# What every schedule promises


@each_factory
@pytest.mark.parametrize("times", [(), (1,), (4,), (6,), (24,), (2, 3), (1, 4, 6), (4, 6), (0,)])
def test_gamma_has_the_shape_of_t_and_of_the_components_whatever_their_sizes(name, times):
    """Sizes of t that equal a component axis must not be mistaken for it."""
    schedule = FACTORIES[name]()
    t = torch.rand(times, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for quantity in (schedule.gamma, schedule.dgamma_dt, schedule.beta, schedule.alpha, schedule.sigma):
        assert quantity(t).shape == t.shape + SHAPE
    assert schedule.batch == ()
    for i in range(min(t.numel(), 3)):
        assert torch.equal(schedule.gamma(t).reshape(-1, *SHAPE)[i], schedule.gamma(t.flatten()[i]))


@each_factory
def test_everything_is_finite_at_both_ends(name):
    schedule, ends = FACTORIES[name](), torch.tensor([0.0, 1.0], dtype=torch.float64)
    for quantity in (schedule.gamma, schedule.dgamma_dt, schedule.beta, schedule.alpha, schedule.sigma):
        assert quantity(ends).isfinite().all()
        assert quantity(ends.float()).isfinite().all()


@each_factory
def test_noise_never_falls_and_dtype_is_that_of_t(name):
    schedule = FACTORIES[name]()
    assert (schedule.gamma(grid()).diff(dim=0) >= 0).all() and (schedule.dgamma_dt(grid()) >= 0).all()
    assert schedule.gamma(grid().float()).dtype == schedule.beta(grid().float()).dtype == torch.float32


@each_factory
@given(t=st.floats(0.01, 0.99))
def test_beta_is_the_noise_variance_times_the_slope_of_gamma(name, t):
    schedule, t, h = FACTORIES[name](), torch.tensor(t, dtype=torch.float64), 1e-5
    before, now, after = schedule.gamma(t - h), schedule.gamma(t), schedule.gamma(t + h)
    smooth = ((after - now) - (now - before)).abs() < 1e-2 * (after - before).clamp(min=1e-9)  # no kink within h
    expected = now.exp() / (1 + now.exp()) * (after - before) / (2 * h)
    torch.testing.assert_close(schedule.beta(t)[smooth], expected[smooth], rtol=1e-5, atol=1e-8)


@each_factory
def test_amplitudes_preserve_variance_and_give_gamma_back(name):
    schedule = FACTORIES[name]()
    alpha, sigma, gamma = schedule.alpha(grid()), schedule.sigma(grid()), schedule.gamma(grid())
    close(alpha**2 + sigma**2, torch.ones_like(alpha))
    close((sigma**2 / alpha**2).log(), gamma)
    close(schedule.snr(grid(), LOG_VARIANCE.exp()), LOG_VARIANCE.exp() * alpha**2 / sigma**2)


# The authors' numbers


def test_linear_agrees_with_the_authors(golden):
    schedule = schedules.linear((1, 1, 1), -13.3, 5.0)
    for quantity in ("gamma", "beta", "alpha", "sigma"):
        close(getattr(schedule, quantity)(golden["t"]).flatten(), golden[f"linear__{quantity}"])


def test_vp_agrees_with_the_authors_and_with_its_own_beta(golden):
    schedule, t = schedules.vp((1, 1, 1)), golden["t_open"]
    for quantity in ("gamma", "beta", "alpha", "sigma"):
        close(getattr(schedule, quantity)(t).flatten(), golden[f"vp__{quantity}"])
    close(schedule.beta(t).flatten(), 0.1 + 19.9 * t)
    assert -14 < schedule.gamma(torch.tensor(0.0)).item() < -13  # theirs is -inf


@pytest.mark.parametrize("a", [0.4, 1.0, 1.6])
def test_soft_conditioning_agrees_with_the_authors(golden, a):
    schedule = schedules.soft_conditioning(
        golden["labels"].reshape(SHAPE), a, gamma_min_target=-7.0, gamma_max_target=3.0
    )
    for quantity in ("gamma", "beta"):
        theirs = golden[f"soft_conditioning__a={a}__{quantity}"]
        close(getattr(schedule, quantity)(golden["t"]).flatten(1), theirs)


def test_cosine_is_that_of_improved_ddpm():
    t = grid()[5:-5]
    f = torch.cos(torch.pi / 2 * (t + 0.008) / 1.008) ** 2
    close(schedules.cosine((1, 1, 1)).alpha(t).flatten() ** 2, f / math.cos(math.pi / 2 * 0.008 / 1.008) ** 2)
    for low, high in ((-10.0, 10.0), (-5.0, 7.0)):
        ends = schedules.cosine((1, 1, 1), low, high).gamma(torch.tensor([0.0, 1.0], dtype=torch.float64))
        close(ends.flatten(), torch.tensor([low, high], dtype=torch.float64))


def test_the_authors_cosine_lacks_the_division_by_its_start(golden):
    schedule, t = schedules.cosine((1, 1, 1), -20.0, 20.0), golden["t_open"]
    f0 = math.cos(math.pi / 2 * 0.008 / 1.008) ** 2
    signal = schedule.alpha(t).flatten() ** 2
    close(torch.logit(1 - signal * f0), golden["cosine__gamma"])
    assert (schedule.gamma(t).flatten() - golden["cosine__gamma"]).abs()[0] > 0.01
    close(schedule.beta(t).flatten(), golden["cosine__beta"])  # a constant factor of alpha leaves beta alone


@pytest.mark.parametrize("a", [0.4, 1.0, 1.6])
def test_variance_adjustment_differs_from_the_authors_by_a_known_shift_and_slope(golden, a):
    """Theirs takes highest and range of m = a l + log Var, ours (and the paper) those of l; here l = -log Var."""
    log_variance = golden["variances"].log().reshape(SHAPE)
    low, high = -log_variance.max(), -log_variance.min()  # of l
    m = (1 - a) * log_variance
    t = golden["t"][:, None, None, None]
    ours = schedules.soft_conditioning(
        -log_variance, a, log_variance, gamma_min_target=-7.0, gamma_max_target=3.0
    ).gamma(golden["t"])
    theirs = golden[f"variance_adjusted__a={a}__gamma"].reshape(-1, *SHAPE)
    shift, slope = a * high - m.max(), (m.max() - m.min()) - a * (high - low)
    close(theirs - ours, (shift + slope * t).expand(-1, *SHAPE))
    assert shift.abs() + slope.abs() > 1


# Their columns run the other way, b = 1 - 1 / softness
SEQUENTIAL = [("column", 1.25), ("column", 2.0), ("column", 4.0), ("row", 2.0), ("row", 4.0)]


@pytest.mark.parametrize(("axis", "softness"), SEQUENTIAL)
def test_columns_and_rows_are_the_authors_in_the_opposite_order(golden, axis, softness):
    label, b = {"column": COLUMN, "row": ROW}[axis], 1 - 1 / softness
    schedule = schedules.sequential(-label, b, -13.0, 5.0)
    t = golden["t"]
    gamma, beta = (golden[f"{axis}__softness={softness}__{name}"].reshape(-1, *SHAPE) for name in ("gamma", "beta"))
    close(schedule.gamma(t), gamma, 1e-5)  # they number columns in float32
    start = (1 - b) * label / label.max()
    since = t[:, None, None, None] - start
    kink = (since.abs() < 1e-6) | ((since - b).abs() < 1e-6)
    assert kink.any() and not kink.all()
    close(schedule.beta(t)[~kink], beta[~kink], 1e-5)


@pytest.mark.parametrize(("softness", "t"), [(2.0, 0.0), (2.0, 0.5), (4.0, 0.0), (4.0, 0.75)])
def test_beta_at_a_cap_is_the_full_slope_not_the_authors_half(golden, softness, t):
    b = 1 - 1 / softness
    ours = schedules.sequential(-COLUMN, b, -13.0, 5.0).beta(torch.tensor(t, dtype=torch.float64))[0, 0, 0].item()
    theirs = golden[f"column__softness={softness}__beta"][golden["t"].tolist().index(t), 0].item()
    assert ours == pytest.approx(2 * theirs)
    gamma = -13.0 if t == 0 else 5.0
    assert ours == pytest.approx(18 / b / (1 + math.exp(-gamma)))


def test_softness_is_never_clamped_and_never_leaves_time_without_motion(golden):
    """The authors' 4 rows at softness 1.25 (b = 0.2) all stand still at t = 0.25; that is refused here."""
    still = golden["row__softness=1.25__gamma"][2]
    assert set(still.tolist()) == {-13.0, 5.0} and golden["row__softness=1.25__beta"][2].abs().max() == 0
    with pytest.raises(ValueError, match="at least 0.25, or nothing moves for 20.0%"):
        schedules.sequential(-ROW, 0.2)
    middle = [schedules.sequential(COLUMN, b).gamma(grid(997)) for b in (1 / 6, 0.2, 0.3, 0.5, 0.9, 1.0)]
    assert all((p - q).abs().max() > 0.5 for p, q in zip(middle, middle[1:], strict=False))
    inside = (grid(997)[1:] + grid(997)[:-1]) / 2
    assert (schedules.sequential(COLUMN, 1 / 6).dgamma_dt(inside).amax((1, 2, 3)) > 0).all()


# Soft-conditioning


@given(a=st.floats(0, 5), t=st.floats(0, 1))
def test_soft_conditioning_is_the_papers_formula(a, t):
    schedule = schedules.soft_conditioning(ORDER, a, LOG_VARIANCE, gamma_min_target=-6.0, gamma_max_target=4.0)
    t, low, high = torch.tensor(t, dtype=torch.float64), ORDER.min(), ORDER.max()
    slope = 4.0 - -6.0 + a * (high - low)
    close(schedule.gamma(t), -6.0 + LOG_VARIANCE + a * (ORDER - high) + t * slope, 1e-9)
    close(schedule.dgamma_dt(t), slope.expand(SHAPE))


def test_soft_conditioning_has_the_defaults_of_standard_diffusion_and_the_papers_ends():
    for a in (0.0, 0.4, 1.0, 3.0):
        schedule = schedules.soft_conditioning(ORDER, a, LOG_VARIANCE, gamma_min_target=-6.0, gamma_max_target=4.0)
        minus_log_snr = -schedule.snr(torch.tensor([0.0, 1.0], dtype=torch.float64), LOG_VARIANCE.exp()).log()
        assert minus_log_snr[0][ORDER == ORDER.max()].item() == pytest.approx(-6.0)
        assert minus_log_snr[1][ORDER == ORDER.min()].item() == pytest.approx(4.0)
    default = schedules.soft_conditioning(ORDER).gamma(grid())
    close(default, schedules.soft_conditioning(ORDER, 1.0, 0.0, -7.0, 5.0).gamma(grid()))


def test_without_softness_all_components_have_one_snr():
    schedule = schedules.soft_conditioning(ORDER, 0.0, LOG_VARIANCE)
    snr = schedule.snr(grid(), LOG_VARIANCE.exp())
    close(snr, snr[:, :1, :1, :1].expand_as(snr))
    close(snr[:, 0, 0, 0].log(), 7 - 12 * grid())


def test_softness_one_is_standard_diffusion_in_either_prior():
    order = -LOG_VARIANCE
    # whitened: SNR_i = Sigma_i e^-g with one g(t) for all
    snr = schedules.soft_conditioning(order, 1.0).snr(grid(), torch.ones(SHAPE))
    g = LOG_VARIANCE - snr.log()
    line = -7 - order.max() + grid() * (12 + order.max() - order.min())
    close(g, line[:, None, None, None].expand_as(g))
    # isotropic: the white variance is Sigma, and gamma itself is that line
    gamma = schedules.soft_conditioning(order, 1.0, LOG_VARIANCE).gamma(grid())
    close(gamma, schedules.linear(SHAPE, line[0].item(), line[-1].item()).gamma(grid()))


def test_caps_hold_gamma_and_leave_the_rest_alone():
    free, capped = (
        schedules.soft_conditioning(ORDER, 3.0),
        schedules.soft_conditioning(ORDER, 3.0, gamma_min=-5.0, gamma_max=3.0),
    )
    close(capped.gamma(grid()), free.gamma(grid()).clamp(-5.0, 3.0))
    moving = (free.gamma(grid()) > -5) & (free.gamma(grid()) < 3)
    close(capped.dgamma_dt(grid()), free.dgamma_dt(grid()) * moving)


def test_beta_at_a_cap_of_soft_conditioning_is_the_full_slope():
    order = torch.tensor([[[0.0, 1.0]]], dtype=torch.float64)
    schedule = schedules.soft_conditioning(order, 4.0, 0.0, -4.0, 4.0, -5.0, 4.0)  # gamma_0 = -8 + 12 t
    rate = schedule.dgamma_dt(torch.tensor([0.2, 0.25, 0.3, 1.0], dtype=torch.float64))[:, 0, 0, 0]
    assert rate.tolist() == [0, 12, 12, 12]
    assert schedule.dgamma_dt(torch.tensor([2 / 3 + 1e-9], dtype=torch.float64))[0, 0, 0, 1] == 0


def test_a_batch_of_softnesses_is_that_many_schedules():
    a, t = torch.tensor([0.4, 1.0, 1.6], dtype=torch.float64), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    many = schedules.soft_conditioning(ORDER, a, LOG_VARIANCE)
    assert many.batch == (3,)
    for quantity in ("gamma", "dgamma_dt", "beta"):
        each = [getattr(schedules.soft_conditioning(ORDER, x, LOG_VARIANCE), quantity) for x in a.tolist()]
        close(getattr(many, quantity)(t), torch.stack([f(x) for f, x in zip(each, t, strict=True)]))
        close(getattr(many, quantity)(t[0]), torch.stack([f(t[0]) for f in each]))
        close(getattr(many, quantity)(t[:2, None]), torch.stack([torch.stack([f(x) for f in each]) for x in t[:2]]))
    scale = (0.5 * LOG_VARIANCE).exp()
    close(schedules.rescaled(many, scale).gamma(t), many.gamma(t) + LOG_VARIANCE)


@each_factory
def test_times_may_be_numbers_integers_or_expanded(name):
    schedule = FACTORIES[name]()
    t = torch.tensor(0.3, dtype=torch.float64)
    for what in ("gamma", "dgamma_dt", "beta", "alpha", "sigma"):
        method = getattr(schedule, what)
        assert torch.equal(method(0.3), method(t)) and torch.equal(method(1), method(torch.ones_like(t)))
        close(method(t.expand(5)), method(t).expand(5, *SHAPE))  # processors round many numbers and one differently
        assert torch.equal(method(torch.tensor([0, 1])), method(grid(2)))


def test_a_batch_as_large_as_a_component_axis_stays_a_batch():
    a = torch.linspace(0.5, 1.5, 6, dtype=torch.float64)
    gamma = schedules.soft_conditioning(ORDER, a).gamma(torch.tensor(0.3, dtype=torch.float64))
    assert gamma.shape == (6, *SHAPE)
    close(gamma[2], schedules.soft_conditioning(ORDER, a[2].item()).gamma(torch.tensor(0.3, dtype=torch.float64)))


def test_each_image_of_a_batch_may_start_at_a_level_of_its_own():
    a, t = torch.tensor([0.0, 1.3, 2.0], dtype=torch.float64), torch.tensor([0.0, 0.6, 1.0], dtype=torch.float64)
    start = torch.tensor([-9.0, -4.0, 1.5], dtype=torch.float64)
    for ends in ((-math.inf, math.inf), (-6.0, 4.0)):
        many = schedules.soft_conditioning(ORDER, a, LOG_VARIANCE, start, 2.0, *ends)
        assert many.batch == (3,)
        each = [
            schedules.soft_conditioning(ORDER, x, LOG_VARIANCE, low, 2.0, *ends)
            for x, low in zip(a.tolist(), start.tolist(), strict=True)
        ]
        for quantity in ("gamma", "dgamma_dt"):
            close(
                getattr(many, quantity)(t),
                torch.stack([getattr(one, quantity)(x) for one, x in zip(each, t, strict=True)]),
            )
        kinks = torch.cat([one.kinks for one in each]).sort().values
        if len(kinks):
            assert all((many.kinks - x).abs().min() < 1e-9 for x in kinks)
            assert len(many.kinks) == len(kinks.round(decimals=9).unique())
    with pytest.raises(ValueError, match="gamma_max_target must be above gamma_min_target, 1.5; got 1.0"):
        schedules.soft_conditioning(ORDER, a, gamma_min_target=start, gamma_max_target=1.0)


# Sequential


@pytest.mark.parametrize("softness", [0.4, 1.0, 5.0])
def test_orders_point_one_way_in_every_factory(softness):
    """Higher order = more noise at every time = generated later."""
    rising = COLUMN[0, 0].argsort()
    share = {0.4: 1.0, 1.0: 0.4, 5.0: 1 / 6}[softness]
    for schedule in (schedules.soft_conditioning(COLUMN, softness), schedules.sequential(COLUMN, share)):
        assert (schedule.gamma(grid())[:, 0, 0][:, rising].diff(dim=-1) >= 0).all()


def test_columns_are_generated_from_left_to_right():
    schedule = schedules.sequential(COLUMN, 1 / 6, -7.0, 5.0)
    for done in range(7):  # t falls in generation
        gamma = schedule.gamma(torch.tensor(1 - done / 6, dtype=torch.float64))[0, 0]
        close(gamma, torch.tensor([-7.0] * done + [5.0] * (6 - done), dtype=torch.float64))


def test_one_sixth_moves_six_columns_one_after_another_without_gap_or_overlap():
    t = (torch.arange(60, dtype=torch.float64) + 0.5) / 60
    moving = schedules.sequential(COLUMN, 1 / 6).dgamma_dt(t)[:, 0, 0] > 0
    assert moving.sum(1).tolist() == [1] * 60
    assert moving.int().argmax(1).tolist() == [5 - i // 10 for i in range(60)]


def test_b_is_the_share_of_time_in_which_a_component_moves():
    t = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    for order, b in ((COLUMN, 0.35), (COLUMN**2, 0.5), (schedules.patch_order(SHAPE, 2), 0.8)):
        moving = (schedules.sequential(order, b).dgamma_dt(t) > 0).double().mean(0)
        close(moving, torch.full(SHAPE, b, dtype=torch.float64), 2e-3)


def test_b_of_one_is_standard_diffusion():
    for order in (COLUMN, schedules.patch_order(SHAPE, 1), torch.zeros(SHAPE)):
        gamma = schedules.sequential(order, 1.0, -9.0, 4.0).gamma(grid())
        close(gamma, schedules.linear(SHAPE, -9.0, 4.0).gamma(grid()))


@pytest.mark.parametrize("w", [1.0, 1.5, 2.0, 6.0])
def test_a_window_of_w_tokens_is_b_of_w_over_k_minus_one_plus_w(w):
    """gamma_k = clip(low + D [(K - 1 + w) t - (K - 1 - k)] / w), as in diffusion forcing and rolling diffusion."""
    k, low, high = 6, -7.0, 5.0
    t = grid()[:, None, None, None]
    expected = (low + (high - low) * ((k - 1 + w) * t - (k - 1 - COLUMN)) / w).clamp(low, high)
    close(schedules.sequential(COLUMN, w / (k - 1 + w), low, high).gamma(grid()), expected)


def test_nested_orders_run_the_inner_one_within_the_share_of_the_outer():
    outer, inner = schedules.sequential(LEVEL, 0.5, 0.0, 1.0), schedules.sequential(COLUMN, 0.4)
    nested = schedules.sequential([LEVEL, COLUMN], [0.5, 0.6])
    for t in grid():
        local, expected = outer.gamma(t), torch.zeros(SHAPE, dtype=torch.float64)  # the time within a component's share
        for level in LEVEL.unique():  # columns of a level go from its own first to its own last
            own = LEVEL == level
            rank = (COLUMN - COLUMN[own].min()) / (COLUMN[own].max() - COLUMN[own].min())
            begun = 0.4 * (1 - rank)
            expected[own] = (-7 + 12 * ((local - begun) / 0.6).clamp(0, 1))[own]
        close(nested.gamma(t), expected)
    close(schedules.sequential([COLUMN], [0.4]).gamma(grid()), inner.gamma(grid()))


NESTED = ([LEVEL, COLUMN], [0.5, torch.tensor([0.6, 1.0, 0.5])]), ([LEVEL, ROW], [torch.tensor([0.6, 1.0, 0.9]), 0.5])


@pytest.mark.parametrize("order, b", [(COLUMN, torch.tensor([0.4, 1.0, 1 / 6], dtype=torch.float64)), *NESTED])
def test_a_batch_of_shares_is_that_many_sequential_schedules(order, b):
    low, high = ORDER - 8, ORDER.exp() - 1
    many, t = schedules.sequential(order, b, low, high), torch.tensor([0.1, 0.55, 0.8], dtype=torch.float64)
    shares = b if isinstance(b, list) else [b]
    each = [[x[i].item() if isinstance(x, torch.Tensor) else x for x in shares] for i in range(3)]
    each = [schedules.sequential(order, x if isinstance(b, list) else x[0], low, high) for x in each]
    assert many.batch == (3,)
    for quantity in ("gamma", "dgamma_dt"):
        one = [getattr(schedule, quantity) for schedule in each]
        close(getattr(many, quantity)(t), torch.stack([f(x) for f, x in zip(one, t, strict=True)]), 1e-6)
        close(getattr(many, quantity)(t[0]), torch.stack([f(t[0]) for f in one]), 1e-6)


def test_a_single_share_may_be_a_tensor():
    one, same = schedules.sequential(COLUMN, torch.tensor(0.4, dtype=torch.float64)), schedules.sequential(COLUMN, 0.4)
    assert one.batch == () and torch.equal(one.kinks, same.kinks)
    close(one.gamma(grid()), same.gamma(grid()))


def idle_time(schedule):
    """Share of a fine grid of times at which nothing moves, not even in the cells on either side."""
    moves = (schedule.gamma(grid(2002)).diff(dim=0) > 1e-9).flatten(1).any(1)
    return 1 - moves.double().mean().item()


@given(
    gaps=st.lists(st.floats(0.01, 1), min_size=1, max_size=6),
    inner=st.lists(st.integers(0, 3), min_size=7, max_size=7),
    b=st.tuples(st.floats(0.02, 1), st.floats(0.02, 1)),
)
@pytest.mark.usefixtures("unchecked")
def test_a_schedule_is_refused_just_when_nothing_would_move_for_part_of_the_time(gaps, inner, b):
    order = torch.tensor([0.0, *gaps], dtype=torch.float64).cumsum(0).view(1, 1, -1)
    within = torch.tensor(inner[: order.numel()], dtype=torch.float64).view(1, 1, -1)
    for orders, shares in (([order], b[:1]), ([order.round(), within], b)):
        start, duration = torch.zeros_like(order), torch.ones_like(order)
        for i in range(order.numel()):  # by hand, component by component
            alike = torch.ones_like(order, dtype=torch.bool)
            for values, share in zip(orders, shares, strict=True):
                low, high = values[alike].min(), values[alike].max()
                if high > low:
                    rank = (values[0, 0, i] - low) / (high - low)
                    start[0, 0, i] += duration[0, 0, i] * (1 - share) * (1 - rank)
                    duration[0, 0, i] *= share
                alike &= values == values[0, 0, i]
        points = (torch.arange(5000, dtype=torch.float64) + 0.5) / 5000
        covered = ((points[:, None] > start.flatten()) & (points[:, None] < (start + duration).flatten())).any(1)
        try:
            schedule = schedules.sequential(orders, list(shares))
        except ValueError as error:
            assert "or nothing moves for" in str(error)
            assert covered.double().mean() < 1 or float(str(error).split("for ")[1].split("%")[0]) < 0.1
        else:
            assert covered.double().mean() > 0.999
            close(schedule.gamma(grid()), -7 + 12 * ((grid()[:, None, None, None] - start) / duration).clamp(0, 1))


def test_the_smallest_softness_follows_from_the_largest_gap():
    uneven = torch.tensor([[[0.0, 0.1, 1.0]]], dtype=torch.float64)
    with pytest.raises(ValueError, match="at least 0.473685, or nothing moves for 26.7% of the time; got 0.33"):
        schedules.sequential(uneven, 1 / 3)
    assert idle_time(schedules.sequential(uneven, 9 / 19)) < 1e-3
    for k in (6, 28, 49):  # also where 1 / K is rounded down
        order = torch.arange(k, dtype=torch.float64).view(1, 1, k)
        schedules.sequential(order, torch.tensor([1 / k]))
    haar = bases.Haar((1, 28, 28), 3)
    column, level = haar.label("column"), haar.label("level")
    assert idle_time(schedules.sequential(column, _least(column))) < 1e-3
    assert idle_time(schedules.sequential([level, column], [0.25, 4 / 15])) < 1e-3  # level 0: 8 of 22 pixels apart
    with pytest.raises(ValueError, match="at least 0.25, 0.266667"):
        schedules.sequential([level, column], [0.25, 0.26])


def _least(order):
    gap = (order.unique().diff() / (order.max() - order.min())).max().item()
    return gap / (1 + gap)


def test_among_components_of_one_place_an_inner_order_takes_all_of_their_time():
    outer, inner = torch.tensor([[[0.0, 1.0, 1.0]]]), torch.tensor([[[5.0, 0.0, 1.0]]])
    schedule = schedules.sequential([outer, inner], [0.5, 0.5], 0.0, 1.0)
    close(schedule.gamma(0.75).flatten(), torch.tensor([0.5, 1.0, 1.0], dtype=torch.float64))
    close(schedule.gamma(0.25).flatten(), torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))


def test_each_component_may_have_ends_of_its_own():
    """gamma_i = low_i + (high_i - low_i) times the course from 0 to 1 that all orderings share."""
    low, high = ORDER - 8, ORDER.exp() - 1
    course = schedules.sequential([LEVEL, COLUMN], [0.5, 0.6], 0.0, 1.0)
    schedule = schedules.sequential([LEVEL, COLUMN], [0.5, 0.6], low, high)
    close(schedule.gamma(grid()), low + (high - low) * course.gamma(grid()))
    assert torch.equal(schedule.kinks, course.kinks)


# Components that are known


@pytest.mark.parametrize("name", FACTORIES)
def test_known_components_stay_as_they_are_at_the_start_and_others_go_their_way(name):
    schedule, t = FACTORIES[name](), grid(7)
    held = schedules.held(schedule, KNOWN)
    assert torch.equal(held.gamma(t)[:, ~KNOWN], schedule.gamma(t)[:, ~KNOWN])
    assert torch.equal(held.gamma(t)[:, KNOWN], schedule.gamma(t[:1])[:, KNOWN].expand(7, -1))
    assert (
        torch.equal(held.dgamma_dt(t)[:, ~KNOWN], schedule.dgamma_dt(t)[:, ~KNOWN])
        and not held.dgamma_dt(t)[:, KNOWN].any()
    )
    assert torch.equal(held.kinks, schedule.kinks) and held.batch == ()


SOFT = torch.tensor([0.5, 0.7, 0.9], dtype=torch.float64)


@pytest.mark.parametrize("b", [0.5, SOFT])
@pytest.mark.parametrize("known", [KNOWN, torch.stack([KNOWN, ~KNOWN, COLUMN < 2])])
def test_masks_and_schedules_may_each_be_one_for_all_images_or_one_for_each(known, b):
    held, t = schedules.held(schedules.sequential(COLUMN, b), known), torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    batched = known.ndim == 4 or isinstance(b, torch.Tensor)
    assert held.batch == ((3,) if batched else ())
    shares, masks = (b if isinstance(b, torch.Tensor) else [b] * 3), known.expand(3, *SHAPE)
    each = [schedules.held(schedules.sequential(COLUMN, float(x)), m) for x, m in zip(shares, masks, strict=True)]
    for quantity in ("gamma", "dgamma_dt"):
        one = [getattr(schedule, quantity) for schedule in each]
        close(getattr(held, quantity)(t), torch.stack([f(x) for f, x in zip(one, t, strict=True)]))
        if batched:
            close(getattr(held, quantity)(t[0]), torch.stack([f(t[0]) for f in one]))


def test_spacing_of_the_order_counts_not_its_scale_or_offset():
    close(schedules.sequential(3 * COLUMN - 7, 0.4).gamma(grid()), schedules.sequential(COLUMN, 0.4).gamma(grid()))
    uneven = schedules.sequential(COLUMN**2, 0.4).gamma(grid())
    assert (uneven - schedules.sequential(COLUMN, 0.4).gamma(grid())).abs().max() > 1


def test_patches_number_squares_in_raster_order():
    expected = [[0, 0, 1, 1, 2, 2]] * 2 + [[3, 3, 4, 4, 5, 5]] * 2
    assert schedules.patch_order((2, 4, 6), 2).tolist() == [expected, expected]


def test_rescaling_moves_the_prior_into_the_schedule():
    schedule, scale = FACTORIES["soft conditioning"](), (0.5 * ORDER).exp()
    moved = schedules.rescaled(schedule, scale)
    close(moved.gamma(grid()), schedule.gamma(grid()) + 2 * scale.log())
    variance = LOG_VARIANCE.exp()
    close(moved.snr(grid(), variance), schedule.snr(grid(), variance / scale**2))


# Errors


@pytest.mark.usefixtures("unchecked")
def test_schedules_that_cannot_be_run_are_refused():
    with pytest.raises(ValueError, match="finite.*t = 1"):
        schedules.Schedule(lambda t: -torch.log1p(-t), SHAPE)
    with pytest.raises(ValueError, match="finite.*t = 0"):
        schedules.Schedule(torch.log, SHAPE)
    with pytest.raises(ValueError, match="must not fall"):
        schedules.Schedule(lambda t: -t, SHAPE)
    for shape in ((1, 4, 5), (2, 4, 6)):
        with pytest.raises(ValueError, match="does not fit components"):
            schedules.Schedule(lambda t, shape=shape: t + torch.zeros(shape), SHAPE)


@pytest.mark.usefixtures("unchecked")
def test_impossible_parameters_are_refused_with_their_values():
    cases = [
        (lambda: schedules.linear(SHAPE, 5.0, 5.0), "gamma_max must be above gamma_min, 5.0; got 5.0"),
        (lambda: schedules.vp(SHAPE, beta_min=0.0), "beta_min"),
        (lambda: schedules.vp(SHAPE, beta_min=3.0, beta_max=2.0), "beta_max"),
        (lambda: schedules.cosine(SHAPE, 1.0, -1.0), "gamma_max must be above gamma_min, 1.0; got -1.0"),
        (
            lambda: schedules.soft_conditioning(ORDER, gamma_min_target=2.0, gamma_max_target=1.0),
            "gamma_max_target must be above gamma_min_target, 2.0",
        ),
        (
            lambda: schedules.soft_conditioning(ORDER, gamma_min=1.0, gamma_max=0.0),
            "gamma_max must be above gamma_min, 1.0; got 0.0",
        ),
        (
            lambda: schedules.sequential(COLUMN, 0.1),
            "at least 0.166667, or nothing moves for 40.0% of the time; got 0.1",
        ),
        (lambda: schedules.sequential(COLUMN, 1.1), "above 0 and at most 1; got 1.1"),
        (lambda: schedules.sequential([LEVEL, COLUMN], [0.5]), "got 1 for 2"),
        (lambda: schedules.sequential([LEVEL, COLUMN], 0.5), "got 1 for 2"),
        (lambda: schedules.sequential([], []), "got 0 for 0"),
        (lambda: schedules.sequential(COLUMN, 0.5, 5.0, -7.0), "got 5 and -7"),
        (
            lambda: schedules.sequential(COLUMN, 0.5, COLUMN, 5.0),
            "gamma_min must be below gamma_max everywhere; got 5 and 5",
        ),
        (lambda: schedules.sequential(COLUMN, torch.tensor([0.5, 0.1])), r"at least 0.166667, .*; got tensor.*0.1000"),
        (
            lambda: schedules.sequential([LEVEL, COLUMN], [torch.tensor([0.5, 1.1]), 0.5]),
            r"at most 1; got tensor.*1.1000",
        ),
        (
            lambda: schedules.held(schedules.linear(SHAPE), KNOWN.double()),
            "known must be bool .*; got torch.float64",
        ),
        (lambda: schedules.held(schedules.linear(SHAPE), KNOWN[..., 1:]), r"got torch.bool of shape \(1, 4, 5"),
        (lambda: schedules.patch_order(SHAPE, 3), "height 4 and width 6; got 3"),
        (lambda: schedules.patch_order(SHAPE, 0), "got 0"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize("a", [-1.5, -0.3, 0.0, 0.7, 3.0])
def test_soft_conditioning_reaches_its_ends_for_either_sign_of_a(a):
    order = torch.tensor([[[-2.0, 0.5, 3.0]]], dtype=torch.float64)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    gamma = schedules.soft_conditioning(order, a, gamma_min_target=-7, gamma_max_target=5).gamma(ends)
    assert gamma[0].max().item() == pytest.approx(-7) and gamma[1].min().item() == pytest.approx(5)
    reversed_ = schedules.soft_conditioning(-order, -a, gamma_min_target=-7, gamma_max_target=5)
    torch.testing.assert_close(gamma, reversed_.gamma(ends))


# Kinks


@each_factory
def test_between_its_kinks_a_schedule_has_no_jump_in_its_slope(name):
    """Seen from either side of each kink some slope differs; anywhere else, on a fine grid, none does."""
    schedule, h = FACTORIES[name](), 1e-7
    kinks = schedule.kinks
    assert torch.equal(kinks, kinks.sort().values) and ((kinks > 0) & (kinks < 1)).all()

    def jump(t):
        return (schedule.dgamma_dt(t + h) - schedule.dgamma_dt(t - h)).abs().flatten(1).amax(1) / schedule.dgamma_dt(
            t
        ).abs().max()

    if len(kinks):
        assert (jump(kinks) > 1e-3).all()
    t = torch.rand(4000, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.98 + 0.01
    away = ((t[:, None] - kinks).abs() > 2 * h).all(1) if len(kinks) else torch.ones_like(t, dtype=torch.bool)
    assert (jump(t[away]) < 1e-3).all()


def test_kinks_of_known_schedules():
    close(schedules.sequential(COLUMN, 0.5).kinks, torch.linspace(0, 1, 11, dtype=torch.float64)[1:-1])
    close(schedules.vp(SHAPE).kinks, torch.tensor([1e-5], dtype=torch.float64))
    assert not len(schedules.linear(SHAPE).kinks) and not len(schedules.soft_conditioning(ORDER, 2.0).kinks)
    a = torch.tensor([0.0, 2.0], dtype=torch.float64)
    both = schedules.soft_conditioning(ORDER, a, gamma_min=-6.0, gamma_max=4.0).kinks
    close(both[0], schedules.soft_conditioning(ORDER, 2.0, gamma_min=-6.0, gamma_max=4.0).kinks.min().clamp(max=1 / 12))
    assert schedules.Schedule(lambda t: t.clamp(0.25, 0.5), SHAPE, [0.5, 0.25, 0.0, 1.0]).kinks.tolist() == [0.25, 0.5]
    assert len(schedules.sequential(COLUMN, 0.3).kinks) == 10  # twice six, less the two at the ends
    close(schedules.sequential(COLUMN, 1 / 6).kinks, torch.arange(1, 6, dtype=torch.float64) / 6)
    scaled = schedules.rescaled(schedules.sequential(COLUMN, 0.3), (0.5 * LOG_VARIANCE).exp())
    close(scaled.kinks, schedules.sequential(COLUMN, 0.3).kinks)


def test_soft_conditioning_takes_its_extremes_over_all_channels():
    order = torch.tensor([[[-2.0, 0.5]], [[3.0, 1.0]]], dtype=torch.float64)
    gamma = schedules.soft_conditioning(order, 2.0, gamma_min_target=-7.0, gamma_max_target=5.0).gamma(grid(2))
    close(gamma, torch.stack([-7 + 2 * (order - 3), 5 + 2 * (order + 2)]))


@pytest.mark.usefixtures("unchecked")
def test_a_single_component_that_falls_is_refused():
    with pytest.raises(ValueError, match="must not fall"):
        schedules.Schedule(lambda t: t * ORDER.to(t), SHAPE)
