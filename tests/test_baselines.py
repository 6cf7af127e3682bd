"""Baselines against slow oracles, as codes that sum to one, and against the numbers known of the embedded sets."""

import functools
import io
import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributions import MultivariateNormal, StudentT

from gudlib import baselines, data


@functools.cache
def load(name):
    return tuple(data.load(name, split).images for split in ("train", "test"))


def images(n, c, h, w, seed=0, top=256):
    """Smooth in places, with equal neighbours and both ends of the range."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, top, (n, c, h, w // 2 + 1), generator=generator).repeat_interleave(2, 3)[..., :w]
    return (coarse + torch.randint(-9, 10, (n, c, h, w), generator=generator)).clamp(0, 255).to(torch.uint8)


CODES = {
    "histograms": baselines.histograms,
    "left": baselines.neighbours,
    "left and upper": partial(baselines.neighbours, upper=True),
    "context table": baselines.context_table,
    "regression 1": partial(baselines.regression, radius=1),
    "regression 2": partial(baselines.regression, radius=2),
    "regression, normal": partial(baselines.regression, radius=1, residuals="normal"),
}


@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 2, 1), (2, 1, 1)], ids=str)
@pytest.mark.parametrize("name", CODES)
def test_probabilities_of_all_images_of_two_pixels_sum_to_one(name, shape):
    pairs = torch.tensor([*itertools.product(range(256), repeat=2)], dtype=torch.uint8)
    found = CODES[name](images(40, *shape), pairs.view(-1, *shape))
    assert found.kind == "grey levels" and found.bits.dtype == torch.float64
    assert torch.exp2(-2 * found.bits).sum().item() == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("shape", [(1, 4, 5), (3, 4, 3)], ids=str)
@pytest.mark.parametrize("name", CODES)
def test_a_pixel_is_coded_with_earlier_ones_only_and_all_values_sum_to_one(name, shape, monkeypatch):
    """Change pixel k: bits of earlier ones stay, and its own 256 probabilities sum to one."""
    maps, coded = [], baselines._coded
    monkeypatch.setattr(baselines, "_coded", lambda name, bits, knows: (maps.append(bits), coded(name, bits, knows))[1])
    order = [(j, y, x) for y, x, j in itertools.product(range(shape[1]), range(shape[2]), range(shape[0]))]
    changed = images(1, *shape, seed=1).repeat(len(order), 256, 1, 1, 1)
    for k, place in enumerate(order):
        changed[(k, slice(None), *place)] = torch.arange(256, dtype=torch.uint8)
    found = CODES[name](images(40, *shape), changed.flatten(0, 1))
    torch.testing.assert_close(found.bits, maps[0].mean((1, 2, 3)))
    bits = torch.stack([maps[0].view(changed.shape)[(..., *place)] for place in order])  # of pixel, change, value
    own = bits.diagonal(dim1=0, dim2=1)
    torch.testing.assert_close(torch.exp2(-own).sum(0), torch.ones_like(own[0]), rtol=0, atol=1e-9)
    for k, of_pixel in enumerate(bits):
        later = of_pixel[k + 1 :]
        torch.testing.assert_close(later, of_pixel[-1, -1].expand_as(later), rtol=1e-9, atol=1e-9)


def slow_contexts(name, x, j, y, k):
    """Context of a pixel of one image, an array (c, h, w), by its definition."""
    c, h, w = x.shape

    def at(y, k):
        return int(x[j, y, k]) if 0 <= y and 0 <= k < w else 0

    west, north, northwest, northeast = at(y, k - 1), at(y - 1, k), at(y - 1, k - 1), at(y - 1, k + 1)
    if name == "histograms":
        return j, y, k
    if name == "left":
        return j, west
    if name == "left and upper":
        return j, west // 8, north // 8
    if northwest >= max(west, north):
        predicted = min(west, north)
    elif northwest <= min(west, north):
        predicted = max(west, north)
    else:
        predicted = west + north - northwest
    texture = abs(west - northwest) + abs(north - northwest) + abs(north - northeast)
    classes = sum(texture > cut for cut in (0, 1, 4, 10, 20, 40, 70, 110, 170, 260))
    return j, math.ceil(predicted * 63 / 255 - 1e-9) if predicted < 1 else 1 + (predicted - 1) * 63 // 255, classes


@pytest.mark.parametrize("c", [1, 2])
@pytest.mark.parametrize("name", ["histograms", "left", "left and upper", "context table"])
def test_tables_are_counts_by_their_definition(name, c):
    train, test = images(30, c, 5, 6), images(4, c, 5, 6, seed=1)
    counts, whole = {}, np.ones(256)
    places = [*itertools.product(range(c), range(5), range(6))]
    for x in train.numpy():
        for place in places:
            counts.setdefault(slow_contexts(name, x, *place), np.zeros(256))[x[place]] += 1
            whole[x[place]] += 1
    added = 8 * whole / whole.sum() if name == "context table" else np.ones(256)
    expected = []
    for x in test.numpy():
        weights = [(counts.get(slow_contexts(name, x, *place), 0 * whole) + added, x[place]) for place in places]
        expected.append(np.mean([-np.log2(w[level] / w.sum()) for w, level in weights]))
    np.testing.assert_allclose(CODES[name](train, test).bits, expected, rtol=1e-12)


def test_contexts_are_704_and_all_reached(monkeypatch):
    seen = []
    counts = baselines._counts

    def spy(images, context, contexts):
        seen.append((context(images.long()), contexts))
        return counts(images, context, contexts)

    monkeypatch.setattr(baselines, "_counts", spy)
    x = torch.randint(0, 256, (3000, 1, 9, 9), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    smooth = (x[:, :, :1, :1] + x % torch.tensor([1, 2, 5, 20]).repeat(750)[:, None, None, None]).to(torch.uint8)
    baselines.context_table(torch.cat([x, smooth]), x[:1])
    ((context, contexts),) = seen
    assert contexts == 704 and context.min() == 0 and context.max() == 703


def causal(x, j, y, k, radius):
    """Values known before colour j of the pixel (y, k) of an image (c, h, w), within a radius, in any fixed order."""
    c, h, w = x.shape
    known = []
    for row, column, colour in itertools.product(range(h), range(w), range(c)):
        near = abs(row - y) <= radius and abs(column - k) <= radius
        if near and (row, column, colour) < (y, k, j):
            known.append(x[colour, row, column])
    return np.array(known, dtype=np.float64)


@pytest.mark.parametrize("radius", [0, 1, 2])
@pytest.mark.parametrize("shape", [(1, 4, 5), (3, 3, 4), (2, 6, 2)], ids=str)
def test_regression_is_least_squares_of_all_known_neighbours(shape, radius):
    """Pixels with the same neighbours share a fit; normal residuals, whose scale is the root of the mean square."""
    c, h, w = shape
    train, test = images(50, *shape, top=200).numpy(), images(3, *shape, seed=1).numpy()
    groups = {}
    for y, k in itertools.product(range(h), range(w)):
        groups.setdefault((min(y, radius), min(k, radius), min(w - 1 - k, radius)), []).append((y, k))
    bits = np.zeros(test.shape)
    for places, j in itertools.product(groups.values(), range(c)):
        known = np.array([[1, *causal(x, j, y, k, radius)] for x in train for y, k in places])
        target = np.array([x[j, y, k] for x in train for y, k in places], dtype=np.float64)
        weight = np.linalg.lstsq(known, target, rcond=None)[0]
        scale = np.sqrt(np.mean((target - known @ weight) ** 2))
        for i, (y, k) in itertools.product(range(len(test)), places):
            centre = np.array([1, *causal(test[i], j, y, k, radius)]) @ weight
            below = [(1 + math.erf((v - 0.5 - centre) / scale / math.sqrt(2))) / 2 for v in range(257)]
            below[0], below[256] = 0, 1
            p = below[int(test[i, j, y, k]) + 1] - below[int(test[i, j, y, k])]
            bits[i, j, y, k] = -math.log2((len(target) * p + 1 / 256) / (len(target) + 1))
    found = baselines.regression(torch.from_numpy(train), torch.from_numpy(test), radius, "normal")
    np.testing.assert_allclose(found.bits, bits.mean((1, 2, 3)), rtol=1e-7)


def test_regression_of_an_exact_law_costs_next_to_nothing():
    """A row that repeats the one above, and colours that repeat the first: only the first of each is news."""
    row = images(400, 1, 1, 6)
    exact = row.expand(-1, 3, 5, -1).contiguous()
    each = baselines.regression(exact[:300], exact[300:], radius=1)
    assert each.mean < 8.5 / 15 + 0.1


@pytest.mark.parametrize("freedom", [0.5, 1.0, 2.0, 3.3, 12.0, 100.0])
def test_tail_of_students_t_is_its_integral(freedom):
    z = torch.tensor([0.0, 1e-3, 0.3, 1.0, 2.0, 5.0, 30.0], dtype=torch.float64)
    u, weight = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(400))
    angle = torch.atan(z / math.sqrt(freedom))[:, None]  # t = sqrt(f) tan(angle): bounded
    half = (math.pi / 2 - angle) / 2
    at = angle + half * (u + 1)
    f = torch.tensor(freedom, dtype=torch.float64)
    density = StudentT(f).log_prob(f.sqrt() * torch.tan(at)).exp() * f.sqrt() / at.cos() ** 2
    rtol = 5e-3 if freedom < 1 else 1e-6 if freedom < 4 else 1e-9  # of the quadrature, whose integrand is cos^(f - 1)
    torch.testing.assert_close(baselines._student_tail(z, freedom), (density * half * weight).sum(1), rtol=rtol, atol=0)


def test_tail_of_students_t_in_closed_form_to_both_ends():
    z = torch.cat([torch.zeros(1), torch.logspace(-8, 8, 200, dtype=torch.float64), torch.tensor([math.inf])]).double()
    cauchy, two = torch.atan2(torch.ones_like(z), z) / math.pi, 1 / (2 + z**2 + z * (2 + z**2).sqrt())
    two[-1] = 0
    torch.testing.assert_close(baselines._student_tail(z, 1.0), cauchy, rtol=1e-12, atol=0)
    torch.testing.assert_close(baselines._student_tail(z, 2.0), two, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("freedom", "scale"), [(1.5, 0.5), (4.0, 3.0), (30.0, 1.0)])
def test_students_t_is_fitted_by_maximum_likelihood(freedom, scale):
    torch.manual_seed(0)
    x = StudentT(torch.tensor(freedom, dtype=torch.float64), scale=scale).sample((20_000,))
    found = baselines._fit_student(x)
    assert found[1] == pytest.approx(scale, rel=0.05) and 1 / found[0] == pytest.approx(1 / freedom, abs=0.02)
    freedom, scale = torch.tensor(found, dtype=torch.float64)
    best = StudentT(freedom, scale=scale).log_prob(x).mean()
    for a, b in itertools.product((0.9, 1.0, 1.1), (0.99, 1.0, 1.01)):
        assert StudentT(a * freedom, scale=b * scale).log_prob(x).mean() <= best


def test_residuals_without_spread_have_the_finest_scale():
    assert baselines._fit_student(torch.zeros(50, dtype=torch.float64))[1] == pytest.approx(baselines.FINEST, abs=0.01)


@pytest.mark.parametrize("centre", [-40.0, 0.2, 127.5, 254.9, 300.0])
@pytest.mark.parametrize("scale", [0.1, 3.0, 80.0])
def test_discretised_distributions_sum_to_one_and_keep_their_digits(scale, centre):
    level, at = torch.arange(256, dtype=torch.float64), torch.tensor(centre, dtype=torch.float64)
    p = baselines._discretised(level, at, lambda z: baselines._student_tail(z / scale, 1.0))
    assert p.sum().item() == pytest.approx(1, abs=1e-12)
    z = (level - centre) / scale
    inner = torch.atan2(torch.ones_like(z) / scale, 1 + z**2 - 0.25 / scale**2) / math.pi  # of atan(a) - atan(b)
    torch.testing.assert_close(p[1:-1], inner[1:-1], rtol=1e-9, atol=0)


@pytest.mark.parametrize("symmetries", ["none", "mirror", "all"])
def test_normal_distribution_is_the_mean_over_dequantised_images(symmetries):
    """By torch's density of the moments of all mirror images."""
    train, test = images(60, 1, 3, 3) // 20, images(2, 1, 3, 3, seed=1) // 20
    generator, moved = torch.Generator().manual_seed(0), [train]
    if symmetries != "none":
        moved += [x.flip(3) for x in moved]
    if symmetries == "all":
        moved += [x.flip(2) for x in moved]
        moved += [x.transpose(2, 3) for x in moved]
    known = (torch.cat(moved).double().flatten(1) + 0.5) / 128 - 1
    covariance = known.T.cov() + torch.eye(9, dtype=torch.float64) / (12 * 128**2)
    y = data.dequantise(test.repeat(100_000, 1, 1, 1), generator).double().flatten(1)
    nats = -MultivariateNormal(known.mean(0), covariance).log_prob(y).view(-1, 2).mean(0)
    found = baselines.normal(train, test, symmetries)
    torch.testing.assert_close(found.bits, nats / (9 * math.log(2)) + 7, rtol=0, atol=5e-4)
    assert found.kind == "density"


