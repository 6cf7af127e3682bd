"""Training: the loss is what it says, and a run that is stopped, or killed, ends as if it had not been."""

import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import cases
import pytest
import torch
from torch import nn

from gudlib import bases, data, denoiser, families, networks, priors, schedules, training
from gudlib.denoiser import Denoiser
from gudlib.exact import gaussian_eps
from gudlib.references import IndependentGaussian
from gudlib.training import Trainer, TrainingConfig

SHAPE = (1, 8, 8)
QUICK = TrainingConfig(steps=6, batch=8, warmup=3, save_every=2)
RANGE = (0.4, 1.6)


def pictures(n=64):
    """One pattern or its negative, and a little noise: a single bit, far from Gaussian."""
    generator = torch.Generator().manual_seed(1)
    pattern = torch.randint(0, 2, SHAPE, generator=generator) * 2 - 1
    sign = torch.randint(0, 2, (n, 1, 1, 1), generator=generator) * 2 - 1
    return (128 + 60 * sign * pattern + torch.randint(-20, 20, (n, *SHAPE), generator=generator)).to(torch.uint8)


def components(r=0.6, floor=1e-4):
    values = (pictures().double() + 0.5) / 128 - 1
    basis = bases.DCT(SHAPE)
    return basis, priors.interpolated(priors.measure(basis, values, floor), r)


def schedule_of(prior):
    order, log_variance = prior.order, prior.log_variance
    return lambda a: schedules.soft_conditioning(order, a, log_variance)


def trainer(config=QUICK, checkpoint=None, kind="unet", images=None, seed=0, a=RANGE, **options):
    torch.manual_seed(seed)
    basis, prior = components()
    if kind == "unet":
        model = denoiser.build(basis, prior, **(dict(groups=4, width=8) | options))
    else:
        mlp = cases.MLP(SHAPE, inputs=2, **(dict(width=32, depth=1) | options))
        model = Denoiser(mlp, IndependentGaussian(basis.float(), prior.float()))
    draw = families.SoftConditioning(prior, a, gamma_min_target=-7.0)
    return Trainer(model, pictures() if images is None else images, draw, config, checkpoint)


def state(t):
    tensors = {f"network.{k}": v.clone() for k, v in t.plain.state_dict().items()}
    tensors |= {f"average.{k}": v.clone() for k, v in t.average.state_dict().items()}
    for i, s in t.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v.clone() for k, v in s.items()}
    return tensors


def assert_same(one, other):
    one, other = state(one), state(other)
    assert one.keys() == other.keys()
    assert [k for k in one if not torch.equal(one[k], other[k])] == []


# Times


@pytest.mark.parametrize("n", [1, 7, 64])
def test_times_are_one_regular_grid_with_a_random_shift(n, generator):
    t = families.stratified_times(n, generator)
    assert t.dtype == torch.float64 and (t >= 0).all() and (t < 1).all()
    assert torch.equal((t * n).floor().sort().values, torch.arange(n, dtype=torch.float64))  # one in each n-th
    torch.testing.assert_close((t * n) % 1, ((t * n) % 1)[:1].expand(n), rtol=0, atol=1e-9)
    shifts = torch.stack([families.stratified_times(n, generator).min() for _ in range(300)]) * n
    assert abs(shifts.mean().item() - 0.5) < 0.06 and shifts.min() < 0.05 and shifts.max() > 0.95


# The loss


class Recorder(nn.Module):
    """Stands in for the denoiser: predicts 100 everywhere, so that errors give the noise away."""

    def __init__(self, model):
        super().__init__()
        self.basis, self.prior = model.basis, model.prior

    def forward(self, white_t, gamma):
        self.white_t, self.gamma = white_t, gamma
        return torch.full_like(white_t, 100.0)


