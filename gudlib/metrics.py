r"""How good are generated images? Distances between two sets of images, each with the name of what measured it.

Most compare *features*, the activations f(x) of a classifier, of real and of generated images:

    Frechet distance    |m - m'|^2 + tr[C + C' - 2 (C C')^(1/2)]      of their means and covariances,
    kernel distance     E k(f, f) + E k(f', f') - 2 E k(f, f')        with k(f, g) = (f.g / d + 1)^3, unbiased,
    precision, recall   the share of one set within the other's reach, balls up to the k-th neighbour.

Two classifiers are known: Inception, with which papers compare and whose weights must be fetched, and a small one
trained on Fashion-MNIST, shipped with the companion. Numbers of different features, or of different numbers of images,
don't compare: say both.

References:
    GANs Trained by a Two Time-Scale Update Rule, M. Heusel et al., 2017, https://arxiv.org/abs/1706.08500
    Demystifying MMD GANs, M. Binkowski et al., 2018, https://arxiv.org/abs/1801.01401
    Improved Precision and Recall Metric, T. Kynkaanniemi et al., 2019, https://arxiv.org/abs/1904.06991
"""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, pad
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from tqdm.auto import tqdm

from gudlib.data import scale, to_uint8
from gudlib.denoiser import read_tensors

Images = Float[Tensor, "n c h w"]
SHIPPED = Path(__file__).resolve().parent.parent / "data" / "checkpoints" / "fashion_features.safetensors"


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

    def forward(self, images: Images) -> Float[Tensor, "n 2048"]:
        """Features of images, grey ones as three equal colours."""
        return self.body(to_uint8(images).expand(-1, 3, -1, -1))


def features(name: str = "fashion") -> nn.Module:
    """A frozen feature extractor, `fashion` or `inception`, with the attributes `name` and `num_features`.

    Raises:
        ValueError: for another name.
        RuntimeError: if Inception cannot be had.
    """
    if name == "inception":
        return Inception().eval().requires_grad_(False)
    if name != "fashion":
        raise ValueError(f"features must be fashion or inception; got {name!r}")
    classifier = Classifier()
    classifier.load_state_dict(read_tensors(SHIPPED)[0])
    return classifier.eval().requires_grad_(False)


@torch.no_grad()
def embed(images: Images, extractor: nn.Module, chunk: int = 256) -> Float[Tensor, "n d"]:
    """Features of all images, `chunk` at a time."""
    return torch.cat([extractor(part) for part in images.split(chunk)])


@dataclass(frozen=True)
class Distance:
    """A distance and what it is of.

    Attributes:
        value: the distance.
        error: its standard error over subsets; nan if there is none.
        what: kind, features and numbers of images, for labels.
    """

    value: float
    error: float
    what: str


def frechet(real: Images, generated: Images, extractor: nn.Module, chunk: int = 256) -> Distance:
    """Frechet distance of features. It is biased upwards for few images: compare equal numbers only."""
    _enough(real, generated, 2)
    metric = FrechetInceptionDistance(feature=extractor)
    with torch.no_grad():
        for images, kind in ((real, True), (generated, False)):
            for part in images.split(chunk):
                metric.update(part, real=kind)
    return Distance(float(metric.compute()), math.nan, _label("Frechet distance", real, generated, extractor))


def kernel(real: Images, generated: Images, extractor: nn.Module, subsets: int = 50, size: int = 500) -> Distance:
    """Kernel distance (squared maximum mean discrepancy, unbiased): mean and standard deviation over random subsets.

    The subsets are drawn by torch's global generator, which is left as it was.
    """
    _enough(real, generated, size)
    with warnings.catch_warnings(), torch.random.fork_rng(), torch.no_grad():
        warnings.simplefilter("ignore")  # that it keeps all features in memory
        torch.manual_seed(0)
        metric = KernelInceptionDistance(feature=_Given(), subsets=subsets, subset_size=size)
        for images, kind in ((real, True), (generated, False)):
            metric.update(embed(images, extractor), real=kind)
        mean, deviation = metric.compute()
    return Distance(float(mean), float(deviation), _label("kernel distance", real, generated, extractor))


