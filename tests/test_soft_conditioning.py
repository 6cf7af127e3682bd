"""From diffusion to autoregression: what schedules, exact denoisers and samplers promise together."""

import math

import pytest
import torch
from cases import COVARIANCE, SHAPE, D, randn

from gudlib import exact, priors, samplers, schedules
from gudlib.process import diffuse, plain

C = COVARIANCE / COVARIANCE.diagonal().sqrt() / COVARIANCE.diagonal().sqrt()[:, None]  # coupled, unit variances
ORDER = torch.arange(float(D), dtype=torch.float64).reshape(SHAPE)
LOW, HIGH = -12.0, 8.0
H = HIGH - LOW
UNIT = torch.eye(D, dtype=torch.float64)


def soft(a, order=ORDER, low=LOW, high=HIGH):
    return schedules.staggered(order, a, low, high)


def noised(gamma, covariance=C):
    n = 1 / (1 + math.exp(-gamma))
    return (1 - n) * covariance + n * UNIT


def divergence(S, V):
    """KL(N(0, S) || N(0, V)), from torch."""
    normal = torch.distributions.MultivariateNormal
    return torch.distributions.kl_divergence(normal(torch.zeros(D).double(), S), normal(torch.zeros(D).double(), V))


def errors_of(predict, gamma):
    """E(eps - predict)^2 of a prediction linear in chi, from its answers to unit vectors of data and of noise."""
    level = gamma.repeat_interleave(D, 0)
    data, eps = (x.mT.reshape(D, *SHAPE).repeat(len(gamma), 1, 1, 1) for x in (torch.linalg.cholesky(C), UNIT))
    from_data, from_noise = predict(diffuse(data, level, 0 * eps), level), predict(diffuse(0 * data, level, eps), level)
    return (from_data.square() + (eps - from_noise).square()).unflatten(0, (-1, D)).sum(1)


def average(gamma):
    return gamma.mean((1, 2, 3), keepdim=True).expand_as(gamma)


def diffusion_term(predict, a):
    return exact.information(soft(a), lambda gamma: errors_of(predict, gamma)).sum()


MODEL = exact.gaussian(torch.zeros(D, dtype=torch.float64), C)
WRONG = exact.gaussian(torch.zeros(D, dtype=torch.float64), UNIT)
ROUTES = (-H, 0.0, 2.0, 7.0, 1.3 * H)


def test_staggered_schedules_share_their_ends_and_are_soft_conditioning_between():
    t = torch.linspace(0, 1, 201, dtype=torch.float64)
    for a in (-H, -3.0, 0.0, 2.0, 1.3 * H):
        gamma = soft(a).gamma(t)
        whole = schedules.soft_conditioning(ORDER, a, 0.0, LOW, HIGH).gamma(t)
        torch.testing.assert_close(gamma, whole.clamp(LOW, HIGH), rtol=0, atol=0)
        torch.testing.assert_close(gamma[0], torch.full_like(gamma[0], LOW), rtol=0, atol=1e-9)
        torch.testing.assert_close(gamma[-1], torch.full_like(gamma[-1], HIGH), rtol=0, atol=1e-9)


