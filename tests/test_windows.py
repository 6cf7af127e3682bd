"""Drawing with a window: the same images as without, only patches that move are computed, and nothing leaks."""

import pytest
import torch
from cases import randn

from gudlib import bases, denoiser, families, likelihood, priors, references, samplers, windows
from gudlib.process import Process, diffuse
from gudlib.schedules import Schedule

SHAPE, PATCH, COUNT = (1, 8, 12), 4, 6


def pictures(n=300, shape=SHAPE, seed=0):
    """Dark or bright, with a ramp."""
    generator = torch.Generator().manual_seed(seed)
    bright = torch.randint(2, (n, 1, 1, 1), generator=generator)
    ramp = torch.linspace(0, 60, shape[2]).expand(shape)
    return (50 + 90 * bright + ramp + 9 * torch.randn(n, *shape, generator=generator)).clamp(0, 255).byte()


def model(reference="histograms", shape=SHAPE, patch=PATCH, move=0.02, ends=True, finest=0.3 / 127.5):
    """A block-causal transformer, not far from zero, and its schedules."""
    images, basis = pictures(shape=shape), bases.Pixel(shape)
    measured = priors.measure(basis, images)
    one = torch.full(shape, 0.3, dtype=torch.float64)
    prior = priors.isotropic(priors.Moments(measured.mean.mean().expand(shape).clone(), one), 0.8).float()
    around = (
        references.fit(reference, basis, prior, images)
        if reference != "histograms"
        else (references.Histograms.fit(basis, prior, images, sectors=1))
    )
    family = families.Sequential(basis, prior, f"patches {patch}", finest=finest)
    between = (float(family.low.min()), float(family.high.max())) if ends else None
    torch.manual_seed(0)
    options = dict(kind="transformer", patch=patch, width=16, depth=2, heads=2, between=between)
    made = denoiser.build(basis, prior, reference=around, **options)
    with torch.no_grad():
        for p in made.network.parameters():
            p += move * torch.randn(p.shape)
    return made.eval(), family


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("reference", ["independent gaussian", "histograms"])
@pytest.mark.parametrize("b, steps", [(1 / COUNT, 24), (0.3, 17), (0.7, 9), (1.0, 5)])
def test_it_draws_what_the_whole_draws(reference, b, steps):
    made, family = model(reference)
    process = Process(made.basis, made.prior, family.schedule(b))
    whole = samplers.sample(made, process, 3, steps, "ddim", gen())
    found = windows.generate(made, process.schedule, 3, steps, "ddim", gen())
    apart = (found.white - whole.white).abs()  # rounding grows on the way, where grey levels part
    assert apart.median() < 2e-5 and apart.max() < 0.02
    torch.testing.assert_close(found.data, process.data(found.white).float())
    assert found.nfe == steps and found.data.shape == (3, *SHAPE) and found.data.std() > 0.1
    plain = samplers.sample(made.reference, process, 3, steps, "ddim", gen())
    assert (plain.white - whole.white).abs().median() > 2e-3  # the network has a say in it


def test_only_the_patches_that_move_are_computed(monkeypatch):
    made, family = model()
    computed, plain = [], made.network.window

    def counted(images, gamma, places, past):
        computed.append(len(places))
        return plain(images, gamma, places, past)

    monkeypatch.setattr(made.network, "window", counted)
    steps = 4
    windows.generate(made, family.schedule(1 / COUNT), 2, COUNT * steps, generator=gen())
    assert len(computed) == COUNT * steps
    assert sum(computed) == COUNT * steps + COUNT - 1  # each of the finished ones once more, but for the last
    computed.clear()
    windows.generate(made, family.schedule(1.0), 2, steps, generator=gen())
    assert computed == [COUNT] * steps


def test_ancestral_steps_draw_the_reference_where_the_network_is_silent():
    """Independent normals of variance 0.3 around the mean, less what finitely many steps lose."""
    made, family = model("independent gaussian", move=0.0)
    found = windows.generate(made, family.schedule(0.4), 1000, 40, generator=gen()).data
    process = Process(made.basis, made.prior, family.schedule(0.4))
    whole = samplers.sample(made, process, 1000, 40, "ancestral", gen(1)).data
    assert found.var().item() == pytest.approx(whole.var().item(), rel=0.03)
    assert found.mean().item() == pytest.approx(made.prior.mean.mean().item(), abs=0.02)
    cold = windows.generate(made, family.schedule(0.4), 300, 40, generator=gen(), temperature=0.0).data
    assert cold.var() < 0.5 * found.var()


