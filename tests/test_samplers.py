"""Samplers on a coupled Gaussian whose every marginal is known; moments are propagated exactly, not drawn."""

import math
from itertools import pairwise

import pytest
import torch
from cases import BASES, COLUMN, COVARIANCE, MEAN, SCHEDULES, SHAPE, D, matrix, moments, randn
from diffusers import DPMSolverMultistepScheduler
from hypothesis import given
from hypothesis import strategies as st

from gudlib import bases, data, priors, samplers, schedules
from gudlib.exact import GaussianMixture, gaussian, gaussian_error
from gudlib.process import Process, from_eps

ORDERS = {  # of convergence
    "euler-maruyama": 1,
    "ancestral": 1,
    "ancestral-mmse": 1,
    "ddim": 1,
    "heun": 2,
    "dpm++2m": 2,
    "gaussian": 1,
    "gaussian-2m": 2,
    "gaussian-pc": 3,
}
MEMORY = {"dpm++2m", "gaussian-2m", "gaussian-pc"}
RANDOM = {"euler-maruyama", "ancestral", "ancestral-mmse"}
PATHS = {
    "common": lambda p: schedules.linear(SHAPE),
    "staggered": lambda p: schedules.soft_conditioning(COLUMN, 3.0, p.log_variance),
    "columns that overlap": lambda p: schedules.sequential(COLUMN, 0.5),
    "columns one by one": lambda p: schedules.sequential(COLUMN, 1 / 3),
}


def make(path="common"):
    """A process on components in which the Gaussian stays coupled, and the Gaussian in it."""
    basis = BASES["dct"]()
    prior = priors.interpolated(moments(basis), 0.6)
    u, s = matrix(basis), prior.scale.flatten()
    covariance = (u @ COVARIANCE @ u.T) / s / s[:, None]
    mean = randn(D, seed=20)  # off the prior's mean, so that errors of the mean show
    return Process(basis, prior, PATHS[path](prior)), gaussian(mean, covariance)


def marginal(model, gamma):
    mean = torch.sigmoid(-gamma).sqrt().flatten() * model.means[0]
    return mean, model.covariance(gamma)[0, 0]


def propagate(method, process, model, n, grid=None):
    """Mean and covariance after n steps from the exact marginal at t = 1."""
    mean, covariance = marginal(model, process.schedule.gamma(torch.ones((), dtype=torch.float64)))
    probes = torch.cat([torch.zeros(1, D, dtype=torch.float64), torch.eye(D, dtype=torch.float64)])
    grid = torch.linspace(1, 0, n + 1, dtype=torch.float64) if grid is None else grid
    update, state = samplers.METHODS[method], probes
    for t, s in pairwise(grid):
        step = update(model, process, state.reshape(-1, *SHAPE), t, s)
        out = step.mean.flatten(1)
        if method in MEMORY:
            update, state = step.next_method, out
        else:
            linear = (out[1:] - out[0]).T  # the update is affine in the state
            added = step.std.expand(D + 1, *SHAPE)[0].flatten() ** 2
            mean, covariance = linear @ mean + out[0], linear @ covariance @ linear.T + added.diag()
    if method in MEMORY:
        linear = (state[1:] - state[0]).T
        mean, covariance = linear @ mean + state[0], linear @ covariance @ linear.T
    return mean, covariance


def error(method, process, model, n):
    mean, covariance = propagate(method, process, model, n)
    true_mean, true_covariance = marginal(model, process.schedule.gamma(torch.zeros((), dtype=torch.float64)))
    return (mean - true_mean).abs().max().item(), (covariance - true_covariance).abs().max().item()


@pytest.mark.parametrize("grid", ["uniform", "adapted"])
@pytest.mark.parametrize("method", ORDERS)
def test_push_carries_the_covariance_and_the_map_of_a_sampler(method, grid):
    process, centred = make("staggered")
    model = gaussian(torch.zeros(D, dtype=torch.float64), centred.covariances[0])
    start = marginal(model, process.schedule.gamma(torch.ones((), dtype=torch.float64)))[1]
    covariance, whole = samplers.push(model, process, 12, method, start, grid)
    times = samplers.time_grid(process, 12) if grid == "adapted" else None
    torch.testing.assert_close(covariance, propagate(method, process, model, 12, times)[1])
    if method not in RANDOM:
        white = randn(3, *SHAPE, seed=40)
        drawn = samplers.sample(model, process, 3, 12, method, start=white, grid=grid).white.flatten(1)
        torch.testing.assert_close(white.flatten(1) @ whole.T, drawn)
        torch.testing.assert_close(whole @ start @ whole.T, covariance)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ORDERS)