def watched(config, a=RANGE):
    """One batch of the loss: (loss, error, chi_t, gamma, inverse softnesses, times, schedule)."""
    t = trainer(config, kind="mlp")
    schedule, seen = schedule_of(components()[1]), {}

    def draw(n, generator):
        u = families.stratified_times(n, generator)[torch.randperm(n, generator=generator)]
        seen["a"] = a[0] + (a[1] - a[0]) * u
        inner = schedule(seen["a"])

        def gamma(time):
            seen["t"] = time[..., 0, 0, 0]
            return inner.gamma(time[..., 0, 0, 0])

        seen["schedule"] = schedules.Schedule(gamma, SHAPE)
        return seen["schedule"]

    t.draw, t.denoiser = draw, Recorder(t.denoiser)
    loss, error = t.loss(0)
    return loss, error, t.denoiser.white_t, t.denoiser.gamma, seen["a"], seen["t"], seen["schedule"]


def test_the_loss_noises_real_images_to_the_levels_of_their_own_schedules():
    config = TrainingConfig(batch=64)
    loss, error, white_t, gamma, a, t, schedule = watched(config)
    torch.testing.assert_close(gamma, schedule.gamma(t).float())
    torch.testing.assert_close(loss, error.mean())
    eps = 100 - error.sqrt()
    assert abs(eps.mean()) < 0.05 and abs(eps.std() - 1) < 0.05
    clean = t < 0.2
    white = ((white_t - torch.sigmoid(gamma).sqrt() * eps) / torch.sigmoid(-gamma).sqrt())[clean]
    basis, prior = components()
    values = 128 * (basis.inverse(prior.unwhiten(white.double())) + 1)
    known = (values[:, None] - 0.5 - pictures().double()).abs().amax((2, 3, 4)).min(1).values
    assert clean.sum() >= 5 and known.max() < 0.51  # every one is a picture, dequantised


def test_inverse_softness_is_uniform_over_its_range_and_unrelated_to_time():
    *_, a, t, _ = watched(TrainingConfig(batch=256), (0.5, 2.5))
    assert a.min() >= 0.5 and a.max() < 2.5
    cells = ((a - 0.5) / 2 * 256).floor().sort().values
    assert torch.equal(cells, torch.arange(256, dtype=torch.float64))
    assert abs(torch.corrcoef(torch.stack([a, t]))[0, 1]) < 0.2
    assert torch.equal((t * 256).floor().sort().values, torch.arange(256, dtype=torch.float64))
    fixed = watched(TrainingConfig(batch=8), (1.0, 1.0))[4]
    assert (fixed == 1).all()


def test_likelihood_weights_are_the_slopes_of_gamma_over_their_mean():
    loss, error, _, _, _, t, schedule = watched(TrainingConfig(batch=16, weighting="likelihood"))
    slope = schedule.dgamma_dt(t).float()
    assert slope.std() > 0.1
    torch.testing.assert_close(loss, (slope / slope.mean() * error).mean(), rtol=1e-5, atol=0)
    plain = watched(TrainingConfig(batch=16))
    assert torch.equal(plain[1], error) and not torch.equal(plain[0], loss)


@pytest.mark.parametrize("end", [4.0, 6.0])
def test_answer_weights_count_errors_of_the_answer_alike(end):
    """With c = v and F the noise error over alpha sqrt(c / v): the same mean square for every noise level up to 4."""
    t = trainer(TrainingConfig(batch=64, weighting="answer"), kind="mlp")
    c, times = t.denoiser.prior.white_variance, families.stratified_times(64, torch.Generator().manual_seed(0))
    assert c.min() > 1e-2 * c.max()  # no floor
    schedule = schedules.linear(SHAPE, -9.0, end)
    gamma = schedule.gamma(times).float()
    alpha2, answer = torch.sigmoid(-gamma), cases.randn(64, *SHAPE).float()
    error = alpha2 * c / (alpha2 * c + 1 - alpha2) * answer.square()
    mirrored = (1 + (8 - gamma).exp() / c) / (1 + gamma.exp() / c)  # as far below 4 as gamma is above
    beyond = mirrored.where(gamma > 4, 1)
    assert (beyond < 0.9).any() == (end > 4)
    torch.testing.assert_close(t.weighted(error, schedule, times), (beyond * answer.square()).mean(), rtol=1e-4, atol=0)


