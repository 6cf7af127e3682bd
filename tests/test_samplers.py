"""Samplers on a coupled Gaussian whose every marginal is known; moments are propagated exactly, not drawn."""

import math

import pytest
import torch
from cases import BASES, COLUMN, COVARIANCE, MEAN, SHAPE, D, matrix, moments, randn

from gudlib import priors, samplers, schedules
from gudlib.exact import Empirical, gaussian
from gudlib.process import Process, from_eps

ORDERS = {"heun": 2, "ddim": 1, "ancestral": 1, "euler-maruyama": 1}  # of convergence
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


def propagate(method, process, model, n):
    """Mean and covariance after n steps from the exact marginal at t = 1."""
    mean, covariance = marginal(model, process.schedule.gamma(torch.ones((), dtype=torch.float64)))
    probes = torch.cat([torch.zeros(1, D, dtype=torch.float64), torch.eye(D, dtype=torch.float64)])
    grid = torch.linspace(1, 0, n + 1, dtype=torch.float64)
    for t, s in zip(grid[:-1], grid[1:], strict=True):
        step = samplers.METHODS[method](model, process, probes.reshape(-1, *SHAPE), t, s)
        out = step.mean.flatten(1)
        linear = (out[1:] - out[0]).T  # the update is affine in the state
        added = step.std.expand(D + 1, *SHAPE)[0].flatten() ** 2
        mean, covariance = linear @ mean + out[0], linear @ covariance @ linear.T + added.diag()
    return mean, covariance


def error(method, process, model, n):
    mean, covariance = propagate(method, process, model, n)
    true_mean, true_covariance = marginal(model, process.schedule.gamma(torch.zeros((), dtype=torch.float64)))
    return (mean - true_mean).abs().max().item(), (covariance - true_covariance).abs().max().item()


@pytest.mark.parametrize("method", ORDERS)
def test_push_carries_the_covariance_and_the_map_of_a_sampler(method):
    process, centred = make("staggered")
    model = gaussian(torch.zeros(D, dtype=torch.float64), centred.covariances[0])
    start = marginal(model, process.schedule.gamma(torch.ones((), dtype=torch.float64)))[1]
    covariance, whole = samplers.push(model, process, 12, method, start)
    torch.testing.assert_close(covariance, propagate(method, process, model, 12)[1])
    if method in ("ddim", "heun"):
        white = randn(3, *SHAPE, seed=40)
        drawn = samplers.sample(model, process, 3, 12, method, start=white).white.flatten(1)
        torch.testing.assert_close(white.flatten(1) @ whole.T, drawn)
        torch.testing.assert_close(whole @ start @ whole.T, covariance)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ORDERS)
def test_a_coupled_gaussian_is_recovered_at_the_methods_order(method, path):
    process, model = make(path)
    # multiples of the kinks, so that the order shows
    (mean, covariance), (fine_mean, fine_covariance) = (error(method, process, model, n) for n in (60, 120))
    assert math.log2(covariance / fine_covariance) == pytest.approx(ORDERS[method], abs=0.15)
    assert fine_covariance < (0.015 if ORDERS[method] == 2 else 0.4)  # of about 5
    if method == "euler-maruyama":
        assert math.log2(mean / fine_mean) == pytest.approx(1, abs=0.1) and fine_mean < 0.1
    else:  # a Gaussian's mean needs no integration: there x0 is the mean and eps is 0
        assert mean < 1e-12


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["ddim", "heun", "ancestral"])
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
    if method in ("ancestral", "euler-maruyama"):
        assert torch.equal(step.mean[..., [0, 2]], x[..., [0, 2]])
        assert (step.std.expand_as(x)[..., 1] > 0).all()


@pytest.mark.parametrize("method", ORDERS)
def test_sample_is_the_methods_steps_with_noise_of_the_generator(method, generator):
    process, model = make("staggered")
    got = samplers.sample(model, process, 3, 4, method, generator)
    generator.manual_seed(0)
    x = torch.randn(3, *SHAPE, generator=generator, dtype=torch.float64)
    grid = torch.tensor([1, 0.75, 0.5, 0.25, 0], dtype=torch.float64)
    for t, s in zip(grid[:-1], grid[1:], strict=True):
        step = samplers.METHODS[method](model, process, x, t, s)
        x = step.mean
        if method in ("ancestral", "euler-maruyama"):
            x = x + step.std * torch.randn(3, *SHAPE, generator=generator, dtype=torch.float64)
    assert torch.equal(got.white, x) and got.white.dtype == torch.float64
    torch.testing.assert_close(got.data, process.data(x).float())
    assert got.data.dtype == torch.float32 and got.nfe == (8 if method == "heun" else 4)
    assert not torch.equal(samplers.sample(model, process, 3, 4, method, generator).white, x)


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
    got = samplers.sample(Empirical(process.white(data)), process, 40, 60, "ancestral", generator).data
    distance = torch.cdist(got.double().flatten(1), data.flatten(1))
    assert distance.min(1).values.max() < 0.5 and len(distance.argmin(1).unique()) == 5


def test_impossible_requests_are_refused_with_their_values():
    process, model = make()
    batch = process.along(schedules.soft_conditioning(COLUMN, torch.ones(3)))
    cases = [
        (dict(method="euler"), "ancestral', 'ddim', 'euler-maruyama', 'heun'.; got 'euler'"),
        (dict(n=0), "n = 0, steps = 5"),
        (dict(steps=0), "n = 2, steps = 0"),
        (dict(keep=1), "between 2 and steps . 1 = 6; got 1"),
        (dict(keep=7), "got 7"),
        (dict(keep=-1), "got -1"),
        (dict(start=randn(3, *SHAPE)), r"\(2, 1, 2, 3\); got \(3, 1, 2, 3\)"),
        (dict(process=batch), r"batch of \(3,\); got n = 2"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            samplers.sample(model, **(dict(process=process, n=2, steps=5) | options))
