"""Heads that say a token's distribution outright: densities, draws and trainings against what is known exactly."""

import math
from dataclasses import replace

import cases
import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

from gudlib import bases, data, denoiser, mar, priors, schedules
from gudlib.mar import mixtures
from gudlib.references import IndependentGaussian

SHAPE, COUNT, D = (1, 6, 4), 6, 4  # six tokens of four numbers
SMALL = {"width": 16, "depth": 1, "heads": 2, "buffer": 3, "head": (2, 24), "dropout": 0.0}
QUICK = mar.MarTrainingConfig(steps=6, batch=8, warmup=3, save_every=2, masking=(0.0, 10.0))
COMPONENTS = {"code": 4, "mixture": 3, "mean": 1}


def patterns(n=200, seed=1):
    """One random token of four, six times: the first tells the others."""
    generator = torch.Generator().manual_seed(seed)
    token = 60 + 140 * (torch.randint(0, 4, (n, 1, 1, 1), generator=generator) >> torch.tensor([[0, 1], [1, 0]]) & 1)
    return token.repeat(1, 1, 3, 2).to(torch.uint8)


def fresh(loss, kind="raster", images=None, seed=0, **options):
    """An untrained model of the images' tokens."""
    torch.manual_seed(seed)
    cut = mar.patchify(data.scale(patterns() if images is None else images), 2).reshape(-1, 1, 2, 2)
    moments = priors.measure(bases.Pixel((1, 2, 2)), cut)
    prior = priors.isotropic(moments, 0.4).float()
    network = mixtures.MixtureNetwork(loss, kind, SHAPE, 2, COMPONENTS[loss], **(SMALL | options))
    return mixtures.MixtureAutoregressor(network, IndependentGaussian(bases.Pixel((1, 2, 2)), prior)).eval()


def awake(loss, kind="raster"):
    """With random weights, codewords and spread."""
    model = fresh(loss, kind)
    for k, part in enumerate([*model.network.parameters(), model.network.head.centres]):
        part.data = 0.3 * cases.randn(part.numel(), seed=k).float().view(part.shape)
    return model


def normal(mean, variance):
    """One normal for each token, as a mixture of one."""
    part = Independent(Normal(mean[..., None, :], variance.sqrt()[..., None, :].expand_as(mean[..., None, :])), 1)
    return MixtureSameFamily(Categorical(logits=torch.zeros(*mean.shape[:-1], 1)), part)


# Densities


@pytest.mark.parametrize("loss", mixtures.LOSSES)
def test_a_head_is_the_mixture_that_its_weights_say(loss):
    head, z, x = awake(loss).network.head, cases.randn(7, 16).float(), cases.randn(7, D, seed=5).float()
    y, one = head.body(z), head.log_spread.exp()
    if loss == "code":
        parts = [(y[:, j], head.centres[j], one) for j in range(4)]
    elif loss == "mean":
        parts = [(torch.zeros(7), y, one)]
    else:
        inner = y[:, 3:].view(7, 3, 2, D)
        parts = [(y[:, j], inner[:, j, 0], inner[:, j, 1].exp()) for j in range(3)]
    weights = torch.stack([logit for logit, *_ in parts], 1).softmax(1)
    densities = [(-(((x - m) / s) ** 2) / 2).exp() / (s * math.sqrt(2 * math.pi)) for _, m, s in parts]
    expected = (weights * torch.stack([d.prod(1) for d in densities], 1)).sum(1)
    torch.testing.assert_close(head(z).log_prob(x).exp(), expected)


@pytest.mark.parametrize("kind", ["raster", "random", "masked"])
def test_with_exact_conditionals_the_bits_are_the_joint_distributions(kind, monkeypatch):
    """Of a correlated normal of 24 numbers, whose conditionals are put in the network's place."""
    model, images = fresh("mean", kind), patterns(9)
    root = cases.randn(24, 24, seed=2) / 5 + torch.eye(24)
    covariance, mean = root @ root.T, cases.randn(24, seed=3)

    def conditional(tokens, permutation, start, stop, labels, cache=None):
        found = []
        for k in range(start, stop):
            before = permutation[:, : start if kind == "masked" else k]
            i, j = ((w[..., None] * D + torch.arange(D)).flatten(1) for w in (permutation[:, k : k + 1], before))
            gain = torch.linalg.solve(covariance[j[:, :, None], j[:, None]], covariance[j[:, :, None], i[:, None]]).mT
            off = tokens.double().flatten(1).gather(1, j) - mean[j]
            rest = covariance[i[:, :, None], i[:, None]] - gain @ covariance[j[:, :, None], i[:, None]]
            found.append((mean[i] + (gain @ off[..., None])[..., 0], rest))
        centre, spread = (torch.stack(each, 1) for each in zip(*found, strict=True))
        return MultivariateNormal(centre, spread)

    monkeypatch.setattr(model.network, "forward", conditional)
    found = model.bits(images, seed=4, chunk=100)
    white = model.tokens(data.dequantise(images, torch.Generator().manual_seed(4))).flatten(1).double()
    nats = -MultivariateNormal(mean, covariance).log_prob(white) + COUNT * model.prior.log_volume
    torch.testing.assert_close(found, nats / (24 * math.log(2)) + 7, atol=1e-5, rtol=0)
    if kind == "masked":  # tokens of one step are independent given those before
        together = model.bits(images, steps=1, seed=4, chunk=100)
        blocks = covariance.view(6, D, 6, D)
        alone = [
            MultivariateNormal(mean[k * D :][:D], blocks[k, :, k]).log_prob(white[:, k * D :][:, :D]) for k in range(6)
        ]
        nats = -torch.stack(alone).sum(0) + COUNT * model.prior.log_volume
        torch.testing.assert_close(together, nats / (24 * math.log(2)) + 7, atol=1e-5, rtol=0)


