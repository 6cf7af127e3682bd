"""The denoiser: exact before training, EDM's preconditioning for one scale, and files that are whole or not there."""

import os
import subprocess
import sys

import cases
import pytest
import torch
from cases import BASES, COLUMN, PATIENCE, PRIORS, SHAPE, D, moments, randn, times
from safetensors.torch import save_file
from torch import nn

from gudlib import bases, denoiser, files, priors, schedules
from gudlib.denoiser import Denoiser
from gudlib.exact import gaussian
from gudlib.process import from_eps
from gudlib.references import IndependentGaussian


class Fixed(nn.Module):
    """A network that answers one image and remembers what it was shown."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, images, gamma):
        self.images, self.gamma = images, gamma
        return self.answer.expand(len(images), *SHAPE)


def parts(basis="dct", prior="interpolated"):
    b = BASES[basis]()
    return b, PRIORS[prior](moments(b))


def noised(prior, b=5):
    order = prior.order
    return 2 * randn(b, *SHAPE), schedules.soft_conditioning(order, 1.6, prior.log_variance).gamma(times(b))


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("basis", BASES)
def test_untrained_it_is_exact_for_independent_gaussian_components(basis, prior):
    b, p = parts(basis, prior)
    white_t, gamma = noised(p)
    exact = gaussian(torch.zeros(D, dtype=torch.float64), p.white_variance.flatten().diag())(white_t, gamma)
    untrained = Denoiser(cases.MLP(SHAPE, inputs=2), IndependentGaussian(b, p))
    torch.testing.assert_close(untrained(white_t, gamma), exact, rtol=1e-10, atol=1e-10)


def test_a_fresh_unet_is_exact_too():
    basis = bases.Pixel((1, 8, 8))
    prior = priors.whitened(priors.Moments(randn(1, 8, 8), randn(1, 8, 8, seed=3).exp()))
    white_t, gamma = randn(3, 1, 8, 8), randn(3, 1, 8, 8, seed=4)
    expected = torch.sigmoid(gamma).sqrt() * white_t  # v = 1
    model = denoiser.build(basis, prior, groups=4, width=8)
    torch.testing.assert_close(model(white_t, gamma), expected, rtol=1e-6, atol=1e-6)  # its prior is float32 now


def test_the_network_adds_its_answer_at_the_size_of_the_gaussians_error():
    """eps_hat = eps_G + alpha sqrt(c / v) U F, and Var(eps | chi_t) = alpha^2 c / v."""
    basis, prior = parts()
    white_t, gamma = noised(prior)
    answer = randn(1, *SHAPE, seed=5)
    quiet, loud = (Denoiser(Fixed(f * answer), IndependentGaussian(basis, prior))(white_t, gamma) for f in (0, 1))
    c, alpha2 = prior.white_variance, torch.sigmoid(-gamma)
    v = alpha2 * c + 1 - alpha2
    expected = (alpha2 * c / v).sqrt() * basis(answer)
    torch.testing.assert_close(loud - quiet, expected, rtol=1e-5, atol=1e-6)


def test_the_network_sees_the_white_image_at_unit_variance_and_the_guess_in_data_units():
    basis, prior = parts()
    white_t, gamma = noised(prior)
    network = Fixed(torch.zeros(SHAPE))
    eps = Denoiser(network, IndependentGaussian(basis, prior))(white_t, gamma)
    c, alpha2 = prior.white_variance, torch.sigmoid(-gamma)
    v = alpha2 * c + 1 - alpha2
    unit = basis.inverse(white_t / v.sqrt())
    guess = basis.inverse(prior.scale * from_eps(eps, "x0", white_t, gamma))  # an image, less the mean image
    torch.testing.assert_close(network.images.double(), torch.cat([unit, guess], 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(network.gamma.double(), gamma, rtol=1e-6, atol=1e-6)
    assert network.images.dtype == network.gamma.dtype == torch.float32


def test_for_one_scale_it_is_the_preconditioning_of_edm():
    """D(y) = c_skip y + c_out F(c_in y) with y = chi_t / alpha, sigma = e^(gamma / 2); our F is minus theirs."""
    basis, c = bases.Pixel(SHAPE), 0.36  # sigma_data^2
    m = priors.Moments(torch.zeros(SHAPE, dtype=torch.float64), torch.full(SHAPE, c, dtype=torch.float64))
    answer = randn(1, *SHAPE, seed=5)
    network = Fixed(answer)
    model = Denoiser(network, IndependentGaussian(basis, priors.isotropic(m)))
    white_t, gamma = (
        randn(4, *SHAPE),
        torch.linspace(-6, 6, 4, dtype=torch.float64)[:, None, None, None].expand(4, *SHAPE),
    )
    y, sigma2 = white_t / torch.sigmoid(-gamma).sqrt(), gamma.exp()
    c_skip = c / (sigma2 + c)
    c_out = (sigma2 * c / (sigma2 + c)).sqrt()
    c_in = 1 / (sigma2 + c).sqrt()
    x0 = from_eps(model(white_t, gamma), "x0", white_t, gamma)
    torch.testing.assert_close(x0, c_skip * y - c_out * answer, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(network.images[:, :1].double(), c_in * y, rtol=1e-5, atol=1e-5)


def test_one_noise_level_serves_a_batch():
    basis, prior = parts()
    white_t, gamma = noised(prior)
    model = Denoiser(stirred(cases.MLP(SHAPE, inputs=2, width=16)), IndependentGaussian(basis, prior))
    one = model(white_t, gamma[2])
    torch.testing.assert_close(one, model(white_t, gamma[2:3].expand_as(white_t)))
    assert one.dtype == torch.float64 and model(white_t.float(), gamma.float()).dtype == torch.float32


def test_build_groups_components_by_variance_or_by_a_label():
    basis, prior = bases.Haar((1, 8, 8), 2), priors.Moments(randn(1, 8, 8), randn(1, 8, 8, seed=3).exp())
    prior = priors.whitened(prior)
    by_variance = denoiser.build(basis, prior, groups=4, width=8).network.levels.groups
    assert torch.equal(by_variance, bases.groups_by(prior.order, 4))
    by_level = denoiser.build(basis, prior, groups=3, label="level", width=8).network.levels.groups
    assert torch.equal(by_level, bases.groups_by(basis.label("level"), 3))
    label = 2 * basis.label("level") + (basis.label("column") > 4)  # no label of the basis: it may be given itself
    by_both = denoiser.build(basis, prior, groups=64, label=label, width=8).network.levels.groups
    assert torch.equal(by_both, bases.groups_by(label, 64)) and by_both.max() == 5


# Files


def stirred(network):
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for p in network.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return network


def trained(basis="haar", per_channel=False, conditioning="film"):
    shape = (2, 8, 8)
    images = randn(20, *shape).cumsum(-1)
    b = bases.make(basis, shape, images, **({"per_channel": per_channel} if basis == "pca" else {}))
    model = denoiser.build(
        b, priors.interpolated(priors.measure(b, images, 0.01), 0.7), 4, width=8, conditioning=conditioning
    )
    stirred(model.network)
    return model.eval(), randn(3, *shape).float(), randn(3, *shape, seed=1).float()


CASES = [(name, False, "film") for name in ("pixel", "pca", "fourier", "dct", "haar")]
CASES += [("pca", True, "attention"), ("pixel", False, "map")]


@pytest.mark.parametrize("case", CASES)
def test_a_saved_denoiser_comes_back_the_same(case, tmp_path):
    model, white_t, gamma = trained(*case)
    file = tmp_path / "new" / "model.safetensors"
    denoiser.save(model, file, card={"steps": 3})
    again = denoiser.load(file)
    assert torch.equal(again(white_t, gamma), model(white_t, gamma)) and not again.training
    assert again.prior.floor == model.prior.floor == 0.01
    assert denoiser.card(file) == {"steps": 3}
    assert [p.name for p in file.parent.iterdir()] == ["model.safetensors"]


@pytest.mark.usefixtures("unchecked")
def test_a_file_of_another_network_is_refused_by_name(tmp_path):
    basis, prior = parts()
    mlp = cases.MLP(SHAPE, inputs=2, width=16)
    denoiser.save(Denoiser(mlp, IndependentGaussian(basis.float(), prior.float())), tmp_path / "m")
    with pytest.raises(ValueError, match="m holds a network of kind 'mlp'; use gudlib.mar.load"):
        denoiser.load(tmp_path / "m")
    assert denoiser.card(tmp_path / "m") == {}


def test_half_precision_halves_the_networks_weights_and_nothing_else(tmp_path):
    model, white_t, gamma = trained("pca")
    for name, half in (("whole", False), ("half", True)):
        denoiser.save(model, tmp_path / name, half=half)
    tensors, _ = files.read_tensors(tmp_path / "half")
    for name, value in tensors.items():
        mine = model.state_dict()[name if name.startswith("network.") else f"reference.{name}"]
        network = name.startswith("network.") and value.is_floating_point()
        assert value.dtype == (torch.float16 if network else mine.dtype)
        assert network or torch.equal(value, mine)
    again = denoiser.load(tmp_path / "half")
    assert all(p.dtype == torch.float32 for p in again.parameters())
    torch.testing.assert_close(again(white_t, gamma), model(white_t, gamma), rtol=2e-2, atol=2e-2)
    assert not torch.equal(again(white_t, gamma), model(white_t, gamma))


@pytest.mark.parametrize("share", [0.0, 0.0005, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_named(share, tmp_path):
    file = tmp_path / "model.safetensors"
    denoiser.save(trained()[0], file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    for read in (denoiser.load, denoiser.card):
        with pytest.raises(ValueError, match="model.safetensors is not a complete gudlib checkpoint"):
            read(file)


def test_files_of_others_are_named(tmp_path):
    file = tmp_path / "other.safetensors"
    file.write_bytes(b"\x80\x02}q\x00." * 100)
    with pytest.raises(ValueError, match="other.safetensors is not a complete"):
        denoiser.load(file)
    for metadata in (None, {"format": "pt"}):
        save_file({"x": torch.zeros(3)}, file, metadata=metadata)
        with pytest.raises(ValueError, match="other.safetensors is not a complete"):
            denoiser.load(file)
    with pytest.raises(FileNotFoundError, match="nothing.safetensors"):
        denoiser.load(tmp_path / "nothing.safetensors")


def test_a_save_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    model, white_t, gamma = trained()
    file = tmp_path / "model.safetensors"
    denoiser.save(model, file)
    before = file.read_bytes()

    def full_disk(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        denoiser.save(model, file)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


KILLED_WHILE_SAVING = """
import itertools, os, random, signal, sys, time
import torch
from pathlib import Path
from gudlib import bases, denoiser, networks, priors, references

