r"""How good are generated images? Distances between two sets of images, each with the name of what measured it.

Most compare *features*, the activations f(x) of a classifier, of real and of generated images:

    Frechet distance    |m - m'|^2 + tr[C + C' - 2 (C C')^(1/2)]      of their means and covariances,
    precision, recall   the share of one set within the other's reach, balls up to the k-th neighbour.

Two classifiers are known: Inception, with which papers compare and whose weights must be fetched, and a small one
trained on Fashion-MNIST, shipped with the companion. Numbers of different features, or of different numbers of images,
don't compare: say both.

References:
    GANs Trained by a Two Time-Scale Update Rule, M. Heusel et al., 2017, https://arxiv.org/abs/1706.08500
    Improved Precision and Recall Metric, T. Kynkaanniemi et al., 2019, https://arxiv.org/abs/1904.06991
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchmetrics.image.fid import FrechetInceptionDistance

from gudlib import checks
from gudlib.data import to_uint8
from gudlib.doors import door, inner
from gudlib.files import CHECKPOINTS, IN_REPOSITORY, read_tensors, with_repository

Images = Float[Tensor, "n c h w"]
Others = Float[Tensor, "m c h w"]
SHIPPED = CHECKPOINTS / "fashion_features.safetensors"


class Classifier(nn.Module):
    """A small convolutional classifier of garments; called, it gives its last hidden layer, 128 features.

    Images (n, c, h, w) in [-1, 1] are averaged over colours and brought to 28 x 28.
    """

    name = "Fashion-MNIST classifier"
    num_features = 128

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.SiLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.GroupNorm(8, 64), nn.SiLU(),
            nn.Conv2d(64, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.SiLU(),
            nn.Conv2d(64, 64, 3, padding=1, stride=2), nn.GroupNorm(8, 64), nn.SiLU(),
            nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 7 * 7, self.num_features), nn.SiLU(),
        )  # fmt: skip
        self.head = nn.Linear(self.num_features, 10)
        self.float()  # whatever torch's default is

    @inner
    def forward(self, images: Images) -> Float[Tensor, "n 128"]:
        """Features of images."""
        x = images.float().mean(1, keepdim=True)
        if x.shape[-2:] != (28, 28):
            x = interpolate(x, (28, 28), mode="bilinear", antialias=True)
        return self.body(x)


class Inception(nn.Module):
    """Inception's last pooling layer, 2,048 features, as in published Frechet distances.

    Raises:
        RuntimeError: if the package torch-fidelity or its weights cannot be had; it says which.
    """

    name = "Inception"
    num_features = 2048

    def __init__(self) -> None:
        super().__init__()
        try:
            self.body = FrechetInceptionDistance(feature=2048).inception
        except (ModuleNotFoundError, OSError) as error:
            raise RuntimeError(
                f"features `inception` need the package torch-fidelity and its weights from the network ({error}); "
                "`fashion` comes with the companion"
            ) from error

    @inner
    def forward(self, images: Images) -> Float[Tensor, "n 2048"]:
        """Features of images, grey ones as three equal colours."""
        return self.body(to_uint8(images).expand(-1, 3, -1, -1))


@door
def features(name: str = "fashion") -> nn.Module:
    """A frozen feature extractor, `fashion` or `inception`, with the attributes `name` and `num_features`.

    Raises:
        ValueError: for another name.
        RuntimeError: if Inception cannot be had, or `fashion` outside the repository.
    """
    checks.one_of("name", name, ("fashion", "inception"))
    if name == "inception":
        return Inception().eval().requires_grad_(False)
    if not IN_REPOSITORY:
        raise RuntimeError(with_repository("the classifier of `fashion`", "an extractor of your own"))
    classifier = Classifier()
    classifier.load_state_dict(read_tensors(SHIPPED)[0])
    return classifier.eval().requires_grad_(False)


@door
@torch.no_grad()
def embed(images: Images, extractor: nn.Module, chunk: int = 256) -> Float[Tensor, "n d"]:
    """Features of all images, `chunk` at a time, found on the extractor's device and given on the images'.

    Raises:
        ValueError: for images that are not data (`checks.data`), or a chunk below 1.
    """
    chunk = checks.whole("chunk", chunk)
    checks.data("images", images)
    where = _device(extractor, images)
    return torch.cat([extractor(part.to(where)).to(images.device) for part in images.split(chunk)])


@dataclass(frozen=True)
class Distance:
    """A distance and what it is of.

    Attributes:
        value: the distance.
        what: kind, features and numbers of images, for labels.
    """

    value: float
    what: str


@door
def frechet(real: Images, generated: Others, extractor: nn.Module, chunk: int = 256) -> Distance:
    """Frechet distance of features. It is biased upwards for few images: compare equal numbers only.

    Raises:
        ValueError: for images that are not data (`checks.data`), not of one shape, or too few.
    """
    chunk = checks.whole("chunk", chunk)
    _enough(real, generated, 2)
    where = _device(extractor, real)
    metric = FrechetInceptionDistance(feature=extractor).to(where)
    with torch.no_grad():
        for images, kind in ((real, True), (generated, False)):
            for part in images.split(chunk):
                metric.update(part.to(where), real=kind)
    what = f"Frechet distance, {extractor.name} features, {len(real)} real and {len(generated)} generated images"
    return Distance(float(metric.compute()), what)


@dataclass(frozen=True)
class Coverage:
    """Precision (generated images within reach of real ones) and recall (the converse), shares from 0 to 1."""

    precision: float
    recall: float


@door
def coverage(real: Images, generated: Others, extractor: nn.Module, k: int = 3) -> Coverage:
    """Precision and recall: an image counts if it lies within the k-th-neighbour distance of one of the other set.

    Raises:
        ValueError: for images that are not data (`checks.data`), not of one shape, or too few.
    """
    k = checks.whole("k", k)
    _enough(real, generated, k + 1)
    f, g = embed(real, extractor).double(), embed(generated, extractor).double()
    reach_f, reach_g = (torch.cdist(x, x).kthvalue(k + 1, dim=1).values for x in (f, g))  # itself is the first
    apart = torch.cdist(f, g)
    inside_real = (apart <= reach_f[:, None]).any(0)
    inside_generated = (apart <= reach_g).any(1)
    return Coverage(float(inside_real.double().mean()), float(inside_generated.double().mean()))


@door
def memorised(generated: Images, training: Others, held_out: Float[Tensor, "k c h w"], share: float = 0.01) -> float:
    """Share of generated images that lie closer to a training image than all but `share` of held-out images do.

    Distances are Euclidean, in pixels. A model that has memorised nothing scores about `share`, one that copies 1; but
    so do images that are near everything, such as blank ones.

    Raises:
        ValueError: for images that are not data (`checks.data`), or not of one shape.
    """
    share = checks.real("share", share, least=0, most=1)
    for name, images in {"generated": generated, "training": training, "held_out": held_out}.items():
        checks.data(name, images, getattr(generated, "shape", ())[1:] or None)
    generated, training, held_out = map(checks.single, (generated, training, held_out))
    near, usual = (torch.cdist(x.flatten(1), training.flatten(1)).amin(1) for x in (generated, held_out))
    return float((near < usual.quantile(share)).double().mean())


@door
def spectrum_error(real: Images, generated: Others) -> float:
    """Root mean square of log10 of the ratio of power, over rings of one wave per picture in wavenumber.

    0.3 is a factor of two. The mean image is part of the power.

    Raises:
        ValueError: for images that are not data (`checks.data`), or not of one shape.
    """
    _enough(real, generated, 1)
    power = []
    for images in (real, generated):
        waves = torch.fft.fft2(images.double()).abs().square().mean((0, 1))
        y, x = (torch.fft.fftfreq(n, 1 / n, dtype=torch.float64, device=waves.device) for n in waves.shape)
        ring = (y[:, None].square() + x.square()).sqrt().round().long().flatten()
        inside = ring <= min(waves.shape) // 2
        ring, flat = ring[inside], waves.flatten()[inside]
        power.append(torch.bincount(ring, flat) / torch.bincount(ring))
    for name, each in zip(("real", "generated"), power, strict=True):
        if not bool((each > 0).all()):
            none = int(each.argmin())
            raise ValueError(f"{name} images must have waves of all lengths; there are none of {none} to a picture")
    return float((power[1] / power[0]).log10().square().mean().sqrt())


def _device(extractor: nn.Module, images: Tensor) -> torch.device:
    """The extractor's, if it has weights."""
    return next((p.device for p in extractor.parameters()), images.device)


def _enough(real: Tensor, generated: Tensor, least: int) -> None:
    checks.data("real", real)
    checks.data("generated", generated)
    if real.shape[1:] != generated.shape[1:]:
        raise ValueError(
            f"real and generated images must have one shape; got {tuple(real.shape)}, {tuple(generated.shape)}"
        )
    if min(len(real), len(generated)) < least:
        raise ValueError(f"at least {least} images of each kind are needed; got {len(real)} and {len(generated)}")
