"""The autoregressive end: who sees what, what it costs, and that its bound is the chain rule's."""

import functools
import importlib.util
import itertools
import math
from dataclasses import replace

import cases
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gudlib import GUD, bases, denoiser, files, likelihood, mar, priors, samplers, schedules, training
from gudlib.data import load as load_set
from gudlib.data import scale
from gudlib.exact import gaussian_eps
from gudlib.mar import training as mar_training
from gudlib.mar.networks import KINDS
from gudlib.process import Process, diffuse
from gudlib.references import IndependentGaussian, PatchHistograms
from gudlib.schedules import alpha, sigma

SHAPE = (1, 6, 4)  # six tokens of four numbers
SMALL = dict(width=16, depth=1, heads=2, buffer=3, head=(2, 24), classes=3)
QUICK = mar.MarTrainingConfig(steps=6, batch=8, warmup=3, save_every=2, repeats=2)


def pictures(n=64):
    """One pattern or its negative, and a little noise: one token tells the others."""
    generator = torch.Generator().manual_seed(1)
    pattern = torch.randint(0, 2, SHAPE, generator=generator) * 2 - 1
    sign = torch.randint(0, 2, (n, 1, 1, 1), generator=generator) * 2 - 1
    return (128 + 60 * sign * pattern + torch.randint(-20, 20, (n, *SHAPE), generator=generator)).to(torch.uint8)


LABELS = torch.arange(64) % 3
LINE = schedules.linear((1, 2, 2), -7, 5)


def cosine(model):
    """The published schedule of a token, cut where its ends would multiply errors."""
    return schedules.cosine(model.basis.shape, gamma_max=7.0)


def fresh(kind, images, size, pca=False, **network):
    """An untrained model for images, with the mean and one scale of their patches, as pixels or as their PCA."""
    shape = (images.shape[1], size, size)
    inner = mar.Network(kind, images.shape[1:], size, **network)
    cut = mar.patchify(images, size).reshape(-1, *shape)
    basis = bases.PCA.fit(cut) if pca else bases.Pixel(shape)
    moments = priors.measure(basis, cut)
    prior = priors.isotropic(moments, float(moments.variance.mean().sqrt()))
    return mar.Autoregressor(inner, IndependentGaussian(basis.float(), prior.float()))


def build(kind, seed=0, awake=True, pca=False, **options):
    """A small model; awake: with random weights where it starts with zeros."""
    torch.manual_seed(seed)
    model = fresh(kind, scale(pictures()), 2, pca=pca, **(SMALL | options)).eval()
    for part in model.network.parameters():
        if awake:
            nn.init.normal_(part, std=0.3)
    return model


def tokens_of(model, n=5, seed=3):
    return cases.randn(n, model.network.count, 4, seed=seed).float()


def orders(n, count=6, seed=4):
    return torch.rand(n, count, generator=torch.Generator().manual_seed(seed)).argsort(1)


# Tokens


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))
def test_patches_are_the_images_squares_in_reading_order(c, rows, columns, size, b):
    images = cases.randn(b, c, rows * size, columns * size)
    tokens = mar.patchify(images, size)
    assert tokens.shape == (b, rows * columns, c * size * size)
    for k, (i, j) in enumerate(itertools.product(range(rows), range(columns))):
        square = images[:, :, i * size : (i + 1) * size, j * size : (j + 1) * size]
        assert torch.equal(tokens[:, k], square.flatten(1))
    assert torch.equal(mar.unpatchify(tokens, images.shape[1:], size), images)


@pytest.mark.parametrize("pca", [False, True])
def test_tokens_have_no_mean_and_one_scale_and_lead_back_to_the_image(pca):
    model, images = build("raster", pca=pca), scale(pictures())
    tokens = model.tokens(images)
    torch.testing.assert_close(model.images(tokens), images, atol=1e-5, rtol=1e-5)
    flat = tokens.flatten(0, 1).double()
    torch.testing.assert_close(flat.mean(0), torch.zeros(4, dtype=torch.float64), atol=1e-5, rtol=0)
    assert flat.var(0).mean().item() == pytest.approx(1, rel=1e-5)
    scales = model.prior.scale.unique()
    assert len(scales) == 1
    patches = mar.patchify(images, 2).flatten(0, 1)
    torch.testing.assert_close(flat.square().sum(1).float(), ((patches - patches.mean(0)) / scales).square().sum(1))
    covariance = flat.T @ flat / len(flat)
    off = (covariance - covariance.diag().diag()).abs().max()
    assert off < 1e-5 if pca else off > 0.1


# The 6-D Gaussian


class Exact:
    """The conditional of tokens of a normal distribution: anything that can answer is a model."""

    def __init__(self, mean, covariance, size, causal=False):
        self.mean, self.covariance, self.size, self.causal = mean, covariance, size, causal

    def moments(self, tokens, permutation, start, stop):
        """Means (n, m, D) and covariances (n, m, D, D) of tokens permutation[:, start:stop]."""
        means, covariances, d = [], [], self.size
        for k in range(start, stop):
            before, own = permutation[:, : k if self.causal else start], permutation[:, k : k + 1]
            i, j = ((which[..., None] * d + torch.arange(d)).flatten(1) for which in (own, before))
            c_ij = self.covariance[i[:, :, None], j[:, None, :]]
            known = torch.linalg.solve(self.covariance[j[:, :, None], j[:, None, :]], c_ij.mT).mT
            off = tokens.flatten(1).gather(1, j) - self.mean[j]
            means.append(self.mean[i] + (known @ off[..., None])[..., 0])
            covariances.append(self.covariance[i[:, :, None], i[:, None, :]] - known @ c_ij.mT)
        return torch.stack(means, 1), torch.stack(covariances, 1)

    def __call__(self, tokens, permutation, start, stop, labels=None):
        mean, covariance = (x.flatten(0, 1) for x in self.moments(tokens, permutation, start, stop))

        def model(white_t, gamma):
            a, s = (f(gamma).flatten(1)[:, :1] for f in (alpha, sigma))
            total = a[..., None] ** 2 * covariance + s[..., None] ** 2 * torch.eye(self.size, dtype=mean.dtype)
            return (s * torch.linalg.solve(total, white_t.flatten(1) - a * mean)).reshape(white_t.shape)

        return model

    def nll(self, tokens, permutation, cuts):
        """-log p of each token in its place, (n, L), nats in white units."""
        parts = [self.moments(tokens, permutation, *cut) for cut in itertools.pairwise(cuts)]
        means, covariances = (torch.cat(x, 1) for x in zip(*parts, strict=True))
        target = tokens.take_along_dim(permutation[..., None], 1)
        return -torch.distributions.MultivariateNormal(means, covariances).log_prob(target)


