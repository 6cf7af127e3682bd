"""The front door: from pictures to a model and back, every promise of `gudlib.GUD`."""

import math
import os
import signal
import subprocess
import sys

import cases
import pytest
import torch

import gudlib as gud
from gudlib import baselines, data, denoiser, families, likelihood, samplers, windows
from gudlib.data import dequantise
from gudlib.files import CHECKPOINTS, read_tensors
from gudlib.model import GUD

SHAPE = (3, 8, 8)
FAST = {"width": 8, "verbose": False}
KINDS = {
    "pca": {},
    "dct": {"basis": "dct", "a": 1.0},
    "fourier": {"basis": "fourier", "a": (0.0, 1.0)},
    "haar": {"basis": "haar", "r": 0.5},
    "pixel": {"basis": "pixel"},
    "columns": {"basis": "pixel", "blocks": "columns"},
    "rows": {"basis": "pixel", "blocks": "rows", "b": 0.5},
    "patches": {"basis": "pixel", "blocks": "patches 2", "b": (0.2, 1.0), "known": 0.0},
    "transformer": {"network": "transformer", "blocks": "patches 2"},
    "random": {"network": "transformer", "blocks": "patches 2", "order": "random"},
    "causal": {"network": "transformer", "blocks": "patches 2", "causal": True, "known": 0.0},
    "histograms": {"basis": "pixel", "blocks": "columns", "reference": "histograms"},
    "marginals": {"basis": "dct", "reference": "marginals"},
    "tissue": {"basis": "pixel", "blocks": "columns", "reference": "lattice gaussian"},
    "levels, columns": {"basis": "haar", "blocks": ("levels", "columns 2"), "b": ((0.5, 1.0), (0.5, 1.0))},
}


def pictures(n=48, shape=SHAPE, seed=0):
    """Smooth colour fields with a bright or a dark square."""
    generator = torch.Generator().manual_seed(seed)
    c, h, w = shape
    coarse = torch.rand(n, c, 3, 3, generator=generator) * 120 + 60
    fields = torch.nn.functional.interpolate(coarse, (h, w), mode="bilinear", align_corners=True)
    sign = torch.randint(0, 2, (n, 1, 1, 1), generator=generator) * 2 - 1
    fields[:, :, h // 4 : h // 2, w // 4 : w // 2] += 50 * sign
    return (fields + torch.randint(-4, 5, fields.shape, generator=generator)).clamp(0, 255).byte()


IMAGES = pictures()


def fitted(kind="pca", images=IMAGES, **options):
    return GUD.fit(images, **(KINDS[kind] | FAST | options))


def trained(kind="pca", steps=3, **options):
    model = fitted(kind)
    list(model.train_steps(steps, batch=4, progress=False, **options))
    return model


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.denoiser.network.parameters()])


# Fit


@pytest.mark.parametrize("kind", KINDS)
def test_every_choice_trains_samples_scores_and_comes_back_from_its_file(kind, tmp_path):
    model = trained(kind)
    drawn = model.sample(3, steps=4)
    assert drawn.shape == (3, *SHAPE) and drawn.dtype == torch.uint8
    assert math.isfinite(model.bits_per_dim(IMAGES[:4], draws=1))
    model.save(tmp_path / "m.safetensors")
    again = GUD.load(tmp_path / "m.safetensors")
    assert torch.equal(again.sample(3, steps=4), drawn)
    assert again.family.spec == model.family.spec and again.recommended == model.recommended
    assert again.card == model.card and repr(again) == repr(model)
    bits = model.bits_per_dim(IMAGES[:4], draws=1)
    assert again.bits_per_dim(IMAGES[:4], draws=1) == pytest.approx(bits, rel=1e-7)


def test_fit_says_what_it_picked(capsys):
    model = GUD.fit(IMAGES, width=8)
    said = capsys.readouterr().out
    assert said.strip() == repr(model)
    for part in ("3 x 8 x 8", "pca", "a from 0.4 to 1.6", "recommended {'a': 1.0}", "width 8", "cpu"):
        assert part in said
    assert "b from 0.125 to 1" in repr(fitted("columns"))