class _Given(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class Coverage:
    """Precision (generated images within reach of real ones) and recall (the converse), shares from 0 to 1."""

    precision: float
    recall: float


def coverage(real: Images, generated: Images, extractor: nn.Module, k: int = 3) -> Coverage:
    """Precision and recall: an image counts if it lies within the k-th-neighbour distance of one of the other set."""
    _enough(real, generated, k + 1)
    f, g = embed(real, extractor).double(), embed(generated, extractor).double()
    reach_f, reach_g = (torch.cdist(x, x).kthvalue(k + 1, dim=1).values for x in (f, g))  # itself is the first
    apart = torch.cdist(f, g)
    inside_real = (apart <= reach_f[:, None]).any(0)
    inside_generated = (apart <= reach_g).any(1)
    return Coverage(float(inside_real.double().mean()), float(inside_generated.double().mean()))


def memorised(generated: Images, training: Images, held_out: Images, share: float = 0.01) -> float:
    """Share of generated images that lie closer to a training image than all but `share` of held-out images do.

    Distances are Euclidean, in pixels. A model that has memorised nothing scores about `share`, one that copies 1; but
    so do images that are near everything, such as blank ones.
    """
    near, usual = (torch.cdist(x.flatten(1), training.flatten(1)).amin(1) for x in (generated, held_out))
    return float((near < usual.quantile(share)).double().mean())


def spectrum_error(real: Images, generated: Images) -> float:
    """Root mean square of log10 of the ratio of power, over rings of one wave per picture in wavenumber.

    0.3 is a factor of two. The mean image is part of the power.
    """
    power = []
    for images in (real, generated):
        waves = torch.fft.fft2(images.double()).abs().square().mean((0, 1))
        y, x = (torch.fft.fftfreq(n, 1 / n, dtype=torch.float64) for n in waves.shape)
        ring = (y[:, None].square() + x.square()).sqrt().round().long().flatten()
        inside = ring <= min(waves.shape) // 2
        ring, flat = ring[inside], waves.flatten()[inside]
        power.append(torch.bincount(ring, flat) / torch.bincount(ring))
    return float((power[1] / power[0]).log10().square().mean().sqrt())


def train_classifier(
    images: UInt8[Tensor, "n 1 28 28"], labels: Int64[Tensor, " n"], epochs: int, seed: int = 0, progress: bool = True
) -> Classifier:
    """Train a `Classifier` from scratch, on shifted and mirrored images."""
    torch.manual_seed(seed)
    net, batch = Classifier(), 100
    steps = epochs * (len(images) // batch)
    optimiser = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
    for step in tqdm(range(steps), desc="classifier", disable=not progress):
        if step % (len(images) // batch) == 0:
            order = torch.randperm(len(images))
        chosen = order[(step * batch) % len(images) :][:batch]
        dy, dx = torch.randint(0, 5, (2,)).tolist()
        x = pad(scale(images[chosen]), (2, 2, 2, 2), value=-1.0)[..., dy : dy + 28, dx : dx + 28]
        x = x.flip(-1) if step % 2 else x
        loss = cross_entropy(net.head(net(x)), labels[chosen], label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rate.step()
    return net.eval()


def accuracy(classifier: Classifier, images: UInt8[Tensor, "n 1 28 28"], labels: Int64[Tensor, " n"]) -> float:
    """Share of images that are classified rightly."""
    with torch.no_grad():
        return float((classifier.head(embed(scale(images), classifier)).argmax(1) == labels).double().mean())


def _enough(real: Tensor, generated: Tensor, least: int) -> None:
    if real.shape[1:] != generated.shape[1:]:
        raise ValueError(
            f"real and generated images must have one shape; got {tuple(real.shape)}, {tuple(generated.shape)}"
        )
    if min(len(real), len(generated)) < least:
        raise ValueError(f"at least {least} images of each kind are needed; got {len(real)} and {len(generated)}")


def _label(kind: str, real: Tensor, generated: Tensor, extractor: nn.Module) -> str:
    return f"{kind}, {extractor.name} features, {len(real)} real and {len(generated)} generated images"