def test_a_coupled_gaussian_is_recovered_at_the_methods_order(method, path):
    process, model = make(path)
    # multiples of the kinks, so that the order shows
    (mean, covariance), (fine_mean, fine_covariance) = (error(method, process, model, n) for n in (60, 120))
    slope, order = math.log2(covariance / fine_covariance), ORDERS[method]
    if method == "gaussian-pc" and path == "columns that overlap":
        order = 2  # where a column sets in, the means of the others bend
    if method in ("gaussian-2m", "gaussian-pc"):  # still falling to their order
        assert order - 0.2 < slope < order + 1 and fine_covariance < {2: 5e-4, 3: 3e-5}[ORDERS[method]]
    else:
        assert slope == pytest.approx(order, abs=0.15) and fine_covariance < {1: 0.4, 2: 0.015}[order]  # of about 5
    if method == "euler-maruyama":
        assert math.log2(mean / fine_mean) == pytest.approx(1, abs=0.1) and fine_mean < 0.1
    else:  # a Gaussian's mean needs no integration: there x0 is the mean and eps is 0
        assert mean < 1e-12


@pytest.fixture(scope="module")
def clothes():
    """Covariance of Fashion-MNIST at 8 x 8 pixels."""
    images = data.dequantise(data.load("fashion_mnist", "train").images[:4000], torch.Generator().manual_seed(0))
    return torch.nn.functional.adaptive_avg_pool2d(images.double(), 8).flatten(1).T.cov()


@pytest.mark.parametrize("a", [None, 0.4, 1.0, 1.6])
@pytest.mark.parametrize("basis", [bases.Pixel((1, 8, 8)), bases.DCT((1, 8, 8)), bases.Haar((1, 8, 8), 2)])
def test_fifteen_calls_do_what_a_thousand_steps_of_euler_maruyama_do(clothes, basis, a):
    """On normal data with the covariance of pictures, in bases that do not diagonalise it; a = None: one gamma."""
    u = basis(torch.eye(64, dtype=torch.float64).view(-1, *basis.shape)).flatten(1).T
    covariance = u @ clothes @ u.T
    variance = covariance.diagonal().view(basis.shape).clone()
    prior = (priors.isotropic if a is None else priors.whitened)(priors.Moments(0 * variance, variance))
    common = schedules.linear(basis.shape)
    schedule = common if a is None else schedules.soft_conditioning(prior.order, a, prior.log_variance)
    s = prior.scale.flatten()
    process, model = Process(basis, prior, schedule), gaussian(0 * s, covariance / s / s[:, None])
    start, end = (marginal(model, schedule.gamma(torch.tensor(t).double()))[1] for t in (1.0, 0.0))

    def error(method, steps, grid):
        got, _ = samplers.push(model, process, steps, method, start, grid)
        return ((got - end) * s * s[:, None]).norm() / (end * s * s[:, None]).norm()

    assert error("gaussian-pc", 15, "adapted") < error("euler-maruyama", 1000, "uniform")


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["gaussian", "gaussian-2m", "gaussian-pc", "ancestral-mmse"])
def test_independent_normals_are_exact_in_any_number_of_steps(method, path, steps):
    variance = randn(*SHAPE, seed=23).exp()
    prior = priors.interpolated(priors.Moments(0 * variance, variance), 0.6)
    mean = randn(D, seed=20)  # not the prior's
    model = gaussian(mean, prior.white_variance.flatten().diag())
    got = error(method, Process(bases.Pixel(SHAPE), prior, PATHS[path](prior)), model, steps)
    assert max(got) < 1e-12


