r"""Baselines: how short a code of 8-bit images is without any network, in bits per dimension for each image.

Any distribution P of images of d grey levels, fitted to training images alone, is a code of length

    bits/dim = -log2 P(x) / d,

so what a network has learned is what it saves beyond the best of these. Those in *raster order* (rows from above, each
from the left, colours in turn) code a grey level with what is known already,

    log2 P(x) = sum_i log2 P(x_i | x_1, ..., x_(i-1)),

where P is a table of counts for each *context*, a class of the neighbours' values, or a distribution around a linear
prediction; every P(x_i | ...) is above 0 and sums to one over the 256 grey levels. Where a baseline is a density p of
dequantised images y = (x + u) / 128 - 1, u ~ U[0, 1), it bounds a code as the NLL of a diffusion model does
(`gudlib.data`):

    bits/dim = -E_u log2 p(y) / d + 7,

here with the exact mean over the noise u.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int64, UInt8
from pandas import DataFrame
from torch import Tensor
from torch.nn.functional import pad

from gudlib import checks, statistics
from gudlib.doors import door
from gudlib.likelihood import bits_per_dim
from gudlib.references import Reference

Grey = UInt8[Tensor, "n c h w"]
Unseen = UInt8[Tensor, "m c h w"]
Levels = Int64[Tensor, "n c h w"]
Bits = Float[Tensor, "n c h w"]

LEVELS = 256
CHUNK = 1024  # images at a time
TEXTURE = (0, 1, 4, 10, 20, 40, 70, 110, 170, 260)  # upper ends of all classes but the last, in grey levels
PREDICTIONS = 64  # classes of the predicted grey level; one is prediction 0
PULL = 8  # of a context towards the histogram of all contexts, in pixels
RESIDUALS = 20_000  # two parameters are fitted to that many or a few more: the error is 1 / 20,000 nats
FINEST, ROUNDEST = 0.1, 100.0  # smallest scale of residuals, in grey levels, and most degrees of freedom
FRACTIONS = 20  # of the continued fraction: the relative error is below 1e-9 up to `ROUNDEST`


@dataclass(frozen=True)
class Baseline:
    """Code length of n test images.

    Attributes:
        name: of the model.
        bits: of each image, in bits per dimension, (n,).
        kind: `grey levels` if it is a code of these, `density` if a density of dequantised images bounds one.
        knows: what the model knows of images, in words.
    """

    name: str
    bits: Float[Tensor, " n"]
    kind: Literal["grey levels", "density"]
    knows: str

    @property
    def mean(self) -> float:
        """Bits per dimension, over all images."""
        return float(self.bits.mean())

    @property
    def error(self) -> float:
        """Standard error of `mean` over images, taken as independent (overlapping ones are not); nan if n = 1."""
        return float(self.bits.std() / math.sqrt(len(self.bits))) if len(self.bits) > 1 else math.nan


@dataclass(frozen=True)
class Published:
    """A number from the literature, on the official test images.

    Attributes:
        images: name of the image set, as in `data.KNOWN`.
        model: name.
        bits: bits per dimension.
        source: title, authors, year, URL.
        decoder: how grey levels get a probability; "not known" where it is not.
        preprocessing: of the training images; "not known" likewise.
    """

    images: str
    model: str
    bits: float
    source: str
    decoder: str
    preprocessing: str


# For Fashion-MNIST none comparable is known
PUBLISHED = (
    Published(
        "cifar10",
        "PixelCNN++",
        2.92,
        "PixelCNN++: Improving the PixelCNN with Discretized Logistic Mixture Likelihood and Other Modifications, "
        "T. Salimans, A. Karpathy, X. Chen, D. P. Kingma, 2017, https://arxiv.org/abs/1701.05517",
        "mixture of discretised logistic distributions, pixel after pixel",
        "not known",
    ),
    Published(
        "cifar10",
        "Sparse Transformer",
        2.80,
        "Generating Long Sequences with Sparse Transformers, R. Child, S. Gray, A. Radford, I. Sutskever, 2019, "
        "https://arxiv.org/abs/1904.10509",
        "softmax over 256 grey levels, one after another",
        "not known",
    ),
    Published(
        "cifar10",
        "DDPM",
        3.70,
        "Denoising Diffusion Probabilistic Models, J. Ho, A. Jain, P. Abbeel, 2020, https://arxiv.org/abs/2006.11239, "
        "trained for the bound (3.75 if trained for quality)",
        "bound; discretised normal distribution",
        "random mirror images",
    ),
    Published(
        "cifar10",
        "Score SDE",
        2.99,
        "Score-Based Generative Modeling through Stochastic Differential Equations, Y. Song, J. Sohl-Dickstein, "
        "D. P. Kingma, A. Kumar, S. Ermon, B. Poole, 2021, https://arxiv.org/abs/2011.13456, table 2",
        "density of uniformly dequantised images, by the probability-flow ODE",
        "random mirror images",
    ),
    Published(
        "cifar10",
        "VDM",
        2.65,
        "Variational Diffusion Models, D. P. Kingma, T. Salimans, B. Poole, J. Ho, 2021, "
        "https://arxiv.org/abs/2107.00630",
        "bound; softmax over 256 grey levels around the least noised image",
        "none",
    ),
    Published(
        "cifar10",
        "GUD",
        3.17,
        "GUD: Generation with Unified Diffusion, M. Gerdes, M. Welling, M. C. N. Cheng, 2024, "
        "https://arxiv.org/abs/2410.02667, section 5.3",
        "not known",
        "not known",
    ),
)


@door
def histograms(train: Grey, test: Unseen) -> Baseline:
    """Independent grey levels: a histogram for each pixel and colour, with one count added to every grey level.

    Arguments:
        train, test: grey levels (n, c, h, w), of one shape.

    Raises:
        ValueError: if the images are no 8-bit images of one shape.
    """
    train, test = train.cpu(), test.cpu()
    place = torch.arange(test[0].numel()).view(test.shape[1:])
    bits = _table_bits(test, _counts(train, place.expand_as, place.numel()) + 1, place.expand_as)
    return _coded("independent histograms", bits, "each pixel's distribution")


@door
def neighbours(train: Grey, test: Unseen, upper: bool = False) -> Baseline:
    """A histogram for each value of the left neighbour, shared by all pixels, with one count added to all grey levels.

    Colours are coded each on its own; outside the picture all is 0.

    Arguments:
        train, test: as for `histograms`.
        upper: tell apart 32 x 32 classes of the left and the upper neighbour, eight grey levels in each, instead.

    Raises:
        ValueError: as `histograms`.
    """
    train, test = train.cpu(), test.cpu()

    def context(x: Levels) -> Levels:
        west, north, *_ = _neighbours(x)
        return _each_colour(west // 8 * 32 + north // 8, 32**2) if upper else _each_colour(west, LEVELS)

    contexts = test.shape[1] * (32**2 if upper else LEVELS)
    bits = _table_bits(test, _counts(train, context, contexts) + 1, context)
    if upper:
        return _coded("left and upper neighbour", bits, "pairs with the left and the upper pixel, coarse")
    return _coded("left neighbour", bits, "pairs with the left pixel")


@door
def context_table(train: Grey, test: Unseen) -> Baseline:
    """A histogram for each of 704 contexts: the prediction of LOCO-I (JPEG-LS), and how rough the neighbourhood is.

    With the neighbours W, N, NW and NE (outside the picture 0), the *median edge detector* predicts

        median(W, N, W + N - NW),

    in 64 bins, one of them for 0; the texture |W - NW| + |N - NW| + |N - NE| has 11 classes. The histogram of all
    contexts counts as `PULL` further pixels in each; itself it has one count added. Colours are coded each on its own.

    Arguments:
        train, test: as for `histograms`.

    Raises:
        ValueError: as `histograms`.

    References:
        The LOCO-I Lossless Image Compression Algorithm: Principles and Standardization into JPEG-LS, M. J. Weinberger,
        G. Seroussi, G. Sapiro, 2000, https://doi.org/10.1109/83.855427, section III
    """
    train, test = train.cpu(), test.cpu()
    cuts, classes = torch.tensor(TEXTURE), PREDICTIONS * (len(TEXTURE) + 1)

    def context(x: Levels) -> Levels:
        west, north, northwest, northeast = _neighbours(x)
        predicted = (west + north - northwest).clamp(torch.minimum(west, north), torch.maximum(west, north))
        bins = torch.where(predicted == 0, 0, 1 + (predicted - 1) * (PREDICTIONS - 1) // (LEVELS - 1))
        texture = (west - northwest).abs() + (north - northwest).abs() + (north - northeast).abs()
        return _each_colour(bins * (len(TEXTURE) + 1) + torch.bucketize(texture, cuts), classes)

    counts = _counts(train, context, test.shape[1] * classes)
    whole = counts.sum(0) + 1
    bits = _table_bits(test, counts + PULL * whole / whole.sum(), context)
    return _coded("context table", bits, "LOCO-I prediction and local texture, four pixels")


@door
def regression(
    train: Grey, test: Unseen, radius: int = 4, residuals: Literal["student", "normal"] = "student"
) -> Baseline:
    """A distribution around the best linear prediction from all neighbours within a radius that are known already.

    These are all colours of earlier pixels whose row and column differ by at most the radius, and earlier colours of
    the pixel itself. Near the borders some don't exist: each set of neighbours that occurs has its own least squares
    and, for each colour, its own distribution of residuals, fitted to those of the training images by maximum
    likelihood. Its probability is collected on whole numbers, all below 0 on 0 and all above 255 on 255; one further
    training residual, spread over all 256 grey levels, keeps each above 0.

    Arguments:
        train, test: as for `histograms`.
        radius: at least 0, in pixels.
        residuals: Student's t with degrees of freedom from 0.5 to `ROUNDEST`, or normal.

    Raises:
        ValueError: as `histograms`, or for other residuals or a negative radius.
    """
    train, test = train.cpu(), test.cpu()
    bits = _regression_bits(train, test, radius, residuals)
    words = {"student": "", "normal": ", normal residuals"}[residuals]
    return _coded(f"causal regression, radius {radius}{words}", bits, f"linear prediction within {radius} pixels")


@door
def normal(train: Grey, test: Unseen, symmetries: str = "none") -> Baseline:
    """The normal distribution of dequantised images: mean and covariance of all pixels, the noise exact in both.

    With y_c the grey levels at their centres and C = cov(y_c) + I v, where v is the variance of the noise, a test
    image's NLL is in the mean over the noise (`gudlib.statistics`)

        ((y_c - m)^T C^-1 (y_c - m) + v tr C^-1 + log det 2 pi C) / 2.

    Arguments:
        train, test: as for `histograms`; at least two training images.
        symmetries: under which mean and covariance are averaged, `none`, `mirror` or `all` (`statistics.mirrored`).

    Raises:
        ValueError: as `histograms`, for fewer than two training images, or for symmetries that don't apply.
    """
    train, test = train.cpu(), test.cpu()
    mean, covariance = statistics.covariance(train, symmetries)
    factor = torch.linalg.cholesky(covariance[0])
    away = (statistics.centres(test).double() - mean).flatten(1)
    square = torch.linalg.solve_triangular(factor, away.T, upper=False).square().sum(0)
    noise = statistics.WITHIN_LEVEL * torch.cholesky_inverse(factor).trace()
    log_volume = away.shape[1] * math.log(2 * math.pi) + 2 * factor.diagonal().log().sum()
    bits = torch.as_tensor(bits_per_dim((square + noise + log_volume) / 2, away.shape[1]))
    words = {"none": "", "mirror": ", mirror images", "all": ", eight symmetries"}[symmetries]
    return Baseline(f"normal distribution{words}", bits, "density", f"mean and covariance{words}")


@door
def webp(test: Unseen) -> Baseline:
    """Lossless WebP, as Pillow writes it with method 6 and quality 100: all bytes of one file for each image.

    Each has about 30 bytes of headers, and code tables of its own, which small images can hardly repay. An image may as
    well be a whole picture or a sheet of many, which then share them.

    Arguments:
        test: grey levels (n, c, h, w), c = 1 or 3.

    Raises:
        ValueError: if these are no 8-bit images, grey or RGB.
    """
    from PIL import Image

    test = test.cpu()
    if test.shape[1] not in (1, 3):
        raise ValueError(f"test must be grey (c = 1) or RGB (c = 3); got c = {test.shape[1]}")
    sizes = []
    for picture in test.permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        image = Image.fromarray(picture if picture.shape[2] == 3 else picture[..., 0])
        image.save(file, "WEBP", lossless=True, method=6, quality=100)
        sizes.append(8 * file.tell())
    bits = torch.tensor(sizes, dtype=torch.float64) / test[0].numel()
    return Baseline("WebP, lossless", bits, "grey levels", "natural images; headers count")


BASELINES: dict[str, Callable[[Grey, Unseen], Baseline]] = {
    "independent histograms": histograms,
    "left neighbour": neighbours,
    "left and upper neighbour": partial(neighbours, upper=True),
    "context table": context_table,
    "causal regression, radius 2": partial(regression, radius=2),
    "causal regression, radius 4": partial(regression, radius=4),
    "normal distribution": normal,
    "normal distribution, mirror images": partial(normal, symmetries="mirror"),
    "normal distribution, eight symmetries": partial(normal, symmetries="all"),
    "WebP, lossless": lambda _, test: webp(test),
}


@door
def table(train: Grey, test: Unseen, which: Sequence[str] | None = None) -> list[Baseline]:
    """Baselines of the same test images, the shortest code first.

    Arguments:
        train, test: as for `histograms`.
        which: names of `BASELINES`; default all that apply, which spares images that are not square the eight
            symmetries, and those that are neither grey nor RGB a file.

    Raises:
        ValueError: as `histograms`, or for unknown names.
    """
    train, test = train.cpu(), test.cpu()
    if which is None:
        inapplicable = {
            "normal distribution, eight symmetries": test.shape[2] != test.shape[3],
            "WebP, lossless": test.shape[1] not in (1, 3),
        }
        which = [name for name in BASELINES if not inapplicable.get(name)]
    if unknown := [name for name in which if name not in BASELINES]:
        raise ValueError(f"which must be among {tuple(BASELINES)}; got {unknown}")
    return sorted((BASELINES[name](train, test) for name in which), key=lambda baseline: baseline.mean)


@door
def of(reference: Reference, test: Unseen, name: str | None = None) -> Baseline:
    """A reference distribution, around which a network can be put, as a baseline: what the network starts from.

    Arguments:
        reference: fitted to training images.
        test: uint8 (m, c, h, w). For a density they are dequantised, with noise of a fixed seed.
        name: to show; default the reference's own.
    """
    test = test.cpu()
    kind: Literal["grey levels", "density"] = "grey levels" if reference.decoder == "discrete" else "density"
    bits = reference.bits(test.to(reference.prior.mean.device)).cpu()
    return Baseline(name or reference.name, bits, kind, reference.knows)


@door
def frame(baselines: Sequence[Baseline]) -> DataFrame:
    """A table with the columns model, bits/dim, error (standard error over images), kind, and what it knows."""
    return DataFrame(
        [(b.name, b.mean, b.error, b.kind, b.knows) for b in baselines],
        columns=["model", "bits/dim", "error", "kind", "what it knows"],
    )


def _coded(name: str, bits: Bits, knows: str) -> Baseline:
    return Baseline(name, bits.flatten(1).mean(1), "grey levels", knows)


# Tables


def _neighbours(x: Levels) -> tuple[Levels, Levels, Levels, Levels]:
    """West, north, northwest and northeast of every pixel; 0 outside the picture."""
    wide = pad(x, (1, 1, 1, 0))
    return wide[..., 1:, :-2], wide[..., :-1, 1:-1], wide[..., :-1, :-2], wide[..., :-1, 2:]


def _each_colour(context: Levels, contexts: int) -> Levels:
    return context + contexts * torch.arange(context.shape[1])[:, None, None]


def _counts(images: Grey, context: Callable[[Levels], Levels], contexts: int) -> Float[Tensor, "contexts 256"]:
    """How often each grey level follows each context."""
    counts = torch.zeros(contexts * LEVELS, dtype=torch.float64)
    for part in images.split(CHUNK):
        x = part.long()
        counts += torch.bincount((context(x) * LEVELS + x).flatten(), minlength=len(counts))
    return counts.view(contexts, LEVELS)


def _table_bits(images: Grey, weights: Float[Tensor, "contexts 256"], context: Callable[[Levels], Levels]) -> Bits:
    """Bits of every pixel, with probabilities proportional to weights."""
    bits = -(weights / weights.sum(1, keepdim=True)).log2()
    return torch.cat([bits[context(part.long()), part.long()] for part in images.split(CHUNK)])


# Regression


def _regression_bits(train: Grey, test: Unseen, radius: int, residuals: str) -> Float[Tensor, "m c h w"]:
    radius = checks.whole("radius", radius, 0)
    c, h, w = test.shape[1:]
    bits, generator = torch.zeros(test.shape, dtype=torch.float64), torch.Generator().manual_seed(0)
    columns = _spans(w, lambda x: (min(x, radius), min(w - 1 - x, radius)))
    for (up,), rows in _spans(h, lambda y: (min(y, radius),)).items():
        for (left, right), span in columns.items():
            above = [(dy, dx) for dy in range(-up, 0) for dx in range(-left, right + 1)]
            known = partial(_known, rows=rows, columns=span, offsets=[*above, *((0, dx) for dx in range(-left, 1))])
            size, seen = c * len(above) + c * (left + 1) + 1, len(train) * len(rows) * len(span)
            gram, some = torch.zeros(size, size, dtype=torch.float64), []
            for part in train.split(max(1, 2**24 // (size * len(rows) * len(span)))):
                x = known(part)
                gram += x @ x.T
                n = min(x.shape[1], math.ceil(x.shape[1] / seen * RESIDUALS))
                some.append(x[:, torch.randperm(x.shape[1], generator=generator)[:n]])
            some, further, fits = torch.cat(some, 1), 1 / (seen + 1), []
            for k in range(size - c, size):
                weight = torch.linalg.lstsq(gram[:k, :k], gram[:k, k : k + 1], driver="gelsd").solution[:, 0]
                fits.append((k, weight, _fitted_tail(some[k] - weight @ some[:k], residuals)))
            for part, code in zip(test.split(CHUNK // 4), bits.split(CHUNK // 4), strict=True):
                x = known(part)
                p = torch.stack([_discretised(x[k], weight @ x[:k], tail) for k, weight, tail in fits])
                p = p.view(c, len(part), len(rows), len(span)).transpose(0, 1)
                code[:, :, rows.start : rows.stop, span.start : span.stop] = -(p + further * (1 / LEVELS - p)).log2()
    return bits


def _spans(size: int, key: Callable[[int], tuple[int, ...]]) -> dict[tuple[int, ...], range]:
    """Places 0 to size - 1 by key; those of one key follow one another."""
    spans: dict[tuple[int, ...], range] = {}
    for place in range(size):
        start = spans.get(key(place), range(place, place)).start
        spans[key(place)] = range(start, place + 1)
    return spans


def _known(images: Grey, rows: range, columns: range, offsets: list[tuple[int, int]]) -> Float[Tensor, "known places"]:
    """One, and the grey levels at offsets (colours in turn) of all pixels in a rectangle of all images."""
    parts = [
        images[:, :, rows.start + dy : rows.stop + dy, columns.start + dx : columns.stop + dx] for dy, dx in offsets
    ]
    values = torch.stack(parts, 1).flatten(1, 2).transpose(0, 1).flatten(1)
    return torch.cat([torch.ones_like(values[:1]), values]).double()


def _fitted_tail(residuals: Float[Tensor, " m"], kind: str) -> Callable[[Tensor], Tensor]:
    """P(residual > z), for z of at least 0, of the distribution of a kind that suits the residuals best."""
    if kind == "normal":
        scale = residuals.square().mean().sqrt().clamp(min=FINEST)
        return lambda z: torch.erfc(z / (math.sqrt(2) * scale)) / 2
    freedom, scale = _fit_student(residuals)
    return lambda z: _student_tail(z / scale, freedom)


def _fit_student(residuals: Float[Tensor, " m"]) -> tuple[float, float]:
    """Degrees of freedom and scale of Student's t around 0, by maximum likelihood within their limits."""
    start = residuals.abs().median().clamp(min=FINEST).log().item()
    parameters = torch.tensor([-2.0, start], dtype=torch.float64, requires_grad=True)

    def limited() -> tuple[Tensor, Tensor]:
        return 0.5 + (ROUNDEST - 0.5) * parameters[0].sigmoid(), FINEST + parameters[1].exp()

    def loss() -> Tensor:
        optimiser.zero_grad()
        freedom, scale = limited()
        nats = -torch.distributions.StudentT(freedom, scale=scale).log_prob(residuals).mean()
        nats.backward()
        return nats

    optimiser = torch.optim.LBFGS([parameters], max_iter=50, line_search_fn="strong_wolfe")
    optimiser.step(loss)
    freedom, scale = (value.item() for value in limited())
    return freedom, scale