def test_answer_weights_are_those_of_a_likelihood_too():
    loss, error, _, gamma, _, t, schedule = watched(TrainingConfig(batch=16, weighting="answer"))
    slope = schedule.dgamma_dt(t).float()
    c = components()[1].log_variance.exp().float()
    weight = slope / slope.mean() * (1 + torch.exp(4 - (gamma - 4).abs()) / c)
    torch.testing.assert_close(loss, (weight * error).mean(), rtol=1e-5, atol=0)


def test_components_that_never_change_weigh_no_more_than_the_floor():
    t = trainer(replace(QUICK, weighting="answer"), kind="mlp")
    t = Trainer(still(t.denoiser), pictures(), t.draw, t.config)
    assert t.denoiser.prior.white_variance.min() == 0
    assert all(math.isfinite(record.loss) for record in t.run())


def still(model):
    """The same denoiser, of data one component of which has no variance."""
    variance = model.prior.variance.clone()
    variance[0, 0, 0] = 0
    prior = priors.Prior(priors.Moments(model.prior.mean, variance, model.prior.floor), model.prior.scale)
    return Denoiser(model.network, IndependentGaussian(model.basis, prior))


# Images


def eight(image):
    """What the symmetries of the square make of an image, the first two those of the mirror."""
    turned = [image.rot90(k, (-2, -1)) for k in range(4)]
    return torch.stack([image, image.flip(-1), *turned[1:], *(x.flip(-1) for x in turned[1:])])


@pytest.mark.parametrize("symmetries, count", [("none", 1), ("mirror", 2), ("all", 8)])
def test_images_undergo_each_symmetry_as_often(symmetries, count):
    t = trainer(replace(QUICK, symmetries=symmetries, discrete=True), kind="mlp")
    which = torch.arange(64).repeat(40)
    found = t.data(which, torch.Generator().manual_seed(0)).unflatten(0, (40, 64))
    own = (data.scale(torch.stack([eight(x) for x in pictures()])) == found[:, :, None]).flatten(3).all(3)
    assert (own.sum(2) == 1).all() and not own[:, :, count:].any()
    share = own[:, :, :count].double().mean((0, 1))
    assert (share - 1 / count).abs().max() < 0.03
    for drawn in (own[0], own[:, 0]):  # from image to image, from use to use
        assert drawn.any(0)[:count].all()


def test_images_are_dequantised_or_the_grey_levels_themselves():
    which = torch.arange(64)
    dequantised = trainer(kind="mlp").data(which, torch.Generator().manual_seed(0))
    assert torch.equal(dequantised, data.dequantise(pictures(), torch.Generator().manual_seed(0)))
    discrete = trainer(replace(QUICK, discrete=True), kind="mlp").data(which, torch.Generator().manual_seed(0))
    torch.testing.assert_close(discrete, pictures().float() / 127.5 - 1, rtol=0, atol=0)


def test_the_loss_is_of_images_as_they_are_to_be_seen():
    config = TrainingConfig(batch=64, symmetries="all", discrete=True)
    _, error, white_t, gamma, _, t, _ = watched(config)
    eps, clean = 100 - error.sqrt(), t < 0.2
    white = ((white_t - torch.sigmoid(gamma).sqrt() * eps) / torch.sigmoid(-gamma).sqrt())[clean]
    basis, prior = components()
    grey = 127.5 * (basis.inverse(prior.unwhiten(white.double())) + 1)
    known = torch.cat([eight(x) for x in pictures()]).double()
    distance, which = (grey[:, None] - known).abs().amax((2, 3, 4)).min(1)
    assert clean.sum() >= 5 and distance.max() < 0.05 and len((which % 8).unique()) > 2


def test_every_step_and_seed_has_its_own_batch_and_always_the_same():
    t = trainer(kind="mlp")
    first, again, next_ = (t.loss(i)[1] for i in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, next_)
    assert not torch.equal(trainer(replace(QUICK, seed=1), kind="mlp").loss(0)[1], first)