def gaussian(image, n=20_000):
    """Images of the coupled Gaussian, their white tokens (n, L, D), and a process and exact models for a token."""
    shape = (image[0], 1, 1)
    moments = priors.Moments(torch.full(shape, 0.3, dtype=torch.float64), torch.full(shape, 5.0, dtype=torch.float64))
    process = Process(bases.Pixel(shape), priors.isotropic(moments, 1.4), schedules.linear(shape, -14.0, 14.0))
    tokens = cases.MEAN + cases.randn(n, cases.D) @ torch.linalg.cholesky(cases.COVARIANCE).T  # in the order of tokens
    data = mar.unpatchify(tokens.view(n, -1, image[0]), image, 1)
    mean, covariance = (cases.MEAN - 0.3) / 1.4, cases.COVARIANCE / 1.4**2
    models = {causal: Exact(mean, covariance, image[0], causal) for causal in (False, True)}
    return data, ((tokens - 0.3) / 1.4).view(n, -1, image[0]), process, models


def quadrature(model, process, data, draws, seed, steps, decoder, chunk):
    """`likelihood.bound` without chance, for models linear in the noise: Gauss-Legendre in t, sigma points in eps."""
    white, d = process.white(data), data[0].numel()
    points = math.sqrt(d) * torch.cat([torch.eye(d), -torch.eye(d)]).double().reshape(-1, 1, *data.shape[1:])
    nodes, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(40))
    path, last = torch.zeros(len(data), dtype=torch.float64), torch.zeros(len(data), dtype=torch.float64)
    gammas, rates = (f((nodes + 1) / 2) for f in (process.schedule.gamma, process.schedule.dgamma_dt))
    for eps in (point.expand_as(white) for point in points):
        for gamma, rate, weight in zip(gammas.split(1), rates.split(1), weights / 2, strict=True):
            square = (eps - model(diffuse(white, gamma, eps), gamma)).square()
            path += weight * 0.5 * (rate * square).flatten(1).sum(1) / len(points)
        last += likelihood.Normal(process)(model, white, eps) / len(points)
    end = process.schedule.gamma(torch.ones((), dtype=torch.float64))
    prior = 0.5 * (alpha(end) ** 2 * white**2 + sigma(end) ** 2 - 1 - 2 * sigma(end).log()).flatten(1).sum(1)
    volume, width = float(process.prior.log_volume), likelihood.GREY_LEVEL
    return likelihood.Likelihood(prior[None], path[None, :, None], last[None], volume, d, width, 2)


@pytest.mark.parametrize("image", [(1, 2, 3), (2, 1, 3), (6, 1, 1)])
@pytest.mark.parametrize("raster", [True, False])
def test_with_exact_conditionals_the_bound_is_the_chain_rules_nll(image, raster, monkeypatch):
    monkeypatch.setattr(likelihood, "bound", quadrature)
    data, tokens, process, models = gaussian(image, 8)
    count, d = tokens.shape[1:]
    joint = torch.distributions.MultivariateNormal(cases.MEAN, cases.COVARIANCE)
    nll = -joint.log_prob(mar.patchify(data, 1).flatten(1))
    one_by_one = list(range(count + 1))
    for causal, cuts in ((False, one_by_one), (True, [0, count]), (True, one_by_one)):
        found = mar.chain_rule_bound(models[causal], process, data, cuts, raster, chunk=5)
        torch.testing.assert_close(found.nats, nll[None], atol=2e-5, rtol=0)  # of every single image
        torch.testing.assert_close(found.tokens.sum(-1), found.nats)
        assert found.bits == pytest.approx(nll.mean().item() / cases.D / math.log(2) + 7, abs=1e-5)
        assert found.curve.shape == (count,) and found.curve.mean().item() == pytest.approx(found.bits)
        assert found.diffusion.shape == (1, 8, count) and found.dims == cases.D and found.nfe == 2 * count
        if raster:
            places = models[True].nll(tokens, torch.arange(count).expand(8, -1), cuts) + d * math.log(1.4)
            torch.testing.assert_close(found.tokens[0], places, atol=2e-5, rtol=0)


def test_tokens_drawn_together_are_bounded_as_independent_given_those_before(monkeypatch):
    monkeypatch.setattr(likelihood, "bound", quadrature)
    data, tokens, process, models = gaussian((1, 2, 3), 40)
    cuts = [0, 1, 3, 6]
    permutation = torch.arange(6).expand(40, -1)
    found = mar.chain_rule_bound(models[False], process, data, cuts, raster=True)
    expected = models[False].nll(tokens, permutation, cuts) + math.log(1.4)
    torch.testing.assert_close(found.tokens[0], expected, atol=2e-5, rtol=0)
    _, tokens, _, models = gaussian((1, 2, 3), 4000)
    permutation = torch.arange(6).expand(4000, -1)
    together, alone = (models[False].nll(tokens, permutation, cut).sum(1).mean() for cut in (cuts, range(7)))
    assert together > alone + 0.02


@pytest.mark.parametrize("raster", [True, False])
def test_the_random_estimate_agrees_within_its_error(raster):
    data, tokens, process, models = gaussian((1, 2, 3), 4000)
    nll = -torch.distributions.MultivariateNormal(cases.MEAN, cases.COVARIANCE).log_prob(data.flatten(1))
    found = mar.chain_rule_bound(models[False], process, data, range(7), raster, draws=3, chunk=1500, seed=2)
    assert found.nats.shape == (3, 4000)
    off = (found.nats - nll).mean(0)
    assert abs(off.mean()) < 4 * off.std() / math.sqrt(4000) and off.std() / math.sqrt(4000) < 0.1
    assert found.probe_error < 0.05 and not torch.equal(found.nats[0], found.nats[1])
    again, other = (mar.chain_rule_bound(models[False], process, data[:9], range(7), raster, seed=s) for s in (2, 3))
    assert torch.equal(
        again.nats, mar.chain_rule_bound(models[False], process, data[:9], range(7), raster, seed=2).nats
    )
    assert not torch.equal(again.nats, other.nats)


def test_decoder_and_steps_are_those_of_the_bound():
    model = build("raster", awake=False, classes=0)
    data, process = scale(pictures(16)), model.process(cosine(model))
    limit, few, exact = (
        mar.chain_rule_bound(model.conditional, process, data, [0, 6], True, draws=4, **more)
        for more in ({}, {"steps": 5}, {"decoder": "discrete"})
    )
    assert few.bits > limit.bits + 0.1  # five steps cost more than infinitely many
    assert (exact.width, exact.log_volume, limit.width) == (1.0, 0.0, likelihood.GREY_LEVEL)
    assert abs(exact.bits - limit.bits) < 1.5