@pytest.mark.parametrize("c", [1, 3])
def test_webp_decodes_to_the_image_and_counts_every_byte(c, monkeypatch):
    written, save = [], Image.Image.save

    def spy(image, file, *arguments, **options):
        save(image, file, *arguments, **options)
        written.append(file.getvalue())

    monkeypatch.setattr(Image.Image, "save", spy)
    x = images(3, c, 12, 20)
    found = baselines.webp(x)
    for i, file in enumerate(written):
        decoded = torch.from_numpy(np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).copy()).permute(2, 0, 1)
        assert file[:4] == b"RIFF" and torch.equal(decoded, x[i].expand(3, -1, -1))
        assert found.bits[i].item() == 8 * len(file) / (c * 12 * 20)


@pytest.mark.parametrize("effort", [{"method": 6, "quality": 90}, {"method": 4, "quality": 100}])
def test_webp_is_at_its_best(effort):
    garments = load("fashion_mnist")[1][:40, 0]
    sizes = []
    for picture in garments.numpy():
        Image.fromarray(picture).save(file := io.BytesIO(), "WEBP", lossless=True, **effort)
        sizes.append(len(file.getvalue()))
    assert baselines.webp(garments[:, None]).mean < 0.999 * 8 * np.mean(sizes) / 784


def test_webp_refuses_two_colours():
    with pytest.raises(ValueError, match=r"grey \(c = 1\) or RGB \(c = 3\); got c = 2"):
        baselines.webp(images(1, 2, 4, 4))


