"""Likelihoods, against densities known in closed form, Bayes' rule written out, and sums over all grey levels."""

import math

import pytest
import torch
from cases import BASES, COVARIANCE, MEAN, PRIORS, SCHEDULES, SHAPE, D, matrix, moments, randn
from torch.distributions import MultivariateNormal, Normal

from gudlib import bases, data, exact, importance, likelihood, priors, samplers, schedules
from gudlib.process import Process

DATA = (MEAN + randn(64, D, seed=5) @ torch.linalg.cholesky(COVARIANCE).T).reshape(-1, *SHAPE)
NLL = -MultivariateNormal(MEAN, COVARIANCE).log_prob(DATA.flatten(1))  # nats of each image
LONG = {  # paths on which next to nothing is left at t = 1, and the decoder has next to nothing to do
    "linear": lambda p: schedules.linear(SHAPE, -12.0, 12.0),
    "vp": lambda p: schedules.vp(SHAPE),
    "cosine": lambda p: schedules.cosine(SHAPE, -12.0, 12.0),
    "soft conditioning": lambda p: schedules.soft_conditioning(p.order, 1.6, p.log_variance, -12.0, 12.0),
    "columns": lambda p: schedules.sequential(bases.Pixel(SHAPE).label("column"), 0.5, -12.0, 12.0),
    "one by one": lambda p: schedules.sequential(torch.arange(6.0).double().reshape(SHAPE), 1 / 6, -12.0, 12.0),
}
assert set(LONG) >= set(SCHEDULES) - {"user function"}


def exact_model(basis, prior, covariance=COVARIANCE):
    u, s = matrix(basis), prior.scale.flatten()
    return exact.gaussian(torch.zeros(D, dtype=torch.float64), u @ covariance @ u.T / s[:, None] / s)


def setting(basis="pca", prior="whitened", schedule="linear", family=LONG):
    basis = BASES[basis]()
    prior = PRIORS[prior](moments(basis))
    return exact_model(basis, prior), Process(basis, prior, family[schedule](prior))


def left_over(model, process):
    """E_q(chi_1 | image) log q(chi_1) / N(chi_1): what the bound must exceed -log p by, in nats for each of DATA."""
    gamma = process.schedule.gamma(torch.ones((), dtype=torch.float64))
    covariance = model.covariance(gamma[None])[0, 0]
    mean = (schedules.alpha(gamma) * process.white(DATA)).flatten(1)
    more = torch.linalg.inv(covariance) - torch.eye(D, dtype=torch.float64)
    noise = torch.sigmoid(gamma).flatten()
    return -0.5 * (torch.logdet(covariance) + (mean @ more * mean).sum(1) + (more.diagonal() * noise).sum())


# a third of all combinations, in which every two of basis, prior and schedule meet
each_setting = pytest.mark.parametrize(
    ("basis", "prior", "schedule"),
    [(b, p, s) for i, b in enumerate(BASES) for j, p in enumerate(PRIORS) for k, s in enumerate(LONG)
     if (i + j + k) % 3 == 0],
)  # fmt: skip


# Against the exact density


@each_setting
def test_bound_of_the_exact_denoiser_is_the_exact_nll(basis, prior, schedule):
    """Every basis, prior and schedule, within four standard errors of the estimate."""
    model, process = setting(basis, prior, schedule)
    got = likelihood.bound(model, process, DATA, draws=24, importance=True)
    excess = (got.nats.mean(1) - NLL.mean()) / D
    assert abs(excess.mean()) < 1e-3 + 4 * excess.std() / 24**0.5
    assert excess.std() / 24**0.5 < 0.06


@pytest.mark.parametrize("schedule", LONG)
def test_bound_of_the_exact_denoiser_is_the_exact_nll_to_a_thousandth(schedule):
    """Where pixels are coupled, by 10^5 to 10^6 probes of the 64 images."""
    model, process = setting("pixel", "interpolated", schedule)
    many = DATA.repeat(400, 1, 1, 1)
    got = likelihood.bound(model, process, many, draws=30, importance=True, chunk=len(many))
    excess = (got.nats.mean(1) - NLL.mean()) / D
    assert excess.std() / 30**0.5 < 1e-3
    assert abs(excess.mean()) < 3e-3