def test_a_transformer_is_for_pixels_and_its_tokens_are_the_blocks():
    model = fitted("transformer")
    assert model.denoiser.basis.name == "pixel" and model.denoiser.network.patch == 2
    assert "transformer, width 8, depth 4, patch 2" in repr(model) and "b from 0.0625" in repr(model)
    assert GUD.fit(IMAGES, network="transformer", **FAST).denoiser.network.patch == 4
    for shape, patch in {(1, 6, 10): 2, (1, 9, 6): 3, (1, 96, 96): 8}.items():
        assert GUD.fit(pictures(8, shape), network="transformer", **FAST).denoiser.network.patch == patch
    blocks = ("patches 8", "patches")
    nested = GUD.fit(pictures(8, (1, 96, 96)), network="transformer", blocks=blocks, known=0.0, **FAST)
    assert nested.denoiser.network.patch == 4


def test_a_causal_transformer_draws_with_a_window_and_fills_without(monkeypatch):
    model, calls, plain = trained("causal", 30), [], windows.generate
    monkeypatch.setattr(windows, "generate", lambda *a, **k: calls.append(k) or plain(*a, **k))
    assert model.denoiser.reference.name == "histograms" and len(model.denoiser.reference.weight) == 1
    assert fitted("causal", reference="independent gaussian").denoiser.reference.name == "independent gaussian"
    drawn = model.sample(6, b=1 / 16, steps=64, chunk=4, temperature=0.9)
    assert [call["temperature"] for call in calls] == [0.9, 0.9] and len(drawn) == 6
    whole = model.sample(6, b=1 / 16, steps=64, method="ddim", keep=2)
    assert len(calls) == 2
    windowed = model.sample(6, b=1 / 16, steps=64, method="ddim")
    assert len(calls) == 3 and (whole.int() - windowed.int()).abs().float().mean() < 1
    each = model.sample(2, b=torch.tensor([0.5, 1.0]), steps=9)
    assert len(calls) == 3 and len(each) == 2
    filling = fitted("causal", known=0.5)
    known = torch.ones(8, 8, dtype=torch.bool)
    known[2:4, 3:7] = False
    filled = filling.inpaint(IMAGES[:2], known, steps=8)
    assert torch.equal(filled[:, :, known], IMAGES[:2][:, :, known])


@pytest.mark.parametrize(
    "kind, method, grid", [("pca", "gaussian-pc", "adapted"), ("columns", "ancestral", "uniform"),
                           ("levels, columns", "ancestral", "uniform")]
)  # fmt: skip
def test_blocks_are_drawn_with_ancestral_steps_in_even_time(kind, method, grid):
    model = trained(kind)
    asked = model.sample(3, steps=6, method=method, grid=grid)
    assert torch.equal(model.sample(3, steps=6), asked)
    for other in ({"method": "gaussian-2m"}, {"grid": "adapted" if grid == "uniform" else "uniform"}):
        assert not torch.equal(model.sample(3, steps=6, **other), asked)
    if kind == "columns":
        known = torch.rand(SHAPE[1:], generator=torch.Generator().manual_seed(0)) < 0.5
        filled = model.inpaint(IMAGES[:3], known, steps=6)
        assert torch.equal(filled, model.inpaint(IMAGES[:3], known, steps=6, method=method))


def test_untrained_it_is_a_normal_distribution():
    """Its bits per dimension are those of independent normals in the basis, of the variances fitted."""
    model, unseen = fitted("pca"), pictures(64, seed=1)
    prior, basis = model.denoiser.prior.double(), model.denoiser.basis.double()
    variance = prior.moments.floored
    x = dequantise(unseen, torch.Generator().manual_seed(0)).double()
    off = (basis(x) - prior.mean).square() / variance
    nats = 0.5 * (off + variance.log() + math.log(2 * math.pi)).flatten(1).sum(1)
    expected = (nats / (192 * math.log(2)) + 7).mean().item()
    fresh = fitted("pca")
    for a in (0.4, 1.0):
        assert fresh.bits_per_dim(unseen, a=a) == pytest.approx(expected, abs=0.02)
    torch.testing.assert_close(fresh.nll(unseen, draws=16).double(), nats, rtol=0.02, atol=0.5)


