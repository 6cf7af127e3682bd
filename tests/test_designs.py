"""Designs: all of them begin and end alike, and what differs between them is what is said to differ."""

import math

import pytest
import torch
from torch import nn

from gudlib import bases, designs, likelihood, metrics, networks, schedules
from gudlib.data import dequantise
from gudlib.process import Process

BASES = ["plain", "pixel", "pca", "fourier", "dct", "haar"]
TRAINED = [(0.0, 0.0), (1.0, 1.0), (0.4, 1.6), (2.5, 2.5)]
LEVEL = 1 / 128  # of grey, in units of the data
WITHIN = LEVEL**2 / 12  # variance of the noise within a level
ZERO, ONE = torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)


def textures(n: int, channels: int = 1, size: int = 8, seed: int = 0) -> torch.Tensor:
    """Noise that is smooth in space and common to colours, so that variances differ by a factor of hundreds."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(size, dtype=torch.float64)
    smooth = torch.exp(-((place[:, None] - place).square()) / 8)
    noise = torch.randn(n, channels, size, size, generator=generator, dtype=torch.float64)
    waves = smooth @ (noise + 2 * noise.mean(1, keepdim=True)) @ smooth + 0.2 * noise
    slope = torch.linspace(90, 150, size, dtype=torch.float64)
    return (slope + 3 * waves).clamp(0, 255).to(torch.uint8)


IMAGES = {"grey": textures(400), "colour": textures(300, 3)}


def build(basis="pca", r=1.0, a=(0.4, 1.6), conditioning="grouped", images="grey"):
    return designs.FittedDesign(designs.Design(basis, r, a, conditioning), IMAGES[images])


def centres(images: torch.Tensor) -> torch.Tensor:
    """Grey levels as numbers, each at its centre; dequantisation adds WITHIN to every variance."""
    return (images.double() + 0.5) / 128 - 1


def left(fitted, images, a):
    """Largest eigenvalue of N^(-1/2) C N^(-1/2) at t = 1, C the second moment around the prior's mean."""
    away = (fitted.basis(centres(images)) - fitted.prior.mean).flatten(1)
    second = away.T @ away / (len(away) - 1) + WITHIN * torch.eye(away.shape[1]).double()
    noise = (fitted.prior.scale**2 * fitted.schedule(a).gamma(ONE).exp()).flatten()
    return float(torch.linalg.eigvalsh(second / (noise[:, None] * noise).sqrt())[-1])


# The two ends