torch.set_num_threads(1)
folder, shape = Path(sys.argv[1]), (1, 8, 8)
file = folder / "model.safetensors"
m = priors.Moments(torch.zeros(shape), torch.ones(shape))
network = networks.UNet(shape, torch.zeros(shape, dtype=torch.long), inputs=2, width=32)
model = denoiser.Denoiser(network, references.IndependentGaussian(bases.Pixel(shape), priors.whitened(m)))
random.seed(0)
seen = 0
for attempt in range(25):
    child = os.fork()
    if child == 0:
        for step in itertools.count(seen):
            torch.nn.init.constant_(network.head.bias, float(step))
            denoiser.save(model, file, card={"step": step})
    while not file.exists() or attempt and file.stat().st_mtime_ns == before:  # it has begun
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    before = file.stat().st_mtime_ns
    loaded = denoiser.load(file)
    step = denoiser.card(file)["step"]
    assert (loaded.network.head.bias == step).all() and step >= seen
    seen = step + 1
    assert [p.name for p in folder.iterdir() if p.name[0] != "."] == [file.name]  # what is half written is hidden
print("saved", seen)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_killed_while_saving_leaves_a_whole_file(tmp_path):
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 25


def test_column_schedules_reach_the_network_as_they_are():
    basis, prior = parts("pixel", "whitened")
    network = Fixed(torch.zeros(SHAPE))
    gamma = schedules.sequential(COLUMN, 1 / 3).gamma(torch.tensor(0.5, dtype=torch.float64))
    Denoiser(network, IndependentGaussian(basis, prior))(randn(2, *SHAPE), gamma)
    assert network.gamma.shape == (2, *SHAPE) and network.gamma[1, 0, 0].tolist() == pytest.approx([-7.0, -1.0, 5.0])
