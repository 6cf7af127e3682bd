"""Reference distributions against brute force, their NLL against the bound of their own denoiser, along every path."""

import math

import pytest
import torch
from cases import randn

from gudlib import baselines, bases, data, denoiser, families, likelihood, priors, references, schedules
from gudlib.exact import gaussian, information
from gudlib.mar import patchify
from gudlib.process import Process, diffuse
from gudlib.references import (
    GroupedGaussian,
    Histograms,
    IndependentGaussian,
    LatticeGaussian,
    Marginals,
    PatchHistograms,
)

SHAPE = (1, 4, 4)
HALF = 127.5


def pictures(n=400, shape=SHAPE, seed=0):
    """Dark or bright, with a ramp, some pixels exactly black."""
    generator = torch.Generator().manual_seed(seed)
    bright = torch.randint(2, (n, 1, 1, 1), generator=generator)
    ramp = torch.linspace(0, 40, shape[2])[:, None].expand(shape)
    x = 60 + 90 * bright + ramp + 12 * torch.randn(n, *shape, generator=generator)
    x = torch.where(torch.rand(n, *shape, generator=generator) < 0.3, torch.zeros(()), x)
    return x.round().clamp(0, 255).to(torch.uint8)


def of_pixels(images, scale=0.7):
    basis = bases.Pixel(tuple(images.shape[1:]))
    return basis, priors.isotropic(priors.measure(basis, images), scale)