def bits_of_reference(model, images):
    decoder = model.denoiser.reference.decoder
    x = data.scale(images) if decoder == "discrete" else dequantise(images, torch.Generator().manual_seed(0))
    width = likelihood.GREY_LEVEL if decoder == "normal" else 1.0
    nll = model.denoiser.reference.nll(x.double()).mean()
    return float(likelihood.bits_per_dim(nll, images[0].numel(), width))


@pytest.mark.parametrize("kind", ["pca", "marginals", "histograms", "tissue"])
def test_untrained_it_is_its_reference(kind):
    images = pictures(400)
    model, fresh = fitted(kind, images), pictures(60, seed=9)
    assert model.discrete == (kind in ("histograms", "tissue"))
    found = model.likelihood(fresh, draws=8)
    assert found.bits == pytest.approx(bits_of_reference(model, fresh), abs=4 * found.probe_error + 0.03)


def test_in_pixels_the_better_reference_is_chosen():
    grey = pictures(400, (1, 8, 8))
    black = grey * (torch.rand(grey.shape, generator=torch.Generator().manual_seed(0)) < 0.5)  # no normal distribution
    for images, name in ((black, "histograms"), (pictures(8), "independent gaussian")):
        model = fitted("columns", images)
        assert model.denoiser.reference.name == name and f"reference {name}" in str(model)


def test_where_to_stop_is_chosen_by_bits_and_kept(tmp_path):
    model = fitted("columns", pictures(400), reference="independent gaussian")
    assert model.family.spec["of"]["of"]["finest"] == pytest.approx(1 / 384)
    bits = model.choose_finest(pictures(50, seed=3), (0.35, 2.0, 20.0), draws=4, b=0.5)
    best = min(bits, key=bits.get)
    assert set(bits) == {0.35, 2.0, 20.0} and bits[20.0] > bits[best] + 0.2
    assert model.family.spec["of"]["of"]["finest"] == pytest.approx(best / 127.5)
    assert model.likelihood(pictures(50, seed=3), b=0.5, draws=4).bits == pytest.approx(bits[best])
    model.save(tmp_path / "m")
    assert GUD.load(tmp_path / "m").family.spec == model.family.spec
    assert GUD.load(tmp_path / "m").card["finest"] == best


def test_few_pictures_give_principal_components_that_suit_others():
    """With fewer pictures than pixels their own covariance is blind to most of what others hold."""
    few, unseen = pictures(20), pictures(64, seed=1)
    model = fitted("pca", few)
    assert model.card["of_waves"] and "of waves" in repr(model)
    plain = gud.designs.FittedDesign(gud.designs.Design("pca", 1.0, (1.0, 1.0)), few)
    bits = gud.bound(plain.denoiser(8), plain.process(1.0), dequantise(unseen, torch.Generator().manual_seed(0))).bits
    assert model.bits_per_dim(unseen) < bits - 1
    many = fitted("pca", pictures(3000))
    assert not many.card["of_waves"] and many.bits_per_dim(unseen) < model.bits_per_dim(unseen) - 0.2


@pytest.mark.parametrize(
    ("shape", "patch", "multipliers"),
    [
        ((1, 28, 28), 2, [1, 2]),
        ((3, 32, 32), 2, [1, 2]),
        ((1, 64, 64), 2, [1, 2, 2]),
        ((1, 96, 128), 4, [1, 2]),
        ((1, 8, 12), 1, [1]),
        ((1, 14, 14), 1, [1, 2]),
        ((3, 17, 21), 1, [1]),
        ((1, 30, 20), 2, [1]),
    ],
)
def test_sizes_fit_the_pictures(shape, patch, multipliers):
    model = GUD.fit(pictures(6, shape), basis="dct", a=1.0, **FAST)
    config = model.denoiser.network.config
    assert (config["patch"], config["multipliers"]) == (patch, multipliers)
    assert model.denoiser(torch.zeros(2, *shape), torch.zeros(1, 1, 1, 1)).shape == (2, *shape)