def test_every_image_and_draw_has_an_order_and_label_of_its_own():
    data, _, process, models = gaussian((1, 2, 3), 50)
    seen = []

    def conditional(tokens, permutation, start, stop, labels):
        seen.append((tokens, permutation, labels))
        return models[False](tokens, permutation, start, stop)

    mar.chain_rule_bound(conditional, process, data, range(7), draws=2, labels=torch.arange(50), chunk=20)
    assert [len(o) for _, o, _ in seen[::6]] == [20, 20, 10] * 2
    drawn = torch.cat([o for _, o, _ in seen[::6]])
    assert torch.equal(drawn.sort(1).values, torch.arange(6).expand(100, -1)) and len(drawn.unique(dim=0)) > 80
    assert torch.cat([labels for *_, labels in seen[::6]]).tolist() == [*range(50)] * 2
    assert all(torch.equal(a[1], b[1]) for a, b in itertools.pairwise(seen[:6]))


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_with_exact_conditionals_recovers_the_gaussian(kind, generator, monkeypatch):
    _, _, process, models = gaussian((1, 2, 3), 2)
    torch.manual_seed(0)
    network = mar.Network(kind, (1, 2, 3), 1, **SMALL)
    model = mar.Autoregressor(network, IndependentGaussian(process.basis, process.prior))
    exact = models[False]
    monkeypatch.setattr(
        model, "conditional", lambda tokens, permutation, a, b, *_: exact(tokens.double(), permutation, a, b)
    )
    images, _ = mar.generate(model, process.schedule, 12_000, generator, head_steps=40, method="heun")
    found = images.double().flatten(1)
    torch.testing.assert_close(found.mean(0), cases.MEAN, atol=0.12, rtol=0)
    error = (found.T.cov() - cases.COVARIANCE).abs().max() / cases.COVARIANCE.abs().max()
    assert error < 0.06
    if kind == "masked":  # all at once: the right marginals, and nothing else
        images, _ = mar.generate(model, process.schedule, 12_000, generator, 1, 40, "heun")
        correlation = images.double().flatten(1).T.corrcoef()
        assert (correlation - torch.eye(6)).abs().max() < 0.06


# Who sees what


def influence(model, permutation, start, stop, labels=None):
    """d z / d token, its largest absolute value for each place of z and of the permutation: (stop - start, L)."""
    tokens = tokens_of(model, 1)
    labels = torch.tensor([1]) if labels is None else labels
    jacobian = torch.autograd.functional.jacobian(
        lambda x: model.network.trunk(x, permutation, start, stop, labels)[0].sum(-1) ** 2, tokens
    )
    return jacobian[:, 0].abs().amax(-1)[:, permutation[0]]


@pytest.mark.parametrize("kind", ["raster", "random"])
def test_a_causal_trunk_sees_what_is_before_and_nothing_else(kind):
    model = build(kind, depth=2)
    permutation = torch.arange(6)[None] if kind == "raster" else orders(1)
    seen = influence(model, permutation, 0, 6) > 0
    assert torch.equal(seen, torch.ones(6, 6).tril(-1).bool())
    assert torch.equal(influence(model, permutation, 2, 4) > 0, seen[2:4])


@pytest.mark.parametrize("start", [0, 1, 4])
def test_a_masked_trunk_sees_what_is_known_and_nothing_else(start):
    model, permutation = build("masked"), orders(1)
    seen = influence(model, permutation, start, 6) > 0
    assert torch.equal(seen, (torch.arange(6) < start).expand(6 - start, 6))


@pytest.mark.parametrize("kind", KINDS)
def test_so_does_the_model_of_a_token(kind):
    model, permutation = build(kind), orders(4)
    tokens, x, gamma = tokens_of(model, 4), cases.randn(8, 1, 2, 2).float(), torch.full((1, 1, 2, 2), -1.0)
    answer = model.conditional(tokens, permutation, 2, 4, LABELS[:4])(x, gamma)
    assert answer.shape == x.shape
    for k in range(6):
        changed = tokens.scatter(1, permutation[:, k, None, None].expand(-1, 1, 4), 9.0)
        same = model.conditional(changed, permutation, 2, 4, LABELS[:4])(x, gamma) == answer
        causal = kind != "masked"
        assert same.view(4, 2, 4).all(-1).all(0).tolist() == [k >= 2, k >= (3 if causal else 2)]


def test_a_causal_trunk_knows_where_it_goes_but_not_where_it_goes_after():
    trunk = build("random").network.trunk
    tokens, labels = cases.randn(1, 6, 4).float(), torch.tensor([0])
    z = trunk(tokens, torch.tensor([[3, 1, 4, 0, 2, 5]]), 0, 6, labels)
    later = trunk(tokens, torch.tensor([[3, 1, 4, 0, 5, 2]]), 0, 6, labels)
    assert torch.equal(z[:, :4], later[:, :4]) and (z[:, 4] - later[:, 4]).abs().max() > 1e-3


def test_a_masked_trunk_knows_no_order_and_places_all_it_asks_for():
    trunk = build("masked").network.trunk
    tokens, labels = cases.randn(1, 6, 4).float(), torch.tensor([0])
    z = trunk(tokens, torch.tensor([[3, 1, 4, 0, 2, 5]]), 3, 6, labels)
    turned = trunk(tokens, torch.tensor([[1, 4, 3, 5, 0, 2]]), 3, 6, labels)
    torch.testing.assert_close(turned, z[:, [2, 0, 1]])
    torch.testing.assert_close(trunk(tokens, torch.tensor([[3, 1, 4, 0, 2, 5]]), 3, 5, labels), z[:, :2])
    assert (z[:, 0] - z[:, 1]).abs().max() > 1e-3


PLACES = {"random": ["place", "target"], "masked": ["encoder_place", "decoder_place", "head_place"]}