def of_columns(shape=(2, 3, 4), scale=0.5, seed=0):
    """Columns of correlated waves: basis, prior, and a grouped normal distribution with its full covariance."""
    basis = bases.Blocks.waves(shape)
    c, h, w = shape
    members = torch.arange(c * h).view(c, h).T.contiguous()
    root = randn(h, c * w, c * w, seed=seed)
    covariance = root @ root.mT / (c * w) + 0.05 * torch.eye(c * w, dtype=torch.float64)
    mean = randn(h, c, seed=seed + 1)
    moments = priors.Moments(torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64))
    reference = GroupedGaussian(basis, priors.isotropic(moments, scale), members, covariance, mean)
    added = reference.added / scale**2
    whole, centre = torch.zeros(c * h * w, c * h * w, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    place = torch.arange(c * h * w).view(shape)
    for g in range(h):  # component (k, row) of column x lies at (k, row, x): a wave's colours at (0.., g, :)
        at = place[:, g].flatten()
        whole[at[:, None], at] = covariance[g] + added * torch.eye(c * w, dtype=torch.float64)
        centre[:, g] = mean[g][:, None].expand(c, w)
    return reference, whole, centre


def levels(n, reference, seed=3):
    """Noise levels that differ from column to column and are the same within one."""
    w = reference.basis.shape[2]
    return (4 * randn(n, 1, 1, w, seed=seed)).expand(n, *reference.basis.shape)


def brute(weight, values, variance, z, s):
    """Posterior mean and deviation of x from mixtures (d, k) of normals, given z = x + s eps, both (b, d)."""
    v = variance + s[..., None] ** 2
    off = z[..., None] - values
    share = (weight.log() - 0.5 * (v.log() + off.square() / v)).softmax(-1)
    each = values + variance / v * off
    mean = (share * each).sum(-1)
    second = (share * (each.square() + variance * s[..., None] ** 2 / v)).sum(-1)
    return mean, (second - mean.square()).clamp(min=0).sqrt()


def noised(reference, x, gamma, unit, offset):
    """Data noised to one level: white_t, gamma, and z = x + s eps with s, flattened, `unit` to a white unit."""
    white = reference.prior.whiten(reference.basis(x.double()))
    g = torch.full_like(white, gamma)
    white_t = diffuse(white, g, randn(*white.shape, seed=2))
    z = offset + unit * white_t.flatten(1) * math.sqrt(1 + math.exp(gamma))
    return white_t, g, z, (unit * math.exp(gamma / 2)).expand_as(z)


# Posteriors


def test_grouped_normals_have_the_posterior_of_their_whole_covariance():
    reference, covariance, mean = of_columns()
    gamma, white_t = levels(5, reference), randn(5, *reference.basis.shape, seed=4)
    got = reference.posterior(white_t, gamma)
    expected = gaussian(mean.flatten(), covariance)(white_t, gamma)
    torch.testing.assert_close(got.eps, expected, rtol=1e-9, atol=1e-9)
    a, noise = torch.sigmoid(-gamma).sqrt().flatten(1), torch.sigmoid(gamma).flatten(1)
    for b in range(5):
        k = covariance * a[b][:, None] * a[b] + noise[b].diag()
        gain = covariance * a[b] @ k.inverse()
        posterior = mean.flatten() + gain @ (white_t[b].flatten() - a[b] * mean.flatten())
        torch.testing.assert_close(got.mean[b].flatten(), posterior, rtol=1e-8, atol=1e-8)
        left = (covariance - gain @ (a[b][:, None] * covariance)).diagonal().sqrt()
        torch.testing.assert_close(got.deviation[b].flatten(), left, rtol=1e-6, atol=1e-8)
        precision = k.inverse()
        residual = precision @ (white_t[b].flatten() - a[b] * mean.flatten()) / precision.diagonal().sqrt()
        torch.testing.assert_close(got.residual[b].flatten(), residual, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("gamma", [-11.0, -9.0, -6.0, -3.0, 0.0, 3.0, 6.0])
def test_histograms_have_the_posterior_of_all_levels_of_grey(gamma):
    images = pictures()
    basis, prior = of_pixels(images)
    reference = Histograms.fit(basis, prior, images, sectors=1)
    grey, unit, offset = torch.arange(256.0).double(), prior.scale.flatten() * HALF, (prior.mean.flatten() + 1) * HALF
    white_t, g, z, s = noised(reference, data.scale(images[:40]), gamma, unit, offset)
    got = reference.posterior(white_t, g)
    weight = reference.weight[0].flatten(0, 2).double()
    mean, deviation = brute(weight, grey.expand_as(weight), torch.zeros_like(weight), z, s)
    spread = deviation.square().mean().sqrt() / unit.mean()
    off = (got.mean.flatten(1) - (mean - offset) / unit).square().mean().sqrt()
    assert off < 0.02 * spread + 1e-6
    assert (got.deviation.flatten(1) - deviation / unit).square().mean().sqrt() < 0.03 * spread + 1e-6


@pytest.mark.parametrize("gamma", [-6.0, -1.0, 3.0])
def test_a_components_posterior_mixes_sectors_by_the_evidence_of_the_others(gamma):
    images = pictures()
    basis, prior = of_pixels(images)
    reference = Histograms.fit(basis, prior, images, sectors=2)
    grey, unit, offset = torch.arange(256.0).double(), prior.scale.flatten() * HALF, (prior.mean.flatten() + 1) * HALF
    white_t, g, z, s = noised(reference, data.scale(images[:60]), gamma, unit, offset)
    weight = reference.weight.flatten(1, 3).double()  # (sectors, d, 256)
    log = weight.log()[:, None] - 0.5 * ((z[..., None] - grey) / s[..., None]).square()  # (sectors, b, d, 256)
    evidence = log.logsumexp(-1).sum(-1) + reference.share.double().log()[:, None]
    sector = evidence.softmax(0)
    means = torch.stack([brute(w, grey.expand_as(w), torch.zeros_like(w), z, s)[0] for w in weight])
    mean = (sector[..., None] * means).sum(0)
    off = (reference.posterior(white_t, g).mean.flatten(1) - (mean - offset) / unit).square().mean().sqrt()
    error = (mean - images[:60].flatten(1).double()).square().mean().sqrt() / unit.mean()
    assert off < 0.12 * error


@pytest.mark.parametrize("gamma", [-1.0, 0.0, 2.0])
def test_a_pixel_without_others_keeps_the_sectors_shares(gamma):
    """Its own evidence counts within each sector's posterior, and not once more for the sector."""
    grey, basis = torch.arange(256.0).double(), bases.Pixel((1, 1, 1))
    prior = priors.isotropic(priors.Moments(torch.zeros(1, 1, 1), torch.ones(1, 1, 1)), 0.7)
    sectors = torch.stack([(-0.5 * ((grey - m) / 30) ** 2).exp() for m in (60, 180)]).float().view(2, 1, 1, 1, 256)
    sectors, share = sectors / sectors.sum(-1, keepdim=True), torch.tensor([0.8, 0.2])
    reference, unit, offset = Histograms(basis, prior, sectors, share), torch.tensor([0.7 * HALF]), torch.tensor([HALF])
    x = data.scale(torch.arange(0, 256, 5, dtype=torch.uint8)).view(-1, 1, 1, 1)
    white_t, g, z, s = noised(reference, x, gamma, unit.double(), offset.double())
    both = (share.view(2, 1) * sectors.view(2, 256)).sum(0, keepdim=True).double()
    mean, deviation = brute(both, grey[None], torch.zeros(1, 256).double(), z, s)
    off = unit * reference.posterior(white_t, g).mean.flatten(1) + offset - mean
    assert off.square().mean().sqrt() < 0.02 * deviation.square().mean().sqrt()


@pytest.mark.parametrize("gamma", [-9.0, -5.0, -1.0, 3.0])
@pytest.mark.parametrize("kind", ["haar", "pca"])
def test_marginals_have_the_posterior_of_all_their_normals(kind, gamma):
    images = pictures()
    basis = bases.Haar(SHAPE, 2) if kind == "haar" else bases.PCA.fit(images)
    prior = priors.whitened(priors.measure(basis, images))
    reference = Marginals.fit(basis, prior, images)
    unit, offset = prior.scale.flatten(), prior.mean.flatten()
    x = data.dequantise(images[:40], torch.Generator().manual_seed(0))
    white_t, g, z, s = noised(reference, x, gamma, unit, offset)
    tables = (x.flatten(0, 2).double() for x in (reference.weight, reference.mean, reference.variance))
    mean, deviation = brute(*tables, z, s)
    got = reference.posterior(white_t, g)
    spread = (deviation / unit).square().mean(0).sqrt()
    off = (got.mean.flatten(1) - (mean - offset) / unit).square().mean(0).sqrt()
    assert bool((off < 0.05 * spread).all())
    assert bool(((got.deviation.flatten(1) - deviation / unit).square().mean(0).sqrt() < 0.1 * spread).all())


@pytest.mark.parametrize("gamma", [-12.0, -9.0, -7.0, -4.0])
def test_on_the_lattice_independent_pixels_have_the_posterior_of_their_levels(gamma):
    shape, scale = (1, 2, 3), 0.4
    basis = bases.Blocks(torch.eye(2, dtype=torch.float64), shape)
    moments = priors.Moments(torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64))
    prior, variance = priors.isotropic(moments, scale), torch.tensor([[0.3, 0.002], [0.0001, 1.0]])[:, :1]
    covariance = variance[..., None] * torch.eye(3, dtype=torch.float64)
    reference = LatticeGaussian(basis, prior, torch.arange(2)[:, None], covariance, torch.zeros(2, 1))
    g = torch.full((30, *shape), gamma, dtype=torch.float64)
    level = torch.randint(100, 150, (30, *shape), generator=torch.Generator().manual_seed(0))
    white_t = diffuse((level / HALF - 1) / scale, g, randn(30, *shape, seed=1))
    got = reference.posterior(white_t, g)
    grey = (torch.arange(256, dtype=torch.float64) / HALF - 1) / scale  # white units
    v = (variance.double()[None, None, :, 0, None, None] + reference.added / scale**2).expand(1, 1, 2, 3, 1)
    log = -0.5 * grey.square() / v
    log = log - 0.5 * (white_t[..., None] * math.sqrt(1 + math.exp(gamma)) - grey).square() * math.exp(-gamma)
    share = log.softmax(-1)
    mean = (share * grey).sum(-1)
    deviation = (share * (grey - mean[..., None]).square()).sum(-1).sqrt()
    unit = HALF * scale
    torch.testing.assert_close(got.mean, mean, rtol=0, atol=2e-4 / unit)
    torch.testing.assert_close(got.deviation, deviation.clamp(min=1e-4 / unit), rtol=1e-3, atol=2e-4 / unit)
    eps = (white_t - torch.sigmoid(-g).sqrt() * mean) / torch.sigmoid(g).sqrt()
    torch.testing.assert_close(got.eps, eps, rtol=0, atol=1e-2)


def test_blocks_that_are_all_noise_cost_nothing_and_change_hardly_anything():
    reference, covariance, mean = of_columns((2, 3, 6))
    gamma = torch.linspace(-6, 14, 6).double().expand(4, *reference.basis.shape).clone()
    gamma[1], gamma[2, ..., 3:], gamma[3] = 20.0, 18.0, -3.0  # nothing seen, half of it, everything
    white_t = diffuse(randn(4, *reference.basis.shape, seed=4), gamma, randn(4, *reference.basis.shape, seed=5))
    expected = gaussian(mean.flatten(), covariance)
    found, exact = reference.posterior(white_t, gamma), expected(white_t, gamma)
    torch.testing.assert_close(found.eps, exact, rtol=0, atol=0.02)
    a = torch.sigmoid(-gamma).sqrt()
    clean = (white_t - torch.sigmoid(gamma).sqrt() * exact) / a
    torch.testing.assert_close(found.mean, clean, rtol=0, atol=0.15)  # of deviations about 1
    one, same = gamma[:1], reference.posterior(white_t, gamma[:1].expand_as(white_t))
    for got, wanted in zip(reference.posterior(white_t, one), same, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


# Likelihoods


def test_a_grouped_normals_nll_is_its_density():
    reference, covariance, mean = of_columns()
    x = 0.5 * randn(4, *reference.basis.shape, seed=5)
    white = reference.prior.whiten(reference.basis(x)).flatten(1)
    expected = -torch.distributions.MultivariateNormal(mean.flatten(), covariance).log_prob(white)
    expected += reference.prior.scale.log().sum()
    torch.testing.assert_close(reference.nll(x), expected, rtol=1e-10, atol=1e-9)


def test_on_the_lattice_the_nll_is_that_of_grey_levels():
    """They sum to one, and a cell's width adds 1/12 to the variance."""
    basis, scale = bases.Blocks(torch.eye(1, dtype=torch.float64), (1, 1, 1)), 0.5
    moments = priors.Moments(torch.zeros(1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, dtype=torch.float64))
    variance = 0.6 / (HALF * scale) ** 2  # of 0.6 squared grey levels
    made = LatticeGaussian(basis, priors.isotropic(moments, scale), torch.zeros(1, 1, dtype=torch.long),
                           torch.full((1, 1, 1), variance), torch.zeros(1, 1))  # fmt: skip
    grey = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1)
    probability = (-made.nll(data.scale(grey).double())).exp()
    level = grey.flatten().double()
    mean = (probability * level).sum()
    assert float(probability.sum()) == pytest.approx(1, abs=1e-4)
    assert float(mean) == pytest.approx(HALF, abs=1e-2)
    assert float((probability * (level - mean).square()).sum()) == pytest.approx(0.6 + 1 / 12, abs=1e-3)


def test_independent_normals_nll_is_their_density():
    images = pictures()
    basis, prior = of_pixels(images)
    x = data.scale(images[:5]).double()
    normal = torch.distributions.Normal(prior.mean, prior.variance.sqrt())
    expected = -normal.log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(IndependentGaussian(basis, prior).nll(x), expected, rtol=1e-10, atol=1e-9)


def test_histograms_nll_is_a_mixture_of_products():
    images = pictures(60)
    basis, prior = of_pixels(images)
    reference = Histograms.fit(basis, prior, images, sectors=3)
    w = reference.weight + 1e-9
    w = w / w.sum(-1, keepdim=True)
    total = torch.zeros(len(images), dtype=torch.float64)
    for share, sector in zip(reference.share, w, strict=True):
        each = sector.expand(len(images), *sector.shape).gather(-1, images[..., None].long())
        total += share.double() * each.double().log().flatten(1).sum(1).exp()
    torch.testing.assert_close(reference.nll(data.scale(images)), -total.log(), rtol=1e-5, atol=1e-5)


def test_marginals_nll_is_a_density():
    images, basis = pictures(4000), bases.Haar(SHAPE, 2)
    prior = priors.whitened(priors.measure(basis, images))
    reference = Marginals.fit(basis, prior, images)
    w, m, v = (x[0, 1, 2].double() for x in (reference.weight, reference.mean, reference.variance))
    one = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(w), torch.distributions.Normal(m, v.sqrt())
    )
    x = torch.zeros(9, *SHAPE, dtype=torch.float64)
    x[:, 0, 1, 2] = torch.linspace(-2, 2, 9)
    nats, expected = reference.nll(basis.inverse(x)), -one.log_prob(x[:, 0, 1, 2])
    torch.testing.assert_close(nats - nats[4], expected - expected[4], rtol=1e-4, atol=1e-4)
    fresh = data.dequantise(pictures(200, seed=9), torch.Generator().manual_seed(1))
    assert reference.nll(fresh).isfinite().all()
    assert reference.nll(fresh).mean() < IndependentGaussian(basis, prior).nll(fresh).mean() - 0.5  # black, two kinds


