"""Distances between sets of images, on sets whose distance is known."""

import importlib.util
import math

import pytest
import torch
from torch import nn

from gudlib import data, files, metrics

spec = importlib.util.spec_from_file_location("features_script", files.DATA / "features.py")
features_script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(features_script)


class Pixels(nn.Module):
    """Features that are the pixels themselves."""

    name, num_features = "pixel", 12

    def forward(self, images):
        return images.flatten(1)


def normal(n, mean=0.0, deviation=1.0, seed=0, shape=(3, 2, 2)):
    generator = torch.Generator().manual_seed(seed)
    return mean + deviation * torch.randn(n, *shape, generator=generator, dtype=torch.float64)


def test_frechet_distance_of_normals_is_that_of_the_closed_form():
    """|m - m'|^2 + sum_i (s_i - s'_i)^2 where covariances commute."""
    n = 40_000
    got = metrics.frechet(normal(n), normal(n, 0.5, 2.0, seed=1), Pixels())
    assert got.value == pytest.approx(12 * (0.25 + 1), rel=0.02)
    assert got.what == "Frechet distance, pixel features, 40000 real and 40000 generated images"
    assert abs(metrics.frechet(normal(n), normal(n), Pixels()).value) < 1e-6
    again = metrics.frechet(normal(500), normal(300, 0.5, seed=1), Pixels(), chunk=7).value
    assert again == pytest.approx(metrics.frechet(normal(500), normal(300, 0.5, seed=1), Pixels()).value)


def test_frechet_distance_sees_correlations():
    """Equal variances, but all components one and the same: 2 d - 2 tr (C C')^(1/2) = 2 d - 2 sqrt d."""
    same = normal(40_000, seed=2)[:, :1, :1, :1].expand(-1, 3, 2, 2)
    expected = 2 * 12 - 2 * math.sqrt(12)
    assert metrics.frechet(normal(40_000), same, Pixels()).value == pytest.approx(expected, rel=0.02)


def test_precision_and_recall_tell_quality_from_variety():
    real = torch.cat([normal(200, -10, seed=1), normal(200, 10, seed=2)])
    fresh = torch.cat([normal(200, -10, seed=3), normal(200, 10, seed=4)])
    half, noise = normal(400, 10, seed=5), normal(400, 100, seed=6)
    both, one, none = (metrics.coverage(real, x, Pixels()) for x in (fresh, half, noise))
    assert both.precision > 0.7 and both.recall > 0.7
    assert one.precision > 0.7 and 0.3 < one.recall < 0.52
    assert none.precision == none.recall == 0
    assert metrics.coverage(real, torch.cat([fresh, noise]), Pixels()).precision == pytest.approx(
        both.precision / 2, abs=0.05
    )


def test_reach_is_that_of_the_kth_other_image():
    """On a line 0, 1, 3, 7: the second neighbour of 0 is 3 away, of 7 it is 6 away; all in tenths."""
    real = torch.tensor([0.0, 0.1, 0.3, 0.7]).double().reshape(4, 1, 1, 1)
    for place, inside in ((-0.29, True), (-0.31, False), (1.29, True), (1.31, False)):
        probe = torch.full((4, 1, 1, 1), place, dtype=torch.float64)
        assert (metrics.coverage(real, probe, Pixels(), k=2).precision == 1) == inside


def test_copies_are_found_out():
    training, held_out, fresh = (normal(n, seed=i) for i, n in enumerate((300, 1000, 1000)))
    assert metrics.memorised(training[:50] + 0.01, training, held_out) == 1
    assert metrics.memorised(fresh, training, held_out) < 0.03
    mixed = torch.cat([training[:100], fresh[:100]])
    assert metrics.memorised(mixed, training, held_out) == pytest.approx(0.5, abs=0.02)


def test_spectrum_error_counts_decades_of_power():
    real = normal(50, shape=(1, 8, 10))
    assert metrics.spectrum_error(real, real) == 0
    assert metrics.spectrum_error(real, math.sqrt(10) * real) == pytest.approx(1)
    assert metrics.spectrum_error(real, real.flip(-1)) == pytest.approx(0, abs=1e-12)
    waves = torch.fft.fft2(real)  # fine waves only: 3 and 4 of the rings 0 to 4
    y, x = (torch.fft.fftfreq(n, 1 / n) for n in (8, 10))
    fine = (y[:, None].square() + x.square()).sqrt().round() >= 3
    louder = torch.fft.ifft2(torch.where(fine, 10 * waves, waves)).real
    assert metrics.spectrum_error(real, louder) == pytest.approx(math.sqrt(2 / 5 * 4))


def test_shipped_classifier_is_as_good_as_its_card_says():
    extractor, test = metrics.features(), data.load("fashion_mnist", "test")
    assert extractor.name == "Fashion-MNIST classifier" and not any(p.requires_grad for p in extractor.parameters())
    stated = files.read_tensors(metrics.SHIPPED)[1]["accuracy"]
    found = features_script.accuracy(extractor, test.images[:500], test.labels[:500])
    assert found == pytest.approx(stated, abs=0.04) and stated > 0.85
    assert metrics.embed(data.scale(test.images[:5]), extractor).shape == (5, 128)


def test_shipped_features_tell_garments_from_noise_and_take_any_size():
    extractor, x = metrics.features(), data.scale(data.load("fashion_mnist", "test").images)
    near = metrics.frechet(x[:1000], x[1000:], extractor).value
    blurred = nn.functional.avg_pool2d(x[1000:], 3, 1, 1)
    assert near < metrics.frechet(x[:1000], blurred, extractor).value / 3
    assert metrics.embed(torch.zeros(2, 3, 32, 32), extractor).shape == (2, 128)


def test_a_classifier_can_be_trained_again():
    train = data.load("fashion_mnist", "train")
    few = torch.randperm(len(train.images), generator=torch.Generator().manual_seed(0))[:600]
    net = features_script.train_classifier(train.images[few], train.labels[few], epochs=4, progress=False)
    again = features_script.train_classifier(train.images[few], train.labels[few], epochs=4, progress=False)
    assert features_script.accuracy(net, train.images[few], train.labels[few]) > 0.3  # a guess: 0.1
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: metrics.features("vgg"), ValueError, "name must be one of .'fashion', 'inception'.; got 'vgg'"),
        (lambda: metrics.frechet(normal(1), normal(9), Pixels()), ValueError, "at least 2 .* got 1 and 9"),
        (lambda: metrics.coverage(normal(3), normal(9), Pixels()), ValueError, "at least 4 .* got 3 and 9"),
        (lambda: metrics.frechet(normal(9), normal(9, shape=(1, 2, 2)), Pixels()), ValueError, "generated must"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_inception_says_what_it_lacks():
    """Where neither package nor weights are to be had the message names the way out."""
    try:
        import torch_fidelity  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(RuntimeError, match="torch-fidelity .* `fashion` comes with the companion"):
            metrics.features("inception")
