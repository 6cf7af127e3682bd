"""Statistics: the mean and covariance of images and mirror images, with the noise within a grey level exactly."""

import pytest
import torch

from gudlib import likelihood, statistics
from gudlib.data import dequantise

SYMMETRIES = ("none", "mirror", "all")
WITHIN = (1 / 128) ** 2 / 12


def grey(n=40, shape=(2, 3, 3), seed=0):
    """Images with a gradient in each direction, so that no symmetry leaves their statistics as they are."""
    generator = torch.Generator().manual_seed(seed)
    slope = torch.arange(torch.Size(shape).numel()).view(shape) * 7
    return (torch.randint(0, 60, (n, *shape), generator=generator).cumsum(-1) + slope).clamp(0, 255).to(torch.uint8)


def images_of(symmetry, images):
    """All that a symmetry group makes of images, one by one."""
    turned = [images.rot90(k, (2, 3)) for k in range(4)]
    group = {"none": [images], "mirror": [images, images.flip(3)], "all": turned + [x.flip(3) for x in turned]}
    return torch.cat(group[symmetry])


def whole(channel_first):
    """Mean and covariance (g, n, n) of groups (g, b, n) by torch, in float64."""
    return channel_first.mean(1), torch.stack([x.T.cov() for x in channel_first])


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("symmetry", SYMMETRIES)
@pytest.mark.parametrize("kind", ["grey", "float32", "float64"])
@pytest.mark.parametrize("chunk", [1024, 7])
def test_covariance_is_torchs_of_all_mirror_images(kind, symmetry, per_channel, chunk, monkeypatch):
    monkeypatch.setattr(statistics, "CHUNK", chunk)
    images = grey() if kind == "grey" else (grey() / 50 + 3).to(getattr(torch, kind))
    mean, covariance = statistics.covariance(images, symmetry, per_channel)
    x = images_of(symmetry, images).double()
    x = (x + 0.5) / 128 - 1 if kind == "grey" else x
    expected, c = whole(x.reshape(len(x), 2 if per_channel else 1, -1).transpose(0, 1))
    noise = WITHIN * torch.eye(c.shape[-1], dtype=torch.float64) if kind == "grey" else 0
    torch.testing.assert_close(mean, expected.view(2, 3, 3), rtol=0, atol=1e-13)
    torch.testing.assert_close(covariance, c + noise, rtol=0, atol=1e-12 * float(c.max()))


def test_covariance_of_grey_levels_is_what_dequantisation_tends_to():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(100, 103, (500, 1, 2, 2), generator=generator).to(torch.uint8)
    mean, covariance = statistics.covariance(images)
    drawn = torch.cat([dequantise(images, generator) for _ in range(400)]).double().flatten(1)
    torch.testing.assert_close(drawn.mean(0), mean.flatten(), rtol=0, atol=0.01 * WITHIN**0.5)
    torch.testing.assert_close(drawn.T.cov() * 500 / 499, covariance[0], rtol=0, atol=0.04 * WITHIN)
    assert likelihood.GREY_LEVEL**2 / 12 == pytest.approx(statistics.WITHIN_LEVEL, rel=1e-15)


def test_grey_levels_are_summed_exactly_a_chunk_of_the_brightest_and_darkest_included():
    """A chunk of black images has the largest sums of products, 2^24; equal pixels have the noise's variance alone."""
    images = torch.zeros(2 * statistics.CHUNK, 1, 1, 2, dtype=torch.uint8)
    images[: statistics.CHUNK, :, :, 1] = 255
    _, covariance = statistics.covariance(images)
    n = len(images)
    bright = (255 / 128) ** 2 / 4 * n / (n - 1)
    expected = torch.tensor([[[0.0, 0.0], [0.0, bright]]], dtype=torch.float64) + WITHIN * torch.eye(2).double()
    torch.testing.assert_close(covariance, expected, rtol=0, atol=1e-15)


def test_centres_are_exact_and_floats_as_they_are():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(statistics.centres(levels).double(), (levels.double() + 0.5) / 128 - 1)
    same = statistics.centres(levels).double()
    assert statistics.centres(same) is same


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_mirrored_are_the_images_of_a_group_each_once(symmetry):
    images = grey(3)
    found, expected = statistics.mirrored(images, symmetry), images_of(symmetry, images)
    assert sorted(x.flatten().tolist() for x in found) == sorted(x.flatten().tolist() for x in expected)
    assert torch.equal(found[:3], images)


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_refused_with_what_was_given():
    for function in (statistics.covariance, statistics.mirrored):
        with pytest.raises(ValueError, match="symmetries must be one of .*'none', 'mirror', 'all'.*; got 'both'"):
            function(grey(), "both")
        with pytest.raises(ValueError, match="'all' are those of square images; got height 3, width 4"):
            function(grey(shape=(2, 3, 4)), "all")
        function(grey(shape=(2, 3, 4)), "mirror")
    for wrong in (grey(1), grey()[0]):
        with pytest.raises(ValueError, match=r"images must be .* of shape \(., c, h, w\).*; got "):
            statistics.covariance(wrong)