def test_normals_one_after_another_take_one_step_each_with_the_mmse_they_have():
    process, model = make()
    order = torch.arange(D, dtype=torch.float64).reshape(SHAPE)
    path = process.along(schedules.sequential(order, 1 / D))

    def mmse(gamma):
        return gamma.exp() * gaussian_error(gamma[None], model.covariances[0])[0]

    samplers.METHODS["measured"] = samplers.analytic(mmse)
    try:
        assert max(error("measured", path, model, D)) < 1e-12
        assert max(error("measured", path, model, 3 * D)) < 1e-12
        assert error("measured", path, model, D - 1)[1] > 1e-4  # steps that do not end where a component does
    finally:
        del samplers.METHODS["measured"]
    assert error("ancestral-mmse", path, model, D)[1] > 0.01  # the default does not know what is known


def nonlinear(white_t, gamma):
    """Each component for itself: eps of no distribution in particular."""
    return torch.tanh(1.3 * white_t) * torch.sigmoid(0.4 * gamma + 1) + 0.1 * white_t


def test_2m_is_that_of_diffusers_for_each_component():
    """Every component has its own noise levels; theirs has one, so it runs once for each."""
    process, _ = make("staggered")
    start, n = randn(2, *SHAPE, seed=24), 9
    got = samplers.sample(nonlinear, process, 2, n, "dpm++2m", start=start).white
    levels = process.schedule.gamma(torch.linspace(1, 0, n + 1, dtype=torch.float64))
    for i, j in [(i, j) for i in range(SHAPE[1]) for j in range(SHAPE[2])]:
        scheduler = DPMSolverMultistepScheduler(lower_order_final=False, final_sigmas_type="sigma_min")
        scheduler.set_timesteps(n)
        scheduler.sigmas = (levels[:, 0, i, j] / 2).exp()
        x = start[:, :, i, j]
        for k, t in enumerate(scheduler.timesteps):
            x = scheduler.step(nonlinear(x, levels[k, 0, i, j]), t, x).prev_sample
        torch.testing.assert_close(got[:, :, i, j], x.double(), rtol=3e-6, atol=3e-6)  # theirs is float32


def test_without_variance_the_gaussian_methods_are_ddim_and_2m():
    process, model = make("columns that overlap")
    none = priors.Prior(priors.Moments(process.prior.mean, 0 * process.prior.variance), process.prior.scale)
    blind, start = Process(process.basis, none, process.schedule), randn(2, *SHAPE)
    for one, other in (("gaussian", "ddim"), ("gaussian-2m", "dpm++2m")):
        got = samplers.sample(nonlinear, blind, 2, 10, one, start=start).white
        torch.testing.assert_close(got, samplers.sample(nonlinear, process, 2, 10, other, start=start).white)
        assert (got - samplers.sample(nonlinear, process, 2, 10, one, start=start).white).abs().max() > 1e-3


@pytest.mark.parametrize("seen", [1, 2, 3])
def test_predictor_and_corrector_integrate_polynomials_exactly(seen):
    """d (chi / sqrt(v)) = m d (alpha / sqrt(v)) where m is a polynomial in gamma, of as many terms as evaluations."""
    process, _ = make("staggered")
    times = torch.tensor([0.8, 0.7, 0.55, 0.5, 0.35], dtype=torch.float64)[3 - seen :]
    levels, c = process.schedule.gamma(times), process.prior.white_variance

    def mean(gamma, terms):
        return sum(w * gamma**k for k, w in enumerate([0.7, -0.4, 0.2, 0.05][:terms]))

    def parts(gamma):
        v = torch.sigmoid(-gamma) * c + torch.sigmoid(gamma)
        return v.sqrt(), torch.sigmoid(-gamma).sqrt() / v.sqrt()

    def exactly(x, now, then, terms):
        u = torch.linspace(0, 1, 20001, dtype=torch.float64).view(-1, 1, 1, 1)
        gamma = now + (then - now) * u
        (root, _), (root_then, _), variance = parts(now), parts(then), parts(gamma)[1]
        middle = mean((gamma[1:] + gamma[:-1]) / 2, terms)
        return root_then * (x / root + (middle * variance.diff(dim=0)).sum(0))

    def model(terms):
        def predict(x, gamma):  # so that the mean is m
            root, _ = parts(gamma)
            return torch.sigmoid(gamma).sqrt() / root**2 * (x - torch.sigmoid(-gamma).sqrt() * mean(gamma, terms))

        return predict

    x = randn(1, *SHAPE, seed=25)
    evaluations = [(level, mean(level, seen).expand(1, *SHAPE)) for level in levels[: seen - 1].flip(0)]
    step = samplers.predictor_corrector(model(seen), process, x, *times[seen - 1 : seen + 1], evaluations)
    torch.testing.assert_close(step.mean, exactly(x, *levels[seen - 1 : seen + 1], seen), rtol=1e-7, atol=1e-7)
    # the next starts anew from x, whatever the first step led to, and has one evaluation more
    evaluations = [(level, mean(level, seen + 1).expand(1, *SHAPE)) for level in levels[:seen].flip(0)]
    bent = samplers.predictor_corrector(
        model(seen + 1), process, randn(1, *SHAPE, seed=26), *times[seen : seen + 2], evaluations, start=x
    )
    right = exactly(x, *levels[seen - 1 : seen + 1], seen + 1)
    torch.testing.assert_close(bent.next_method.keywords["start"], right, rtol=1e-6, atol=1e-6)
    assert len(bent.next_method.keywords["evaluations"]) == seen + 1


