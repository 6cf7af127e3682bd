r"""Designs: one choice on each of the three axes, trained and scored as all others are.

To compare designs, something must be held fixed. The noise on component i, as a variance in units of the data, is
N_i(t) = S_i^2 e^gamma_i(t), and every design here has the same two ends, whatever happens between them:

    t = 0    max_i N_i = `FINEST`^2: in no direction is more noise left than a third of a grey level;
    t = 1    the largest eigenvalue of N^(-1/2) C N^(-1/2) is e^-`GONE`, C the data's covariance: no direction is left.

Between them -log SNR_i rises with one slope from offsets a l_i (soft-conditioning, section 5.1), so a design is its
basis, its prior's exponent r, S_i = Sigma_i^(r/2), and a. Since the schedule fixes the signal-to-noise ratio, r changes
the end that the noise flows to and the numbers that the network is told, not the path; with one gamma(t) common to all
components, the other reading of "change the prior", the ratio follows the prior, which is a = 1 - r.
"""

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from gudlib import bases, checks, likelihood, metrics, priors, references, samplers, statistics
from gudlib.data import dequantise, scale, to_uint8
from gudlib.denoiser import Denoiser, build
from gudlib.doors import door
from gudlib.families import FINEST, Family, Range, Sequential, SoftConditioning
from gudlib.process import Model, Process
from gudlib.references import IndependentGaussian
from gudlib.schedules import Order, PerImage, Schedule, sequential, shape_of

GONE = 5.0  # -log SNR at t = 1
ONE_VARIANCE = ("plain", "waves")
NOISE_LEVEL_INPUTS = {
    "time": ("film", 1), "pooled": ("film", 1), "grouped": ("film", 16), "attention": ("attention", 16),
    "map": ("map", 1),
}  # fmt: skip


@dataclass(frozen=True)
class Design:
    """What is compared.

    Attributes:
        basis: `pixel`, `pca`, `fourier`, `dct` or `haar`; `plain` is the usual diffusion model: pixels of one mean, one
            variance and one noise level; `waves` are its columns in cosine waves (`bases.Blocks.waves`).
        r: exponent of the prior, 0 isotropic to 1 whitened.
        a: lowest and highest inverse softness in training.
        conditioning: what the network is told: `time` (t alone), `pooled` (the mean of gamma), `grouped` (the means of
            16 groups), `attention` (the same as tokens to attend to) or `map` (gamma itself as an image).
        reference: what the network is put around, a name of `references.KINDS`.
    """

    basis: str = "pca"
    r: float = 1.0
    a: tuple[float, float] = (1.0, 1.0)
    conditioning: str = "grouped"
    reference: str = IndependentGaussian.name

    def __post_init__(self) -> None:
        known = ("plain", "pixel", "pca", "fourier", "dct", "haar", "waves")
        checks.one_of("basis", self.basis, known)
        checks.one_of("conditioning", self.conditioning, tuple(NOISE_LEVEL_INPUTS))
        checks.real("r", self.r)
        pair = isinstance(self.a, list | tuple) and len(self.a) == 2
        if not pair or not 0 <= checks.real("a", self.a[0]) <= checks.real("a", self.a[1]):
            raise ValueError(f"a must be (lowest, highest), not negative; got {self.a}")