# Training


def test_the_loss_falls_and_the_model_can_be_used_meanwhile():
    model = fitted("dct")
    before = model.bits_per_dim(IMAGES)
    losses, drawn = [], []
    for record in model.train_steps(150, batch=32, progress=False, lr=5e-3):
        losses.append(record.loss)
        if record.step in (1, 150):
            drawn.append(model.sample(2, steps=3))
    assert [len(losses), record.step] == [150, 150]
    assert sum(losses[-30:]) < sum(losses[:30])
    assert not torch.equal(*drawn) and model.bits_per_dim(IMAGES) < before - 0.1
    assert model.card["steps"] == 150


def test_every_call_is_a_run_of_its_own_from_the_present_weights():
    model = trained()
    after = weights(model)
    steps = list(model.train_steps(2, batch=4, progress=False, seed=1))
    assert [s.step for s in steps] == [1, 2] and not torch.equal(weights(model), after)
    assert steps[0].loss < 3  # it goes on from there


@pytest.mark.parametrize("kind", ["pca", "random"])
def test_a_stopped_run_ends_as_if_it_had_not_been_stopped(kind, tmp_path):
    whole = trained(kind, steps=6)
    model = fitted(kind)
    for record in model.train_steps(6, tmp_path / "run", batch=4, progress=False):
        if record.step == 4:
            break
    again = fitted(kind, seed=5)  # in another process, say
    rest = list(again.train_steps(6, tmp_path / "run", batch=4, progress=False))
    assert [r.step for r in rest] == [5, 6] and torch.equal(weights(again), weights(whole))
    third = fitted(kind)
    assert list(third.train_steps(6, tmp_path / "run", batch=4, progress=False)) == []
    assert torch.equal(third.sample(2, steps=3), whole.sample(2, steps=3))


INTERRUPTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, sys.argv[2])
import test_model as here
here.torch.set_num_threads(1)
for record in here.fitted().train_steps(100_000, sys.argv[1], batch=4):
    print(record.step, flush=True)