@each_setting
def test_flow_of_the_exact_denoiser_is_the_exact_nll_of_every_image(basis, prior, schedule):
    model, process = setting(basis, prior, schedule)
    got = likelihood.flow(model, process, DATA[:8], tolerance=1e-6)
    torch.testing.assert_close(got.nats[0] / D, NLL[:8] / D, rtol=0, atol=1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prior", PRIORS)
def test_where_components_are_independent_the_bound_is_exact_and_so_is_what_it_exceeds_by(prior, schedule):
    """In the basis of principal components, on any path: no random error is left, and paths agree to 1e-6."""
    model, process = setting("pca", prior, schedule, SCHEDULES)
    got = likelihood.bound(model, process, DATA, draws=2)
    off = got.nats - left_over(model, process) - NLL
    assert off.abs().max() < 1e-5 and off.mean().abs() < 1e-6


@pytest.mark.parametrize("prior", PRIORS)
def test_flow_and_decoder_share_out_the_nll_wherever_the_noise_begins(prior):
    """With much noise left at t = 0 most of the NLL is the decoder's; for independent components both are exact."""
    model, process = setting("pca", prior)
    for low in (-12.0, -2.0, 0.5):
        noised = process.along(schedules.linear(SHAPE, low, 14.0))
        got = likelihood.flow(model, noised, DATA[:4], tolerance=1e-7)
        torch.testing.assert_close(got.nats[0], NLL[:4], rtol=0, atol=1e-4)


def independent(n=784):
    """Components of falling variance and a shape of 28 x 28, as the process of a coupled Gaussian of 784 pixels."""
    shape = (1, 28, 28)
    basis = bases.DCT(shape)
    variance = 20 / (0.1 + basis.label("wavenumber")) ** 2
    return basis, priors.Moments(torch.zeros(shape, dtype=torch.float64), variance)


@pytest.mark.parametrize("schedule", ["linear", "soft conditioning"])
def test_784_dimensions(schedule):
    """A coupled Gaussian image: components independent in the cosine basis, seen through whitened and plain priors."""
    basis, m = independent()
    prior = priors.interpolated(m, 0.5)
    path = {
        "linear": lambda: schedules.linear(basis.shape, -14.0, 14.0),
        "soft conditioning": lambda: schedules.soft_conditioning(prior.order, 1.3, prior.log_variance, -12.0, 12.0),
    }[schedule]()
    process = Process(basis, prior, path)
    components = m.variance.sqrt() * randn(4, 1, 28, 28, seed=3)
    nll = -Normal(0, m.variance.sqrt()).log_prob(components).flatten(1).sum(1)

    def model(white_t, gamma):
        return exact.gaussian_eps(white_t, gamma, prior.white_variance)

    for got in (
        likelihood.bound(model, process, basis.inverse(components), draws=1),
        likelihood.flow(model, process, basis.inverse(components)),
    ):
        torch.testing.assert_close(got.nats[0] / 784, nll / 784, rtol=0, atol=1e-3)


def test_784_coupled_dimensions_in_pixels():
    """The same images where no component is independent: the bound is a true estimate."""
    basis, m = independent()
    pixel = bases.Pixel(basis.shape)
    prior = priors.isotropic(priors.Moments(m.mean, torch.full(basis.shape, m.variance.mean(), dtype=torch.float64)))
    process = Process(pixel, prior, schedules.linear(basis.shape, -14.0, 14.0))

    def model(white_t, gamma):  # one gamma for all, so the cosines diagonalise the noised data too
        level = gamma[:, :1, :1, :1].expand_as(white_t)
        return basis.inverse(exact.gaussian_eps(basis(white_t), level, m.variance))

    components = m.variance.sqrt() * randn(64, 1, 28, 28, seed=3)
    nll = -Normal(0, m.variance.sqrt()).log_prob(components).flatten(1).sum(1)
    images = basis.inverse(components)
    got = likelihood.bound(model, process, images.repeat(8, 1, 1, 1), draws=12, importance=True, chunk=512)
    error = got.probe_error * math.log(2)  # nats per dimension
    assert error < 3e-3 and abs(got.nats.mean() - nll.mean()) / 784 < 1e-3 + 4 * error
    flow = likelihood.flow(model, process, images[:2])
    assert abs(flow.nats[0] - nll[:2]).max() / 784 < 0.1  # one random sign vector for 784 diagonal entries


# Parts


def test_a_wrong_denoiser_has_a_larger_bound():
    model, process = setting("pixel")
    right = likelihood.bound(model, process, DATA, draws=16)
    wrong = likelihood.bound(lambda x, gamma: 1.2 * model(x, gamma), process, DATA, draws=16)
    assert wrong.bits > right.bits + 0.1


def test_volume_and_width_carry_the_units():
    """Images in other units, x -> 3 x: the NLL of a density rises by log 3 for each dimension."""
    basis = BASES["pca"]()
    m = moments(basis)
    larger = priors.Moments(3 * m.mean, 9 * m.variance)
    paths = [Process(basis, priors.whitened(x), schedules.linear(SHAPE, -12.0, 12.0)) for x in (m, larger)]
    model = exact_model(basis, paths[0].prior)
    small, large = (likelihood.bound(model, p, x, draws=1) for p, x in zip(paths, (DATA, 3 * DATA), strict=True))
    torch.testing.assert_close(large.nats - small.nats, torch.full_like(small.nats, D * math.log(3)))


def test_bits_per_dim_of_a_uniform_density_are_eight():
    """256 grey levels, all as likely, are 8 bits, as a density on [-1, 1) and as a probability."""
    assert likelihood.bits_per_dim(D * math.log(2), D) == pytest.approx(8)
    assert likelihood.bits_per_dim(D * math.log(256), D, width=1) == pytest.approx(8)


def test_dequantised_grey_levels_never_cost_less_than_their_entropy():
    """Uniform 8-bit noise: 8 bits for any model, and for a normal model as much more as its misfit, in closed form."""
    grey = torch.randint(0, 256, (400, *SHAPE), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    x = data.dequantise(grey, torch.Generator().manual_seed(1)).double()
    prior = priors.whitened(priors.measure(bases.Pixel(SHAPE), x))
    process = Process(bases.Pixel(SHAPE), prior, schedules.linear(SHAPE, -12.0, 12.0))
    got = likelihood.bound(lambda z, g: exact.gaussian_eps(z, g, prior.white_variance), process, x, draws=1)
    assert got.bits == pytest.approx(float(7 + 0.5 * (2 * math.pi * math.e * prior.variance).log2().mean()), abs=0.01)
    assert got.bits > 8


def test_groups_split_the_path():
    model, process = setting("haar", schedule="one by one")
    groups = torch.tensor([0, 2, 1, 1, 2, 0]).reshape(SHAPE)
    split = likelihood.bound(model, process, DATA, draws=4, groups=groups)
    whole = likelihood.bound(model, process, DATA, draws=4)
    assert split.diffusion.shape == (4, len(DATA), 3)
    torch.testing.assert_close(split.diffusion.sum(-1, keepdim=True), whole.diffusion)
    information = exact.information(process.schedule, lambda g: exact.gaussian_error(g, model.covariances[0]))
    expected = torch.stack([information[groups == k].sum() for k in range(3)])
    found = split.diffusion.mean(0)  # of 64 images, each with a square of its own
    assert ((found.mean(0) - expected) / found.std(0) * 8).abs().max() < 4


def test_finite_steps_are_the_kl_divergences_of_ancestral_sampling():
    """sum_j E KL(q(chi_s | chi_t, chi_0) || p(chi_s | chi_t)), both written out, p being the sampler's own step."""
    model, process = setting("pixel", schedule="soft conditioning")
    steps, n = 5, 4000
    x = DATA[:1].expand(n, *SHAPE)
    got = likelihood.bound(model, process, x, draws=8, steps=steps)
    white, total = process.white(x), 0.0
    grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    for s, t in zip(grid, grid[1:], strict=False):
        now, then = process.schedule.gamma(t), process.schedule.gamma(s)
        chi = schedules.alpha(now) * white + schedules.sigma(now) * randn(n, *SHAPE, seed=int(100 * t))
        step = samplers.ancestral(model, process, chi, t, s)
        # q(chi_s | chi_t, chi_0): precision-weighted mean of the forward transition's and the marginal's normals
        ratio = schedules.alpha(now) / schedules.alpha(then)
        noise = torch.sigmoid(now) - ratio**2 * torch.sigmoid(then)
        variance = 1 / (1 / torch.sigmoid(then) + ratio**2 / noise)
        mean = variance * (schedules.alpha(then) * white / torch.sigmoid(then) + ratio * chi / noise)
        torch.testing.assert_close(variance, step.std.square())
        total += 0.5 * ((mean - step.mean).square() / variance).flatten(1).sum(1).mean()
    path = got.diffusion.sum(-1).mean(1)
    assert abs(path.mean() - total) < 4 * path.std() / 8**0.5 + 0.03 * total


def test_finite_steps_of_a_model_that_predicts_nothing_sum_the_steps():
    """For eps_hat = 0 the diffusion term is 1/2 sum_j sum_i (e^(gamma_i(t_j) - gamma_i(t_j-1)) - 1), as E eps^2 = 1."""
    _, process = setting("pixel", schedule="soft conditioning")
    grid = process.schedule.gamma(torch.linspace(0, 1, 9, dtype=torch.float64))
    expected = 0.5 * torch.expm1(grid.diff(dim=0)).sum()
    many = DATA.repeat(60, 1, 1, 1)
    got = likelihood.bound(lambda x, _: torch.zeros_like(x), process, many, draws=12, steps=8, chunk=len(many))
    path = got.diffusion.sum(-1).mean(1)
    error = path.std() / 12**0.5
    assert error < 0.01 * expected and abs(path.mean() - expected) < 4 * error


def test_finite_steps_cost_more_and_tend_to_the_continuous_bound():
    model, process = setting("pca", "isotropic", "soft conditioning")
    bits = [likelihood.bound(model, process, DATA, draws=1, steps=k).bits for k in (16, 64, 256, 1024)]
    limit = likelihood.bound(model, process, DATA, draws=1).bits
    excess = [b - limit for b in bits]
    assert excess[0] > excess[1] > excess[2] > excess[3] > 0
    assert excess[3] == pytest.approx(excess[2] / 4, rel=0.1)  # first order in the step


# Estimation


def test_importance_sampling_is_unbiased_and_helps_on_paths_that_waste_time():
    model, process = setting("pixel", schedule="vp")
    plain, better = (likelihood.bound(model, process, DATA, draws=64, importance=k) for k in (False, True))
    assert better.probe_error < 0.6 * plain.probe_error
    assert abs(plain.bits - better.bits) < 4 * math.hypot(plain.probe_error, better.probe_error)


def test_importance_sampling_needs_no_draw_to_learn_from_where_normals_tell_the_times():
    """One by one, each component in a time of its own: times at which its normal errs are found at once."""
    model, process = setting("pixel", schedule="linear")
    path = process.along(schedules.sequential(torch.arange(D).view(DATA.shape[1:]), 1 / D, -9.0, 7.0))
    plain, better = (
        torch.stack([likelihood.bound(model, path, DATA, 1, seed, importance=k).diffusion.mean() for seed in range(30)])
        for k in (False, True)
    )
    assert better.std() < 0.7 * plain.std()
    assert abs(better.mean() - plain.mean()) < 4 * plain.std() / math.sqrt(30)


def test_times_of_importance_sampling_are_drawn_from_the_density_that_goes_with_them():
    """The density integrates to one between any two times, before and after something was learnt."""
    _, process = setting("pixel", schedule="vp")
    proposal = importance.Proposal(process, process.prior.log_variance.exp())
    u, shares = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000, []
    for _ in range(2):
        t, density = proposal.times(u)
        assert (t.diff() > 0).all() and (density > 0).all()
        assert (t.diff() * (density[1:] + density[:-1]) / 2).sum().item() == pytest.approx(1, abs=0.01)
        inside = (t > 0.2) & (t < 0.6)
        shares.append(inside.double().mean().item())
        share = (t[inside].diff() * density[inside][1:]).sum().item()
        assert share == pytest.approx(shares[-1], abs=0.01)
        proposal.learn(torch.where(inside, 8.0, 1.0) * density)
    assert shares[1] > shares[0] + 0.2  # more of the times lie where the integrand was large


def test_rounding_errors_of_a_network_do_not_grow_from_draw_to_draw():
    """What one processor computes differently from another, by 1e-7, stays as small through all that is learnt."""
    model, process = setting("pixel", schedule="linear")
    path = process.along(schedules.sequential(torch.arange(D).view(DATA.shape[1:]), 1 / D, -12.0, 10.0))
    shifts = torch.randn(100_000, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 1e-7

    def almost(x, gamma):
        return model(x, gamma) + 0.5 * (40 * x).sin() * (1 + shifts[: x.numel()].view_as(x))

    def nearly(x, gamma):
        return model(x, gamma) + 0.5 * (40 * x).sin()

    one, other = (likelihood.bound(m, path, DATA, 12, importance=True).nats.mean(1) for m in (almost, nearly))
    assert (one - other).abs().max() < 1e-4 * one.std() and (one - other).abs().max() > 0


def test_standard_errors_are_what_they_say():
    """Over draws: the spread of the mean of repeated runs. Over images: that of sets of images."""
    model, process = setting("pixel")
    runs = [likelihood.bound(model, process, DATA, draws=8, seed=k) for k in range(40)]
    spread = torch.tensor([run.bits for run in runs]).std()
    assert 0.6 < torch.tensor([run.probe_error for run in runs]).square().mean().sqrt() / spread < 1.5
    exactly = likelihood.bound(*setting("pca"), DATA, draws=1)
    wanted = NLL.std() / 8 / (D * math.log(2))
    assert exactly.image_error == pytest.approx(float(wanted), rel=1e-3)
    assert math.isnan(exactly.probe_error)


def test_hutchinson_agrees_with_the_exact_trace(monkeypatch):
    model, process = setting("pixel")
    whole = likelihood.flow(model, process, DATA[:8])
    monkeypatch.setattr(likelihood, "EXACT_TRACE", 0)
    guesses = likelihood.flow(model, process, DATA[:8], draws=20, tolerance=1e-3)
    error = (guesses.nats - whole.nats).mean(1)
    assert abs(error.mean()) < 4 * error.std() / 20**0.5 + 0.01
    assert error.std() > 0


def test_chunks_do_not_matter():
    model, process = setting("pixel")
    whole, parts = (likelihood.flow(model, process, DATA[:7], draws=2, chunk=k).nats for k in (7, 3))
    torch.testing.assert_close(whole, parts, rtol=0, atol=2e-3 * D)
    assert whole.shape == (2, 7)


# The discrete decoder


def grey_setting(basis=None, prior=None, low=-9.0):
    basis = basis or bases.Pixel(SHAPE)
    grey = torch.randint(0, 256, (16, *SHAPE), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    x = data.scale(grey).double()
    prior = (prior or priors.isotropic)(priors.measure(basis, x))
    schedule = schedules.Schedule(lambda t: low - 2 * prior.scale.log().to(t) + t * (6 - low + 9), SHAPE)
    return grey, x, Process(basis, prior, schedule)


@pytest.mark.parametrize(("basis", "prior"), [("pixel", "isotropic"), ("haar", "whitened")])
def test_discrete_decoder_is_a_probability_over_grey_levels(basis, prior):
    """At the z it sees, exp(-nll) summed over the 256 values of one pixel, others fixed, is that of the others."""
    grey, x, process = grey_setting(BASES[basis](), PRIORS[prior])
    decode = likelihood.Discrete(process)
    # all values of pixel 0 at one noised image: the noise is chosen such that z stays where it is
    every = x[:1].repeat(256, 1, 1, 1)
    every[:, 0, 0, 0] = data.scale(torch.arange(256).to(torch.uint8))
    low = process.schedule.gamma(torch.zeros((), dtype=torch.float64))
    shift = (process.white(x[:1]) - process.white(every)) / (0.5 * low).exp()
    eps = shift + randn(1, *SHAPE, seed=4)
    total = torch.logsumexp(-decode(lambda x, _: x, process.white(every), eps), 0)
    z = process.data(process.white(x[:1]) + (0.5 * low).exp() * randn(1, *SHAPE, seed=4)).flatten()
    values = data.scale(torch.arange(256).to(torch.uint8)).double()
    others = (-0.5 * (z[:, None] - values).square() * math.exp(9)).log_softmax(-1)
    level = grey[0].flatten().long()
    expected = others.gather(1, level[:, None])[1:].sum()
    torch.testing.assert_close(total, expected)


def test_discrete_and_dequantised_bits_agree_where_both_are_tight():
    """Normal data, many grey levels wide, noise about one grey level wide at t = 0: both are the entropy."""
    smooth = torch.normal(128.0, 30.0, (300, *SHAPE), generator=torch.Generator().manual_seed(1)).round().clamp(0, 255)
    basis = bases.Pixel(SHAPE)
    loose = data.dequantise(smooth.to(torch.uint8), torch.Generator().manual_seed(2)).double()
    prior = priors.isotropic(priors.measure(basis, loose))
    process = Process(basis, prior, schedules.linear(SHAPE, -10.0, 9.0))

    def model(white_t, gamma):
        return exact.gaussian_eps(white_t, gamma, prior.white_variance)

    density = likelihood.bound(model, process, loose, draws=4)
    exactly = likelihood.bound(model, process, data.scale(smooth.to(torch.uint8)).double(), draws=4, decoder="discrete")
    assert exactly.log_volume == 0 and exactly.width == 1
    assert abs(exactly.bits - density.bits) < 0.03
    entropy = 0.5 * math.log2(2 * math.pi * math.e * 30**2)
    assert density.bits == pytest.approx(entropy, abs=0.05)


@pytest.mark.parametrize(("decoder", "calls"), [("normal", 2), ("discrete", 1)])
def test_nfe_counts_the_calls_spent_on_an_image(decoder, calls):
    _, x, process = grey_setting()
    made = []

    def model(white_t, gamma):
        made.append(len(white_t))
        return 0 * white_t

    got = likelihood.bound(model, process, x, draws=3, decoder=decoder)
    assert got.nfe == calls and sum(made) == 3 * calls * len(x)
    made.clear()
    flow = likelihood.flow(model, process, x, decoder=decoder)
    assert flow.nfe * len(x) == sum(made)


@pytest.mark.usefixtures("unchecked")
def test_discrete_decoder_is_refused_where_the_noise_is_not_white_in_pixels():
    model, process = setting("pca", "whitened")
    with pytest.raises(ValueError, match=r"`discrete` needs white noise in the pixels .* runs from"):
        likelihood.bound(model, process, DATA, decoder="discrete")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"decoder": "laplace"}, "decoder must be one of .*; got 'laplace'"),
        ({"draws": 0}, "draws must be at least 1; got 0"),
        ({"chunk": 0}, "chunk must be at least 1; got 0"),
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"data": DATA[:, :, 1:]}, r"data must be floating numbers of shape \(n, 1, 2, 3\); got"),
    ],
)
def test_bad_arguments_are_refused(wrong, message):
    model, process = setting()
    with pytest.raises(ValueError, match=message):
        likelihood.bound(**{"model": model, "process": process, "data": DATA} | wrong)


@pytest.mark.usefixtures("unchecked")
def test_a_schedule_for_each_image_is_refused():
    model, process = setting()
    a = torch.ones(len(DATA), dtype=torch.float64)
    with pytest.raises(ValueError, match="schedule must be one for all images"):
        likelihood.bound(model, process.along(schedules.soft_conditioning(process.prior.order, a)), DATA)