@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("r", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("trained", TRAINED)
def test_every_design_leaves_a_third_of_a_grey_level_at_one_end_and_nothing_at_the_other(images, basis, r, trained):
    fitted = build(basis, r, trained, images=images)
    assert len({*trained, 1.3}) > 1
    for a in {*trained, 1.3}:  # the first end is exact for any a, trained or not
        noise = fitted.prior.scale**2 * fitted.process(a).schedule.gamma(ZERO).exp()
        assert float(noise.max()) == pytest.approx((LEVEL / 3) ** 2, rel=1e-9)
    remains = [left(fitted, IMAGES[images], a) for a in trained]
    assert max(remains) == pytest.approx(math.exp(-5), rel=0.01)
    assert left(fitted, IMAGES[images], sum(trained) / 2) < 1.01 * math.exp(-5)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("r", [0.0, 0.7])
def test_the_snr_rises_with_one_slope_from_offsets_a_l(basis, r):
    """-log SNR_i, computed from the process, is u(t) + a l_i with l = -log Sigma, whatever the prior."""
    fitted, a, t = build(basis, r), 1.3, torch.linspace(0, 1, 5, dtype=torch.float64)
    data = centres(IMAGES["grey"])
    variance = fitted.basis(data).var(0)
    if basis == "plain":
        variance = torch.ones_like(variance)
    if basis == "fourier":  # the power of each wave
        variance = torch.fft.fft2(data - data.mean(0), norm="ortho").abs().square().sum(0) / (len(data) - 1)
    order = -(variance + WITHIN).log()
    level = -fitted.schedule(a).snr(t, fitted.prior.white_variance).log()
    common = level - a * order
    assert (common - common[:, :1, :1, :1]).abs().max() < 1e-5
    steps = common[:, 0, 0, 0].diff()
    torch.testing.assert_close(steps, steps.mean().expand(4))
    assert steps.mean() > 1


def test_the_last_component_is_noised_least_in_units_of_its_signal():
    """At a > 0 components of large variance are noised last, and all at once at a = 0."""
    fitted = build("pca", 0.0)
    t = torch.tensor(0.5, dtype=torch.float64)
    signal = {a: fitted.schedule(a).snr(t, fitted.prior.white_variance).flatten().log() for a in (0.0, 1.6)}
    variance = fitted.prior.variance.flatten()
    assert signal[1.6][variance.argmax()] > signal[1.6][variance.argmin()] + 3
    assert signal[0.0].max() - signal[0.0].min() < 1e-9


def test_the_prior_changes_neither_snr_nor_where_it_ends():
    t = torch.linspace(0, 1, 7, dtype=torch.float64)
    for basis in BASES:
        levels = []
        for r in (0.0, 0.3, 1.0):
            fitted = build(basis, r)
            levels.append(fitted.schedule(1.3).gamma(t) - fitted.prior.log_variance)
            expected = -0.5 * r * fitted.prior.order
            torch.testing.assert_close(fitted.prior.scale.double().log(), expected, rtol=0, atol=1e-12)
        for level in levels:
            torch.testing.assert_close(level, levels[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("r", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("basis", BASES)
def test_one_gamma_for_all_is_a_of_one_minus_r(basis, r):
    gamma = build(basis, r, (1 - r, 1 - r)).schedule(1 - r).gamma(torch.linspace(0, 1, 7, dtype=torch.float64))
    torch.testing.assert_close(gamma, gamma[:, :1, :1, :1].expand_as(gamma), rtol=0, atol=1e-12)


def test_plain_is_the_usual_model_of_one_mean_one_variance_and_one_level():
    data = centres(IMAGES["colour"])
    total = data.var(0).mean() + data.mean(0).var(correction=0) + WITHIN
    assert float(total) == pytest.approx(float(data.var()), rel=0.01)
    for r in (0.0, 1.0):
        fitted = build("plain", r, (1.0, 1.0), images="colour")
        assert torch.equal(fitted.basis(data), data)
        for values, wanted in ((fitted.prior.mean, data.mean()), (fitted.prior.variance, total)):
            torch.testing.assert_close(values, wanted.expand(3, 8, 8), rtol=1e-12, atol=1e-12)
        gamma = fitted.schedule(1.0).gamma(ZERO)
        assert gamma.max() == gamma.min()
    assert build("pixel", images="colour").prior.mean.std() > 0.1


def test_a_batch_of_inverse_softnesses_has_the_schedules_of_each():
    a = torch.tensor([0.4, 1.6, 0.9, 1.0], dtype=torch.float64)
    t = torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=torch.float64)
    for basis, r in (("pca", 1.0), ("haar", 0.3), ("plain", 0.0)):
        fitted = build(basis, r)
        many = fitted.schedule(a)
        for quantity in ("gamma", "dgamma_dt"):
            each = [getattr(fitted.schedule(x), quantity)(when) for x, when in zip(a.tolist(), t, strict=True)]
            torch.testing.assert_close(getattr(many, quantity)(t), torch.stack(each), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            fitted.family().gamma_min_target(a), torch.stack([fitted.family().gamma_min_target(x) for x in a.tolist()])
        )


# What is fitted


@pytest.mark.parametrize("basis, r", [("plain", 0.0), ("pixel", 0.5), ("haar", 1.0), ("pca", 0.3)])
def test_components_one_after_another_have_the_same_two_ends(basis, r):
    """Each ends at the finest noise, in units of the data, and where every signal is gone."""
    fitted = build(basis, r, images="colour")
    one, other = torch.arange(3 * 64).reshape(3, 8, 8) % 5.0, torch.arange(3 * 64).reshape(3, 8, 8) % 7.0
    variance = fitted.prior.moments.floored
    for schedule in (fitted.sequential(one, 0.3), fitted.sequential([one, other], [0.6, torch.tensor([0.3, 1.0])])):
        first, last = schedule.gamma(ZERO), schedule.gamma(ONE)
        finest = fitted.prior.scale * (first / 2).exp()
        torch.testing.assert_close(finest, torch.full_like(finest, LEVEL / 3), rtol=1e-6, atol=0)
        level = last - (variance / fitted.prior.scale**2).log()
        torch.testing.assert_close(level, torch.full_like(level, fitted.gamma_max_target), rtol=0, atol=1e-5)
    half = torch.tensor(0.5, dtype=torch.float64)
    gamma = fitted.sequential(one, 0.3).gamma(half)
    course = schedules.sequential(one, 0.3, 0.0, 1.0).gamma(half)
    torch.testing.assert_close(gamma, first[0] + (last[0] - first[0]) * course, rtol=0, atol=1e-6)


@pytest.mark.parametrize("basis", BASES[1:])
@pytest.mark.parametrize("images", IMAGES)
def test_moments_are_those_of_the_components_and_of_the_noise_within_a_grey_level(basis, images):
    fitted = build(basis, images=images)
    chi = fitted.basis(centres(IMAGES[images]))
    variance = chi.var(0) + WITHIN
    if basis == "fourier":
        variance = (variance + variance.flip(1, 2).roll((1, 1), (1, 2))) / 2
    torch.testing.assert_close(fitted.prior.mean, chi.mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(fitted.prior.variance, variance, rtol=1e-5, atol=0)
    assert fitted.prior.variance.dtype == torch.float64


def test_directions_that_no_image_has_hold_the_noise_within_a_grey_level():
    """Ten images span at most nine of the 64 directions."""
    few = textures(10)
    variance = designs.FittedDesign(designs.Design("pca"), few).prior.variance.flatten()
    torch.testing.assert_close(variance[9:], torch.full_like(variance[9:], WITHIN), rtol=1e-6, atol=0)
    assert variance[8] > 2 * WITHIN
    images = IMAGES["grey"].clone()
    images[..., :2] = 7
    prior = designs.FittedDesign(designs.Design("pixel", 1.0), images).prior
    torch.testing.assert_close(prior.variance[..., :2], torch.full((1, 8, 2), WITHIN, dtype=torch.float64))
    torch.testing.assert_close((-prior.order).exp(), prior.variance)


def test_noise_of_a_fourier_design_is_stationary():
    prior = build("fourier", 0.7, images="colour").prior
    basis = bases.Fourier((3, 8, 8))
    rows = basis.inverse(prior.scale.flatten().diag().view(-1, 3, 8, 8)).flatten(1)
    covariance = (rows.T @ rows).view(3, 8, 8, 3, 8, 8)
    moved = covariance.roll((1, 2, 1, 2), (1, 2, 4, 5))
    torch.testing.assert_close(moved, covariance, rtol=0, atol=1e-10 * float(covariance.max()))


def test_seeds_order_few_images_and_do_nothing_else(monkeypatch):
    """What is unseen when principal components are chosen is drawn at random, by the seed."""
    given = []
    choose = designs.principal
    monkeypatch.setattr(designs, "principal", lambda images: given.append(images) or choose(images))
    for seed in (3, 3, 4):
        designs.FittedDesign(designs.Design("pca"), IMAGES["grey"], seed, few=True)
    assert torch.equal(given[0], given[1]) and not torch.equal(given[0], given[2])
    for images in given:
        assert sorted(images.flatten(1).tolist()) == sorted(IMAGES["grey"].flatten(1).tolist())
    for few in (False, True):
        one, other = (designs.FittedDesign(designs.Design("haar"), IMAGES["grey"], seed, few) for seed in (3, 4))
        assert torch.equal(one.prior.variance, other.prior.variance) and len(given) == 3
        assert one.gamma_max_target == other.gamma_max_target and not one.of_waves


def test_few_images_are_fitted_as_many_are_where_their_own_components_predict_best():
    images = textures(2000, size=6)
    own, chosen = (designs.FittedDesign(designs.Design("pca"), images, few=few) for few in (False, True))
    assert not chosen.of_waves
    torch.testing.assert_close(chosen.basis.matrix, own.basis.matrix, rtol=0, atol=1e-9)
    torch.testing.assert_close(chosen.prior.variance, own.prior.variance)
    torch.testing.assert_close(chosen.prior.mean, own.prior.mean)


def test_fitted_designs_repeat_themselves_and_leave_torchs_generator_alone():
    design = designs.Design("pca", 0.5)
    torch.rand(1)  # a state that no seed leads to
    state = torch.get_rng_state()
    first, again = (designs.FittedDesign(design, IMAGES["grey"]) for _ in range(2))
    assert torch.equal(first.prior.variance, again.prior.variance) and first.gamma_max_target == again.gamma_max_target
    weights = [fitted.denoiser(8, seed).state_dict() for fitted, seed in ((first, 1), (again, 1), (first, 2))]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    bare = networks.UNet((1, 8, 8), weights[0]["network.levels.groups"], 2, 8)
    assert torch.equal(bare.stem.weight, weights[0]["network.stem.weight"])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"basis": "wavelet"}, "basis must be one of .*'plain', 'pixel', 'pca', .*; got 'wavelet'"),
        ({"conditioning": "vector"}, "conditioning must be one of .*'time', 'pooled', .*; got 'vector'"),
        ({"a": (1.6, 0.4)}, r"a must be \(lowest, highest\), not negative; got \(1.6, 0.4\)"),
        ({"a": (-0.1, 0.4)}, r"a must be .* got \(-0.1, 0.4\)"),
        ({"a": (math.nan, 1.0)}, "a must be a finite number; got nan"),
    ],
)
def test_impossible_designs_are_refused_with_their_values(given, message):
    with pytest.raises(ValueError, match=message):
        designs.Design(**given)


