"""Priors: moments of the data, scales, and densities that agree with torch's own."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from gudlib import bases, priors, schedules

SHAPE = (2, 3, 4)


def moments(floor=1e-4):
    generator = torch.Generator().manual_seed(4)
    mean = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    variance = torch.randn(SHAPE, generator=generator, dtype=torch.float64).mul(2).exp()
    return priors.Moments(mean, variance, floor)


def prior_of(kind, m=None):
    m = m or moments()
    wavenumber = bases.Fourier(SHAPE).label("wavenumber")
    return {
        "isotropic": lambda: priors.isotropic(m, 1.7),
        "whitened": lambda: priors.whitened(m),
        "interpolated": lambda: priors.interpolated(m, 0.6),
        "power law": lambda: priors.power_law(m, wavenumber, 2.5),
    }[kind]()


KINDS = ("isotropic", "whitened", "interpolated", "power law")
each_prior = pytest.mark.parametrize("kind", KINDS)


def components(n=7):
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 2


def test_moments_are_those_of_torch_in_the_basis():
    images = components(2500) + 3  # more than one internal part
    basis = bases.DCT(SHAPE)
    m = priors.measure(basis, images)
    torch.testing.assert_close(m.mean, basis(images).mean(0))
    torch.testing.assert_close(m.variance, basis(images).var(0))
    assert m.floor == 1e-4 and priors.measure(basis, images, 0.1).floor == 0.1


def test_moments_of_float32_images_are_accumulated_in_float64():
    images = (components(3000) * 0.01 + 100).float()
    m = priors.measure(bases.Pixel(SHAPE), images)
    assert m.variance.dtype == torch.float64
    torch.testing.assert_close(m.variance, images.double().var(0), rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", [bases.Pixel, bases.DCT, bases.Haar])
def test_moments_of_grey_levels_are_those_of_their_centres_and_of_the_noise_within_a_level(kind):
    images = (40 * components(1500) + 128).clamp(0, 255).to(torch.uint8)
    basis = kind((2, 3, 4), 1) if kind is bases.Haar else kind(SHAPE)
    m, chi = priors.measure(basis, images), basis((images.double() + 0.5) / 128 - 1)
    assert m.variance.dtype == torch.float64
    torch.testing.assert_close(m.mean, chi.mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(m.variance, chi.var(0) + (1 / 128) ** 2 / 12, rtol=1e-6, atol=0)


def test_moments_under_symmetries_are_those_of_all_mirror_images():
    images = components(1300).cumsum(-1)
    square = images[..., :3].clone() + torch.arange(9).view(3, 3)
    every = [y for k in range(4) for y in (square.rot90(k, (2, 3)), square.rot90(k, (2, 3)).flip(3))]
    for x, symmetry, group in ((images, "mirror", [images, images.flip(3)]), (square, "all", every)):
        basis = bases.DCT((2, 3, x.shape[3]))
        m, chi = priors.measure(basis, x, symmetries=symmetry), basis(torch.cat(group))
        torch.testing.assert_close(m.mean, chi.mean(0), rtol=0, atol=1e-12)
        torch.testing.assert_close(m.variance, chi.var(0))
    with pytest.raises(ValueError, match="square images; got height 3, width 4"):
        priors.measure(bases.Pixel(SHAPE), images, symmetries="all")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranked_breaks_ties_by_rank_and_keeps_all_other_differences(dtype):
    variance = torch.tensor([[[3.0, 0.02, 9.0, 0.5], [3.0, 0.0, 0.05, 3.0], [0.02, 8.0, 0.5, 1.0]]], dtype=dtype)
    prior = priors.whitened(priors.Moments(torch.zeros_like(variance), variance, floor=0.01))
    step, ranked = 0.125, prior.ranked(0.125)
    by_rank = [2, 9, 0, 4, 7, 11, 3, 10, 6, 1, 8, 5]  # by falling variance, then by place; the last four are floored
    order, found = prior.order.double().flatten()[by_rank], ranked.flatten()[by_rank]
    ties = order.diff() == 0
    assert ties.tolist() == [i in (2, 3, 6, 8, 9, 10) for i in range(11)]
    torch.testing.assert_close(found.diff(), torch.where(ties, step, order.diff()))
    assert (found.diff() > 0).all() and found[0] == order[0]
    assert ranked.shape == variance.shape and ranked.dtype == torch.float64
    untied = prior_of("isotropic")
    torch.testing.assert_close(untied.ranked(0.3)[untied.moments.floored == untied.variance],
                               untied.order[untied.moments.floored == untied.variance])  # fmt: skip


def test_an_inverse_softness_sets_ranked_components_below_the_floor_apart():
    variance = 10.0 ** -torch.arange(12, dtype=torch.float64).view(1, 3, 4)
    prior = priors.whitened(priors.Moments(torch.zeros_like(variance), variance))
    half = torch.tensor(0.5, dtype=torch.float64)
    for order, different in ((prior.order, 5), (prior.ranked(0.5), 12)):
        gamma = schedules.soft_conditioning(order, 1.0, prior.log_variance).gamma(half).flatten()
        assert len(gamma.unique()) == different and (gamma.diff() >= 0).all()


def test_the_floor_is_a_share_of_the_largest_variance_and_visible():
    variance = torch.tensor([[[100.0, 1.0, 0.5, 0.0]]], dtype=torch.float64)
    m = priors.Moments(torch.zeros_like(variance), variance, floor=0.01)
    assert m.floored.tolist() == [[[100.0, 1.0, 1.0, 1.0]]]
    assert m.n_floored == 2 and m.variance is variance
    prior = priors.whitened(m)
    assert prior.scale.isfinite().all() and prior.white_variance.tolist() == [[[1.0, 1.0, 0.5, 0.0]]]
    assert prior.log_variance.abs().max() == 0 and prior.moments.floor == 0.01
    torch.testing.assert_close(prior.order, -m.floored.log())


def test_isotropic_scale_is_the_same_everywhere():
    assert (priors.isotropic(moments()).scale == 1).all()
    assert (priors.isotropic(moments(), 0.3).scale == 0.3).all()


def test_whitened_data_have_unit_variance():
    images = components(300) * torch.arange(1, 5)
    prior = priors.whitened(priors.measure(bases.Pixel(SHAPE), images))
    white = prior.whiten(images)
    torch.testing.assert_close(white.var(0), torch.ones(SHAPE, dtype=torch.float64))
    torch.testing.assert_close(white.mean(0), torch.zeros(SHAPE, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(prior.white_variance, white.var(0))


def test_interpolation_runs_from_isotropic_to_whitened_along_a_power():
    m = moments()
    torch.testing.assert_close(priors.interpolated(m, 0).scale, priors.isotropic(m).scale)
    torch.testing.assert_close(priors.interpolated(m, 1).scale, priors.whitened(m).scale)
    torch.testing.assert_close(priors.interpolated(m, 0.5).scale ** 4, m.floored)


def test_power_law_has_its_exponent_and_the_datas_total_variance():
    m, k = moments(), bases.DCT(SHAPE).label("wavenumber")
    for exponent in (0.0, 2.0, 3.5):
        square = priors.power_law(m, k, exponent).scale ** 2
        torch.testing.assert_close(square.sum(), m.variance.sum())
        smallest = k[k > 0].min()
        torch.testing.assert_close(
            square * k.clamp(min=smallest) ** exponent, square[0, 0, 0].expand(SHAPE) * smallest**exponent
        )
    default = priors.power_law(m, k).scale
    torch.testing.assert_close(default, priors.power_law(m, k, 2.0).scale)


@each_prior
def test_unwhiten_undoes_whiten(kind):
    prior, chi = prior_of(kind), components()
    torch.testing.assert_close(prior.unwhiten(prior.whiten(chi)), chi, rtol=0, atol=1e-12)
    torch.testing.assert_close(prior.whiten(prior.mean + prior.scale), torch.ones(SHAPE, dtype=torch.float64))


@each_prior
def test_log_density_is_that_of_torch(kind):
    prior, chi = prior_of(kind), components()
    expected = Normal(prior.mean, prior.scale).log_prob(chi).sum((1, 2, 3))
    torch.testing.assert_close(prior.log_prob(chi), expected)


@each_prior
def test_log_volume_is_the_change_of_variables_of_whitening(kind):
    prior, chi = prior_of(kind), components()
    white = Normal(0.0, 1.0).log_prob(prior.whiten(chi)).sum((1, 2, 3))
    torch.testing.assert_close(prior.log_prob(chi), white - prior.log_volume)
    jacobian = torch.autograd.functional.jacobian(lambda x: prior.whiten(x[None])[0], chi[0])
    torch.testing.assert_close(jacobian.reshape(24, 24).logdet(), -prior.log_volume)


@each_prior
def test_kl_is_that_of_torch_before_and_after_diffusion(kind):
    prior = prior_of(kind)
    data = Normal(prior.mean, prior.variance.sqrt())
    torch.testing.assert_close(prior.kl(), kl_divergence(data, Normal(prior.mean, prior.scale)))
    gamma = torch.linspace(-5, 5, 24, dtype=torch.float64).reshape(SHAPE)
    signal = 1 / (1 + gamma.exp())
    diffused = Normal(0.0, (signal * prior.variance / prior.scale**2 + 1 - signal).sqrt())
    torch.testing.assert_close(prior.kl(gamma), kl_divergence(diffused, Normal(torch.tensor(0.0).double(), 1.0)))


@each_prior
def test_derived_scales_are_consistent(kind):
    prior = prior_of(kind)
    torch.testing.assert_close(prior.white_variance, prior.variance / prior.scale**2)
    torch.testing.assert_close(prior.log_variance, (prior.moments.floored / prior.scale**2).log())
    torch.testing.assert_close(prior.order, -prior.moments.floored.log())


def test_samples_are_mean_plus_scaled_noise_of_the_generator(generator):
    prior = prior_of("interpolated")
    draws = prior.sample(5, generator)
    noise = torch.randn(5, *SHAPE, generator=generator.manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(draws, prior.mean + prior.scale * noise)


def test_data_keep_their_dtype():
    prior = prior_of("whitened")
    assert prior.whiten(components().float()).dtype == prior.unwhiten(components().float()).dtype == torch.float32


def test_multi_information_is_torchs_kl_from_dependent_to_independent_components():
    x, zero = components(50)[:, 0, 0], torch.zeros(4, dtype=torch.float64)
    for noise in (0.0, 0.7):
        c = torch.cov(x.T) + noise**2 * torch.eye(4)
        expected = kl_divergence(MultivariateNormal(zero, c), MultivariateNormal(zero, c.diagonal().diag())) / 4
        torch.testing.assert_close(priors.multi_information(torch.cov(x.T), noise), expected)
    with pytest.raises(ValueError, match="4 components is not positive definite"):
        priors.multi_information(torch.cov(x[:3].T))


def coupled(n=6):
    root = torch.randn(n, n, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return root @ root.T + 0.1 * torch.eye(n, dtype=torch.float64)


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_multi_information_is_the_kl_to_independence_for_each_component(noise):
    c, zero = coupled(), torch.zeros(6, dtype=torch.float64)
    total = c + noise**2 * torch.eye(6)
    kl = kl_divergence(MultivariateNormal(zero, total), MultivariateNormal(zero, total.diagonal().diag()))
    torch.testing.assert_close(priors.multi_information(c, noise), kl / 6)


def test_multi_information_vanishes_in_the_eigenbasis_and_ignores_scales():
    c, scale = coupled(), torch.arange(1, 7, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(c)
    assert abs(priors.multi_information(vectors.T @ c @ vectors).item()) < 1e-12
    torch.testing.assert_close(priors.multi_information(scale * c * scale[:, None]), priors.multi_information(c))
    singular = torch.ones(6, 6)
    with pytest.raises(ValueError, match="6 components is not positive definite"):
        priors.multi_information(singular - 0.1 * torch.eye(6))
    assert priors.multi_information(singular, 1.0) > 0


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_refused_with_what_was_given():
    m, k = moments(), bases.Fourier(SHAPE).label("wavenumber")
    for floor in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match="floor"):
            moments(floor)
    with pytest.raises(ValueError, match=r"\(2, 3, 4\), \(1, 3, 4\)"):
        priors.Moments(m.mean, m.variance[:1])
    with pytest.raises(ValueError, match="n at least 2"):
        priors.measure(bases.Pixel(SHAPE), components(1))
    with pytest.raises(ValueError, match=r"\(2, 3, 4\); got \(1, 3, 4\)"):
        priors.Prior(m, torch.ones(1, 3, 4))
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="step must be (above 0 and finite|a finite number); got"):
            priors.isotropic(m).ranked(bad)
        with pytest.raises(ValueError, match="must be .*(positive and finite|finite number)"):
            priors.isotropic(m, bad)
    for wrong in (k[:1], -k, 0 * k):
        with pytest.raises(ValueError, match="wavenumber"):
            priors.power_law(m, wrong)