def _student_tail(z: Tensor, freedom: float) -> Tensor:
    """P(t > z) for z >= 0: half the regularised incomplete beta function I_x(freedom / 2, 1 / 2), 1 / x = 1 + z^2 / f.

    By Lentz's method; where the continued fraction is slow, I_x(a, b) = 1 - I_(1-x)(b, a).

    References:
        NIST Digital Library of Mathematical Functions, F. W. J. Olver et al., 2010, https://dlmf.nist.gov/8.17,
        equation 8.17.22
    """
    x, rest = 1 / (1 + z**2 / freedom), 1 / (1 + freedom / z**2)
    fast = x < (freedom / 2 + 1) / (freedom / 2 + 2.5)
    a, b = (torch.where(fast, *pair) for pair in ((freedom / 2, 0.5), (0.5, freedom / 2)))
    a, b = a.to(z), b.to(z)
    x, rest = torch.where(fast, x, rest), torch.where(fast, rest, x)
    d = 1 / (1 - (a + b) * x / (a + 1))
    fraction, c = d, torch.ones_like(d)
    for m in range(1, FRACTIONS + 1):
        for step in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d, c = 1 / (1 + step * d), 1 + step / c
            fraction = fraction * d * c
    beta = math.lgamma(freedom / 2) + math.lgamma(0.5) - math.lgamma(freedom / 2 + 0.5)
    half = x**a * rest**b * fraction / a * math.exp(-beta) / 2
    return torch.where(fast, half, 0.5 - half)


def _discretised(level: Tensor, centre: Tensor, tail: Callable[[Tensor], Tensor]) -> Tensor:
    """Probability of grey levels: that of [level - 1/2, level + 1/2), all below for 0 and all above for 255."""
    low = torch.where(level == 0, -math.inf, level - 0.5 - centre)
    high = torch.where(level == LEVELS - 1, math.inf, level + 0.5 - centre)
    low, high = torch.where(low + high < 0, -high, low), torch.where(low + high < 0, -low, high)  # no digits cancel
    above = torch.where(low < 0, 1 - tail(low.abs()), tail(low.abs()))
    return above - tail(high)