# What the network is told


class Ear(nn.Module):
    """A network that keeps what it was told."""

    def __init__(self, network):
        super().__init__()
        self.network, self.told = network, []

    def forward(self, images, gamma):
        self.told.append(gamma)
        return self.network(images, gamma)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("r", [0.0, 1.0])
def test_told_the_time_a_network_hears_one_number_from_minus_10_to_10_whatever_a(basis, r):
    fitted = build(basis, r, conditioning="time")
    model = fitted.denoiser(8)
    model.network.network = ear = Ear(model.network.network)
    a = torch.tensor([0.4, 1.6, 0.7, 1.0, 1.3], dtype=torch.float64)
    t = torch.tensor([0.0, 1.0, 0.2, 0.5, 0.9], dtype=torch.float64)
    white = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model(white, fitted.schedule(a).gamma(t).float())
    expected = (20 * t - 10)[:, None, None, None].expand(5, 1, 8, 8)
    torch.testing.assert_close(ear.told[0].double(), expected, rtol=0, atol=1e-4)
    for x in (0.4, 1.1, 2.5):  # one a for all, as in sampling and likelihood; beyond the range too
        model(white, fitted.schedule(x).gamma(t))
        torch.testing.assert_close(ear.told[-1].double(), expected, rtol=0, atol=1e-4)