@pytest.mark.parametrize("kind, name", [(kind, name) for kind in PLACES for name in PLACES[kind]])
def test_each_embedding_of_places_tells_them_on_its_own(kind, name):
    trunk, tokens = build(kind).network.trunk, torch.ones(1, 6, 4)

    def answer(permutation):
        return trunk(tokens, torch.tensor([permutation]), 3, 6, torch.tensor([0]))

    for other in set(PLACES[kind]) - {name}:
        nn.init.zeros_(getattr(trunk, other).weight)
    assert (answer([3, 1, 4, 0, 2, 5]) - answer([0, 2, 5, 3, 1, 4])).abs().max() > 1e-3
    nn.init.zeros_(getattr(trunk, name).weight)
    torch.testing.assert_close(answer([3, 1, 4, 0, 2, 5]), answer([0, 2, 5, 3, 1, 4]))


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_seen_and_none_is_one_more(kind):
    model, permutation = build(kind), orders(1)
    x, gamma = cases.randn(6, 1, 2, 2).float(), torch.zeros(1, 1, 2, 2)
    answers = [model.conditional(tokens_of(model, 1), permutation, 0, 6, torch.tensor([y]))(x, gamma) for y in range(4)]
    assert all((a - b).abs().max() > 1e-4 for a, b in itertools.combinations(answers, 2))
    assert torch.equal(model.conditional(tokens_of(model, 1), permutation, 0, 6)(x, gamma), answers[3])