class FittedDesign:
    """A design on a set of images: basis and prior fitted to them, and the schedule of every `a`.

    Arguments:
        design: what to build.
        images: the training data, at least two; dequantised, which is taken into account in closed form.
        seed: of the order in which `few` images are told apart into seen and unseen ones.
        few: images may be few: `pca` is what `principal` says.

    Attributes:
        basis, prior, reference: fitted.
        of_waves: `pca` is that of waves (`bases.PCA.of_waves`), the images being too few for their own.
        gamma_max_target: -log SNR_i at which the first component ends, the same for all `a` of the design.
    """

    @door
    def __init__(self, design: Design, images: UInt8[Tensor, "n c h w"], seed: int = 0, few: bool = False) -> None:
        checks.grey("images", images, least=2)
        seed = checks.seed("seed", seed)
        self.design, shape = design, (images.shape[1], images.shape[2], images.shape[3])
        self.of_waves = False
        if few and design.basis == "pca":
            generator = torch.Generator(images.device).manual_seed(seed)
            shuffled = torch.randperm(len(images), generator=generator, device=images.device)
            self.basis, self.of_waves = principal(images[shuffled])
        else:
            self.basis = bases.make("pixel" if design.basis in ONE_VARIANCE else design.basis, shape, images)
        if isinstance(self.basis, bases.PCA):
            mean = self.basis(priors.measure(bases.Pixel(shape), images).mean[None])[0]
            variance = self.basis.eigenvalues.reshape(shape)
        else:
            moments = priors.measure(self.basis, images)
            mean, variance = moments.mean, moments.variance
        if not float(variance.max()) > 1.000001 * statistics.WITHIN_LEVEL:
            raise ValueError("images must differ from one another; these are all the same")
        if design.basis in ONE_VARIANCE:
            variance = torch.full_like(mean, float(variance.mean() + mean.var(correction=0)))
            mean = torch.full_like(mean, float(mean.mean()))
        if design.basis == "waves":
            self.basis = bases.Blocks.waves(shape)
            mean = self.basis(mean[None])[0]
        if isinstance(self.basis, bases.Fourier):
            variance = self.basis.stationary(variance)
        # No component of dequantised data varies less than the uniform noise within a grey level
        floor = statistics.WITHIN_LEVEL / float(variance.max())
        self.prior = priors.interpolated(priors.Moments(mean, variance, floor), design.r)
        self.gamma_max_target = GONE + self._spread(images)
        self._soft = SoftConditioning(self.prior, design.a, self.gamma_max_target)
        self.reference = references.fit(design.reference, self.basis, self.prior, images)

    @door
    def family(
        self,
        blocks: str | Sequence[str] | None = None,
        b: Range | Sequence[Range] | None = None,
        finest: float = FINEST,
        order: str = "raster",
    ) -> Family:
        """Schedules with the common ends: the design's range of `a` or, with `blocks`, `families.Sequential`.

        finest: standard deviation of the noise at t = 0 of the latter, in units of the data.
        order: of its blocks, as there.
        """
        if blocks is None:
            return self._soft
        return Sequential(self.basis, self.prior, blocks, b, self.gamma_max_target, finest, order)

    @door
    def schedule(self, a: PerImage) -> Schedule:
        """Soft-conditioning with the common ends; a tensor holds one `a` for each image of a batch."""
        return self._soft.schedule(a)

    @door
    def sequential(self, order: Order | Sequence[Order], b: PerImage | Sequence[PerImage]) -> Schedule:
        """Components one after another (`schedules.sequential`), from the finest noise to SNR = e^-gamma_max_target."""
        gamma_min = 2 * math.log(FINEST) - 2 * self.prior.scale.log()
        return sequential(order, b, gamma_min, self.gamma_max_target + self.prior.log_variance)

    @door
    def process(self, a: float) -> Process:
        """The design's process at inverse softness `a`."""
        return Process(self.basis, self.prior, self.schedule(a))

    @door
    def denoiser(self, width: int, seed: int = 0, **network: Any) -> Denoiser:
        """An untrained denoiser in float32; `network` are options of `networks.UNet`.

        Its weights are drawn by torch's global generator, which is left as it was.
        """
        kind, count = NOISE_LEVEL_INPUTS[self.design.conditioning]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            built = build(
                self.basis, self.prior, count, reference=self.reference, width=width, conditioning=kind, **network
            )
        if self.design.conditioning == "time":
            built.network = _ToldTime(built.network, copy.deepcopy(self._soft), self.gamma_max_target)
        return built

    def _spread(self, images: UInt8[Tensor, "n c h w"]) -> float:
        """log of the largest eigenvalue of N^(-1/2) C N^(-1/2) for N_i = Sigma_i e^(a (l_i - l_min)), at the lowest a.

        At others it is smaller, since N_i rises with a. By subspace iteration; C is applied in pixels, as the images'
        products and the noise within a grey level.
        """
        order, shape = self.prior.order.double(), self.basis.shape
        scale = (0.5 * order - 0.5 * self.design.a[0] * (order - order.min())).exp()  # N^(-1/2)
        middle = 128 * (self.basis.inverse(self.prior.mean[None].double()) + 1) - 0.5  # the mean, in grey levels
        generator = torch.Generator(order.device).manual_seed(0)
        space = torch.randn(6, *shape, generator=generator, dtype=torch.float64, device=order.device)
        ritz = space
        for _ in range(10):
            probe = self.basis.inverse(scale * space).flatten(1)
            moved = torch.zeros_like(probe)
            for part in images.split(statistics.CHUNK):
                x = (part - middle.float()).flatten(1)
                moved += (x @ probe.float().T).T @ x
            moved = moved / (128**2 * (len(images) - 1)) + statistics.WITHIN_LEVEL * probe
            moved = (scale * self.basis(moved.view(-1, *shape))).flatten(1)
            ritz = space.flatten(1) @ moved.T
            space = torch.linalg.qr(moved.T).Q.T.reshape(-1, *shape)
        return round(float(torch.linalg.eigvalsh(ritz).max().log()), 6)  # digits that float32 products leave