def test_other_networks_hear_the_levels_themselves_in_groups():
    t, heard = torch.tensor([0.3, 0.6], dtype=torch.float64), {}
    for conditioning in ("pooled", "grouped", "attention"):
        fitted = build("pca", 0.0, conditioning=conditioning)
        network = fitted.denoiser(8).network
        assert isinstance(network, networks.UNet)
        gammas = [fitted.schedule(a).gamma(t).float() for a in (0.4, 1.6)]
        means = [network.levels(gamma)[..., 0] * 10 for gamma in gammas]
        heard[conditioning] = means[0].shape[1], network.conditioning
        assert (means[0] - means[1]).abs().min(0).values.max() > 0.5  # what is heard tells a
        inside = gammas[0].clamp(-12, 12).flatten(1)
        torch.testing.assert_close(means[0].mean(1), inside.mean(1), rtol=1e-4, atol=1e-4)
    assert heard == {"pooled": (1, "film"), "grouped": (16, "film"), "attention": (16, "attention")}


def test_told_by_a_map_a_network_hears_every_level_in_its_place():
    fitted = build("plain", 0.0, conditioning="map")
    model = fitted.denoiser(8)
    columns = fitted.sequential(fitted.basis.label("column"), 0.4).gamma(torch.tensor(0.5, dtype=torch.float64))
    white = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert model.network.conditioning == "map"
    ear = Ear(model.network)
    model.network = ear
    model(white, columns)
    torch.testing.assert_close(ear.told[0].double(), columns.expand(1, 1, 8, 8), rtol=1e-6, atol=1e-6)


# Scores


class Pixels(nn.Module):
    """Features that need no weights."""

    num_features, name = 64, "pixels"

    def forward(self, images):
        return images.flatten(1)