"""


def test_ctrl_c_stops_after_a_step_and_loses_nothing(tmp_path):
    file = tmp_path / "run.safetensors"
    command = [sys.executable, "-c", INTERRUPTED, str(file), os.path.dirname(__file__)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    seen = [int(process.stdout.readline()) for _ in range(3)]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=cases.PATIENCE)
    last = [*seen, *(int(line) for line in out.split())][-1]
    assert "KeyboardInterrupt" in err and process.returncode == 130 or process.returncode == -signal.SIGINT
    assert read_tensors(file)[1]["step"] in (last, last + 1)  # the step after may have been made, not told
    model = fitted()
    next(model.train_steps(100_000, file, batch=4, progress=False))


def test_a_loaded_model_trains_on_with_images_given(tmp_path):
    trained().save(tmp_path / "m")
    again = GUD.load(tmp_path / "m")
    before = weights(again)
    with pytest.raises(ValueError, match=r"was loaded has no images: give train_steps\(images=...\)"):
        again.train_steps(2)
    list(again.train_steps(2, images=IMAGES, batch=4, progress=False))
    assert not torch.equal(weights(again), before)


def test_a_run_with_other_pictures_is_not_taken_up(tmp_path):
    list(fitted().train_steps(2, tmp_path / "run", batch=4, progress=False))
    with pytest.raises(ValueError, match="run belongs to another run, which had digest = "):
        fitted().train_steps(2, tmp_path / "run", images=IMAGES.flip(0), batch=4)


def test_a_run_along_other_orders_is_not_taken_up(tmp_path):
    list(fitted("random").train_steps(2, tmp_path / "run", batch=4, progress=False))
    with pytest.raises(ValueError, match="run belongs to another run, which had family.of = .*'order': 'random'"):
        fitted("transformer").train_steps(2, tmp_path / "run", batch=4)


def test_the_bar_shows_steps_and_loss(capsys):
    list(fitted().train_steps(20, batch=2))
    said = capsys.readouterr().err
    assert "20/20" in said and "loss=" in said
    list(fitted().train_steps(2, batch=2, progress=False))
    assert capsys.readouterr().err == ""


# Sampling


def test_the_same_seed_draws_the_same_pictures_however_they_are_chunked():
    model = trained()
    one = model.sample(5, a=0.7, steps=4, seed=3)
    assert torch.equal(model.sample(5, a=0.7, steps=4, seed=3), one)
    assert not torch.equal(model.sample(5, a=0.7, steps=4, seed=4), one)
    assert model.sample(5, a=0.7, steps=4, chunk=2).shape == (5, *SHAPE)


def test_samples_are_those_of_the_modules_beneath():
    model = trained()
    process = model.process(a=0.7)
    generator = torch.Generator().manual_seed(3)
    below = samplers.sample(model.denoiser, process, 4, 5, "heun", generator, grid="adapted", temperature=0.5)
    assert torch.equal(
        model.sample(4, a=0.7, steps=5, method="heun", seed=3, temperature=0.5), data.to_uint8(below.data)
    )


def test_each_picture_may_have_a_softness_of_its_own():
    model = trained()
    a = torch.tensor([0.4, 1.0, 1.6])
    drawn = model.sample(3, a=a, steps=4, chunk=2)
    alone = model.sample(3, a=1.0, steps=4, chunk=2, grid="uniform")
    assert torch.equal(drawn[1], alone[1]) and not torch.equal(drawn[0], alone[0])
    blocks = trained("levels, columns")
    assert blocks.sample(2, b=[torch.tensor([0.5, 1.0]), 0.5], steps=4).shape == (2, *SHAPE)


def test_steps_follow_from_how_long_a_component_moves():
    for kind, member, steps in (
        ("pca", {}, 20),
        ("columns", {"b": 0.25}, 80),
        ("levels, columns", {"b": [0.5, 0.5]}, 80),
    ):
        made = []

        def counted(model, process, x, t, s, made=made):
            made.append(t)
            return samplers.Step(x, torch.zeros(()))

        fitted(kind).sample(2, method=counted, **member)
        assert len(made) == steps


def test_untrained_samples_have_the_moments_of_the_pictures():
    model, shown = fitted("dct"), IMAGES.double()
    drawn = model.sample(400, method="ancestral-mmse", steps=5, chunk=400).double()
    torch.testing.assert_close(drawn.mean(0), shown.mean(0), rtol=0, atol=9)
    assert drawn.std(0).mean().item() == pytest.approx(shown.std(0).mean().item(), rel=0.1)


# Filling and growing


def test_inpaint_keeps_what_is_known_and_fills_the_rest():
    model = trained("pixel")
    known = torch.ones(8, 8, dtype=torch.bool)
    known[2:5, 3:6] = False
    filled = model.inpaint(IMAGES[:3], known, steps=5)
    assert torch.equal(filled[..., known], IMAGES[:3][..., known])
    other = torch.where(known, IMAGES[:3], 0)  # what is not known does not matter
    assert torch.equal(model.inpaint(other, known, steps=5), filled)
    each = torch.stack([known, ~known, known])
    assert torch.equal(model.inpaint(IMAGES[:3], each, steps=5)[1][:, ~known], IMAGES[1][:, ~known])


@pytest.mark.parametrize("width", [5, 8, 20])
def test_extend_adds_columns(width):
    model = trained("columns")
    start = pictures(2, (3, 8, width), seed=2)
    longer = model.extend(start, 7, progress=False)
    assert longer.shape == (2, 3, 8, width + 7) and torch.equal(longer[..., :width], start)
    assert torch.equal(model.extend(start, 7, progress=False), longer)


# Files


def test_a_file_without_a_family_loads_and_can_be_told_its_own(tmp_path):
    model = trained("dct")
    denoiser.save(model.denoiser, tmp_path / "old.safetensors", card={"by": "hand"})
    old = GUD.load(tmp_path / "old.safetensors")
    assert old.family is None and old.card == {"by": "hand"} and "set model.family" in repr(old)
    with pytest.raises(ValueError, match="does not tell its schedules: set model.family"):
        old.sample(2)
    old.family = families.rebuild(model.family.spec, old.denoiser.basis, old.denoiser.prior)
    assert torch.equal(old.sample(2, a=1.0, steps=3), model.sample(2, a=1.0, steps=3))
    old.save(tmp_path / "new.safetensors")
    assert GUD.load(tmp_path / "new.safetensors").family.spec == model.family.spec


@pytest.mark.parametrize("path", sorted(CHECKPOINTS.glob("*.safetensors")), ids=lambda path: path.stem)
def test_shipped_files_open_here_or_say_what_opens_them(path):
    if "mar" in path.stem:
        with pytest.raises(ValueError, match=rf"{path.name} holds a network of kind '\w+'; use gudlib.mar.load"):
            GUD.load(path)
    elif "features" in path.stem:
        with pytest.raises(ValueError, match=path.name):
            GUD.load(path)
    else:
        model = GUD.load(path)
        assert model.sample(1, steps=2).shape == (1, *model.denoiser.basis.shape)


def test_shipped_models_are_as_good_as_their_cards_say():
    train, test = data.load("fashion_mnist", "train").images, data.load("fashion_mnist", "test").images[::20]
    bits = GUD.load(CHECKPOINTS / "fashion_pca.safetensors").bits_per_dim(test, a=1.0, draws=4)
    assert bits + 0.05 < baselines.context_table(train, test).mean < bits + 0.3
    haar = GUD.load(CHECKPOINTS / "fashion_haar.safetensors")  # loses to the table, and has learnt
    webp, bits = baselines.webp(test).mean, haar.bits_per_dim(test, b=[1.0, 1.0], draws=1)
    assert baselines.context_table(train, test).mean < bits < webp - 0.4
    assert bits < haar.denoiser.reference.bits(test).mean() - 0.8
    tissue = GUD.load(CHECKPOINTS / "histology_columns.safetensors").denoiser.reference
    assert 2.79 < tissue.bits(data.load("histology", "test").images).mean() < 2.82


def test_what_is_recommended_is_kept_and_used(tmp_path):
    model = trained()
    model.recommended = {"a": 1.4}
    model.save(tmp_path / "m")
    again = GUD.load(tmp_path / "m")
    assert again.bits_per_dim(IMAGES[:5]) == model.bits_per_dim(IMAGES[:5], a=1.4)
    assert again.bits_per_dim(IMAGES[:5]) != model.bits_per_dim(IMAGES[:5], a=1.0)
    assert torch.equal(again.sample(2, steps=3), model.sample(2, a=1.4, steps=3))


def test_half_precision_halves_the_network(tmp_path):
    model = trained()
    model.save(tmp_path / "whole")
    model.save(tmp_path / "half", half=True)
    kept = [
        sum(t.numel() * t.element_size() for k, t in read_tensors(tmp_path / f)[0].items() if "network" in k)
        for f in ("whole", "half")
    ]
    assert kept[1] < 0.6 * kept[0]
    difference = GUD.load(tmp_path / "half").sample(4, steps=3).int() - model.sample(4, steps=3).int()
    assert difference.abs().float().mean() < 1


# Errors


@pytest.mark.usefixtures("unchecked")
def test_a_wrong_choice_is_refused_before_any_work(tmp_path):
    pca, pixel, columns, patches = fitted(), fitted("pixel", known=0.0), fitted("columns"), fitted("random")
    known = torch.ones(8, 8, dtype=torch.bool)
    for call, message in (
        (
            lambda: GUD.fit(IMAGES.float()),
            r"images must be uint8 of shape \(n, c, h, w\); got torch.float32",
        ),
        (lambda: GUD.fit(IMAGES.numpy()), "got ndarray"),
        (lambda: GUD.fit(IMAGES[0]), r"got torch.uint8 of shape \(3, 8, 8\)"),
        (lambda: GUD.fit(IMAGES[:3]), r"got torch.uint8 of shape \(3, 3, 8, 8\)"),
        (lambda: GUD.fit(IMAGES, "wavelet"), "basis must be one of .*; got 'wavelet'"),
        (lambda: GUD.fit(IMAGES, network="mlp"), "network must be one of .*; got 'mlp'"),
        (
            lambda: GUD.fit(IMAGES, "dct", network="transformer"),
            "is for pixels, whose patches it sees; the basis is 'dct'",
        ),
        (lambda: GUD.fit(IMAGES, network="transformer", multipliers=(1,)), r"options of a transformer are .*\['multip"),
        (lambda: GUD.fit(IMAGES, causal=True), r"options of a unet are .*; got \['causal'\]"),
        (lambda: GUD.fit(IMAGES, network="transformer", causal=True), "blocks='patches'; got None"),
        (lambda: fitted("transformer", blocks="columns", causal=True), "blocks='patches'; got 'columns'"),
        (lambda: fitted("causal", order="random"), "causal=True is for .* order='raster'; got 'random'"),
        (lambda: GUD.fit(IMAGES, order="spiral"), r"order must be one of \('raster', 'random'\); got 'spiral'"),
        (lambda: GUD.fit(IMAGES, order="random"), "order='random' is for blocks='patches'; got no blocks"),
        (lambda: fitted("columns", order="random"), "order='random' is for blocks='patches'; got 'columns'"),
        (lambda: columns.sample(2, order=torch.arange(8)), "order is for models of patches with order='random'"),
        (lambda: pca.bits_per_dim(IMAGES[:2], order=torch.arange(8)), "order is for models of patches"),
        (lambda: pca.process(order=torch.arange(8)), r"order is for .*; got torch.int64 of shape \(8,\)"),
        (
            lambda: patches.sample(3, order=torch.arange(16).expand(2, 16)),
            r"for all 3 pictures .*\(2, 16\)",
        ),
        (lambda: patches.sample(3, order=list(range(16))), "order must be int64 of shape .*; got \\[0, 1"),
        (
            lambda: patches.inpaint(IMAGES[:3], known, order=torch.zeros(2, 16).long()),
            r"for all 3 pictures or \(3, L\) for each",
        ),
        (lambda: patches.sample(3, order=torch.arange(1, 17)), "each row 0 to 15 in any order; got"),
        (lambda: patches.nll(IMAGES[:3], order=torch.arange(16).expand(3, -1)), "must be one for all images"),
        (lambda: patches.nll(IMAGES[:3], steps=5), "steps must be None along schedules for each image; got 5"),
        (lambda: fitted("causal", patch=4), "needs patch and blocks of one size; got 4 and 'patches 2'"),
        (lambda: fitted("causal").choose_finest(IMAGES[:4]), "finished where its training ended"),
        (lambda: GUD.fit(IMAGES, depth=2), r"options of a unet are .*; got \['depth'\]"),
        (lambda: GUD.fit(IMAGES, "pixel", reference="patch histograms"), "is for single patches, in gudlib.mar"),
        (lambda: fitted("tissue", network="transformer"), "in waves along columns: it needs network='unet'"),
        (lambda: GUD.fit(pictures(4, (1, 67, 71)), network="transformer"), "make 4757 patches of 1 pixels, more than"),
        (lambda: GUD.fit(IMAGES, a=(1.6, 0.4)), r"a must be \(lowest, highest\)"),
        (lambda: GUD.fit(IMAGES, "pixel", a=1.0, blocks="columns"), "a is for schedules without blocks"),
        (lambda: GUD.fit(IMAGES, b=0.5), "b is the softness of blocks; got b = 0.5 without blocks"),
        (lambda: GUD.fit(IMAGES, known=0.5), "known = 0.5 is for pixels; the basis is 'pca'"),
        (lambda: fitted("tissue", known=0.5), "known = 0.5 is for pixels; .* the reference 'lattice gaussian'"),
        (lambda: fitted("columns").choose_finest(IMAGES[:4], (0.1, 0.5)), "candidates must be at least 0"),
        (lambda: GUD.fit(IMAGES, "pixel", reference="histograms"), "'histograms' knows grey levels"),
        (lambda: GUD.fit(IMAGES, reference="nothing"), "a reference must be one of .*; got 'nothing'"),
        (lambda: GUD.fit(IMAGES, reference="grouped gaussian"), "needs basis='pixel' and blocks='columns'"),
        (lambda: GUD.fit(IMAGES, "haar", reference="histograms", blocks="levels"), "are for pixels; .* 'haar'"),
        (lambda: GUD.fit(IMAGES, "dct", blocks="columns"), "DCT has no label 'column'"),
        (lambda: GUD.fit(IMAGES, "pixel", blocks="stripes"), "blocks must be of"),
        (lambda: GUD.fit(pictures(4, (3, 64, 64))), "'pca' takes pictures of 6144 numbers at most.*choose 'dct'"),
        (lambda: pca.train_steps(0), "steps must be at least 1; got 0"),
        (lambda: pca.train_steps(2, batch=0), "batch must be at least 1; got 0"),
        (lambda: pca.train_steps(2, images=IMAGES[..., :4]), r"images must be uint8 of shape \(n, 3, 8, 8\)"),
        (lambda: pca.sample(0), "n must be at least 1; got 0"),
        (lambda: pca.sample(2, a=2.5), "a must lie in what was trained, 0.4 to 1.6; got 2.5"),
        (lambda: pca.sample(2, b=0.5), "this model's schedules have a; got b"),
        (lambda: columns.sample(2, a=1.0), "this model's schedules have b; got a"),
        (lambda: columns.sample(2, b=[0.5, 0.5]), "b must hold 1 numbers"),
        (lambda: columns.sample(2, b=0.05), "b must lie in what was trained, 0.125 to 1; got 0.05"),
        (lambda: pca.sample(2, method="euler"), "method must be one of"),
        (lambda: pca.bits_per_dim(IMAGES.float()), r"images must be uint8 of shape \(n, c, h, w\); got torch.float32"),
        (lambda: pca.nll(IMAGES[..., :4]), r"got torch.uint8 of shape \(48, 3, 8, 4\)"),
        (lambda: pca.inpaint(IMAGES[:2], known), "inpaint needs a model of pixels that has been trained with known"),
        (lambda: pixel.inpaint(IMAGES[:2], known), "inpaint needs a model of pixels that has been trained with known"),
        (
            lambda: columns.inpaint(IMAGES[:2], known[:4]),
            r"known must be bool of shape \(8, 8\) or bool of shape \(2, 8, 8\)",
        ),
        (lambda: columns.inpaint(IMAGES[:2], known.float()), "got torch.float32"),
        (lambda: fitted("pixel").extend(IMAGES[:2], 3), "extend is for models of columns"),
        (lambda: columns.extend(IMAGES[:2, :1], 3), r"got torch.uint8 of shape \(2, 1, 8, 8\)"),
        (lambda: columns.extend(IMAGES[:2], 3, context=40), "context must lie between"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        GUD.load(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="text is not a complete gudlib checkpoint"):
        GUD.load(tmp_path / "text")
    list(pca.train_steps(1, tmp_path / "run", batch=2, progress=False))
    with pytest.raises(ValueError, match="run is the state of a training run"):
        GUD.load(tmp_path / "run")