# Numbers known of the embedded sets


@pytest.mark.parametrize(
    ("name", "bits"), [("histograms", 4.58), ("left", 3.89), ("left and upper", 3.46), ("context table", 3.31)]
)
def test_tables_of_garments(name, bits):
    assert CODES[name](*load("fashion_mnist")).mean == pytest.approx(bits, abs=0.005)


def test_regression_of_histology():
    train, test = load("histology")
    assert baselines.regression(train[::4], test, radius=2).mean == pytest.approx(2.79, abs=0.005)


@pytest.mark.parametrize(("symmetries", "bits"), [("none", 3.46), ("all", 2.92)])
def test_normal_distribution_of_histology(symmetries, bits):
    assert baselines.normal(*load("histology"), symmetries).mean == pytest.approx(bits, abs=0.005)


def test_webp_of_a_picture_beats_that_of_its_patches():
    """The test region in one file, from patches that tile it, and these each in one."""
    patches = data.load("histology", "test").images.view(33, 7, 3, 32, 32)[::2, ::2]  # 30 pixels apart
    picture = patches[..., :30, :30].permute(2, 0, 3, 1, 4).reshape(1, 3, 17 * 30, 4 * 30)
    assert baselines.webp(picture).mean == pytest.approx(2.96, abs=0.02)
    assert baselines.webp(patches[:, 0]).mean > 3.2