def gaussian_bits(fitted, a, data):
    """Bits of independent normals of the fitted moments, and of what is left of them at t = 1, by hand."""
    chi = (fitted.basis(data).double() - fitted.prior.mean).flatten(1)
    variance = fitted.prior.variance.double().flatten()
    nll = 0.5 * (chi.square() / variance + variance.log() + math.log(2 * math.pi))
    gamma = fitted.schedule(a).gamma(ONE).flatten()
    signal, noise = 1 / (1 + gamma.exp()), 1 / (1 + (-gamma).exp())
    c, scale = variance / fitted.prior.scale.flatten() ** 2, fitted.prior.scale.flatten()
    reached = signal * (chi / scale).square() + noise  # mean square at t = 1, which the prior takes for 1
    v = signal * c + noise
    excess = 0.5 * (reached - reached / v - v.log())
    return float((nll + excess).sum(1).mean() / (64 * math.log(2)) + 7)


@pytest.mark.parametrize("basis", BASES)
def test_an_untrained_model_has_the_nll_of_independent_normals_along_every_path(basis):
    test = textures(40, seed=1)
    data = dequantise(test, torch.Generator().manual_seed(0))
    for r, tolerance in ((1.0, 2e-6), (0.3, 2e-6)):
        fitted = build(basis, r, (0.0, 2.5))
        model, bits = fitted.denoiser(8), []
        for a in (0.0, 0.6, 1.0, 2.5):
            found = likelihood.bound(model, fitted.process(a), data, 2, importance=True)
            bits.append(found.bits)
            assert found.bits == pytest.approx(gaussian_bits(fitted, a, data), abs=tolerance)
        if r == 1:
            assert max(bits) - min(bits) < 1e-6


@pytest.fixture(scope="module")
def scored():
    """An untrained design's score, twice and with another seed, with another state of torch's generator each."""
    fitted, test = build("dct", 0.5, conditioning="grouped"), textures(60, seed=1)
    model, found, states = fitted.denoiser(8), [], []
    with torch.random.fork_rng():
        for seed in (0, 0, 5):
            torch.manual_seed(len(found))
            states.append(torch.get_rng_state())
            process, sizes = fitted.process(0.7), {"generated": 300, "steps": 20, "draws": 2, "seed": seed}
            found.append(designs.score(model, process, IMAGES["grey"], test, Pixels(), **sizes))
            assert torch.equal(torch.get_rng_state(), states[-1])
    return fitted, test, found


def test_a_score_repeats_itself_whatever_torchs_generator_is_at(scored):
    _, _, [(values, images), (again, same), (other, others)] = scored
    numbers = {name: value for name, value in values.items() if not name.endswith("seconds")}
    assert numbers == {name: again[name] for name in numbers} and torch.equal(images, same)
    assert other["frechet"] != values["frechet"] and not torch.equal(images, others)
    assert all(type(value) is float and math.isfinite(value) for value in values.values())


def test_a_score_is_the_bound_of_held_out_images_and_the_metrics_of_generated_ones(scored):
    fitted, test, [(values, images), *_] = scored
    data = dequantise(test, torch.Generator().manual_seed(0))
    assert values["bits"] == pytest.approx(gaussian_bits(fitted, 0.7, data), abs=1e-5)
    found = likelihood.bound(fitted.denoiser(8), fitted.process(0.7), data, 2, importance=True)
    rest = float(found.reconstruction.mean() + found.log_volume) / (64 * math.log(2)) + 7
    assert values["diffusion_bits"] + values["prior_bits"] + rest == pytest.approx(values["bits"], abs=1e-5)
    assert values["image_error"] == pytest.approx(found.image_error) and values["probe_error"] < 1e-5
    assert images.shape == (300, 1, 8, 8) and images.min() >= -1 and images.max() <= 1
    assert torch.equal((127.5 * (images + 1)).round() / 127.5 - 1, images)  # grey levels
    f, g = (x.double().flatten(1) for x in (IMAGES["grey"].float() / 127.5 - 1, images))
    root = torch.linalg.eigvals(f.T.cov() @ g.T.cov()).real.clamp(min=0).sqrt().sum()
    distance = (f.mean(0) - g.mean(0)).square().sum() + f.var(0).sum() + g.var(0).sum() - 2 * root
    assert values["frechet"] == pytest.approx(float(distance), rel=1e-3, abs=1e-4)
    real, held_out = IMAGES["grey"].float() / 127.5 - 1, test.float() / 127.5 - 1
    covered = metrics.coverage(real[:300], images, Pixels())
    assert (values["precision"], values["recall"]) == (covered.precision, covered.recall)
    assert values["spectrum"] == metrics.spectrum_error(real, images)
    assert values["memorised"] == metrics.memorised(images, real, held_out)
    assert values["score_seconds"] > 0 and values["sample_seconds"] > 0


