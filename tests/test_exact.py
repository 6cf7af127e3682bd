"""Closed forms, checked against autograd, torch's distributions, quadrature and brute force."""

import math

import pytest
import torch
from cases import BASES, COVARIANCE, MEAN, PRIORS, SCHEDULES, SHAPE, D, matrix, moments, randn, times
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from gudlib import schedules
from gudlib.exact import (
    GaussianMixture,
    curve,
    gaussian,
    gaussian_eps,
    gaussian_error,
    information,
    linear_eps,
    linear_error,
    normal_kl,
)
from gudlib.process import Process, from_eps


def mixture(k=3):
    root = randn(k, D, D, seed=7)
    covariances = 0.3 * root @ root.mT + 0.05 * torch.eye(D, dtype=torch.float64)
    return GaussianMixture(2 * randn(k, D, seed=8), covariances, torch.tensor([0.2, 0.5, 1.3][:k], dtype=torch.float64))


def noised(b=5):
    return randn(b, *SHAPE, seed=9), 2 * randn(b, *SHAPE, seed=10)


def torch_mixture(model, gamma):
    """The diffused mixture by torch, for one gamma of (d,)."""
    alpha, noise = (1 / (1 + gamma.exp())).sqrt(), 1 / (1 + (-gamma).exp())
    covariances = alpha[:, None] * model.covariances * alpha + noise.diag()
    return MixtureSameFamily(Categorical(model.weights), MultivariateNormal(alpha * model.means, covariances))


def test_mixture_density_is_that_of_torch_at_every_noise_level():
    model, (chi, gamma) = mixture(), noised()
    expected = [torch_mixture(model, g.flatten()).log_prob(x.flatten()) for x, g in zip(chi, gamma, strict=True)]
    torch.testing.assert_close(model.log_prob(chi, gamma), torch.stack(expected))
    torch.testing.assert_close(
        model.log_prob(chi, gamma[:1]), torch_mixture(model, gamma[0].flatten()).log_prob(chi.flatten(1))
    )


def test_mixture_density_without_noise_level_is_that_of_the_data():
    model, (chi, _) = mixture(), noised()
    data = MixtureSameFamily(Categorical(model.weights), MultivariateNormal(model.means, model.covariances))
    torch.testing.assert_close(model.log_prob(chi), data.log_prob(chi.flatten(1)))


@pytest.mark.parametrize("levels", ["one for all", "each its own"])
def test_mixture_score_is_the_gradient_of_its_log_density(levels):
    model, (chi, gamma) = mixture(), noised()
    gamma = gamma[:1] if levels == "one for all" else gamma
    chi.requires_grad_()
    (gradient,) = torch.autograd.grad(model.log_prob(chi, gamma).sum(), chi)
    torch.testing.assert_close(model.score(chi, gamma), gradient)
    torch.testing.assert_close(model(chi, gamma), -torch.sigmoid(gamma).sqrt() * gradient)  # eps = -sigma score


def test_mixture_prediction_is_the_posterior_mean_by_quadrature():
    """In one dimension, E[x0 | chi] = int x0 p(x0) p(chi | x0) / int p(x0) p(chi | x0), without any formula of ours."""
    model = GaussianMixture(
        torch.tensor([[-1.0], [2.0]], dtype=torch.float64),
        torch.tensor([[[0.3]], [[0.05]]], dtype=torch.float64),
        torch.tensor([1.0, 3.0], dtype=torch.float64),
    )
    x0 = torch.linspace(-12, 12, 24001, dtype=torch.float64)
    prior = 0.25 * (-((x0 + 1) ** 2) / 0.6).exp() / 0.3**0.5 + 0.75 * (-((x0 - 2) ** 2) / 0.1).exp() / 0.05**0.5
    for gamma in (-4.0, 0.0, 2.0):
        level = torch.full((1, 1, 1, 1), gamma, dtype=torch.float64)
        noise = torch.sigmoid(level).item()
        chi = torch.tensor([-1.5, 0.1, 0.8, 3.0], dtype=torch.float64).reshape(4, 1, 1, 1)
        weight = prior * (-((chi.flatten()[:, None] - (1 - noise) ** 0.5 * x0) ** 2) / (2 * noise)).exp()
        expected = (weight * x0).sum(1) / weight.sum(1)
        got = from_eps(model(chi, level), "x0", chi, level).flatten()
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