def test_the_untrained_loss_is_the_closed_form():
    """A linear prediction errs by E (eps - eps_hat)^2 = alpha^2 c / v for data of variance c, Gaussian or not."""
    t = trainer(TrainingConfig(batch=512), kind="mlp")
    c = t.denoiser.prior.white_variance
    found, expected = [], []
    for index in range(20):
        seen = {}
        inner = families.SoftConditioning(components()[1], RANGE, gamma_min_target=-7.0)
        t.draw = lambda n, g, s=seen, f=inner: s.setdefault("schedule", f(n, g))
        error = t.loss(index)[1]
        found.append(error.mean(0))
        generator = torch.Generator().manual_seed(index)
        torch.randint(64, (512,), generator=generator)
        gamma = seen["schedule"].gamma(families.stratified_times(512, generator))
        signal = torch.sigmoid(-gamma)
        expected.append((signal * c / (signal * c + 1 - signal)).mean(0).float())
    found, expected = torch.stack(found).mean(0), torch.stack(expected).mean(0)
    assert abs(found.mean() / expected.mean() - 1) < 0.01
    torch.testing.assert_close(found, expected, rtol=0.12, atol=0.01)


def test_held_out_error_of_the_gaussian_answer_is_the_closed_form(generator):
    basis, prior = components()
    white = torch.randn(20_000, *SHAPE, generator=generator, dtype=torch.float64) * prior.white_variance.sqrt()
    schedule, c = schedule_of(prior)(1.0), prior.white_variance
    calls = []

    def exact(x, gamma):
        calls.append(len(x))
        return gaussian_eps(x, gamma, c)

    error = training.evaluate(exact, white, schedule, generator, chunk=3000)
    assert calls == [3000] * 6 + [2000] and error.shape == SHAPE
    signal = schedule.alpha(torch.linspace(0, 1, 4001, dtype=torch.float64)) ** 2
    expected = (signal * c / (signal * c + 1 - signal)).mean(0)
    torch.testing.assert_close(error, expected, rtol=0.06, atol=1e-3)
    same = [training.evaluate(exact, white[:50], schedule, generator.manual_seed(4)) for _ in range(2)]
    assert torch.equal(*same)


def test_held_out_times_have_nothing_to_do_with_the_order_of_the_images(generator):
    """One half of the images is recognised and missed wholly where it is noisy: of all pairs, a quarter."""
    white = torch.cat([torch.zeros(500, *SHAPE), torch.full((500, *SHAPE), 100.0)])

    def misses_the_bright(x, gamma):
        bright = x.mean((1, 2, 3), keepdim=True) > 10
        return torch.where(bright & (gamma > 0), 100.0, 0.0).expand_as(x)

    schedule = schedules.linear(SHAPE, -4.0, 4.0)
    for seed in range(4):
        error = training.evaluate(misses_the_bright, white, schedule, generator.manual_seed(seed)).mean() / 100**2
        assert error.item() == pytest.approx(0.25, abs=0.05)


# Steps


def test_the_steps_are_adams_with_decoupled_decay_and_short_memory():
    """After Loshchilov and Hutter 2019, algorithm 2, with beta = 0.9 and 0.99, epsilon = 1e-8 and decay 0.01."""
    t = trainer(replace(QUICK, lr=1e-2), kind="mlp")
    expected = [p.detach().double().clone() for p in t.plain.parameters()]
    first, second = ([torch.zeros_like(p) for p in expected] for _ in range(2))
    for record in t.run():
        n, lr = record.step, record.lr
        for k, (p, weight) in enumerate(zip(expected, t.plain.parameters(), strict=True)):
            g = weight.grad.double()
            first[k] = 0.9 * first[k] + 0.1 * g
            second[k] = 0.99 * second[k] + 0.01 * g**2
            direction = (first[k] / (1 - 0.9**n)) / ((second[k] / (1 - 0.99**n)).sqrt() + 1e-8)
            expected[k] = p * (1 - 0.01 * lr) - lr * direction
    for p, weight in zip(expected, t.plain.parameters(), strict=True):
        torch.testing.assert_close(weight.detach().double(), p, rtol=1e-4, atol=2e-6)