@pytest.mark.parametrize("b", [1.0, 0.5, 0.3, 0.25])
def test_a_normals_error_integrates_to_its_information_along_every_path(b):
    """1/2 int sum_i gamma_i' (alpha_i s_i / sigma_i)^2 dt = 1/2 log det (1 + C e^-gamma), between the ends."""
    reference, covariance, _ = of_columns()
    schedule = schedules.sequential(reference.basis.label("column"), b, -8.0, 6.0)

    def error(gamma):
        return (-gamma).exp() * reference.posterior(torch.zeros_like(gamma), gamma).deviation.square()

    root = (-0.5 * schedule.gamma(torch.tensor([0.0, 1.0], dtype=torch.float64)).flatten(1)).exp()
    eye = torch.eye(len(covariance), dtype=torch.float64)
    first, last = (0.5 * torch.logdet(eye + covariance * r[:, None] * r) for r in root)
    assert float(information(schedule, error).sum()) == pytest.approx(float(first - last), rel=1e-6)


def family(reference, basis, prior, finest):
    if basis.name in ("pixel", "blocks"):
        return families.Sequential(basis, prior, "columns", None, 6.0, finest), [{"b": b} for b in (1.0, 0.5, 0.25)]
    soft = families.SoftConditioning(prior, (0.0, 1.0), 6.0, finest=finest)
    return soft, [{"a": a} for a in (0.0, 0.5, 1.0)]