# The table


def test_table_is_sorted_and_holds_what_applies():
    grey = baselines.table(images(20, 1, 2, 2), images(3, 1, 2, 2, seed=1))
    assert [b.name for b in sorted(grey, key=lambda b: list(baselines.BASELINES).index(b.name))] == list(
        baselines.BASELINES
    )
    assert [b.mean for b in grey] == sorted(b.mean for b in grey)
    oblong = {b.name for b in baselines.table(images(20, 2, 1, 2), images(3, 2, 1, 2, seed=1))}
    assert set(baselines.BASELINES) - oblong == {"normal distribution, eight symmetries", "WebP, lossless"}
    which = ["left neighbour", "independent histograms"]
    assert {b.name for b in baselines.table(images(9, 1, 4, 4), images(3, 1, 4, 4), which)} == set(which)


def test_frame_and_errors():
    bits = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    one = baselines.Baseline("some", bits, "density", "nothing")
    assert one.mean == pytest.approx(7 / 3) and one.error == pytest.approx(bits.std().item() / math.sqrt(3))
    assert math.isnan(baselines.Baseline("some", bits[:1], "density", "nothing").error)
    shown = baselines.frame([one])
    assert list(shown.columns) == ["model", "bits/dim", "error", "kind", "what it knows"]
    assert shown.iloc[0].tolist() == ["some", one.mean, one.error, "density", "nothing"]