def test_no_two_seeds_share_the_randomness_of_any_steps():
    runs = [trainer(replace(QUICK, seed=seed), kind="mlp") for seed in range(4)]
    steps = (*range(8), 1_000, 500_000)
    assert len({run.stream(step).initial_seed() for run in runs for step in steps}) == 4 * len(steps)


def test_records_tell_step_loss_and_learning_rate_on_their_schedule():
    config = TrainingConfig(steps=8, batch=8, warmup=4, lr=1e-2)
    t = trainer(config)
    untouched = t.loss(0)[0].item()
    records = list(t.run())
    assert [r.step for r in records] == list(range(1, 9)) and records[0].loss == pytest.approx(untouched)
    expected = [1e-2 * min(1, (n + 1) / 4) * (1 + math.cos(math.pi * n / 8)) / 2 for n in range(8)]
    assert [r.lr for r in records] == pytest.approx(expected)
    assert all(r.seconds > 0 for r in records) and list(t.run()) == []


def test_the_optimiser_runs_at_the_rate_of_the_record():
    t = trainer(replace(QUICK, lr=1e-3))
    for record in t.run():
        assert t.optimizer.param_groups[0]["lr"] == record.lr


def test_group_errors_add_up_to_the_loss():
    t = trainer()
    record = next(t.run())
    sizes = t.plain.levels.groups.flatten().bincount().double()
    assert record.by_group.shape == (4,)
    assert (sizes * record.by_group).sum().item() / 64 == pytest.approx(record.loss, rel=1e-5)
    by_component = next(trainer(kind="mlp").run()).by_group
    assert by_component.shape == (64,)
    error = trainer(kind="mlp").loss(0)[1].mean(0)
    torch.testing.assert_close(by_component, error.flatten().detach())


def test_gradients_are_clipped():
    t = trainer(replace(QUICK, clip=1e-3))
    next(t.run())
    norm = torch.stack([p.grad.norm() for p in t.plain.parameters() if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("ema", [0.999, 0.15])
def test_the_average_follows_its_formula(ema):
    t = trainer(replace(QUICK, ema=ema, lr=1e-2))
    expected = None
    for record in t.run():
        now = [p.detach().clone() for p in t.plain.parameters()]
        n = record.step - 1
        decay = min(ema, (1 + n) / (10 + n))
        expected = now if n == 0 else [decay * e + (1 - decay) * p for e, p in zip(expected, now, strict=True)]
    for e, p in zip(expected, t.averaged().network.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), e)
    moved = [(p - q).abs().max() for p, q in zip(t.plain.parameters(), t.averaged().network.parameters(), strict=True)]
    assert max(moved) > 1e-4 and not t.averaged().training


def test_training_learns_what_is_not_gaussian():
    t = trainer(TrainingConfig(steps=120, batch=64, warmup=10, lr=1e-2), kind="mlp", width=64)
    with torch.no_grad():
        before = sum(t.loss(10_000 + i)[0].item() for i in range(10))
        list(torch.enable_grad()(lambda: list(t.run()))())
        after = sum(t.loss(10_000 + i)[0].item() for i in range(10))
    assert after < 0.9 * before


@pytest.mark.parametrize("weighting", training.WEIGHTINGS)
@pytest.mark.parametrize("conditioning", networks.CONDITIONINGS)
def test_every_network_trains_under_either_weighting(conditioning, weighting):
    t = trainer(replace(QUICK, steps=2, weighting=weighting), conditioning=conditioning)
    before = [p.detach().clone() for p in t.plain.parameters()]
    assert all(math.isfinite(r.loss) for r in t.run())
    assert any(not torch.equal(p, q) for p, q in zip(before, t.plain.parameters(), strict=True))


# Stopping and going on


RICH = dict(conditioning="local", fourier=True, linear=2, dropout=0.3)


@pytest.mark.parametrize("kind, options", [("unet", {}), ("mlp", {}), ("unet", RICH)])
@pytest.mark.parametrize("stop", [3, 4])
def test_a_stopped_run_goes_on_bit_for_bit_as_if_it_had_not_been(kind, options, stop, tmp_path):
    config = replace(QUICK, symmetries="all", weighting="answer") if options else QUICK
    whole = trainer(config, kind=kind, **options)
    losses = [r.loss for r in whole.run()]
    for record in trainer(config, tmp_path / "c", kind, **options).run():
        torch.rand(())  # what others draw meanwhile must not matter
        if record.step == stop:
            break
    again = trainer(config, tmp_path / "c", kind, seed=5, **options)  # its fresh weights must not matter
    resumed = again.step
    assert resumed == stop
    assert [r.loss for r in again.run()] == losses[resumed:]
    assert_same(again, whole)


def test_dropout_belongs_to_a_step_and_leaves_the_global_generator_alone():
    t = trainer(dropout=0.5)
    torch.nn.init.normal_(t.plain.head.weight), torch.nn.init.normal_(t.plain.down[0].conv2.weight)
    torch.manual_seed(1)
    first, state = t.loss(3)[1], torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(t.loss(3)[1], first)
    drawn = []
    for index in (3, 3, 4):
        with t.seeded(t.stream(index)):
            drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], torch.rand(4, generator=t.stream(3)))
    t.plain.eval()
    assert not torch.equal(t.loss(3)[1], first)