@pytest.mark.parametrize("scale", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("a", [-1.0, 0.4, 1.0, 7.0])
def test_the_wiener_weight_of_soft_conditioning_is_a_fermi_function(a, scale):
    """W = 1 / (1 + exp(a (l - l*))) with a level l* that moves linearly in time, in every prior."""
    variance = COVARIANCE.diagonal().reshape(SHAPE)
    prior = priors.interpolated(priors.Moments(0 * variance, variance), scale)
    order, t = prior.order, torch.linspace(0, 1, 21, dtype=torch.float64)
    low, high = (a * order).min(), (a * order).max()
    schedule = schedules.soft_conditioning(order, a, prior.log_variance, LOW, HIGH)
    snr = schedule.snr(t, prior.log_variance.exp())
    level = (high - LOW - t * (H + high - low)) / a
    torch.testing.assert_close(snr / (1 + snr), torch.sigmoid(a * (level.view(-1, 1, 1, 1) - order)))


@pytest.mark.parametrize("w", [1.0, 1.4, 3.0, 10.0])
def test_equidistant_soft_conditioning_is_the_sequential_schedule(w):
    """An inverse softness of H / w is a window of w components: b = w / (K - 1 + w)."""
    t = torch.linspace(0, 1, 501, dtype=torch.float64)
    other = schedules.sequential(ORDER, w / (D - 1 + w), LOW, HIGH)
    torch.testing.assert_close(soft(H / w).gamma(t), other.gamma(t), rtol=0, atol=1e-9)
    active = (soft(H / w).dgamma_dt(t + 1e-7) > 0).flatten(1).sum(1)[:-1]
    assert active.max() <= math.ceil(w) and active.double().mean() == pytest.approx(D * w / (D - 1 + w), rel=0.02)


def seen(level):
    """I(chi_0; chi_t) = 1/2 log det(A C A + N) / det N for any vector of noise levels."""
    a, n = torch.sigmoid(-level).sqrt(), torch.sigmoid(level)
    return 0.5 * (torch.logdet(a[:, None] * C * a + n.diag()) - n.log().sum())


def test_half_the_error_is_the_slope_of_the_information():
    for level in 3 * randn(5, D, seed=31):
        slope = torch.func.grad(seen)(level)
        error = exact.gaussian_error(level.reshape(1, *SHAPE), C).flatten()
        torch.testing.assert_close(slope, -0.5 * error, rtol=1e-9, atol=1e-12)


def test_the_slope_has_no_curl_and_that_of_a_badly_told_denoiser_has():
    def exactly(level):
        return exact.gaussian_error(level.reshape(1, *SHAPE), C).flatten()

    def told_the_average(level):
        gamma = level.reshape(1, *SHAPE)
        return errors_of(lambda chi, g: MODEL(chi, average(g)), gamma).flatten()

    for level in 2 * randn(3, D, seed=32):
        J, bad = (torch.func.jacrev(f)(level) for f in (exactly, told_the_average))
        torch.testing.assert_close(J, J.T, rtol=0, atol=1e-10)
        assert (J - J.T.diag().diag()).abs().max() > 1e-3  # coupled, so that there is something to be symmetric
        assert (bad - bad.T).abs().max() > 0.01


def test_the_map_from_noise_to_data_slides_from_the_symmetric_root_to_cholesky():
    values, vectors = torch.linalg.eigh(C)
    root, factor = vectors @ values.sqrt().diag() @ vectors.T, torch.linalg.cholesky(C)
    found = {}
    for a, high in ((0.0, HIGH), (HIGH - LOW, HIGH), (24.0, 12.0)):
        path = plain(soft(a, high=high))
        drawn = samplers.sample(MODEL, path, D, 600, "heun", start=UNIT.reshape(D, *SHAPE)).white
        found[a] = drawn.flatten(1).T
        torch.testing.assert_close(found[a] @ found[a].T, C, rtol=0, atol=0.005)
    torch.testing.assert_close(found[0.0], root, rtol=0, atol=0.002)
    leak = (found[H] - factor).abs().max(), (found[24.0] - factor).abs().max()
    assert leak[0] < 2 * math.exp(-HIGH / 2) and leak[1] < 2 * math.exp(-6)  # signal left in "pure" noise
    assert (root - factor).abs().max() > 0.2


@pytest.mark.parametrize("stop", [-1.0, 1.0, 3.0, HIGH])
@pytest.mark.parametrize("a", [0.0, 5.0])
def test_the_bound_exceeds_the_entropy_by_what_the_noise_does_not_reach(a, stop):
    """Prior, diffusion and reconstruction terms, minus the entropy of chi at t = 0: KL(q(chi_1) || N(0, 1))."""
    information = exact.information(soft(a, high=stop), lambda g: exact.gaussian_error(g, C)).sum()
    n1, n0 = (1 / (1 + math.exp(-g)) for g in (stop, LOW))
    start = 0.5 * D * ((1 - n1) * 1.0 + n1 - math.log(n1) - 1)
    bound = start + information + 0.5 * D * math.log(2 * math.pi * math.e * n0)
    entropy = 0.5 * torch.logdet(2 * math.pi * math.e * noised(LOW))
    assert bound - entropy == pytest.approx(float(divergence(noised(stop), UNIT)), abs=1e-7)


def test_the_exact_denoiser_of_another_density_is_as_independent_of_the_route_and_loses_the_divergence():
    terms = torch.stack([diffusion_term(WRONG, a) for a in ROUTES])
    right = torch.stack([diffusion_term(MODEL, a) for a in ROUTES])
    assert terms.max() - terms.min() < 1e-6 and right.max() - right.min() < 1e-6
    lost = divergence(noised(LOW), UNIT) - divergence(noised(HIGH), UNIT)
    torch.testing.assert_close(terms - right, lost.expand(len(ROUTES)), rtol=0, atol=1e-6)
    assert lost > 0.1


def test_a_constant_factor_keeps_the_bound_independent_of_the_route_and_other_faults_do_not():
    """(1 + d) eps_hat turns an error e into e + d^2 (1 - e)."""
    right = diffusion_term(MODEL, 0.0)
    for a in ROUTES:
        scaled = diffusion_term(lambda chi, g: 1.3 * MODEL(chi, g), a)
        torch.testing.assert_close(scaled, right + 0.09 * (0.5 * D * H - right), rtol=0, atol=1e-6)
    faults = {
        "told the average": lambda chi, g: MODEL(chi, average(g)),
        "a factor for each component": lambda chi, g: (1 + 0.1 * ORDER) * MODEL(chi, g),
        "a factor that depends on the noise": lambda chi, g: (1 + torch.sigmoid(g)) * MODEL(chi, g),
    }
    for name, predict in faults.items():
        terms = torch.stack([diffusion_term(predict, a) for a in ROUTES])
        assert terms.max() - terms.min() > 0.02, name
        assert (terms > right - 1e-6).all(), name


@pytest.mark.parametrize("method", ["ddim", "heun", "ancestral"])
def test_a_samplers_error_depends_on_the_stride_not_on_the_route(method):
    def distance(a, stride):
        path = plain(soft(a))
        S, steps = UNIT, round((H + (D - 1) * a) / stride)
        grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        for t, s in zip(grid[:-1], grid[1:], strict=True):
            step = samplers.METHODS[method](MODEL, path, UNIT.reshape(D, *SHAPE), t, s)
            L = step.mean.flatten(1).T
            S = L @ S @ L.T + (step.std.expand(D, *SHAPE)[0].flatten() ** 2).diag()
        return float(divergence(S, noised(LOW)))

    far = [distance(a, 1.25) for a in (0.0, 4.0, H)]
    assert max(far) / min(far) < 1.02
    assert distance(0.0, 0.625) < 0.4 * far[0]


def test_a_mixtures_information_is_that_of_its_entropies_and_of_the_chain_rule():
    means = torch.tensor([[-1.1, 0.9], [-0.2, -1.1], [1.1, 0.5]], dtype=torch.float64)
    spread = torch.tensor([[[0.2, 0.05], [0.05, 0.3]]], dtype=torch.float64).expand(3, 2, 2)
    both, single = exact.GaussianMixture(means, spread), exact.GaussianMixture(means[:, :1], spread[:, :1, :1])

    def error(mixture):
        d, axis = mixture.means.shape[1], torch.arange(-7, 7.05, 0.14, dtype=torch.float64)
        places = torch.cartesian_prod(*[axis] * d).reshape(-1, 1, 1, d)

        def mean_square(level):
            return (mixture.log_prob(places, level).exp()[:, None, None, None] * mixture(places, level) ** 2).sum(0)

        return lambda gamma: torch.stack([1 - 0.14**d * mean_square(g[None]) for g in gamma])

    order = ORDER.flatten()[:2].reshape(1, 1, 2)
    shares = {a: exact.information(soft(a, order), error(both), points=16).flatten() for a in (-H, 0.0, 4.0, H)}
    totals = torch.stack([share.sum() for share in shares.values()])
    assert totals.max() - totals.min() < 1e-5

    axis, information = torch.arange(-7, 7.05, 0.14, dtype=torch.float64), []
    for gamma in (LOW, HIGH):  # entropy of the noised density, less that of the noise
        level = torch.full((1, 1, 1, 2), gamma, dtype=torch.float64)
        log_density = both.log_prob(torch.cartesian_prod(axis, axis).reshape(-1, 1, 1, 2), level)
        entropy = -(0.14**2) * float((log_density.exp() * log_density).sum())
        information.append(entropy - math.log(2 * math.pi * math.e) + math.log1p(math.exp(-gamma)))
    assert float(totals.mean()) == pytest.approx(information[0] - information[1], abs=1e-5)
    alone = exact.information(schedules.linear((1, 1, 1), LOW, HIGH), error(single), points=16).sum()
    assert shares[H][0] == pytest.approx(float(alone), abs=1e-3)
    assert shares[0.0][0] < alone - 0.05