def test_gaussian_prediction_is_the_regression_on_the_noised_data():
    mean, covariance, (chi, gamma) = randn(D), COVARIANCE, noised()
    a, n = torch.sigmoid(-gamma).sqrt().flatten(1), torch.sigmoid(gamma).flatten(1)
    expected = torch.stack([
        mean + covariance * a[i] @ torch.linalg.inv(a[i][:, None] * covariance * a[i] + n[i].diag()) @ (y - a[i] * mean)
        for i, y in enumerate(chi.flatten(1))
    ])  # fmt: skip
    got = from_eps(gaussian(mean, covariance)(chi, gamma), "x0", chi, gamma).flatten(1)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("basis", BASES)
def test_gaussian_score_in_every_basis_prior_and_schedule_is_that_of_the_images(basis, prior, schedule):
    """Noised images are N(m, K_t) with K_t = A K A^T + U^T S^2 sigma^2 U; their score -K_t^-1 (y - m) is the oracle."""
    b = BASES[basis]()
    p = PRIORS[prior](moments(b))
    process = Process(b, p, SCHEDULES[schedule](p))
    u, s = matrix(b), p.scale.flatten()
    model = gaussian(torch.zeros(D, dtype=torch.float64), (u @ COVARIANCE @ u.T) / s / s[:, None])
    t, images = times(4, 0.05, 0.95), 3 * randn(4, *SHAPE, seed=11)
    alpha, noise = process.schedule.alpha(t).flatten(1), process.schedule.sigma(t).flatten(1) ** 2
    eps = model(process.white(images), process.schedule.gamma(t))
    for i in range(4):
        shrink = u.T @ (alpha[i] * torch.eye(D, dtype=torch.float64)) @ u
        total = shrink @ COVARIANCE @ shrink.T + u.T @ (s**2 * noise[i]).diag() @ u
        score = -torch.linalg.solve(total, images[i].flatten() - MEAN)
        white_score = s * (u @ score)
        torch.testing.assert_close(eps[i].flatten(), -noise[i].sqrt() * white_score, rtol=1e-7, atol=1e-8)


def test_independent_gaussians_have_the_short_formula():
    variance, (chi, gamma) = randn(*SHAPE, seed=12).exp(), noised()
    model = gaussian(torch.zeros(D, dtype=torch.float64), variance.flatten().diag())
    torch.testing.assert_close(gaussian_eps(chi, gamma, variance), model(chi, gamma), rtol=1e-10, atol=1e-12)


def test_covariance_of_every_component_at_a_noise_level():
    model, (_, gamma) = mixture(), noised()
    got = model.covariance(gamma)
    assert got.shape == (3, 5, D, D)
    for j, g in enumerate(gamma):
        expected = torch_mixture(model, g.flatten()).component_distribution.covariance_matrix
        torch.testing.assert_close(got[:, j], expected)


def test_mixture_draws_have_its_mean_covariance_and_weights(generator):
    model, n = mixture(), 40_000
    draws = model.sample(n, generator)
    mean = model.weights @ model.means
    off = model.means - mean
    covariance = (model.weights[:, None, None] * (model.covariances + off[:, :, None] * off[:, None, :])).sum(0)
    assert (draws.mean(0) - mean).abs().max() < 4 * (covariance.diagonal().max() / n) ** 0.5
    assert (draws.T.cov() - covariance).abs().max() < 0.04 * covariance.diagonal().max()
    assert torch.equal(model.sample(10, generator.manual_seed(3)), model.sample(10, generator.manual_seed(3)))


@pytest.mark.usefixtures("unchecked")
def test_mixtures_that_do_not_fit_are_refused():
    model = mixture()
    with pytest.raises(ValueError, match=r"covariances must be .* \(3, 6, 6\); got .* \(2, 6, 6\)"):
        GaussianMixture(model.means, model.covariances[:2])
    with pytest.raises(ValueError, match=r"weights must be .* \(3,\)"):
        GaussianMixture(model.means, model.covariances, model.weights[:2])
    with pytest.raises(ValueError, match="weights must be above 0"):
        GaussianMixture(model.means, model.covariances, torch.tensor([1.0, 0.0, 1.0]))
    with pytest.raises(ValueError, match=r"6 components; got shape \(2, 1, 2, 4\)"):
        model(randn(2, 1, 2, 4), randn(2, 1, 2, 4))