def test_times_and_noise_of_the_bound_are_those_of_the_seed():
    """Seen with a model that errs: one that does not has the same bound for any."""
    fitted, bits, dark = build("dct", 0.5), [], textures(8, seed=1) // 8

    def model(white, gamma):
        return fitted.denoiser(8)(white, gamma) + 0.1

    data = dequantise(dark, torch.Generator().manual_seed(0))
    for seed in (3, 4):
        process, sizes = fitted.process(0.7), {"generated": 4, "steps": 8, "draws": 3, "seed": seed}
        values, _ = designs.score(model, process, IMAGES["grey"], dark, Pixels(), **sizes)
        found = likelihood.bound(model, process, data, 3, seed=seed, importance=True)
        assert (values["bits"], values["probe_error"]) == (found.bits, found.probe_error)
        assert values["memorised"] == 1  # all lie closer to the training images than the dark ones do
        bits.append(values["bits"])
    assert bits[0] != bits[1] and min(bits) > gaussian_bits(fitted, 0.7, data)


def test_an_untrained_model_samples_the_normals_that_it_was_fitted_to(scored):
    """Means and variances of the components of 300 samples; so chunks are joined, and none is drawn twice."""
    fitted, _, [(_, images), *_] = scored
    found, prior = fitted.basis(images).double(), fitted.prior
    spread = prior.variance.sqrt()
    assert ((found.mean(0) - prior.mean).abs() < 5 * spread / math.sqrt(300) + LEVEL).all()
    coarse = spread > LEVEL  # what a grey level resolves
    assert (found.std(0) / spread - 1)[coarse].abs().max() < 0.3 and coarse.sum() > 16
    assert len(images.flatten(1).unique(dim=0)) == 300


def test_process_is_made_of_the_fitted_basis_prior_and_schedule():
    fitted = build("haar", 0.5)
    process = fitted.process(0.7)
    assert isinstance(process, Process) and process.basis is fitted.basis and process.prior is fitted.prior
    assert torch.equal(process.schedule.gamma(ONE), fitted.schedule(0.7).gamma(ONE))


@pytest.mark.parametrize("n", [12, 400])
def test_principal_components_are_those_under_which_unseen_images_are_likelier(n, generator):
    """Normal log-likelihoods of the first fifth, by torch, of normals fitted to the rest: covariance or waves."""
    shape, noise = (1, 4, 4), 0.01
    mix = torch.randn(16, 16, generator=generator, dtype=torch.float64)
    data = (torch.randn(n, 16, generator=generator, dtype=torch.float64) @ mix + 1).view(-1, *shape)
    unseen, seen = data[: max(n // 5, 2)], data[max(n // 5, 2) :]
    waves, mean = bases.PCA.of_waves(seen.flatten(1).T.cov()[None], shape), seen.flatten(1).mean(0)
    covariances = [seen.flatten(1).T.cov(), waves.matrix[0].T @ waves.eigenvalues[0].diag() @ waves.matrix[0]]
    own, of_waves = (
        torch.distributions.MultivariateNormal(mean, c + noise * torch.eye(16, dtype=torch.float64))
        .log_prob(unseen.flatten(1))
        .mean()
        for c in covariances
    )
    basis, few = designs.principal(data, noise)
    assert few == bool(of_waves > own) == (n == 12)
    c = data.flatten(1).T.cov()[None]
    whole = bases.PCA.of_waves(c, shape) if few else bases.PCA.of(c, shape)
    torch.testing.assert_close(basis.eigenvalues, whole.eigenvalues + noise)
    torch.testing.assert_close(basis.matrix, whole.matrix)


def test_principal_components_of_grey_levels_are_those_of_their_centres_and_the_noise_within_a_level():
    for images in (textures(12), textures(400)):
        found, expected = designs.principal(images), designs.principal(centres(images), WITHIN)
        assert found[1] == expected[1] == (len(images) == 12)
        torch.testing.assert_close(found[0].eigenvalues, expected[0].eigenvalues)
        x = centres(textures(5, seed=1))
        torch.testing.assert_close(found[0](x).abs(), expected[0](x).abs(), rtol=0, atol=1e-6)
