"""The process: marginals that solve its own SDE, one truth behind all conversions, prior and schedule redundant."""

import pytest
import torch
from cases import BASES, COLUMN, PRIORS, SCHEDULES, SHAPE, moments, randn, times

from gudlib import bases, priors, schedules
from gudlib.exact import gaussian_eps
from gudlib.process import Process, diffuse, from_eps, plain, to_eps

each_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
KINDS = ("eps", "x0", "score", "v")


def make(basis="dct", prior="interpolated", schedule="soft conditioning"):
    b = BASES[basis]()
    p = PRIORS[prior](moments(b))
    return Process(b, p, SCHEDULES[schedule](p))


def variance(process, t):
    """v = alpha^2 c + sigma^2, the variance of chi(t) for the data's c."""
    s = process.schedule
    return s.alpha(t) ** 2 * process.prior.white_variance + s.sigma(t) ** 2


# The SDE


@each_schedule
def test_forward_marginal_solves_the_moment_equations_of_the_sde(schedule):
    """dm/dt = drift, dv/dt = -beta v + diffusion^2, integrated numerically from t = 0."""
    process, n = make(schedule=schedule), 6000
    middle = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    beta = process.schedule.beta(middle)  # d chi = -1/2 beta chi dt + sqrt(beta) dW
    shrink = (-beta / n).exp()  # of the variance, in one small step
    start = torch.zeros((), dtype=torch.float64)
    zero, one = torch.zeros(SHAPE, dtype=torch.float64), torch.ones(SHAPE, dtype=torch.float64)
    mean = diffuse(one, process.schedule.gamma(start), zero)
    var = diffuse(zero, process.schedule.gamma(start), one) ** 2
    for i in range(n):
        mean = mean * shrink[i].sqrt()
        var = var * shrink[i] + beta[i] / n * (1 + shrink[i]) / 2
        if (i + 1) % (n // 5) == 0:
            gamma = process.schedule.gamma(torch.tensor((i + 1) / n, dtype=torch.float64))
            torch.testing.assert_close(mean, diffuse(one, gamma, zero), rtol=2e-3, atol=1e-4)
            torch.testing.assert_close(var, diffuse(zero, gamma, one) ** 2, rtol=2e-3, atol=1e-4)


@each_schedule
def test_velocity_is_the_derivative_of_the_exact_gaussian_flow(schedule):
    """For independent Gaussians the flow is chi(t) = z sqrt(v(t)), with one z along a path."""
    process, z = make(schedule=schedule), randn(8, *SHAPE)
    t = times(8, 0.03, 0.97)
    path, derivative = torch.func.jvp(lambda t: z * variance(process, t).sqrt(), (t,), (torch.ones_like(t),))
    eps = gaussian_eps(path, process.schedule.gamma(t), process.prior.white_variance)
    torch.testing.assert_close(process.velocity(path, t, eps), derivative, rtol=1e-9, atol=1e-9)


@each_schedule
def test_reverse_sde_keeps_the_marginals(schedule):
    """For drift k chi and diffusion g, run with dt < 0, a variance v stays the marginal's if dv/dt = 2 k v - g^2."""
    process, t = make(schedule=schedule), times(8, 0.03, 0.97)
    v, slope = torch.func.jvp(lambda t: variance(process, t), (t,), (torch.ones_like(t),))
    chi = randn(8, *SHAPE)
    eps = gaussian_eps(chi, process.schedule.gamma(t), process.prior.white_variance)
    drift, diffusion = process.reverse_sde(chi, t, eps)
    torch.testing.assert_close(2 * drift / chi * v - diffusion**2, slope, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(diffusion**2, process.schedule.beta(t))


def test_the_flow_is_half_way_between_the_sde_and_its_reverse():
    process, t, chi, eps = make(), times(5), randn(5, *SHAPE), randn(5, *SHAPE, seed=3)
    forward, (reverse, _) = -0.5 * process.schedule.beta(t) * chi, process.reverse_sde(chi, t, eps)
    torch.testing.assert_close(process.velocity(chi, t, eps), (forward + reverse) / 2)


# Conversions


def test_every_kind_of_prediction_means_the_same():
    gamma, x0, eps = randn(4, *SHAPE, seed=4) * 3, randn(4, *SHAPE), randn(4, *SHAPE, seed=5)
    chi = diffuse(x0, gamma, eps)
    alpha, sigma = (1 / (1 + gamma.exp())).sqrt(), (1 / (1 + (-gamma).exp())).sqrt()
    torch.testing.assert_close(chi, alpha * x0 + sigma * eps)
    meaning = {"eps": eps, "x0": x0, "score": -eps / sigma, "v": alpha * eps - sigma * x0}
    for kind in KINDS:
        torch.testing.assert_close(from_eps(eps, kind, chi, gamma), meaning[kind], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(to_eps(meaning[kind], kind, chi, gamma), eps, rtol=1e-9, atol=1e-9)


def test_velocity_prediction_is_the_derivative_along_the_circle():
    """v = d chi / d phi on chi = cos(phi) x0 + sin(phi) eps."""
    x0, eps, phi = randn(3, *SHAPE), randn(3, *SHAPE, seed=5), torch.tensor(0.8, dtype=torch.float64)
    chi, v = torch.func.jvp(lambda p: p.cos() * x0 + p.sin() * eps, (phi,), (torch.ones_like(phi),))
    torch.testing.assert_close(from_eps(eps, "v", chi, 2 * phi.tan().log()), v)


@pytest.mark.usefixtures("unchecked")
def test_unknown_kinds_are_refused_with_the_known_ones():
    for convert in (to_eps, from_eps):
        with pytest.raises(ValueError, match="eps, x0, score, v; got 'noise'"):
            convert(randn(1), "noise", randn(1), randn(1))


def test_score_and_flow_agree_with_the_authors(golden):
    chi, eps, gamma, beta = (golden[f"conv__{k}"][:, None] for k in ("x", "eps", "gamma", "beta"))  # (5, 1, 24, 2 or 1)
    torch.testing.assert_close(from_eps(eps, "score", chi, gamma), golden["conv__score"][:, None])
    slope = beta / torch.sigmoid(gamma)
    shape = (1, 24, 2)
    schedule = schedules.Schedule(lambda t: gamma + slope * (t - 0.5), shape)
    m = priors.Moments(torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64))
    process = Process(bases.Pixel(shape), priors.isotropic(m), schedule)
    velocity = process.velocity(chi, torch.full((5,), 0.5, dtype=torch.float64), eps)
    torch.testing.assert_close(velocity, -golden["conv__velocity"][:, None])  # theirs runs with time reversed


# Prior and schedule are partly redundant


def test_rescaling_lemma_same_paths_up_to_a_known_factor():
    """(S, gamma) and (1, gamma + 2 log S): equal SNR, and components that differ by alpha' / alpha."""
    one = make(prior="power law")
    scale = one.prior.scale
    other = Process(one.basis, priors.isotropic(one.prior.moments), schedules.rescaled(one.schedule, scale))
    t, white, eps = times(6), randn(6, *SHAPE), randn(6, *SHAPE, seed=3)
    torch.testing.assert_close(
        one.schedule.snr(t, one.prior.white_variance), other.schedule.snr(t, other.prior.white_variance)
    )
    factor = other.schedule.alpha(t) / one.schedule.alpha(t)
    here = scale * diffuse(white, one.schedule.gamma(t), eps)  # components less their mean
    there = diffuse(scale * white, other.schedule.gamma(t), eps)
    torch.testing.assert_close(there, factor * here)
    # the variance of chi_0 + Brownian motion at S^2 e^gamma, which fixes the law of the whole path
    torch.testing.assert_close(scale**2 * one.schedule.gamma(t).exp(), other.schedule.gamma(t).exp())


def test_rescaling_lemma_same_flow():
    one = make(prior="power law")
    scale = one.prior.scale
    other = Process(one.basis, priors.isotropic(one.prior.moments), schedules.rescaled(one.schedule, scale))
    t, white_t = times(6, 0.1, 0.9), randn(6, *SHAPE)

    def flow(process, x):
        eps = gaussian_eps(x, process.schedule.gamma(t), process.prior.white_variance)
        return process.velocity(x, t, eps)

    def factor(t):
        return scale * other.schedule.alpha(t) / one.schedule.alpha(t)

    k, slope = torch.func.jvp(factor, (t,), (torch.ones_like(t),))
    torch.testing.assert_close(flow(other, k * white_t), slope * white_t + k * flow(one, white_t))


# Data in, data out


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("prior", PRIORS)
def test_white_and_data_are_inverse(basis, prior):
    process, data = make(basis, prior), randn(4, *SHAPE)
    torch.testing.assert_close(process.data(process.white(data)), data, rtol=0, atol=1e-12)
    expected = (process.basis(data) - process.prior.mean) / process.prior.scale
    torch.testing.assert_close(process.white(data), expected)


def test_standard_diffusion_is_pixel_isotropic_linear(generator):
    m = priors.Moments(torch.zeros(SHAPE, dtype=torch.float64), torch.ones(SHAPE, dtype=torch.float64))
    process = Process(bases.Pixel(SHAPE), priors.isotropic(m), schedules.linear(SHAPE, -6.0, 6.0))
    data, eps = randn(2, *SHAPE), torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64)
    noised = process.data(diffuse(process.white(data), process.schedule.gamma(0.5), eps))
    torch.testing.assert_close(noised, (data + eps) / 2**0.5)


def test_along_another_schedule_shares_basis_and_prior():
    process, other = make(), schedules.sequential(COLUMN, 0.5)
    moved = process.along(other)
    assert moved.schedule is other and moved.basis is process.basis and moved.prior is process.prior


@pytest.mark.usefixtures("unchecked")
def test_a_plain_process_leaves_data_as_they_are():
    schedule = schedules.linear(SHAPE)
    process, data = plain(schedule), randn(2, *SHAPE, seed=8)
    assert process.schedule is schedule
    torch.testing.assert_close(process.white(data), data, rtol=0, atol=0)
    torch.testing.assert_close(process.data(data), data, rtol=0, atol=0)
    torch.testing.assert_close(process.prior.white_variance, torch.ones(SHAPE, dtype=torch.float64), rtol=0, atol=0)


def test_pieces_of_different_shapes_are_refused_with_their_shapes():
    process = make()
    with pytest.raises(ValueError, match=r"'schedule': \(1, 2, 4\)"):
        process.along(schedules.linear((1, 2, 4)))
    with pytest.raises(ValueError, match=r"'basis': \(3, 2, 3\)"):
        Process(bases.Pixel((3, 2, 3)), process.prior, process.schedule)