@pytest.mark.parametrize("method", ["dpm++2m", "gaussian-2m"])
def test_memory_is_not_stretched_far_and_not_used_by_who_has_none(method):
    first = {"dpm++2m": "ddim", "gaussian-2m": "gaussian"}[method]
    process, model = make("columns one by one")
    x, t = randn(2, *SHAPE), torch.tensor([0.5, 0.45, 0.3, 0.1], dtype=torch.float64)
    second = samplers.METHODS[method](model, process, x, t[0], t[1]).next_method
    near, plain = second(model, process, x, t[1], t[2]), samplers.METHODS[first](model, process, x, t[1], t[2])
    torch.testing.assert_close(near.mean[..., [0, 2]], plain.mean[..., [0, 2]])
    assert (near.mean[..., 1] - plain.mean[..., 1]).abs().min() > 1e-4  # three times as far
    torch.testing.assert_close(  # the left column only begins
        second(model, process, x, t[1], t[3]).mean[..., 0],
        samplers.METHODS[first](model, process, x, t[1], t[3]).mean[..., 0],
    )
    common = make()[0]  # seven times as far
    third = samplers.METHODS[method](model, common, x, t[0], t[1]).next_method
    torch.testing.assert_close(
        third(model, common, x, t[1], t[3]).mean, samplers.METHODS[first](model, common, x, t[1], t[3]).mean
    )


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["ddim", "heun", "ancestral", "dpm++2m"])
def test_a_single_point_is_recovered_exactly_in_any_number_of_steps(method, path, steps):
    """Its noise is known, so that DDIM and the ancestral posterior are exact: N(alpha x, sigma^2) at every time."""
    process, _ = make(path)
    point = randn(1, *SHAPE, seed=21)
    tiny = gaussian(point.flatten(), 0 * torch.eye(D, dtype=torch.float64))
    mean, covariance = propagate(method, process, tiny, steps)
    gamma = process.schedule.gamma(torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(mean, torch.sigmoid(-gamma).sqrt().flatten() * point.flatten())
    torch.testing.assert_close(covariance, torch.sigmoid(gamma).flatten().diag(), rtol=1e-6, atol=1e-9)


def test_ancestral_step_is_the_posterior_of_ddpm():
    process, model = make("staggered")
    t, s = torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    x = randn(4, *SHAPE)
    step = samplers.ancestral(model, process, x, t, s)
    at, as_ = process.schedule.alpha(t), process.schedule.alpha(s)
    vt, vs = process.schedule.sigma(t) ** 2, process.schedule.sigma(s) ** 2
    x0 = from_eps(model(x, process.schedule.gamma(t)), "x0", x, process.schedule.gamma(t))
    transition = vt - (at / as_) ** 2 * vs  # variance of chi_t given chi_s
    expected = (at / as_ * vs * x + as_ * transition * x0) / vt
    torch.testing.assert_close(step.mean, expected)
    torch.testing.assert_close(step.std**2, vs * transition / vt)


@pytest.mark.parametrize("method", ORDERS)
def test_components_that_are_not_moving_stay_where_they_are(method):
    process, model = make("columns one by one")
    x, t, s = randn(3, *SHAPE), torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
    step = samplers.METHODS[method](model, process, x, t, s)  # only the middle column moves
    for column in (0, 2):
        torch.testing.assert_close(step.mean[..., column], x[..., column], rtol=0, atol=1e-13)
        assert (step.std.expand_as(x)[..., column] == 0).all()
    assert (step.mean[..., 1] - x[..., 1]).abs().min() > 1e-3
    if method != "heun":
        assert torch.equal(step.mean[..., [0, 2]], x[..., [0, 2]])
    if method in RANDOM:
        assert (step.std.expand_as(x)[..., 1] > 0).all()


@pytest.mark.parametrize("method", ORDERS)
def test_sample_is_the_methods_steps_with_noise_of_the_generator(method, generator):
    process, model = make("staggered")
    got = samplers.sample(model, process, 3, 4, method, generator)
    generator.manual_seed(0)
    x = torch.randn(3, *SHAPE, generator=generator, dtype=torch.float64)
    grid = torch.tensor([1, 0.75, 0.5, 0.25, 0], dtype=torch.float64)
    update = samplers.METHODS[method]
    for t, s in pairwise(grid):
        step = update(model, process, x, t, s)
        x, update = step.mean, step.next_method or update
        if method in RANDOM:
            x = x + step.std * torch.randn(3, *SHAPE, generator=generator, dtype=torch.float64)
    assert torch.equal(got.white, x) and got.white.dtype == torch.float64
    torch.testing.assert_close(got.data, process.data(x).float())
    assert got.data.dtype == torch.float32 and got.nfe == (8 if method == "heun" else 4)
    assert (step.next_method is not None) == (method in MEMORY)
    assert not torch.equal(samplers.sample(model, process, 3, 4, method, generator).white, x)
    generator.manual_seed(0)
    assert torch.equal(samplers.sample(model, process, 3, 4, samplers.METHODS[method], generator).white, x)


def test_kept_states_are_spread_evenly_and_include_both_ends():
    process, model = make()
    start = randn(2, *SHAPE)
    for keep, times in ((0, []), (2, [1, 0]), (3, [1, 0.5, 0]), (9, [1 - i / 8 for i in range(9)])):
        got = samplers.sample(model, process, 2, 8, start=start, keep=keep)
        assert got.times.tolist() == times and got.states.shape == (keep, 2, *SHAPE)
        if keep:
            assert torch.equal(got.states[0], start) and torch.equal(got.states[-1], got.white)
    all_states = got.states
    third = samplers.sample(model, process, 2, 8, start=start, keep=3)
    assert torch.equal(third.states[1], all_states[4])


def test_a_grid_of_ones_own_settles_the_steps():
    process, model = make("staggered")
    start, grid = randn(2, *SHAPE), torch.tensor([1.0, 0.7, 0.2, 0.0])
    got = samplers.sample(model, process, 2, 50, "gaussian-pc", start=start, grid=grid, keep=4)
    assert got.nfe == 3 and torch.equal(got.times, grid.double())
    x, update = start, samplers.predictor_corrector
    for t, s in pairwise(grid.double()):
        step = update(model, process, x, t, s)
        x, update = step.mean, step.next_method
    assert torch.equal(got.white, x)
    even = samplers.sample(model, process, 2, 4, start=start, grid=torch.linspace(1, 0, 5))
    assert torch.equal(even.white, samplers.sample(model, process, 2, 4, start=start).white)
    adapted = samplers.sample(model, process, 2, 4, start=start, grid="adapted", keep=5)
    assert torch.equal(adapted.times, samplers.time_grid(process, 4)) and not torch.equal(adapted.white, even.white)


@given(name=st.sampled_from(sorted(SCHEDULES)), steps=st.integers(1, 40))
def test_times_fall_from_one_to_zero_in_as_many_steps_as_asked_for(name, steps):
    prior = priors.interpolated(moments(BASES["dct"]()), 0.6)
    got = samplers.time_grid(Process(BASES["dct"](), prior, SCHEDULES[name](prior)), steps)
    assert got.shape == (steps + 1,) and got.dtype == torch.float64
    assert got[0] == 1 and got[-1] == 0 and (got.diff() < 0).all()


def activity(process, nodes):
    """The share of the activity up to each node, by a fine sum."""
    t = torch.linspace(0, 1, 100001, dtype=torch.float64)
    gamma, c = process.schedule.gamma(t), process.prior.white_variance
    unknown = 1 / (1 + c * (-(gamma[1:] + gamma[:-1]) / 2).exp())
    rate = ((gamma.diff(dim=0) ** 4 * unknown**2).flatten(1).mean(1)) ** 0.25
    total = torch.cat([torch.zeros(1), rate.cumsum(0)]) / rate.sum()
    return total[(nodes * 100000).round().long()]


@pytest.mark.parametrize("path", ["common", "staggered"])
def test_steps_have_equal_shares_where_nothing_kinks(path):
    process, _ = make(path)
    shares = -activity(process, samplers.time_grid(process, 7)).diff()
    torch.testing.assert_close(shares, torch.full((7,), 1 / 7).double(), rtol=1e-3, atol=0)


def test_steps_end_at_kinks_and_each_piece_gets_its_share():
    process, _ = make("columns that overlap")  # kinks at a quarter, a half and three quarters
    for steps in (4, 9, 30):
        got = samplers.time_grid(process, steps)
        for kink in process.schedule.kinks:
            assert (got == kink).any()
        shares = -activity(process, got).diff()
        piece = (got[1:] * 4 + 1e-9).floor()
        largest = max(shares[piece == k].max() for k in range(4))
        for k in range(4):  # within a piece alike; one step fewer would make some piece's steps the largest
            mine = shares[piece == k]
            assert mine.max() < mine.min() * 1.02
            assert len(mine) == 1 or mine.sum() / (len(mine) - 1) > largest * 0.99


def test_few_components_that_move_alone_get_steps_too():
    """Haar's levels in turn: the coarsest has one component in 64 and is not starved for it."""
    basis = bases.Haar((1, 16, 16), 3)
    ones = torch.ones(basis.shape, dtype=torch.float64)
    path = schedules.sequential(basis.label("level"), 0.25)
    got = samplers.time_grid(Process(basis, priors.isotropic(priors.Moments(0 * ones, ones)), path), 40)
    assert torch.histc(got[1:], 4, 0, 1).min() > 4


def test_too_many_kinks_attract_steps_that_end_near_them():
    order = torch.arange(D, dtype=torch.float64).reshape(SHAPE)
    prior = priors.whitened(priors.Moments(torch.zeros(SHAPE).double(), torch.ones(SHAPE).double()))
    process = Process(bases.Pixel(SHAPE), prior, schedules.sequential(order, 1 / D))
    kinks = process.schedule.kinks
    assert len(kinks) == 5
    third, fifth = samplers.time_grid(process, 3), samplers.time_grid(process, 5)
    torch.testing.assert_close(third[1:-1], kinks[[3, 1]], rtol=0, atol=0)
    shares = activity(process, fifth)  # equal ends are at fifths, kinks at sixths: 1/5 and 4/5 are near, 2/5 is not
    assert (fifth[1] == kinks[4]) and (fifth[4] == kinks[0])
    assert not torch.isin(fifth[2:4], kinks).any()
    torch.testing.assert_close(shares[2:4] - shares[3:5], (shares[1:2] - shares[4:5]).expand(2) / 3, rtol=5e-3, atol=0)


def test_time_in_which_nothing_moves_costs_no_step():
    def gamma(t):
        return -6 + 20 * (t.clamp(0.2, 0.4) + t.clamp(0.6, 0.9))

    prior = make()[0].prior
    process = Process(bases.Pixel(SHAPE), prior, schedules.Schedule(gamma, SHAPE, [0.2, 0.4, 0.6, 0.9]))
    got = samplers.time_grid(process, 2)
    assert got.tolist() in ([1, 0.6, 0], [1, 0.4, 0])
    for steps in (5, 8):
        got = samplers.time_grid(process, steps)
        assert (gamma(got[:-1]) - gamma(got[1:]) > 0.1).all()
    still = Process(bases.Pixel(SHAPE), prior, schedules.Schedule(lambda t: 0 * t, SHAPE))
    assert torch.equal(samplers.time_grid(still, 4), torch.tensor([1, 0.75, 0.5, 0.25, 0]).double())


def test_a_batch_of_softnesses_samples_each_image_along_its_own_schedule():
    process, model = make()
    start, a = randn(3, *SHAPE), torch.tensor([0.0, 1.0, 2.5], dtype=torch.float64)
    many = process.along(schedules.soft_conditioning(COLUMN, a, process.prior.log_variance))
    got = samplers.sample(model, many, 3, 6, start=start).white
    for i in range(3):
        one = process.along(schedules.soft_conditioning(COLUMN, a[i].item(), process.prior.log_variance))
        torch.testing.assert_close(got[i : i + 1], samplers.sample(model, one, 1, 6, start=start[i : i + 1]).white)


def test_the_default_is_fifty_steps_of_heun():
    process, model = make()
    start = randn(2, *SHAPE)
    assert torch.equal(
        samplers.sample(model, process, 2, start=start).white,
        samplers.sample(model, process, 2, 50, "heun", start=start).white,
    )


def test_the_model_is_called_without_gradients_and_state_is_float64():
    process, model = make()
    seen = []

    def watching(white_t, gamma):
        seen.append((torch.is_grad_enabled(), white_t.dtype))
        return model(white_t, gamma)

    samplers.sample(watching, process, 2, 3, "ddim", start=randn(2, *SHAPE).float())
    assert seen == [(False, torch.float64)] * 3


@pytest.mark.parametrize("method", ORDERS)
def test_drawn_samples_have_the_images_mean_and_covariance(method, generator):
    process, _ = make("columns that overlap")
    u, s = matrix(process.basis), process.prior.scale.flatten()
    model = gaussian(torch.zeros(D, dtype=torch.float64), (u @ COVARIANCE @ u.T) / s / s[:, None])
    images = samplers.sample(model, process, 6000, 100, method, generator).data.double().flatten(1)
    scale = COVARIANCE.diagonal().max()
    assert (images.mean(0) - MEAN).abs().max() < 0.08 * scale**0.5
    assert (images.T.cov() - COVARIANCE).abs().max() < 0.12 * scale


def test_finite_data_are_reproduced(generator):
    process, _ = make("columns that overlap")
    data = 2 * randn(5, *SHAPE, seed=22)
    points = process.white(data).flatten(1)
    model = GaussianMixture(points, 1e-8 * torch.eye(D, dtype=torch.float64).expand(5, D, D))
    got = samplers.sample(model, process, 40, 60, "ancestral", generator).data
    distance = torch.cdist(got.double().flatten(1), data.flatten(1))
    assert distance.min(1).values.max() < 0.5 and len(distance.argmin(1).unique()) == 5


@pytest.mark.usefixtures("unchecked")
def test_impossible_requests_are_refused_with_their_values():
    process, model = make()
    batch = process.along(schedules.soft_conditioning(COLUMN, torch.ones(3)))
    cases = [
        (dict(method="euler"), "ancestral', 'ancestral-mmse', .*'heun'.; got 'euler'"),
        (dict(n=0), "n must be at least 1; got 0"),
        (dict(steps=0), "steps must be at least 1; got 0"),
        (dict(steps=0, grid="adapted"), "steps must be at least 1; got 0"),
        (dict(grid="even"), "uniform, adapted or times; got 'even'"),
        (dict(grid=torch.tensor([1.0, 0.5])), r"fall from 1 to 0; got tensor\(\[1.0000, 0.5000\]\)"),
        (dict(grid=torch.tensor([0.9, 0.0])), "fall from 1 to 0"),
        (dict(grid=torch.tensor([1.0, 0.5, 0.5, 0.0])), "fall from 1 to 0"),
        (dict(grid=torch.tensor([[1.0, 0.0]])), "grid must be floating"),
        (dict(grid=torch.tensor([0.0])), "fall from 1 to 0"),
        (dict(grid=torch.tensor([1.0, 0.5, 0.0]), keep=4), "between 2 and steps . 1 = 3; got 4"),
        (dict(keep=1), "between 2 and steps . 1 = 6; got 1"),
        (dict(keep=7), "got 7"),
        (dict(keep=-1), "got -1"),
        (dict(start=randn(3, *SHAPE)), r"\(2, 1, 2, 3\); got \(3, 1, 2, 3\)"),
        (dict(process=batch), r"batch of \(3,\); got n = 2"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            samplers.sample(model, **(dict(process=process, n=2, steps=5) | options))