def test_published_numbers_say_where_they_are_from():
    assert all(p.images in data.KNOWN and "https://arxiv.org/abs/" in p.source for p in baselines.PUBLISHED)
    assert all(2 < p.bits < 4 and p.decoder and p.preprocessing for p in baselines.PUBLISHED)
    assert len({p.model for p in baselines.PUBLISHED}) == len(baselines.PUBLISHED)


GOOD = images(3, 1, 4, 5)
TABLE = partial(baselines.table, GOOD, GOOD)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: baselines.histograms(GOOD, GOOD.float()),
            r"test must be uint8 of shape \(m, 1, 4, 5\); got torch.float32",
        ),
        (
            lambda: baselines.neighbours(GOOD, GOOD[..., :4]),
            r"test must be uint8 of shape \(m, 1, 4, 5\); got torch.uint8 of shape \(3, 1, 4, 4\)",
        ),
        (
            lambda: baselines.context_table(GOOD[:0], GOOD),
            "train must not be empty; got .*0, 1, 4, 5",
        ),
        (lambda: baselines.webp(GOOD[0]), r"test must be uint8 of shape \(m, c, h, w\)"),
        (lambda: baselines.regression(GOOD, GOOD, -1), "radius must be at least 0; got -1"),
        (lambda: baselines.regression(GOOD, GOOD, 1, "uniform"), "residuals must be one of .*; got 'uniform'"),
        (lambda: baselines.normal(GOOD, GOOD, "some"), "symmetries must be one of .*; got 'some'"),
        (lambda: baselines.normal(GOOD, GOOD, "all"), "square images"),
        (lambda: baselines.normal(GOOD[:1], GOOD), "n at least 2"),
        (lambda: TABLE(which=["left neighbour", "right"]), r"which must be among .*; got \['right'\]"),
    ],
)
def test_what_makes_no_baseline_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