@pytest.mark.parametrize("name, buffer, size", [("B", 64, 208), ("L", 64, 479), ("H", 64, 943)])
def test_published_sizes_have_the_published_number_of_parameters(name, buffer, size):
    width, depth, heads, head = {
        "B": (768, 12, 12, (6, 1024)), "L": (1024, 16, 16, (8, 1280)), "H": (1280, 20, 16, (12, 1536)),
    }[name]  # fmt: skip
    with torch.device("meta"):
        network = mar.Network("masked", (16, 16, 16), 1, 1000, width, depth, heads, buffer, head)
    assert network.count == 256
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(size, rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_model_answers_as_for_independent_normals(kind):
    model = build(kind, awake=False, pca=True)
    x, gamma = cases.randn(10, 1, 2, 2).float(), torch.linspace(-3, 3, 10)[:, None, None, None]
    answer = model.conditional(tokens_of(model), orders(5), 2, 4)(x, gamma)
    torch.testing.assert_close(answer, gaussian_eps(x, gamma.expand_as(x), model.prior.white_variance.float()))


def test_layers_of_an_untrained_head_change_nothing():
    x, y = cases.randn(3, 24).float(), cases.randn(3, 24, seed=1).float()
    assert all(torch.equal(layer(x, y), x) for layer in build("raster", awake=False).network.head.layers)


# Steps and caches


@pytest.mark.parametrize("kind", ["raster", "random"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_with_its_cache_a_trunk_says_the_same(kind, guidance):
    model, permutation = build(kind, depth=2), orders(3)
    tokens, cache = tokens_of(model, 3), model.network.trunk.cache()
    for k in range(6):
        x, gamma = cases.randn(3, 1, 2, 2, seed=k).float(), torch.full((1, 1, 2, 2), -1.0)
        known = tokens.scatter(1, permutation[:, k:, None].expand(-1, -1, 4), 0.0)  # the rest isn't there yet
        cached = model.conditional(known, permutation, k, k + 1, LABELS[:3], guidance, cache)(x, gamma)
        whole = model.conditional(tokens, permutation, k, k + 1, LABELS[:3], guidance)(x, gamma)
        torch.testing.assert_close(cached, whole, atol=1e-5, rtol=1e-5)


def test_the_cache_saves_most_of_the_work(monkeypatch):
    torch.manual_seed(0)
    model, rows, flops, drawn = fresh("raster", cases.randn(4, 1, 28, 28).float(), 4, **SMALL).eval(), [], [], []
    for block in model.network.trunk.blocks:
        block.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    for cached in (True, False):
        if not cached:
            monkeypatch.setattr(model.network.trunk, "cache", lambda: None)
        with FlopCounterMode(display=False) as counter:
            images, _ = mar.generate(model, cosine(model), 2, torch.Generator().manual_seed(0), head_steps=1)
        drawn.append(images)
        flops.append(sum(counter.get_flop_counts()["Causal"].values()))
    torch.testing.assert_close(*drawn, atol=1e-4, rtol=1e-4)
    assert rows == [1] * 49 * 2 + [k for k in range(1, 50) for _ in range(2)]
    assert flops[1] > 10 * flops[0]


@pytest.mark.parametrize("kind", ["raster", "random"])
def test_a_causal_trunk_answers_one_by_one_as_all_at_once(kind):
    model, permutation, tokens = build(kind, depth=2), orders(3), tokens_of(build(kind), 3)
    together = model.network.trunk(tokens, permutation, 0, 6, LABELS[:3])
    for k in range(6):
        torch.testing.assert_close(model.network.trunk(tokens, permutation, k, k + 1, LABELS[:3])[:, 0], together[:, k])


@given(st.integers(1, 300), st.data())
def test_unmasking_takes_each_token_once_in_steps_that_grow(count, data):
    steps = data.draw(st.integers(1, count))
    cuts = mar.unmasking(count, steps)
    assert len(cuts) == steps + 1 and (cuts[0], cuts[-1]) == (0, count)
    sizes = [b - a for a, b in itertools.pairwise(cuts)]
    assert min(sizes) >= 1
    for s, cut in enumerate(cuts):
        assert cut >= count - math.floor(count * math.cos(math.pi / 2 * s / steps) + 1e-9)
    if steps <= count // 8:
        assert cuts == [count - math.floor(count * math.cos(math.pi / 2 * (s / steps))) for s in range(steps + 1)]


def test_unmasking_of_the_published_size():
    assert mar.unmasking(256, 64)[:6] == [0, 1, 2, 3, 4, 5] and mar.unmasking(256, 64)[-2] == 256 - 6
    assert mar.unmasking(256, 8) == [0, 5, 20, 44, 75, 114, 159, 207, 256]
    assert mar.unmasking(49, 49) == list(range(50))


@pytest.mark.parametrize("kind, steps", [("raster", None), ("random", 6), ("masked", None), ("masked", 3)])
def test_generation_asks_for_every_token_once_and_puts_it_in_its_place(kind, steps, generator, monkeypatch):
    model, asked = build(kind), []

    def constant(given, process, n, *args, **kwargs):
        """Tokens that say when they were drawn."""
        white = torch.full((n, 1, 2, 2), float(len(asked)), dtype=torch.float64)
        return replace(real(given, process, n, *args, **kwargs), white=white)

    def given(tokens, permutation, start, stop, *args):
        known = tokens.take_along_dim(permutation[..., None], 1)[..., 0]
        assert (known[:, start:] == 0).all() and (known[:, :start] > 0).all()
        asked.append((permutation, start, stop))
        return inner(tokens, permutation, start, stop, *args)

    real, inner = samplers.sample, model.conditional
    monkeypatch.setattr(samplers, "sample", constant)
    monkeypatch.setattr(model, "conditional", given)
    images, permutation = mar.generate(model, cosine(model), 5, generator, steps, 2)
    assert images.shape == (5, *SHAPE) and images.dtype == torch.float32
    cuts = list(itertools.pairwise([0, 1, 3, 6] if steps == 3 else range(7)))
    assert [(a, b) for _, a, b in asked] == cuts and all(torch.equal(o, permutation) for o, *_ in asked)
    assert torch.equal(permutation.sort(1).values, torch.arange(6).expand(5, -1))
    assert (permutation == torch.arange(6)).all() == (kind == "raster")
    when = torch.tensor([i + 1.0 for i, (a, b) in enumerate(cuts) for _ in range(a, b)])
    tokens = model.tokens(images).take_along_dim(permutation[..., None], 1)
    torch.testing.assert_close(tokens, when[None, :, None].expand_as(tokens), atol=1e-4, rtol=1e-4)


# Guidance and temperature


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_is_a_line_through_both_predictions(kind):
    model, permutation = build(kind), orders(4)
    tokens, x, gamma = tokens_of(model, 4), cases.randn(4, 1, 2, 2).float(), torch.full((1, 1, 2, 2), -1.0)
    by = {w: model.conditional(tokens, permutation, 3, 4, LABELS[:4], w)(x, gamma) for w in (0.0, 1.0, 3.0)}
    without = model.conditional(tokens, permutation, 3, 4)(x, gamma)
    torch.testing.assert_close(by[0.0], without)
    torch.testing.assert_close(by[3.0], without + 3 * (by[1.0] - without), atol=1e-5, rtol=1e-5)
    assert (by[3.0] - by[1.0]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_of_one_is_none_exactly_and_costs_nothing(kind):
    model, rows = build(kind), []
    model.network.head.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    options = dict(n=4, head_steps=3, labels=LABELS[:4])
    plain, one, two = (
        mar.generate(model, cosine(model), generator=torch.Generator().manual_seed(5), **options, **more)[0]
        for more in ({}, {"guidance": 1.0}, {"guidance": 2.0})
    )
    assert torch.equal(plain, one) and not torch.equal(plain, two)
    assert len(rows) == 6 * 3 * (1 + 1 + 2)


@pytest.mark.parametrize("kind, steps", [("masked", 3), ("random", 6)])
def test_guidance_grows_with_what_is_known(kind, steps, generator, monkeypatch):
    model, seen = build(kind), []
    inner = model.conditional
    monkeypatch.setattr(model, "conditional", lambda *args: seen.append(args[5]) or inner(*args))
    options = dict(n=2, generator=generator, steps=steps, head_steps=1, labels=LABELS[:2], guidance=4.0)
    mar.generate(model, cosine(model), **options)
    assert seen == pytest.approx([1.5, 2.5, 4] if steps == 3 else [1.5, 2, 2.5, 3, 3.5, 4])


@pytest.mark.parametrize("kind, steps", [("raster", 6), ("masked", 3)])
def test_tokens_may_have_steps_of_their_own(kind, steps, monkeypatch):
    model, calls, plain = build(kind), [], samplers.sample
    monkeypatch.setattr(samplers, "sample", lambda *a, **k: calls.append(a[3]) or plain(*a, **k))
    draw = functools.partial(mar.generate, model, cosine(model), 3, steps=steps)
    same, each = (draw(torch.Generator().manual_seed(4), head_steps=k)[0] for k in (4, [4] * steps))
    assert torch.equal(same, each)
    fewer = list(range(2 + steps, 2, -1))
    calls.clear()
    draw(torch.Generator().manual_seed(4), head_steps=fewer)
    assert calls == fewer


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_temperature_scales_the_noise_of_the_steps_and_not_the_start(temperature, generator):
    """For standard normal data every step is linear, and the variance of the samples a recursion."""
    _, _, process, _ = gaussian((1, 2, 3), 2)
    grid = process.schedule.gamma(torch.linspace(1, 0, 9, dtype=torch.float64))[:, 0, 0, 0]
    variance = torch.ones(())
    for now, then in itertools.pairwise(grid):
        moved = -torch.expm1(then - now)
        mean = alpha(then) / alpha(now) * (1 - sigma(now) ** 2 * moved)
        variance = mean**2 * variance + (temperature * sigma(then)) ** 2 * moved
    found = samplers.sample(
        lambda x, gamma: sigma(gamma) * x, process, 40_000, 8, "ancestral", generator, temperature=temperature
    )
    assert found.white.var().item() == pytest.approx(variance.item(), rel=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_cold_tokens_vary_less_and_one_is_the_default(kind):
    model = build(kind, awake=False)
    default, *by = (
        mar.generate(model, cosine(model), 300, torch.Generator().manual_seed(1), head_steps=8, **more)[0]
        for more in ({}, {"temperature": 1.0}, {"temperature": 0.5}, {"temperature": 0.0})
    )
    assert torch.equal(default, by[0])
    spread = [model.tokens(images).std().item() for images in by]
    assert spread[0] > spread[1] + 0.05 > spread[2] + 0.1


# Training


def trainer(kind="masked", config=QUICK, checkpoint=None, seed=0, awake=False, labels=LABELS, line=None, **options):
    model = build(kind, seed, awake, **options)
    model.train()
    labels = labels if model.network.classes else None
    return mar.MarTrainer(model, pictures(), labels, line or cosine(model), config, checkpoint)


class Spy(nn.Module):
    """Stands in for the network, answers nothing, and keeps what it was told."""

    def forward(self, images, gamma, *context):
        self.gamma, self.context = gamma, context
        return torch.zeros_like(gamma)


def spied(kind, config):
    t = trainer(kind, config)
    t.denoiser.network = Spy()
    return t


def watched(kind, config, monkeypatch, index=0):
    """One batch of the loss: trainer, loss, error, and what was noised: (white, gamma, eps)."""
    t, noised, inner = spied(kind, config), [], mar_training.diffuse
    monkeypatch.setattr(mar_training, "diffuse", lambda *args: noised.append(args) or inner(*args))
    return t, *t.loss(index), *noised[0]


def contexts(kind, config, batches):
    """What the network is told of several batches, apart from what it is to denoise."""
    t = spied(kind, config)
    for index in range(batches):
        t.loss(index)
        yield t.denoiser.network.context


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_noises_each_unknown_token_several_times(kind, monkeypatch):
    config = replace(QUICK, batch=32, repeats=3, masking=(0.0, 10.0))
    t, loss, error, white, gamma, eps = watched(kind, config, monkeypatch, 2)
    tokens, permutation, start, labels, repeats = t.denoiser.network.context
    assert start == (3 if kind == "masked" else 0) and repeats == 3 and tokens.shape == (32, 6, 4)
    assert torch.equal(permutation.sort(1).values, torch.arange(6).expand(32, -1))
    assert (permutation == torch.arange(6)).all() == (kind == "raster")
    asked = tokens.take_along_dim(permutation[:, start:, None], 1)
    assert torch.equal(white.view(32, 6 - start, 3, 4), asked[:, :, None].expand(-1, -1, 3, -1))
    known = t.model.tokens(scale(pictures())).flatten(1)
    nearest = torch.cdist(tokens.flatten(1), known).min(1)
    assert nearest.values.max() < 0.2  # every one is a picture, dequantised ...
    assert torch.equal(LABELS[nearest.indices][labels < 3], labels[labels < 3])  # ... with its label
    times = torch.linspace(0, 1, 4001, dtype=torch.float64)
    levels = t.schedule.gamma(times)[:, 0, 0, 0]
    share = torch.searchsorted(levels, gamma[:, 0, 0, 0].double()) / 4000
    assert abs(share.mean() - 0.5) < 0.02 and abs(share.std() - 12**-0.5) < 0.02
    by_image = share.view(32, -1).mean(1)
    assert by_image.std() < 3 * 12**-0.5 / by_image.numel() ** 0.5 and by_image.std() > 0.01  # not one time an image
    assert abs(eps.mean()) < 0.1 and abs(eps.std() - 1) < 0.05 and len(eps.unique()) > 0.99 * eps.numel()
    c = t.model.prior.white_variance
    torch.testing.assert_close(error, (eps - gaussian_eps(diffuse(white, gamma, eps), gamma, c)).square())
    torch.testing.assert_close(loss, error.mean())


def test_likelihood_weights_are_the_slopes_of_gamma(monkeypatch):
    for weighting in training.WEIGHTINGS:
        t, loss, error, _, gamma, _ = watched("raster", replace(QUICK, weighting=weighting), monkeypatch)
        times = torch.linspace(0, 1, 20_001, dtype=torch.float64)
        levels, slopes = (f(times)[:, 0, 0, 0] for f in (t.schedule.gamma, t.schedule.dgamma_dt))
        slope = slopes[torch.searchsorted(levels, gamma[:, 0, 0, 0].double())].float()[:, None, None, None]
        weight = torch.ones_like(slope) if weighting == "plain" else slope / slope.mean()
        if weighting == "answer":
            weight = weight * (1 + (4 - (gamma - 4).abs()).exp() / t.model.prior.log_variance.exp())
        torch.testing.assert_close(loss, (weight * error).mean(), rtol=2e-3, atol=0)


def test_labels_are_withheld_as_often_as_asked():
    for drop in (0.0, 0.1, 1.0):
        withheld = torch.cat([c[3] == 3 for c in contexts("raster", replace(QUICK, batch=64, drop=drop), 8)])
        assert withheld.double().mean().item() == pytest.approx(drop, abs=0.05) and (drop > 0 or not withheld.any())


def test_one_ratio_masks_a_batch_and_varies_between_batches():
    starts = [c[2] for c in contexts("masked", replace(QUICK, masking=(0.0, 10.0)), 60)]
    assert set(starts) == set(range(6))
    assert [starts.count(k) for k in range(6)] == pytest.approx([10] * 6, abs=9)
    published = [c[2] for c in contexts("masked", QUICK, 20)]
    assert set(published) == {0, 1}  # 0.7 of 6 is more than 4


@pytest.mark.parametrize("lowest, spread", [(0.7, 0.25), (0.0, 0.25), (0.2, 1.0)])
def test_mask_ratios_are_truncated_normal(lowest, spread, generator):
    drawn = torch.tensor([mar.mask_ratio(lowest, spread, generator) for _ in range(5000)], dtype=torch.float64)
    assert drawn.min() >= lowest and drawn.max() <= 1
    grid = torch.linspace(lowest, 1, 100_001, dtype=torch.float64)
    density = torch.exp(-0.5 * ((grid - 1) / spread) ** 2)
    mean = (density * grid).sum() / density.sum()
    std = ((density * (grid - mean) ** 2).sum() / density.sum()).sqrt()
    assert abs(drawn.mean() - mean) < 4 * std / 5000**0.5 and abs(drawn.std() / std - 1) < 0.05


def test_a_wide_spread_is_uniform_and_the_published_one_leaves_little_for_many_known_tokens(generator):
    wide = torch.tensor([mar.mask_ratio(0.0, 10.0, generator) for _ in range(5000)])
    assert torch.histc(wide, 10, 0, 1) / 5000 == pytest.approx([0.1] * 10, abs=0.02)
    narrow = torch.tensor([mar.mask_ratio(0.0, 0.25, generator) for _ in range(5000)])
    assert (narrow < 0.36).double().mean().item() == pytest.approx(0.01, abs=0.006)


def copies(n=512):
    """One random token six times, and a little noise."""
    generator = torch.Generator().manual_seed(1)
    token = torch.randint(20, 236, (n, 1, 2, 2), generator=generator).repeat(1, 1, 3, 2)
    return (token + torch.randint(-3, 4, (n, *SHAPE), generator=generator)).to(torch.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_training_learns_and_context_helps(kind):
    config = mar.MarTrainingConfig(steps=100, batch=32, warmup=10, lr=5e-3, repeats=2, ema=0.9, masking=(0.0, 10.0))
    t = trainer(kind, config, dropout=0.0, classes=0)
    t.images = copies()
    with torch.no_grad():
        before = sum(t.loss(10_000 + i)[0].item() for i in range(10))
    records = list(t.run())
    assert [r.step for r in records] == list(range(1, 101)) and records[0].by_group.shape == (4,)
    model = t.averaged()
    with torch.no_grad():
        after = sum(t.loss(10_000 + i)[0].item() for i in range(10))
    assert after < 0.9 * before and not model.training
    cuts = range(7) if kind == "masked" else [0, 6]
    data, process = scale(copies(128)), model.process(cosine(model))
    curve = mar.chain_rule_bound(model.conditional, process, data, cuts, kind == "raster", draws=2).curve
    assert curve[1:].mean() < curve[0] - 0.2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [3, 4])
def test_a_stopped_run_goes_on_bit_for_bit_as_if_it_had_not_been(kind, stop, tmp_path):
    whole = trainer(kind)
    losses = [r.loss for r in whole.run()]
    for record in trainer(kind, checkpoint=tmp_path / "c").run():
        if record.step == stop:
            break
    torch.manual_seed(99)
    again = trainer(kind, checkpoint=tmp_path / "c", seed=5)
    resumed = again.step
    assert resumed == stop
    assert [r.loss for r in again.run()] == losses[resumed:]
    for one, two in ((again.plain, whole.plain), (again.averaged(), whole.averaged())):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_dropout_is_the_steps_own_and_leaves_the_global_stream_alone():
    t, still = trainer(awake=True), trainer(awake=True, dropout=0.0)
    state = torch.get_rng_state()
    first, again, next_ = (t.loss(i)[0].item() for i in (0, 0, 1))
    assert first == again != next_ and first != still.loss(0)[0].item()
    assert torch.equal(torch.get_rng_state(), state)
    t.plain.eval()
    assert t.loss(0)[0].item() == still.loss(0)[0].item()


def test_the_average_and_not_the_last_weights_are_handed_out():
    t = trainer(config=replace(QUICK, lr=1e-2, ema=0.9))
    list(t.run())
    pairs = zip(t.averaged().network.parameters(), t.plain.parameters(), strict=True)
    assert max((a - b).abs().max() for a, b in pairs) > 1e-4


@pytest.mark.usefixtures("unchecked")
def test_a_checkpoint_of_another_kind_or_setting_is_refused(tmp_path):
    file = tmp_path / "c.safetensors"
    trainer("masked", checkpoint=file).save(file)
    for other, name in (
        (dict(kind="random"), "network.kind"),
        (dict(config=replace(QUICK, repeats=1)), "config.repeats"),
        (dict(config=replace(QUICK, drop=0.2)), "config.drop"),
        (dict(config=replace(QUICK, masking=(0.7, 0.3))), "config.masking"),
    ):
        with pytest.raises(ValueError, match=rf"c.safetensors belongs to another run, which had {name} = "):
            trainer(**other, checkpoint=file)
    with pytest.raises(ValueError, match="had labels = "):
        trainer("masked", checkpoint=file, labels=2 - LABELS)
    with pytest.raises(ValueError, match="had schedule.gamma = "):
        trainer("masked", checkpoint=file, line=schedules.linear((1, 2, 2), -3.0, 3.0))
    with pytest.raises(ValueError, match="state of a training run"):
        mar.load(file)


# The recipes of the shipped models


spec = importlib.util.spec_from_file_location("models_script", files.DATA / "models.py")
recipes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipes)


def test_recipes_of_models_of_patches_share_their_noise(tmp_path):
    train = load_set("fashion_mnist", "train")
    images, labels = train.images[:300], train.labels[:300]
    settings = recipes.MAR["fashion_mar_raster"] | {"steps": 1, "batch": 2, "warmup": 1}
    model = recipes.token_by_token("masked", images, labels, tmp_path / "m.safetensors", settings)
    shipped = mar.load(files.CHECKPOINTS / "fashion_mar_masked.safetensors")
    assert model.network.config == shipped.network.config
    assert model.reference.weight.shape == shipped.reference.weight.shape
    assert (tmp_path / "m.state").is_file()
    gud, stored = recipes.transformer(images), GUD.load(files.CHECKPOINTS / "fashion_gud.safetensors", "cpu")
    assert gud.denoiser.network.config == stored.denoiser.network.config
    assert gud.recommended == stored.recommended and gud.family.finest == pytest.approx(stored.family.finest)
    assert model.prior.mean[0, 0, 0] == gud.denoiser.prior.mean[0, 0, 0]
    small, kept = recipes.causal(images), GUD.load(files.CHECKPOINTS / "fashion_causal.safetensors", "cpu")
    configs = [each.denoiser.network.config for each in (small, kept)]
    assert [config.pop("between") for config in configs] == [
        pytest.approx([float(x) for x in (m.family.low.min(), m.family.high.max())], abs=1e-3) for m in (small, kept)
    ]
    assert configs[0] == configs[1] and small.denoiser.reference.name == kept.denoiser.reference.name


# Files


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pca", [False, True])
def test_a_saved_model_says_the_same(kind, pca, tmp_path):
    model = build(kind, pca=pca)
    mar.save(model, tmp_path / "m.safetensors", card={"seconds": 3})
    again = mar.load(tmp_path / "m.safetensors")
    assert denoiser.card(tmp_path / "m.safetensors") == {"seconds": 3} and not again.training
    images, permutation, x = scale(pictures(3)), orders(3), cases.randn(6, 1, 2, 2).float()
    answers = [
        m.conditional(m.tokens(images), permutation, 2, 4, LABELS[:3])(x, torch.zeros(1, 1, 2, 2))
        for m in (model, again)
    ]
    assert torch.equal(*answers)
    assert again.network.config == model.network.config and torch.equal(model.tokens(images), again.tokens(images))


def with_histograms(kind, pixels=None, **options):
    """A small model around the grey levels of each pixel."""
    model, pixels = build(kind, **options), pictures() if pixels is None else pixels
    return mar.Autoregressor(model.network, PatchHistograms.fit(model.basis, model.prior, pixels))


@pytest.mark.parametrize("kind", KINDS)
def test_untrained_it_is_the_histograms_of_its_places(kind, tmp_path):
    """In every order and however many tokens at a time, the bound is the pixels' own code length."""
    generator = torch.Generator().manual_seed(0)
    bright = torch.arange(24).view(SHAPE) * 8 + torch.randint(0, 30, (500, *SHAPE), generator=generator)
    pixels = bright.to(torch.uint8)
    model = with_histograms(kind, pixels, awake=False)
    mar.save(model, tmp_path / "m", half=True)
    again = mar.load(tmp_path / "m")
    assert isinstance(again.reference, PatchHistograms)
    mar.save(model, tmp_path / "whole")
    assert (tmp_path / "whole").stat().st_size - (tmp_path / "m").stat().st_size > 2 * model.reference.weight.numel()
    x, places = scale(pixels[:100]), torch.arange(6).repeat(100)
    exact = again.reference.at(places).nll(mar.patchify(x, 2).reshape(-1, 1, 2, 2)).view(100, 6)
    token = schedules.linear((1, 2, 2), 2 * math.log(0.25 / 127.5) - 2 * float(model.prior.scale[0, 0, 0].log()), 9.0)
    cuts = [0, 2, 6] if kind == "masked" else [0, 6]
    found = mar.chain_rule_bound(
        again.conditional, again.process(token), x, cuts, kind == "raster", draws=4, decoder="discrete"
    )
    assert found.bits == pytest.approx(
        float(exact.sum(1).mean()) / (24 * math.log(2)), abs=4 * found.probe_error + 0.01
    )


def test_training_tells_the_reference_where_tokens_are(monkeypatch):
    t, seen = trainer("random", replace(QUICK, discrete=True)), []
    t.denoiser.reference = PatchHistograms.fit(t.model.basis, t.model.prior, pictures())
    at = PatchHistograms.at
    monkeypatch.setattr(PatchHistograms, "at", lambda self, places: seen.append(places) or at(self, places))
    t.denoiser.network = Spy()
    t.loss(0)
    _, permutation, start, _, repeats = t.denoiser.network.context
    assert torch.equal(seen[0].view(-1, 6 - start, repeats), permutation[:, start:, None].expand(-1, -1, repeats))


def test_guidance_and_averages_keep_the_places():
    """With g the head is asked twice; both answers are around the histograms of the same places."""
    model, x = with_histograms("masked", awake=False), cases.randn(6, 1, 2, 2).float()
    tokens, permutation = model.tokens(scale(pictures(3))), orders(3)
    guided = model.conditional(tokens, permutation, 2, 4, LABELS[:3], guidance=2.0)(x, torch.zeros(1, 1, 2, 2))
    plain = model.reference.at(permutation[:, 2:4].flatten())(x, torch.zeros(1, 1, 2, 2))
    torch.testing.assert_close(guided, plain)
    config = replace(QUICK, discrete=True)
    t = mar.MarTrainer(model.train(), pictures(), LABELS, cosine(model), config)
    assert t.averaged().reference is model.reference


@pytest.mark.usefixtures("unchecked")
def test_references_of_other_patches_are_refused():
    model, histograms = build("raster"), with_histograms("raster").reference
    other = bases.Pixel((1, 1, 1))
    one = priors.isotropic(priors.Moments(torch.zeros(1, 1, 1), torch.ones(1, 1, 1)), 1.0)
    with pytest.raises(ValueError, match=r"reference must be of patches \(1, 2, 2\).*got \(1, 1, 1\)"):
        mar.Autoregressor(model.network, IndependentGaussian(other, one))
    few = PatchHistograms(histograms.basis, histograms.prior, histograms.weight[:5])
    with pytest.raises(ValueError, match="the network's 6 patches; got 5"):
        mar.Autoregressor(model.network, few)


def test_a_half_saved_model_is_half_as_big_and_nearly_the_same(tmp_path):
    model = build("masked", width=64)
    for half in (False, True):
        mar.save(model, tmp_path / f"{half}", half=half)
    assert (tmp_path / "True").stat().st_size < 0.55 * (tmp_path / "False").stat().st_size
    for name, value in mar.load(tmp_path / "True").state_dict().items():
        exact = model.state_dict()[name]
        torch.testing.assert_close(value, exact, atol=1e-3 if name.startswith("network") else 0, rtol=1e-3)
        assert value.dtype == exact.dtype


@pytest.mark.usefixtures("unchecked")
def test_files_of_the_other_sort_are_refused(tmp_path):
    mar.save(build("masked"), tmp_path / "m")
    with pytest.raises(ValueError, match="of kind 'masked'; use gudlib.mar.load"):
        denoiser.load(tmp_path / "m")
    basis = bases.DCT((1, 4, 4))
    prior = priors.whitened(priors.measure(basis, cases.randn(9, 1, 4, 4)))
    plain = denoiser.build(basis, prior, groups=2, width=8, multipliers=(1,))
    denoiser.save(plain, tmp_path / "d")
    with pytest.raises(ValueError, match="d holds a network of kind 'unet'; use denoiser.load"):
        mar.load(tmp_path / "d")


# Errors

REFUSED = {
    "size of a patch must divide height 6 and width 4; got 3": lambda: fresh("raster", scale(pictures()), 3),
    "got 0": lambda: mar.patchify(scale(pictures()), 0),
    "kind must be one of .*got 'causal'": lambda: build("causal"),
    "width must be a multiple of heads, 3; got 16": lambda: build("masked", heads=3),
    "steps must lie between 1 and 6; got 7": lambda: sampled(steps=7),
    "steps must lie between 1 and 6; got 0": lambda: sampled(steps=0),
    "head_steps must be one number, or 6, one for each step; got 2": lambda: sampled("random", head_steps=[3, 4]),
    "a random model draws one token a step, steps = 6; got 3": lambda: sampled("random", steps=3),
    "guidance = 2.0 needs labels": lambda: sampled(guidance=2.0),
    "labels must be 2 integers, 0 to 2; got torch.int64 of shape .2,., 0 to 3": lambda: sampled(labels=LABELS[:2] * 3),
    "of shape .3,.": lambda: sampled(labels=torch.tensor([0, 1, 2])),
    "got torch.float32": lambda: sampled(labels=torch.tensor([0.0, 1.0])),
    ", -1 to 1": lambda: sampled(labels=torch.tensor([-1, 1])),
    "repeats must be at least 1; got 0": lambda: mar.MarTrainingConfig(repeats=0),
    "drop must be a finite number between 0 and 1; got 1.5": lambda: mar.MarTrainingConfig(drop=1.5),
    "masking's lowest ratio must be .*; got 1.0": lambda: mar.MarTrainingConfig(masking=(1.0, 0.25)),
    "masking's spread must be a finite number above 0; got 0": lambda: mar.MarTrainingConfig(masking=(0.7, 0)),
    "batch must be at least 1; got 0": lambda: mar.MarTrainingConfig(batch=0),
    "labels must be given .* it has 3": lambda: mar.MarTrainer(build("raster"), pictures(), None, LINE, QUICK),
    "labels must be given .* it has 0": lambda: mar.MarTrainer(
        build("raster", classes=0), pictures(), LABELS, LINE, QUICK
    ),
    r"labels must be int64 of shape \(64,\)": lambda: mar.MarTrainer(
        build("raster"), pictures(), LABELS[1:], LINE, QUICK
    ),
    r"uint8 of shape \(n, 1, 6, 4\); got torch.uint8 of shape \(64, 1, 6, 2\)": lambda: mar.MarTrainer(
        build("raster", classes=0), pictures()[..., :2], None, LINE, QUICK
    ),
    r"cuts must rise from 0 to the number of tokens, 6; got \[0, 3, 3, 6\]": lambda: bounded([0, 3, 3, 6]),
    r"got \[1, 6\]": lambda: bounded([1, 6]),
    r"got \[0, 5\]": lambda: bounded([0, 5]),
}  # fmt: skip


def sampled(kind="masked", **options):
    model = build(kind)
    return mar.generate(model, cosine(model), 2, torch.Generator(), **options)


def bounded(cuts):
    data, _, process, models = gaussian((1, 2, 3), 2)
    return mar.chain_rule_bound(models[False], process, data, cuts)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("message", REFUSED)
def test_what_makes_no_sense_is_refused(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()