# Limits


def test_mixture_limits_are_data_and_pure_noise():
    model, (chi, _) = mixture(), noised()
    clean, noise = (torch.full((1, *SHAPE), g, dtype=torch.float64) for g in (-40.0, 80.0))
    torch.testing.assert_close(from_eps(model(chi, clean), "x0", chi, clean), chi, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model(chi, noise), chi)


def test_samples_of_a_singular_covariance_stay_on_its_plane():
    """Eigenvalues that rounding makes negative count as zero."""
    direction = randn(D, seed=20)
    model = gaussian(randn(D), torch.outer(direction, direction))
    off = model.sample(200, torch.Generator().manual_seed(0)) - randn(D)
    assert torch.isfinite(off).all() and 0.8 < (off.norm(dim=1) / direction.norm()).square().mean() < 1.2
    across = off - torch.outer(off @ direction, direction) / direction.square().sum()
    assert across.abs().max() < 1e-6


# Information along a path

WHITE = COVARIANCE / COVARIANCE.diagonal().mean()
LABEL = torch.arange(float(D), dtype=torch.float64).reshape(SHAPE)
LOW, HIGH = -12.0, 8.0
SPAN = math.log(math.expm1(20) / math.expm1(2e-5))
PATHS = {
    "all at once": lambda: schedules.linear(SHAPE, LOW, HIGH),
    "in another time": lambda: schedules.Schedule(lambda t: LOW + (HIGH - LOW) * t**2, SHAPE),
    "staggered": lambda: schedules.sequential(LABEL, 0.37, LOW, HIGH),
    "one after another": lambda: schedules.sequential(LABEL, 1 / D, LOW, HIGH),
    "one after another, from the other end": lambda: schedules.sequential(-LABEL, 1 / D, LOW, HIGH),
    "soft conditioning, capped": lambda: schedules.soft_conditioning(
        LABEL, 3.0, gamma_min_target=LOW, gamma_max_target=HIGH, gamma_min=LOW, gamma_max=HIGH
    ),
    "far beyond one after another": lambda: schedules.soft_conditioning(
        LABEL, 50.0, gamma_min_target=LOW, gamma_max_target=HIGH, gamma_min=LOW, gamma_max=HIGH
    ),
    "a steep start": lambda: schedules.Schedule(
        lambda t: (torch.expm1(20 * t.clamp(min=1e-6)).log() - math.log(math.expm1(2e-5))) * (HIGH - LOW) / SPAN + LOW,
        SHAPE,
        [1e-6],
    ),
    "each its own power": lambda: schedules.Schedule(lambda t: LOW + (HIGH - LOW) * t ** (1 + LABEL), SHAPE),
}


def seen(gamma):
    """I(chi_0; chi_t) = 1/2 log det(A C A + N) / det N of the coupled Gaussian, one gamma for all components."""
    noise = 1 / (1 + math.exp(-gamma))
    noised = (1 - noise) * WHITE + noise * torch.eye(D, dtype=torch.float64)
    return 0.5 * (torch.logdet(noised) - D * math.log(noise))


def test_error_of_the_best_prediction_is_that_of_the_posterior():
    """e^gamma-scaled posterior covariance, from the joint Gaussian of data and noised data."""
    gamma = 3 * randn(4, *SHAPE, seed=11)
    got = gaussian_error(gamma, WHITE)
    assert got.shape == gamma.shape
    for level, error in zip(gamma.flatten(1), got.flatten(1), strict=True):
        a, n = torch.sigmoid(-level).sqrt(), torch.sigmoid(level)
        cross = WHITE * a
        posterior = WHITE - cross @ torch.linalg.solve(a[:, None] * WHITE * a + n.diag(), cross.T)
        torch.testing.assert_close(error, level.neg().exp() * posterior.diagonal(), rtol=1e-8, atol=1e-10)