def test_a_denoiser_that_was_at_rest_trains_with_dropout_and_is_averaged_without():
    t = trainer(dropout=0.5)
    again = Trainer(t.averaged(), pictures(), t.draw, QUICK)
    assert all(part.training for part in again.plain.modules())
    assert not any(part.training for part in again.averaged().modules())


def test_a_finished_run_is_restored_and_does_nothing_more(tmp_path):
    config = replace(QUICK, steps=5)  # not a multiple of save_every
    first = trainer(config, tmp_path / "c")
    list(first.run())
    second = trainer(config, tmp_path / "c", seed=5)
    assert second.step == 5 and list(second.run()) == []
    assert_same(first, second)


def test_without_a_checkpoint_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    list(trainer(kind="mlp").run())
    assert list(tmp_path.iterdir()) == []


OTHERS = {
    "config.lr": lambda c: trainer(replace(QUICK, lr=1e-5), c),
    "family.a": lambda c: trainer(QUICK, c, a=(0.4, 1.5)),
    "images": lambda c: trainer(QUICK, c, images=pictures(32)),
    "digest": lambda c: trainer(QUICK, c, images=255 - pictures()),
    "network.width": lambda c: trainer(QUICK, c, width=16),
    "network": lambda c: trainer(QUICK, c, kind="mlp"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_another_run_is_refused_with_what_differs(name, tmp_path):
    file = tmp_path / "c.safetensors"
    trainer(QUICK, file).save(file)
    with pytest.raises(
        ValueError, match=rf"c.safetensors belongs to another run, which had {re.escape(name)} = "
    ) as error:
        OTHERS[name](file)
    assert "Remove it or give another file" in str(error.value)


@pytest.mark.parametrize("name", [each.name for each in fields(TrainingConfig)])
def test_every_setting_belongs_to_the_run(name, tmp_path):
    value = getattr(QUICK, name)
    other = {"weighting": "likelihood", "symmetries": "mirror", "discrete": True}.get(name, value)
    other = other if other != value else value + 1 if isinstance(value, int) else value / 2
    trainer(QUICK, tmp_path / "c").save(tmp_path / "c")
    with pytest.raises(ValueError, match=rf"had config.{name} = {value}; this one has {other}"):
        trainer(replace(QUICK, **{name: other}), tmp_path / "c")


@pytest.mark.usefixtures("unchecked")
def test_a_checkpoint_tells_tensors_and_schedules_by_what_is_in_them(tmp_path):
    """Another prior, other principal components, a function of other schedules; rounding makes no other run."""
    file, images = tmp_path / "c", pictures()
    basis, prior = bases.PCA.fit(data.dequantise(images, torch.Generator().manual_seed(0))), components()[1]

    def run(basis=basis, prior=prior, low=-9.0, move=0.0):
        torch.manual_seed(0)
        model = denoiser.build(basis, prior, groups=4, width=8)
        model.reference.prior.mean += move
        return Trainer(model, images, lambda n, g: schedules.linear(SHAPE, low, 5.0), QUICK, file)

    run().save(file)
    assert run(move=1e-6).step == 0
    turned = bases.PCA(
        basis.matrix * torch.linspace(-1, 1, len(basis.matrix)).sign()[:, None], SHAPE, basis.eigenvalues
    )
    wider = priors.Prior(prior.moments, 1.1 * prior.scale)
    for name, other in {
        "around.basis.matrix": lambda: run(basis=turned), "around.prior.scale": lambda: run(prior=wider),
        "family.gamma": lambda: run(low=-8.0),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"had {name} = "):
            other()


@pytest.mark.usefixtures("unchecked")
def test_a_checkpoint_of_other_code_is_refused(tmp_path, monkeypatch):
    trainer(QUICK, tmp_path / "c").save(tmp_path / "c")
    assert trainer(QUICK, tmp_path / "c").step == 0
    monkeypatch.setattr(training, "code", lambda: "other")
    with pytest.raises(ValueError, match="had code = .*; this one has other"):
        trainer(QUICK, tmp_path / "c")


def test_the_digest_of_code_knows_statements_of_what_is_imported_and_no_words(tmp_path, monkeypatch):
    folder = tmp_path / "gudlib"
    shutil.copytree(Path(training.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(training, "__file__", str(folder / "training.py"))

    def digest(name="", old="", new=""):
        path = folder / (name or "training.py")
        before = path.read_text()
        assert old in before
        path.write_text(before.replace(old, new, 1) if old else before)
        training.code.cache_clear()
        found = training.code()
        path.write_text(before)
        return found

    try:
        plain = digest()
        assert plain == digest("networks.py", '"""Networks that take', '"""Things that take')
        assert plain == digest("training.py", "import copy", "import copy  # a word")
        assert plain == digest("plotting.py", "COLOURS = [", "COLOURS = ['red', ")
        for name, old, new in (("training.py", "0.5 * (1 + math.cos", "0.4 * (1 + math.cos"),
                               ("networks.py", "reach = 12.0", "reach = 11.0"),
                               ("mar/training.py", "index + 500_000", "index + 400_000"),
                               ("schedules.py", "import torch", "import math, torch")):  # fmt: skip
            assert digest(name, old, new) != plain, name
    finally:
        training.code.cache_clear()


@pytest.mark.usefixtures("unchecked")
def test_a_checkpoint_for_another_basis_is_refused(tmp_path):
    file = tmp_path / "c"
    first = trainer(QUICK, file)
    first.save(file)
    prior = components()[1]
    torch.manual_seed(0)
    other = denoiser.build(bases.Haar(SHAPE, 2), prior, groups=4, width=8)
    with pytest.raises(ValueError, match="had basis = {'name': 'dct'}; this one has {'name': 'haar', 'levels': 2}"):
        Trainer(other, pictures(), families.SoftConditioning(prior, RANGE), QUICK, file)


def test_a_training_state_is_not_taken_for_a_denoiser(tmp_path):
    t = trainer(QUICK, tmp_path / "c.safetensors")
    t.save(tmp_path / "c.safetensors")
    for read in (denoiser.load, denoiser.card):
        with pytest.raises(ValueError, match="c.safetensors is the state of a training run"):
            read(tmp_path / "c.safetensors")
    denoiser.save(t.averaged(), tmp_path / "d.safetensors")
    denoiser.load(tmp_path / "d.safetensors")


def test_a_broken_checkpoint_is_named(tmp_path):
    file = tmp_path / "c.safetensors"
    trainer(QUICK, file).save(file)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="c.safetensors is not a complete"):
        trainer(QUICK, file)


KILLED_WHILE_TRAINING = """
import os, random, signal, sys, time
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_training as here

here.torch.set_num_threads(1)
file = Path(sys.argv[1]) / "checkpoint"
config = replace(here.QUICK, steps=60, save_every=1)
whole = here.trainer(config, None, "mlp")  # also imports what all need, before the forks
random.seed(0)
before = None
for attempt in range(5):
    child = os.fork()
    if child == 0:
        list(here.trainer(config, file, "mlp", seed=attempt).run())
        os._exit(0)
    while not file.exists() or file.stat().st_mtime_ns == before:  # it has begun
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.04))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it had finished"
    before = file.stat().st_mtime_ns
last = here.trainer(config, file, "mlp", seed=9)
print("resumed at", last.step)
list(last.run())
list(whole.run())
here.assert_same(last, whole)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path):
    command = [sys.executable, "-c", KILLED_WHILE_TRAINING, str(tmp_path), os.path.dirname(__file__)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=cases.PATIENCE, env=environment)
    assert done.returncode == 0, done.stderr
    assert 5 <= int(done.stdout.split()[-1]) < 60


# Errors


@pytest.mark.parametrize("name", ["loss", "weights"])
def test_what_is_not_finite_stops_a_run_and_leaves_the_checkpoint(name, tmp_path, monkeypatch):
    file = tmp_path / "checkpoint"
    t = trainer(replace(QUICK, steps=10), file, "mlp")
    run = t.run()
    for _ in range(4):
        next(run)
    before = file.read_bytes()
    if name == "loss":
        inner = t.loss
        monkeypatch.setattr(t, "loss", lambda index: tuple(x * (math.nan if index == 5 else 1) for x in inner(index)))
        message = "the loss of step 6 is not finite: .*checkpoint holds step 4"
    else:
        step = t.optimizer.step
        monkeypatch.setattr(t.optimizer, "step", lambda: (step(), next(t.plain.parameters()).data.fill_(math.inf)))
        message = "weights after step 5 are not finite: .*checkpoint holds step 4"
    with pytest.raises(FloatingPointError, match=message):
        list(run)
    assert file.read_bytes() == before and trainer(replace(QUICK, steps=10), file, "mlp").step == 4


def test_seeds_may_be_long(tmp_path):
    config = replace(QUICK, steps=2, seed=2**62)
    list(trainer(config, tmp_path / "c", "mlp").run())
    assert trainer(config, tmp_path / "c", "mlp").step == 2


@pytest.mark.usefixtures("unchecked")
def test_images_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"images must be data, .*; got whole numbers up to \d+, grey levels perhaps"):
        trainer(images=pictures().float())
    with pytest.raises(
        ValueError, match=r"images must be uint8 of shape .* or floating numbers of shape .*; got torch.int64"
    ):
        trainer(images=pictures().long())
    with pytest.raises(ValueError, match=r"\(n, 1, 8, 8\); got torch.uint8 of shape \(64, 1, 8, 4\)"):
        trainer(images=pictures()[..., :4])


@pytest.mark.usefixtures("unchecked")
def test_settings_that_make_no_sense_are_refused():
    for name in ("steps", "batch", "save_every"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1; got 0"):
            TrainingConfig(**{name: 0})
    with pytest.raises(ValueError, match="weighting must be .*'plain', 'likelihood', 'answer'.; got 'snr'"):
        TrainingConfig(weighting="snr")
    with pytest.raises(ValueError, match="symmetries must be .*'none', 'mirror', 'all'.; got 'turns'"):
        TrainingConfig(symmetries="turns")


@pytest.mark.usefixtures("unchecked")
def test_all_symmetries_are_of_squares():
    basis = bases.Pixel((1, 4, 8))
    prior = priors.isotropic(priors.Moments(torch.zeros(basis.shape), torch.ones(basis.shape)))
    draw, images = families.SoftConditioning(prior, RANGE), pictures()[:, :, :4]

    def make(symmetries):
        model = denoiser.build(basis, prior, width=8)
        return Trainer(model, images, draw, replace(QUICK, symmetries=symmetries))

    assert math.isfinite(next(make("mirror").run()).loss)
    with pytest.raises(ValueError, match="'all' are of square images; these are 4 x 8"):
        make("all")


def test_uint8_images_are_dequantised_with_fresh_noise_each_time(generator):
    x = pictures(4)
    one, two = data.dequantise(x, generator), data.dequantise(x, generator)
    assert not torch.equal(one, two)
    assert torch.equal(data.to_uint8(one), x) and torch.equal(data.to_uint8(two), x)