def test_the_bound_one_by_one_is_that_of_the_chain_rule():
    """Six pixels, each given those before it as they are: term by term, with one set of noise for both."""
    shape, count = (1, 1, 6), 6
    made, family = model("independent gaussian", shape, patch=1, move=0.1, finest=1e-5)
    line, n = family.schedule(1 / count), 30
    white = randn(n, *shape).double()
    low, high = made.network.between
    times = (torch.arange(30 * count, dtype=torch.float64) + 0.5) / (30 * count)
    joint = chained = silent = 0.0
    for t, eps in zip(times, randn(len(times), n, *shape, seed=1).double(), strict=True):
        gamma, k = line.gamma(t), int((1 - t) * count)
        chi, rate = diffuse(white, gamma, eps), 0.5 * line.dgamma_dt(t)
        joint += (rate * (eps - made(chi, gamma[None])).square()).sum() / len(times)
        silent += (rate * (eps - made.reference(chi, gamma[None])).square()).sum() / len(times)
        levels = torch.tensor([low] * k + [0.0] + [high] * (count - 1 - k), dtype=torch.float64).view(1, *shape)
        levels[..., k] = gamma[..., k]
        given = torch.cat([white[..., :k], chi[..., k : k + 1], torch.full((n, 1, 1, count - 1 - k), 1e3)], -1)
        error = (eps - made(given, levels)).square()[..., k]
        chained += (rate[..., k] * error).sum() / len(times)
    nats = torch.stack([joint, chained, silent]) / n
    whole, parts, none = likelihood.bits_per_dim(nats, count).tolist()
    assert whole == pytest.approx(parts, abs=1e-3) and abs(whole - none) > 0.1  # the network has a say in it


def test_annealed_times_give_each_patch_its_steps():
    times = windows.annealed(7, 12, 3)
    assert times[0] == 1 and times[-1] == 0 and (times.diff() < 0).all()
    turn = (-times[1:] * 7 + 7 - 1e-9).floor().long()
    assert torch.bincount(turn).tolist() == [12, 10, 9, 8, 6, 4, 3]
    torch.testing.assert_close(windows.annealed(5, 4, 4), torch.linspace(1, 0, 21, dtype=torch.float64))
    made, family = model()
    assert windows.generate(made, family.schedule(1 / COUNT), 2, grid=windows.annealed(COUNT, 3, 1)).nfe == 12


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_refused():
    made, family = model()
    full, line = model(ends=False)[0], family.schedule(0.5)
    columns = families.Sequential(made.basis, made.prior, "columns", finest=0.3 / 127.5).schedule(0.5)
    backwards = Schedule(lambda t: line.gamma(t[..., 0, 0, 0]).flip(-1, -2), SHAPE)
    shuffled = families.rebuild(family.spec | {"order": "random"}, made.basis, made.prior)
    shuffled = shuffled.schedule(0.3, torch.tensor([0, 2, 1, 3, 4, 5]))
    coarse = families.Sequential(made.basis, made.prior, "patches", finest=0.9 / 127.5).schedule(0.5)
    each = family.schedule(torch.tensor([0.5, 1.0]))
    sectors = denoiser.Denoiser(made.network, references.Histograms.fit(made.basis, made.prior, pictures(), sectors=3))
    order = "must end, patch by patch in reading order"
    for call, message in (
        (lambda: windows.generate(full, line, 2), "must have a block-causal transformer"),
        (lambda: windows.generate(made, line, 2, method="heun"), "method must be one of .*; got 'heun'"),
        (lambda: windows.generate(made, each, 2), r"one for a batch of \(2,\)"),
        (lambda: windows.generate(made, line, 0), "n must be at least 1; got 0"),
        (lambda: windows.generate(made, line, 2, 0), "steps must be at least 1; got 0"),
        (lambda: windows.generate(made, columns, 2), order),
        (lambda: windows.generate(made, backwards, 2), order),
        (lambda: windows.generate(made, shuffled, 2), order),
        (lambda: windows.generate(made, coarse, 2), order),
        (lambda: windows.generate(sectors, line, 2), "must have one sector .*; it has 3"),
        (lambda: windows.annealed(6, 0, 1), "first must be at least 1; got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