@pytest.mark.parametrize("loss", mixtures.LOSSES)
@pytest.mark.parametrize("kind", ["raster", "masked"])
def test_bits_do_not_depend_on_chunks(loss, kind):
    model, images = awake(loss, kind), patterns(7)
    whole = model.bits(images, chunk=7)
    assert whole.shape == (7,) and bool(whole.isfinite().all())
    torch.testing.assert_close(model.bits(images, chunk=3), whole, atol=1e-5, rtol=0)
    assert not torch.allclose(whole, model.bits(images, seed=1, chunk=7), atol=1e-5)


# Codewords


def test_codewords_are_the_clusters_centres_and_pictures_of_them_stay():
    images = patterns()
    model = fresh("code", images=images)
    model.fit_codewords(images)
    off = (model.rounded(data.scale(images)) - data.scale(images)).abs().max()
    assert off < 1 / 127  # four tokens, four codewords: nothing is lost but what dequantisation added
    centres = model.network.head.centres
    assert torch.equal(mixtures.nearest(centres[[3, 0]], centres), torch.tensor([3, 0]))
    tokens = cases.randn(50, D, seed=7).float()
    expected = (tokens[:, None] - centres).square().sum(2).argmin(1)
    assert torch.equal(mixtures.nearest(tokens.view(5, 10, D), centres), expected.view(5, 10))