@door
def principal(images: statistics.Images, noise: float = 0.0) -> tuple[bases.PCA, bool]:
    """Principal components for images that may be few: those of their covariance or, if it predicts better, of waves.

    Both are fitted to four fifths of the images and asked for the normal likelihood of the others. A mixture of the two
    covariances predicts better still, but axes fitted to the very images that a network learns from make these look
    different from new ones, and the network learns the difference.

    Arguments:
        images: at least four (n, c, h, w), in random order; uint8 grey levels count as dequantised, exactly.
        noise: variance of white noise to add; above 0 for floating-point images, which may be few.

    Returns:
        The basis, fitted to all images, with the variances of the noise added; and whether it is that of waves.

    Raises:
        ValueError: for fewer images, or too few for a covariance without noise; for noise below 0.
    """
    checks.images("images", images, least=4)
    noise = checks.real("noise", noise, least=0)
    unseen, seen = images.tensor_split([max(len(images) // 5, 2)])
    mean, own = statistics.covariance(seen)
    waves = bases.PCA.of_waves(own, shape_of(mean))
    away = (statistics.centres(unseen[:2000]) - mean).flatten(1)
    root, failed = torch.linalg.cholesky_ex(
        own[0] + noise * torch.eye(mean.numel(), dtype=own.dtype, device=own.device)
    )
    if int(failed):
        raise ValueError(f"images must be more, or noise above 0: {len(seen)} images have a singular covariance")
    variance = waves.eigenvalues[0] + noise
    nll = (
        torch.linalg.solve_triangular(root, away.T, upper=False).square().sum(0).mean()
        + 2 * root.diagonal().log().sum()
    )
    nll_of_waves = ((away @ waves.matrix[0].T).square() / variance).sum(1).mean() + variance.log().sum()
    few, whole = bool(nll_of_waves < nll), statistics.covariance(images)[1]
    basis = (bases.PCA.of_waves if few else bases.PCA.of)(whole, shape_of(mean))
    return bases.PCA(basis.matrix, basis.shape, basis.eigenvalues + noise), few


class _ToldTime(nn.Module):
    """A network that is told t and nothing else, as one level for all components, from -10 to 10."""

    def __init__(self, network: Any, soft: SoftConditioning, gamma_max_target: float) -> None:
        super().__init__()
        self.network, self.soft, self.gamma_max_target = network, soft, gamma_max_target
        order = soft.order.flatten()
        self.first, self.last = int(order.argmin()), int(order.argmax())  # numbers: a step must not wait for a GPU
        self.config = {**network.config, "told": "time"}

    def forward(self, images: Tensor, gamma: Tensor) -> Tensor:
        low, high = self.soft.ends
        level = (gamma - self.soft.log_variance.to(gamma)).flatten(1).double()  # -log SNR
        first, last = level[:, self.first], level[:, self.last]
        steep = (last - first) / max(high - low, 1e-9)  # the inverse softness of each image
        start = self.soft.gamma_min_target(steep)
        t = ((last - start) / (self.gamma_max_target - start + steep * (high - low))).to(gamma)
        return self.network(images, (20 * t - 10)[:, None, None, None].expand_as(gamma))


@door
@torch.no_grad()
def score(
    model: Model,
    process: Process,
    train: UInt8[Tensor, "n c h w"],
    test: UInt8[Tensor, "m c h w"],
    extractor: nn.Module,
    generated: int = 500,
    steps: int = 24,
    draws: int = 8,
    seed: int = 0,
) -> tuple[dict[str, float], Float[Tensor, "k c h w"]]:
    """Every number that designs are compared by, and the generated images.

    Arguments:
        model, process: what to score.
        train: images that generated ones are compared with (distances, memorisation).
        test: held-out images, whose likelihood is bounded. Dequantisation, times and noise are the same for all designs
            of one seed.
        extractor: of features, see `metrics.features`.
        generated: number of samples.
        steps: of Heun's method, two model calls each.
        draws: estimates of each image's bound.
        seed: of noise.
    """
    generated, draws, seed = (
        checks.whole("generated", generated, 4),
        checks.whole("draws", draws),
        checks.seed("seed", seed),
    )
    start, device = time.perf_counter(), process.prior.mean.device
    data = dequantise(test, torch.Generator().manual_seed(0)).to(device)
    found = likelihood.bound(model, process, data, draws, seed=seed, importance=True)
    nats = found.dims * math.log(2)
    middle, generator = time.perf_counter(), torch.Generator(device).manual_seed(seed)
    parts = [
        samplers.sample(model, process, len(part), steps, "heun", generator).data.cpu()
        for part in torch.arange(generated).split(250)
    ]
    images, end = scale(to_uint8(torch.cat(parts))), time.perf_counter()
    real, held_out = scale(train), scale(test)
    covered = metrics.coverage(real[: len(images)], images, extractor)
    return {
        "bits": found.bits,
        "probe_error": found.probe_error,
        "image_error": found.image_error,
        "diffusion_bits": float(found.diffusion.sum(-1).mean()) / nats,
        "prior_bits": float(found.prior.mean()) / nats,
        "frechet": metrics.frechet(real, images, extractor).value,
        "spectrum": metrics.spectrum_error(real, images),
        "precision": covered.precision,
        "recall": covered.recall,
        "memorised": metrics.memorised(images, real, held_out),
        "score_seconds": middle - start,
        "sample_seconds": end - middle,
    }, images