def test_error_of_the_best_prediction_is_what_the_model_commits():
    model, gamma, n = gaussian(torch.zeros(D).double(), WHITE), 2 * randn(1, *SHAPE, seed=12), 200_000
    white = model.sample(n, torch.Generator().manual_seed(0)).reshape(n, *SHAPE)
    eps = randn(n, *SHAPE, seed=13)
    chi = torch.sigmoid(-gamma).sqrt() * white + torch.sigmoid(gamma).sqrt() * eps
    square = (eps - model(chi, gamma)).square()
    error = (square.mean(0) - gaussian_error(gamma, WHITE)[0]) / (square.std(0) / n**0.5)
    assert error.abs().max() < 4


@pytest.mark.parametrize("path", PATHS)
def test_information_does_not_depend_on_the_path(path):
    total = information(PATHS[path](), lambda gamma: gaussian_error(gamma, WHITE)).sum()
    torch.testing.assert_close(total, seen(LOW) - seen(HIGH), rtol=0, atol=1e-6)


def test_one_after_another_the_information_is_that_of_the_chain_rule():
    """Component i sees those before it (all but) exactly: 1/2 log of its conditional over the noise's variance."""
    conditional = torch.linalg.cholesky(WHITE).diagonal().square()
    expected = 0.5 * (torch.log1p(conditional * math.exp(-LOW)) - torch.log1p(conditional * math.exp(-HIGH)))
    got = information(PATHS["one after another"](), lambda gamma: gaussian_error(gamma, WHITE)).flatten()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)
    together = information(PATHS["all at once"](), lambda gamma: gaussian_error(gamma, WHITE)).flatten()
    assert (together - expected).abs().max() > 0.05


def test_information_of_a_constant_error_is_half_the_rise_of_gamma():
    schedule = PATHS["soft conditioning, capped"]()
    got = information(schedule, torch.ones_like, points=2)
    torch.testing.assert_close(got, torch.full(SHAPE, (HIGH - LOW) / 2, dtype=torch.float64))


# Linear denoisers


def test_linear_denoiser_of_a_gaussian_is_its_closed_form_and_so_is_its_error():
    gamma, chi = 3 * randn(3, *SHAPE, seed=30), randn(3, *SHAPE, seed=31)
    matrix = linear_eps(gamma, WHITE)
    got = torch.einsum("bij,bj->bi", matrix, chi.flatten(1)).view_as(chi)
    torch.testing.assert_close(got, gaussian(torch.zeros(D).double(), WHITE)(chi, gamma))
    torch.testing.assert_close(linear_error(matrix, gamma, WHITE), gaussian_error(gamma, WHITE))


def test_error_of_any_linear_denoiser_is_that_of_its_samples():
    gamma, matrix, n = randn(1, *SHAPE, seed=32), 0.3 * randn(1, D, D, seed=33), 200_000
    white = gaussian(torch.zeros(D).double(), WHITE).sample(n, torch.Generator().manual_seed(1)).view(n, *SHAPE)
    eps = randn(n, *SHAPE, seed=34)
    chi = torch.sigmoid(-gamma).sqrt() * white + torch.sigmoid(gamma).sqrt() * eps
    square = (eps - (chi.flatten(1) @ matrix[0].T).view_as(eps)).square()
    off = (square.mean(0) - linear_error(matrix, gamma, WHITE)[0]) / (square.std(0) / n**0.5)
    assert off.abs().max() < 4


def test_divergence_of_normals_is_torchs():
    other = WHITE + 0.5 * torch.eye(D, dtype=torch.float64)
    zero = torch.zeros(D, dtype=torch.float64)
    expected = torch.distributions.kl_divergence(MultivariateNormal(zero, WHITE), MultivariateNormal(zero, other))
    torch.testing.assert_close(normal_kl(WHITE, other), expected)


def test_a_curves_points_are_alike_if_they_are_near():
    C = curve(4, 1.5)
    torch.testing.assert_close(C, torch.exp(-(torch.cdist(*[torch.arange(4.0)[:, None].double()] * 2) ** 2) / 4.5))
    assert torch.linalg.eigvalsh(C).min() > 0