def test_the_codes_spread_is_that_of_what_is_rounded():
    images = torch.randint(0, 256, (50, *SHAPE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    model = fresh("code", images=images)
    model.fit_codewords(images, sample=300, seed=2)
    tokens = model.tokens(data.dequantise(images, torch.Generator().manual_seed(2))).flatten(0, 1)
    off = tokens - model.network.head.centres[mixtures.nearest(tokens, model.network.head.centres)]
    assert float(model.network.head.log_spread.exp()) == pytest.approx(float(off.square().mean().sqrt()), rel=1e-4)


# Draws


@pytest.mark.parametrize("kind", ["raster", "random", "masked"])
def test_generation_with_exact_conditionals_recovers_the_gaussian(kind, monkeypatch):
    """Each token's mean is half of the mean of those known: all are normal, and so is what is drawn."""
    model = fresh("mixture", kind)

    def conditional(tokens, permutation, start, stop, labels, cache=None):
        known = tokens.take_along_dim(permutation[:, :start, None], 1)
        mean = known.sum(1, keepdim=True).expand(-1, stop - start, -1) / (2 * max(start, 1))
        return normal(mean, torch.full_like(mean, 0.25))

    monkeypatch.setattr(model.network, "forward", conditional)
    drawn, permutation = model.generate(20_000, torch.Generator().manual_seed(0))
    tokens = model.tokens(drawn).take_along_dim(permutation[..., None], 1)
    root = torch.eye(6)  # the same linear recursion of the noise, x_k = 1/2 mean of those before + noise / 2
    for k in range(1, 6):
        root[k] += root[:k].sum(0) / (2 * k)
    torch.testing.assert_close(tokens[..., 0].T.cov(), root @ root.T / 4, atol=0.02, rtol=0)
    assert float((tokens[..., 0] * tokens[..., 1]).mean().abs()) < 0.01


def test_temperature_chooses_the_likeliest_or_scales_the_noise():
    means, draws = {}, {}
    for loss in mixtures.LOSSES:
        model = awake(loss)
        for tau in (0.0, 0.5, 1.0):
            drawn, _ = model.generate(4000, torch.Generator().manual_seed(0), temperature=tau)
            draws[loss, tau] = model.tokens(drawn)[:, 0]
        start = torch.zeros(1, COUNT, D), torch.arange(COUNT)[None], 0, 1, torch.zeros(1, dtype=torch.long)
        means[loss] = model.network(*start)
    logits = means["code"].mixture_distribution.logits[0, 0]
    centres = means["code"].component_distribution.base_dist.loc[0, 0]
    for tau in (0.5, 1.0):
        counts = torch.bincount(mixtures.nearest(draws["code", tau], centres), minlength=4) / 4000
        torch.testing.assert_close(counts, (logits / tau).softmax(0), atol=0.03, rtol=0)
    torch.testing.assert_close(draws["code", 0.0], centres[logits.argmax()].expand(4000, -1), atol=1e-4, rtol=0)
    for loss in ("mean", "mixture"):
        parts = means[loss].component_distribution.base_dist
        spread = torch.stack([draws[loss, tau].var(0) for tau in (0.0, 0.5, 1.0)])
        weights = means[loss].mixture_distribution.probs[0, 0]
        inner = (weights[:, None] * parts.variance[0, 0]).sum(0)
        between = (weights[:, None] * (parts.mean[0, 0] - weights @ parts.mean[0, 0]) ** 2).sum(0)
        expected = torch.stack([between + tau**2 * inner for tau in (0.0, 0.5, 1.0)])
        torch.testing.assert_close(spread, expected, atol=0.05, rtol=0.08)


@pytest.mark.parametrize("loss", mixtures.LOSSES)
def test_a_causal_trunks_cache_changes_nothing(loss, monkeypatch):
    model = awake(loss)
    kept, _ = model.generate(5, torch.Generator().manual_seed(1))
    monkeypatch.setattr(model.network.trunk, "cache", lambda: None)
    torch.testing.assert_close(model.generate(5, torch.Generator().manual_seed(1))[0], kept, atol=1e-4, rtol=0)


# Training


def trainer(loss, config=QUICK, kind="raster", checkpoint=None, **options):
    model, images = fresh(loss, kind, **options), patterns()
    if loss == "code":
        model.fit_codewords(images)
    return mixtures.MixtureTrainer(model.train(), images, None, config, checkpoint)


@pytest.mark.parametrize("loss", mixtures.LOSSES)
@pytest.mark.parametrize("kind", ["raster", "masked"])
def test_training_learns_what_one_token_says_of_the_others(loss, kind):
    config = mar.MarTrainingConfig(steps=250, batch=32, warmup=10, lr=5e-3, ema=0.9, masking=(0.0, 10.0))
    t = trainer(loss, config, kind)
    list(t.run())
    model, held_out = t.averaged(), patterns(64, seed=9)
    assert type(model) is mixtures.MixtureAutoregressor and not model.training
    tokens, order = model.tokens(data.scale(held_out)), torch.arange(COUNT).expand(64, -1)
    with torch.no_grad():
        found = [model.network(tokens, order, k, k + 1, torch.zeros(64, dtype=torch.long)) for k in (0, 3)]
        first, later = (-each.log_prob(tokens[:, k : k + 1]).mean() for k, each in zip((0, 3), found, strict=True))
    assert later < first - (0.8 if loss == "mean" else 1.0)  # of four patterns, log 4 = 1.39 nats
    if loss == "code":
        assert float(found[1].mixture_distribution.probs.amax(-1).mean()) > 0.9


def test_the_loss_of_a_code_is_the_cross_entropy_of_the_nearest_codeword_and_of_others_the_nll():
    for loss in mixtures.LOSSES:
        t = trainer(loss)
        t.plain.train()
        nats, each = t.loss(3)
        tokens, permutation, start, labels = t.batch(3, t.stream(3))
        found, target = t.plain(tokens, permutation, start, COUNT, labels), tokens
        if loss == "code":
            which = mixtures.nearest(target, t.model.network.head.centres)
            expected = -found.mixture_distribution.logits.log_softmax(-1).gather(-1, which[..., None])[..., 0]
        else:
            expected = -found.log_prob(target)
        torch.testing.assert_close(each.flatten(), expected.flatten() / D)
        torch.testing.assert_close(nats, expected.mean() / D)


@pytest.mark.parametrize("loss", mixtures.LOSSES)
def test_a_stopped_run_goes_on_bit_for_bit(loss, tmp_path):
    whole = trainer(loss)
    losses = [record.loss for record in whole.run()]
    for record in trainer(loss, checkpoint=tmp_path / "c").run():
        if record.step == 3:
            break
    again = trainer(loss, checkpoint=tmp_path / "c")
    assert [record.loss for record in again.run()] == losses[3:]
    one, other = (t.averaged().state_dict() for t in (whole, again))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    with pytest.raises(ValueError, match="belongs to another run"):
        trainer(next(other for other in mixtures.LOSSES if other != loss), checkpoint=tmp_path / "c")


def test_a_mean_is_fitted_as_by_least_squares():
    """The spread has a best value, the mean square error's root, and does not move the best mean."""
    t = trainer("mean", replace(QUICK, steps=400, batch=64, lr=1e-2, ema=0.99))
    list(t.run())
    model, images = t.averaged(), patterns()
    tokens = model.tokens(data.dequantise(images, torch.Generator().manual_seed(0)))
    with torch.no_grad():
        found = model.network(tokens, torch.arange(COUNT).expand(200, -1), 0, COUNT, torch.zeros(200, dtype=torch.long))
    off = tokens - found.mean
    assert float(model.network.head.log_spread.exp()) == pytest.approx(float(off.square().mean().sqrt()), rel=0.1)


def test_codes_of_images_may_be_trained_on_as_they_are():
    """Floating data: the same as grey levels that are scaled to them."""
    images = patterns()
    codes = data.scale(images)
    for values in (images, codes, codes.double(), codes.requires_grad_(), codes.detach().double()):
        model = fresh("mixture")
        t = mixtures.MixtureTrainer(model.train(), values, None, replace(QUICK, discrete=True))
        found = [record.loss for record in t.run()]
        expected = found if values is images else expected
        assert found == expected


@pytest.mark.parametrize("loss", mixtures.LOSSES)
def test_a_saved_model_says_the_same(loss, tmp_path):
    model = awake(loss)
    mar.save(model, tmp_path / "m", card={"seconds": 3})
    again = mixtures.load(tmp_path / "m")
    assert torch.equal(model.bits(patterns(5)), again.bits(patterns(5))) and not again.training
    assert denoiser.card(tmp_path / "m") == {"seconds": 3}
    with pytest.raises(ValueError, match=f"m holds a head of loss '{loss}'; use mar.mixtures.load"):
        mar.load(tmp_path / "m")
    plain = mar.Autoregressor(mar.Network("raster", SHAPE, 2, **SMALL), model.reference)
    mar.save(plain, tmp_path / "plain")
    with pytest.raises(ValueError, match="plain holds no mixture; use mar.load"):
        mixtures.load(tmp_path / "plain")


# Bad input

LINE = schedules.linear((1, 2, 2), -7, 5)


def plain():
    """Of a diffusion head."""
    return mar.Autoregressor(mar.Network("raster", SHAPE, 2, **SMALL), fresh("mean").reference)


WRONG = {
    "loss must be one of": lambda: mixtures.MixtureNetwork("huber", "raster", SHAPE, 2),
    "components must lie between 1 and 1": lambda: mixtures.MixtureNetwork("mean", "raster", SHAPE, 2, 2),
    "components must be at least 1": lambda: mixtures.MixtureNetwork("code", "raster", SHAPE, 2, 0),
    "tokens must be at least k, 5; got 4": lambda: mixtures.codewords(cases.randn(4, 2), 5),
    "tokens must be finite": lambda: mixtures.codewords(torch.full((9, 2), math.nan), 5),
    "images must be uint8": lambda: awake("code").bits(data.scale(patterns(3))),
    "a raster model draws one token a step": lambda: awake("mean").generate(2, torch.Generator(), 3),
    "a raster model draws one token a step, steps = 6; got 2": lambda: awake("mean").bits(patterns(3), 2),
    "codewords must be fitted first": lambda: mixtures.MixtureTrainer(fresh("code"), patterns(), None, QUICK),
    "codewords must be fitted": lambda: fresh("code").bits(patterns(3)),
    "codewords must be": lambda: fresh("code").generate(2, torch.Generator()),
    "codewords are of a network of loss 'code'; this one is of 'mean'": lambda: fresh("mean").fit_codewords(patterns()),
    "codewords are of .*'mixture'": lambda: fresh("mixture").rounded(data.scale(patterns(2))),
    "network must be a MixtureNetwork": lambda: mixtures.MixtureAutoregressor(plain().network, plain().reference),
    "model must be a MixtureAutoregressor": lambda: mixtures.MixtureTrainer(plain(), patterns(), None, QUICK),
    "head is of loss 'mean'": lambda: mar.generate(fresh("mean"), LINE, 2, torch.Generator()),
    "head is of loss 'code'": lambda: mar.MarTrainer(fresh("code"), patterns(), None, LINE, QUICK),
    "temperature must be": lambda: awake("mean").generate(2, torch.Generator(), temperature=-1.0),
    "images must be data": lambda: mixtures.MixtureTrainer(fresh("mean"), patterns().float(), None, QUICK),
    "images must be finite": lambda: mixtures.MixtureTrainer(
        fresh("mean"), torch.full((4, *SHAPE), math.nan), None, QUICK
    ),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("message", WRONG)
def test_what_makes_no_sense_is_refused(message):
    with pytest.raises(ValueError, match=message):
        WRONG[message]()