@pytest.mark.parametrize("kind", ["histograms", "sectors", "eight sectors", "haar", "pca", "grouped", "lattice"])
def test_an_untrained_networks_bound_is_its_references_nll(kind):
    images, test, finest = pictures(1000), pictures(300, seed=7), 0.12 / HALF
    basis, prior = of_pixels(images)
    if sectors := {"histograms": 1, "sectors": 2, "eight sectors": 8}.get(kind):
        reference = Histograms.fit(basis, prior, images, sectors=sectors)
    elif kind in ("haar", "pca"):
        basis = bases.Haar(SHAPE, 2) if kind == "haar" else bases.PCA.fit(images)
        prior = priors.whitened(priors.measure(basis, images))
        reference = Marginals.fit(basis, prior, images)
    else:
        images, test = (x // 8 + 100 for x in (images, test))  # smooth where the lattice matters
        basis = bases.Blocks.waves(SHAPE)
        flat = torch.full((1, *SHAPE), float(data.scale(images).mean()), dtype=torch.float64)
        moments = priors.Moments(basis(flat)[0], torch.full(SHAPE, 0.01, dtype=torch.float64))
        made = LatticeGaussian if kind == "lattice" else GroupedGaussian
        prior = priors.isotropic(moments, 0.1)
        reference = made.fit(basis, prior, images)
    dequantised = reference.decoder == "normal"
    x = data.dequantise(test, torch.Generator().manual_seed(0)) if dequantised else data.scale(test)
    width = likelihood.GREY_LEVEL if dequantised else 1.0
    nll = likelihood.bits_per_dim(reference.nll(x.double()).mean(), 16, width)
    model = denoiser.build(basis, prior, 4, reference=reference, width=8, multipliers=(1,))
    soft, members = family(reference, basis, prior, finest)
    for member in members:
        process = Process(model.basis, model.prior, soft.schedule(**member))
        found = likelihood.bound(model, process, x, 32, decoder=reference.decoder, importance=True)
        assert found.bits - nll == pytest.approx(0, abs=4 * found.probe_error + 0.02), member
        assert found.probe_error < 0.08


def test_every_reference_is_a_row_of_the_table_of_baselines():
    images, test = pictures(400), pictures(50, seed=3)
    basis, prior = of_pixels(images)
    histograms, normal = Histograms.fit(basis, prior, images, 1), IndependentGaussian(basis, prior)
    rows = [baselines.of(histograms, test, "mine"), baselines.of(normal, test)]
    frame = baselines.frame([*rows, baselines.histograms(images, test)])
    assert frame["model"].tolist()[:2] == ["mine", "independent gaussian"]
    assert frame["kind"].tolist()[:2] == ["grey levels", "density"]
    expected = histograms.nll(data.scale(test)) / (16 * math.log(2))
    torch.testing.assert_close(rows[0].bits, expected)
    assert rows[0].mean == pytest.approx(frame["bits/dim"][2], abs=0.2)  # another smoothing of the same counts
    x = data.dequantise(test, torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(rows[1].bits, normal.nll(x) / (16 * math.log(2)) + 7)


# Fits and files


def test_an_image_belongs_to_a_sector_by_all_its_pixels_together():
    """Three kinds, one darker than the next, by less than a pixel can tell."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.tensor([190.0, *[150.0] * 3, *[110.0] * 6]).repeat(60)[torch.randperm(600, generator=generator)]
    x = mean[:, None, None, None] + 60 * torch.randn(600, 1, 16, 16, generator=generator)
    basis, prior = of_pixels(images := x.round().clamp(0, 255).to(torch.uint8))
    reference = Histograms.fit(basis, prior, images, sectors=3)
    assert sorted(reference.share.tolist()) == pytest.approx([0.1, 0.3, 0.6], abs=0.01)


def test_sectors_are_found():
    images = pictures(600)
    basis, prior = of_pixels(images)
    one, two = (Histograms.fit(basis, prior, images, sectors=k) for k in (1, 2))
    fresh = data.scale(pictures(300, seed=5))
    assert two.nll(fresh).mean() < one.nll(fresh).mean() - 5
    level = (two.weight.flatten(1, 3) * torch.arange(256)).sum(-1).mean(1)
    assert abs(level.diff()) > 50  # dark and bright
    torch.testing.assert_close(two.share.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("symmetries", ["none", "mirror", "all"])
def test_grouped_normals_are_fitted_to_all_mirror_images(symmetries):
    images = pictures(200)
    basis = bases.Blocks.waves(SHAPE)
    zero = torch.zeros(SHAPE, dtype=torch.float64)
    prior = priors.isotropic(priors.Moments(zero, torch.ones_like(zero)), 0.5)
    got = GroupedGaussian.fit(basis, prior, images, symmetries)
    turned = [images]
    if symmetries != "none":
        turned += [images.flip(-1)]
    if symmetries == "all":
        turned += [x.flip(-2) for x in turned]
        turned += [x.mT for x in turned]
    white = basis((torch.cat(turned).double() + 0.5) / 128 - 1) / 0.5  # (n, 1, wave, column)
    z = white[:, 0].transpose(0, 1) - white[:, 0].mean((0, 2))[:, None, None]
    torch.testing.assert_close(got.mean[:, 0], white[:, 0].mean((0, 2)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.covariance, z.mT @ z / z.shape[1], rtol=1e-4, atol=1e-6)


def test_stationary_covariances_depend_on_how_far_columns_are_apart():
    reference, _, _ = of_columns((2, 3, 5))
    found = reference.stationary()
    by_place = found.covariance.view(3, 2, 5, 2, 5)
    torch.testing.assert_close(by_place[:, :, :-1, :, :-1], by_place[:, :, 1:, :, 1:], rtol=0, atol=1e-12)
    assert torch.linalg.eigvalsh(found.covariance).min() > 0.99 * reference.added / 0.5**2
    torch.testing.assert_close(found.stationary().covariance, found.covariance, rtol=0, atol=1e-12)
    uneven = torch.rand(3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
    reference.covariance.copy_(torch.diag_embed(uneven))
    mean = uneven.view(3, 2, 5).mean(2).repeat_interleave(5, 1)
    torch.testing.assert_close(reference.stationary().covariance, torch.diag_embed(mean), rtol=0, atol=1e-12)
    reference, _, _ = of_columns((1, 1, 2))
    reference.covariance.fill_(1.0)  # two equal columns: waves 1 and 2 of three have no variance
    least = torch.linalg.eigvalsh(reference.stationary().covariance).min()
    assert float(least) == pytest.approx(reference.added / 0.5**2)


def test_every_reference_is_kept_with_its_denoiser(tmp_path):
    images = pictures(200)
    basis, prior = of_pixels(images)
    blocks = bases.Blocks.pca(data.scale(images))
    flat = priors.isotropic(priors.Moments(torch.zeros(SHAPE), torch.ones(SHAPE)), 0.5)
    haar = bases.Haar(SHAPE, 2)
    white = priors.whitened(priors.measure(haar, images))
    made = [
        IndependentGaussian(basis, prior),
        Histograms.fit(basis, prior, images, 3),
        PatchHistograms.fit(basis, prior, images),
        Marginals.fit(haar, white, images, 32),
        GroupedGaussian.fit(blocks, flat, images),
        LatticeGaussian.fit(bases.Blocks.waves(SHAPE), flat, images, "all"),
    ]
    assert {type(reference) for reference in made} == set(references.KINDS.values())
    for reference in made:
        model = denoiser.build(reference.basis, reference.prior, 4, reference=reference, width=8, multipliers=(1,))
        torch.nn.init.normal_(model.network.head.weight, std=0.1)
        denoiser.save(model, tmp_path / "m", card={})
        again = denoiser.load(tmp_path / "m")
        white_t, gamma = randn(3, *SHAPE).float(), torch.full((1, *SHAPE), -2.0)
        assert type(again.reference) is type(reference)
        torch.testing.assert_close(again(white_t, gamma), model(white_t, gamma), rtol=1e-5, atol=1e-5)
        denoiser.save(model, tmp_path / "half", half=True)
        close = denoiser.load(tmp_path / "half")(white_t, gamma)
        torch.testing.assert_close(close, model(white_t, gamma), rtol=2e-2, atol=2e-2)


def test_patches_at_their_places_have_the_histograms_of_the_image(monkeypatch):
    """In any order, several at one place or none at another, they say what the image's histograms say of its pixels."""
    images, shape = pictures(300), (1, 2, 2)
    basis, prior = of_pixels(images)
    even = priors.isotropic(priors.Moments(torch.full(SHAPE, 0.1), prior.variance), 0.7)
    cell = priors.isotropic(priors.Moments(even.mean[:, :2, :2], prior.variance[:, :2, :2]), 0.7)
    whole = Histograms.fit(basis, even, images, 1)
    reference = PatchHistograms.fit(bases.Pixel(shape), cell, images)
    white, gamma = randn(3, *SHAPE).float(), (3 * randn(3, *SHAPE, seed=1) - 3).float()
    expected = whole.posterior(white, gamma)
    places = torch.tensor([[3, 0], [1, 1], [2, 0]])

    def cut(x):
        return patchify(x, 2).take_along_dim(places[..., None], 1).reshape(-1, *shape)

    found = reference.at(places.flatten()).posterior(cut(white), cut(gamma))
    for name in ("mean", "deviation", "eps"):
        torch.testing.assert_close(getattr(found, name), cut(getattr(expected, name)), rtol=1e-5, atol=1e-6)
    x = data.scale(images[:3])
    each = reference.at(torch.arange(4).repeat(3)).nll(patchify(x, 2).reshape(-1, *shape))
    torch.testing.assert_close(each.view(3, 4).sum(1), whole.nll(x))
    plain = IndependentGaussian(basis, prior)
    assert plain.at(places.flatten()) is plain
    same = priors.isotropic(priors.Moments(torch.full(SHAPE, 0.1), torch.full(SHAPE, 0.3)), 0.7)
    for each in (Histograms(basis, same, whole.weight), IndependentGaussian(basis, same)):
        apart, expected = (
            each.patches(2).at(places.flatten()).posterior(cut(white), cut(gamma)),
            each.posterior(white, gamma),
        )
        for name in ("mean", "deviation", "residual", "eps"):
            torch.testing.assert_close(getattr(apart, name), cut(getattr(expected, name)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(reference.bits(images[:3]), whole.bits(images[:3]))
    empty = reference.at(places[:0, 0]).posterior(cut(white)[:0], cut(gamma)[:0])
    assert empty.mean.shape == (0, *shape)
    monkeypatch.setattr(references, "AT_ONCE", 8)  # two patches at a time
    again = reference.at(places.flatten()).posterior(cut(white), cut(gamma))
    torch.testing.assert_close(again.mean, found.mean)


def test_what_was_never_seen_is_finite():
    images = pictures(50)
    images[:, :, 0] = 0  # a row that is always black
    basis, prior = of_pixels(images)
    bright = torch.full((1, *SHAPE), 250, dtype=torch.uint8)
    assert Histograms.fit(basis, prior, images, 2).nll(data.scale(bright)).item() < 16 * 25
    haar = bases.Haar(SHAPE, 2)
    white = priors.isotropic(priors.measure(haar, images), 0.5)
    assert Marginals.fit(haar, white, images).nll(data.scale(bright)).item() < 16 * 40
    blocks = bases.Blocks.waves(SHAPE)
    lattice = LatticeGaussian.fit(blocks, priors.isotropic(priors.measure(blocks, images), 0.5), images)
    gamma, out = torch.full((1, *SHAPE), -13.0), torch.full((1, *SHAPE), -2.2)  # far below black
    level = 127.5 * (1 + blocks.inverse(lattice.prior.mean[None]) + 0.5 * lattice.posterior(blocks(out), gamma).mean)
    assert level.min() > -0.01 and level.max() < 255.01


def test_the_network_sees_residual_guess_and_noised_image():
    images = pictures(100)
    basis = bases.make("pca", SHAPE, images)
    prior = priors.whitened(priors.measure(basis, images)).float()
    reference = IndependentGaussian(basis.float(), prior)
    seen = []

    class Network(torch.nn.Module):
        def forward(self, x, gamma):
            seen.append(x)
            return torch.zeros_like(x[:, :1])

    white_t, gamma = randn(2, *SHAPE).float(), torch.full((1, *SHAPE), 1.0)
    denoiser.Denoiser(Network(), reference, noised=True)(white_t, gamma)
    posterior = reference.posterior(white_t, gamma)
    expected = [posterior.residual, prior.scale * posterior.mean, prior.unwhiten(white_t)]
    torch.testing.assert_close(seen[0], torch.cat([basis.inverse(x) for x in expected], 1), rtol=1e-4, atol=1e-5)


def errors():
    images = pictures(20)
    basis, prior = of_pixels(images)
    haar = bases.Haar(SHAPE, 2)
    blocks = bases.Blocks.waves(SHAPE)
    uneven = priors.whitened(priors.Moments(torch.zeros(SHAPE), torch.rand(SHAPE) + 0.1))
    even = priors.isotropic(uneven.moments)
    small = priors.isotropic(priors.Moments(torch.zeros(1, 3, 3), torch.ones(1, 3, 3)), 1.0)
    corner, z = bases.Pixel((1, 2, 2)), torch.zeros(3, 1, 2, 2)
    cells = priors.isotropic(priors.Moments(torch.zeros(1, 2, 2), torch.ones(1, 2, 2)), 1.0)
    one, eye = torch.zeros(4, 1), torch.eye(4).expand(4, 4, 4)
    member = torch.arange(4)[:, None]
    return {
        "histograms of grey levels are for pixels; the basis is 'haar'": lambda: Histograms.fit(haar, prior, images, 2),
        "weight must not be negative": lambda: Histograms(basis, prior, -torch.ones(2, 1, 4, 4, 256)),
        r"weight must be .* \(l, c, p, p, 256": lambda: PatchHistograms(basis, prior, torch.ones(1, 4, 4, 256)),
        "are for pixels; the basis is 'blocks'": lambda: PatchHistograms(blocks, prior, torch.ones(1, 1, 4, 4, 256)),
        "places must be 3 of 0 .. 3, .*got none": lambda: PatchHistograms.fit(corner, cells, images)(z, z[:1] * 0),
        "places must be 3 of 0 .. 3, .*got 2": lambda: (
            PatchHistograms.fit(corner, cells, images).at(torch.tensor([0, 1])).nll(z)
        ),
        "must be made of patches": lambda: PatchHistograms.fit(bases.Pixel((1, 3, 3)), small, images),
        "must have one sector for patches of its own; it has 2": lambda: Histograms.fit(
            basis, prior, images, 2
        ).patches(2),
        "must have independent pixels .*; it is 'marginals'": lambda: Marginals.fit(basis, even, images).patches(2),
        "need pixels that share one prior; the basis is 'pixel'": lambda: IndependentGaussian(basis, uneven).patches(2),
        "need pixels that share one prior; the basis is 'haar'": lambda: IndependentGaussian(haar, even).patches(2),
        "bins must be a power of 2": lambda: Marginals.fit(haar, uneven, images, 100),
        "must be one of blocks .*; it is 'pixel'": lambda: GroupedGaussian.fit(basis, even, images),
        "one scale for all components": lambda: GroupedGaussian(blocks, uneven, member, eye, one),
        r"need covariance \(4, 4, 4\)": lambda: GroupedGaussian(blocks, even, member, eye[:, :3, :3], one),
        "a reference must be one of": lambda: references.rebuild("nothing", basis, prior, {}),
        "basis and prior must have one shape": lambda: IndependentGaussian(bases.Pixel((1, 2, 2)), prior),
        "share must be": lambda: Histograms(basis, prior, torch.ones(2, 1, 4, 4, 256), torch.tensor([1.0, -1.0])),
        "sectors must lie between 1": lambda: Histograms.fit(basis, prior, images, 0),
        "images must be uint8": lambda: Marginals.fit(haar, uneven, images.float()),
        "images must be at least 8, mirror": lambda: GroupedGaussian.fit(blocks, even, images[:6]),
        "symmetries must be one of": lambda: GroupedGaussian.fit(blocks, even, images, "some"),
        "blocks must be columns; they are patches of 2": lambda: GroupedGaussian(
            bases.Blocks(torch.eye(4), SHAPE, 2), even, member, eye, one
        ).stationary(),
    }


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("message", errors())
def test_bad_input_is_refused(message):
    with pytest.raises(ValueError, match=message):
        errors()[message]()
