r"""Reference distributions: what a network need not learn, because its posterior is known exactly.

Let chi be the white data and chi_t = alpha chi + sigma eps. Any distribution whose posterior given chi_t is at hand,
with mean m(chi_t) and standard deviation s(chi_t) of each component, gives a denoiser without a network,

    eps_hat = (chi_t - alpha m) / sigma,

whose likelihood bound is that distribution's own NLL, along every schedule, up to what its ends leave. A network around
it (`gudlib.denoiser`) answers in units of s what the reference leaves, m - s F: it learns interactions only, in the
sense of mean-field theory the corrections to a solvable model. The references here, from what they know:

    IndependentGaussian   mean and variance of each component
    Marginals             the distribution of each component, whatever its shape
    Histograms            that of each pixel, on its 256 grey levels; one set for each of several kinds of image
    PatchHistograms       that of each pixel, for single patches of an image, each at its own place
    GroupedGaussian       correlations among columns (or patches), for one component of a column at a time or a few
    LatticeGaussian       these, and the grey levels

The network sees of a reference its mean and each component's *standardised residual*: how far chi_t is from what is
expected there, given the other components where the reference knows correlations, in units of the standard deviation.
At low noise that is the detail which chi_t itself, a hundred times larger, would drown.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional

from gudlib import checks
from gudlib.bases import Basis, Blocks, Pixel
from gudlib.data import dequantise, scale, to_uint8
from gudlib.doors import door, inner
from gudlib.exact import gaussian_eps
from gudlib.likelihood import GREY_LEVEL, bits_per_dim
from gudlib.priors import Moments, Prior
from gudlib.process import Batch, Gamma
from gudlib.schedules import alpha, shape_of, sigma
from gudlib.statistics import WITHIN_LEVEL, centres, mirrored

Grey = UInt8[Tensor, "n c h w"]
LEVELS, HALF = 256, 127.5  # grey levels, and how many of them a unit of the data has (`data.scale`)
LARGEST = 30_000  # sectors times components: 150 MB of tables
AT_ONCE = 25_088  # components whose posterior is computed together, which bounds the memory
SILENT = 4.5  # log of noise over signal, beyond which a block counts as noise only
FEW = 2  # sectors of an image that are told apart at once, the likeliest
BLUR, PULL = 1.2, 30.0  # of a sector's histograms: over neighbours, in pixels, and towards all images', in images


class Posterior(NamedTuple):
    """What a reference says of white data, each (b, c, h, w), in components of `Reference.components`.

    Attributes:
        mean: of the white data.
        deviation: standard deviation of each component.
        residual: of the noised data, in units of their standard deviation; given the other components, if the reference
            knows correlations.
        eps: the noise that is expected, of the white data, in the process's own components.
    """

    mean: Tensor
    deviation: Tensor
    residual: Tensor
    eps: Tensor


class Reference(nn.Module, ABC):
    """A distribution of images with a known posterior, in a basis and in units of a prior.

    Arguments:
        basis: U.
        prior: m and S.

    Attributes:
        name, knows: what to call it, and what it knows of images, in words.
        decoder: of `gudlib.likelihood`, to which the reference's NLL belongs: `normal` for a density of dequantised
            images, `discrete` for probabilities of grey levels.

    Raises:
        ValueError: if basis and prior differ in shape.
    """

    name: str
    knows: str
    decoder = "normal"
    basis: Basis
    prior: Prior

    @door
    def __init__(self, basis: Basis, prior: Prior) -> None:
        super().__init__()
        if basis.shape != tuple(prior.mean.shape):
            raise ValueError(f"basis and prior must have one shape; got {basis.shape} and {tuple(prior.mean.shape)}")
        self.basis, self.prior = basis, prior

    @abstractmethod
    def posterior(self, white_t: Batch, gamma: Gamma) -> Posterior:
        """Mean, standard deviation and residual given noised white data; gamma broadcasts to them."""

    @classmethod
    @abstractmethod
    def fit(cls, basis: Basis, prior: Prior, images: Grey) -> "Reference":
        """Fitted to images, uint8 (n, c, h, w), for a basis and a prior."""

    @abstractmethod
    def nll(self, data: Batch) -> Float[Tensor, " n"]:
        """-log p in nats of images (n, c, h, w), dequantised for decoder `normal`, `data.scale`d for `discrete`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(c, h, w)."""
        return self.basis.shape

    @property
    def components(self) -> Basis:
        """In which the posterior is written."""
        return self.basis

    @inner
    def white(self, estimate: Batch) -> Batch:
        """White components of an estimate written in `components`."""
        return estimate

    @inner
    def at(self, places: Int64[Tensor, " n"]) -> "Reference":
        """The reference of n patches at those places of an image: itself, if it is the same at all of them."""
        return self

    @door
    def patches(self, size: int) -> "Reference":
        """The same of single patches, whose place `at` tells; for references of pixels that know no correlations.

        Raises:
            ValueError: for others, or where pixels have priors of their own.
        """
        raise ValueError(f"reference must have independent pixels for patches of its own; it is {self.name!r}")

    def _patch(self, size: int) -> tuple[Basis, Prior]:
        """Basis and prior of a patch."""
        c, h, w = self.basis.shape
        size, parts = checks.whole("size", size), []
        if h % size or w % size:
            raise ValueError(f"size must divide height {h} and width {w}; got {size}")
        for value in (self.prior.mean, self.prior.variance, self.prior.scale):
            if self.basis.name != "pixel" or bool((value != value[:, :1, :1]).any()):
                raise ValueError(f"patches need pixels that share one prior; the basis is {self.basis.name!r}")
            parts.append(value[:, :size, :size].clone())
        return Pixel((c, size, size)), Prior(Moments(parts[0], parts[1], self.prior.floor), parts[2])

    @inner
    def forward(self, white_t: Batch, gamma: Gamma) -> Batch:
        """The noise that the reference expects: a model `(white_t, gamma) -> eps_hat` without a network."""
        return self.posterior(white_t, gamma).eps

    @door
    def bits(self, images: Grey) -> Float[Tensor, " n"]:
        """NLL of each image in bits per dimension; where it is a density, of images dequantised with a fixed seed."""
        checks.grey("images", images, self.basis.shape)
        if self.decoder == "discrete":
            width, data = 1.0, scale(images)
        else:
            width, data = GREY_LEVEL, dequantise(images, torch.Generator(images.device).manual_seed(0))
        nats = torch.cat([self.nll(part.double()) for part in data.split(1024)])
        return torch.as_tensor(bits_per_dim(nats.double(), images[0].numel(), width))


class IndependentGaussian(Reference):
    """Independent normals of the data's variances: the best denoiser that is linear in each component.

    For one scale and one gamma, a network around it has the preconditioning of EDM.

    References:
        Elucidating the Design Space of Diffusion-Based Generative Models, T. Karras et al., 2022,
        https://arxiv.org/abs/2206.00364, section 5
    """

    name = "independent gaussian"
    knows = "mean and variance of each component"

    @classmethod
    @door
    def fit(cls, basis: Basis, prior: Prior, images: Grey) -> "IndependentGaussian":
        """That of the prior's own moments."""
        return cls(basis, prior)

    @inner
    def posterior(self, white_t: Batch, gamma: Gamma) -> Posterior:
        """As `Reference`: with v = alpha^2 c + sigma^2, mean alpha c chi_t / v, variance c sigma^2 / v."""
        c = self.prior.white_variance.to(white_t)
        noise, signal = torch.sigmoid(gamma), torch.sigmoid(-gamma)
        v = signal * c + noise
        mean, deviation = signal.sqrt() * c / v * white_t, (c * noise / v).sqrt().expand_as(white_t)
        return Posterior(mean, deviation, white_t / v.sqrt(), gaussian_eps(white_t, gamma, c))

    @door
    def nll(self, data: Batch) -> Float[Tensor, " n"]:
        """As `Reference`."""
        white, c = self.prior.whiten(self.basis(data)), self.prior.white_variance.to(data)
        square = white.square() / c + (2 * math.pi * c).log()
        return 0.5 * square.flatten(1).sum(1) + self.prior.log_volume.to(data)

    @door
    def patches(self, size: int) -> "IndependentGaussian":
        """As `Reference`: the same everywhere."""
        return IndependentGaussian(*self._patch(size))


class _Pyramid(Reference):
    """Distributions of single components as histograms, coarse-grained as far as the noise allows.

    Level l of a table has the bins of the data merged 2^l at a time, each with its weight, mean and variance, as in a
    block-spin renormalisation. At noise of standard deviation s the posterior needs bins no wider than s, and those
    within a few s of the noised value: 2 `reach` + 1 bins of one level, of however many there are.

    `sectors` sets of histograms are a mixture: one draws a sector for the whole image, then each component for itself.
    A component's posterior mixes those of the sectors with the responsibilities p(sector | all *other* components),
    for its own evidence counts within each sector's posterior already.
    """

    reach = 8
    table: Tensor
    within: Tensor
    start: Tensor
    window: Tensor

    def _tabulate(self, weight: Tensor, mean: Tensor, variance: Tensor) -> None:
        """Tables from the finest bins: weight (k, d, bins), mean and variance (d, bins), in the units of `_place`."""
        pad = (0, 0, self.reach, self.reach)
        w = weight.double().permute(1, 2, 0)  # (d, bins, sectors)
        whole, first = w.mean(2), w * mean.double()[..., None]
        second = whole * (variance.double() + mean.double().square())
        pieces, places, start = [], [], 0
        while True:
            centre = first.sum(2) / w.sum(2)
            spread = (second / whole - centre.square()).clamp(min=0)
            pieces.append((functional.pad(torch.stack([w, first], 3).flatten(2), pad), functional.pad(spread, pad[2:])))
            places.append(start + self.reach)
            start += w.shape[1] + 2 * self.reach
            if w.shape[1] == 1:
                break
            w, first, second, whole = (x.unflatten(1, (-1, 2)).sum(2) for x in (w, first, second, whole))
        table = torch.cat([piece for piece, _ in pieces], 1).float().unflatten(2, (len(weight), 2))
        self.register_buffer("table", table.permute(2, 0, 1, 3).contiguous(), persistent=False)
        self.register_buffer("within", torch.cat([piece for _, piece in pieces], 1).float(), persistent=False)
        window = torch.arange(-self.reach, self.reach + 1, device=weight.device)
        self.register_buffer("start", torch.tensor(places, device=weight.device), persistent=False)
        self.register_buffer("window", window, persistent=False)
        self.bins = weight.shape[2]

    @abstractmethod
    def _place(self, z: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Where values lie, counted in finest bins, and how many of these are as wide as the noise there."""

    def _units(self) -> tuple[Tensor | float, Tensor]:
        """Offset and scale from white components to the units of the tables, for flattened components."""
        return self.prior.mean.flatten(), self.prior.scale.flatten()

    def posterior(self, white_t: Batch, gamma: Gamma) -> Posterior:
        """As `Reference`; computed in float32."""
        gamma, rows = gamma.expand_as(white_t), max(1, AT_ONCE // math.prod(self.basis.shape))
        component = self._component(len(white_t)).expand(len(white_t), -1)
        split = (x.split(rows) for x in (white_t.float(), gamma.float(), component))
        parts = [self._of(*part) for part in zip(*split, strict=True)]
        mean, deviation, eps = (torch.cat(part).to(white_t) for part in zip(*parts, strict=True))
        v = torch.sigmoid(-gamma) * self.prior.white_variance.to(white_t) + torch.sigmoid(gamma)
        return Posterior(mean, deviation, white_t / v.sqrt(), eps)

    def _component(self, n: int) -> Int64[Tensor, "#n d"]:
        """Which of the tables each component of n images has."""
        return torch.arange(math.prod(self.basis.shape), device=self.table.device)[None]

    def _of(self, white_t: Batch, gamma: Batch, component: Int64[Tensor, "b d"]) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and standard deviation of the white data, and the noise that is expected."""
        offset, scale = self._units()
        y, g = white_t.flatten(1), gamma.flatten(1)
        z, s = offset + scale * y * (1 + g.exp()).sqrt(), scale * (0.5 * g).exp()  # y / alpha, sigma / alpha
        place, wide = self._place(z, s)
        level = wide.log2().floor().clamp(0, len(self.start) - 1).long()
        last = (self.bins >> level) - 1
        near = (place * torch.exp2(-level.to(place))).floor().clamp(-self.reach, self.bins + self.reach).long()
        d, rows = self.table.shape[1:3]
        at = component * rows + self.start[level]  # (b, d): the level's first bin
        index = (at + near.clamp(min=0).minimum(last))[..., None] + self.window
        if len(self.table) > 1:
            sector, share = self._others(z, s, at + near.minimum(last + self.reach))  # (b, few), (b, few, d)
            bins = self.table.flatten(0, 2)[index[:, None] + sector[..., None, None] * (d * rows)]
            weight, first = (share[..., None, None] * bins).sum(1).unbind(-1)  # (b, d, window)
        else:
            weight, first = self.table.flatten(0, 2)[index].unbind(-1)
        centre = first / weight.clamp(min=1e-30)
        within, s2 = self.within.flatten()[index], s.square()[..., None]
        v, off = within + s2, z[..., None] - centre
        log = weight.clamp(min=1e-30).log() - 0.5 * (v.log() + off.square() / v)
        probability = log.masked_fill(weight <= 0, -math.inf).softmax(-1)
        eps = s * (probability * off / v).sum(-1)  # (z - mean) / s, without the loss of digits at low noise
        mean, each = z - s * eps, s2 / v * off  # each: how far z is from a bin's own mean
        spread = (each - (s * eps)[..., None]).square() + within * s2 / v
        deviation = (probability * spread).sum(-1).sqrt()
        found = (mean - offset) / scale, deviation / scale, eps
        return found[0].view_as(white_t), found[1].view_as(white_t), found[2].view_as(white_t)

    def _others(self, z: Tensor, s: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest few sectors of each image (b, few), and p(sector | all other components), (b, few, d).

        index: the noised values' rows in the tables.
        """
        raise NotImplementedError


class _GreyLevels(_Pyramid):
    """Histograms whose bins are the 256 grey levels: (sets, c, h, w, 256), `sets` the symbol for their number."""

    decoder = "discrete"
    weight: Tensor

    def __init__(self, basis: Basis, prior: Prior, weight: Tensor, sets: str) -> None:
        super().__init__(basis, prior)
        if basis.name != "pixel":
            raise ValueError(f"histograms of grey levels are for pixels; the basis is {basis.name!r}")
        if tuple(weight.shape[1:]) != (*basis.shape, LEVELS) or not bool((weight >= 0).all()):
            raise ValueError(
                f"weight must not be negative, and of shape ({sets}, {', '.join(map(str, basis.shape))}, {LEVELS}); "
                f"got {tuple(weight.shape)}, smallest {float(weight.min()):.3g}"
            )
        self.register_buffer("weight", weight)

    def _place(self, z: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return z + 0.5, s

    def _units(self) -> tuple[Tensor, Tensor]:
        return (self.prior.mean.flatten() + 1) * HALF, self.prior.scale.flatten() * HALF

    def _log(self) -> Float[Tensor, "k d 256"]:
        """Log probability of each grey level; none is impossible."""
        log = (self.weight + 1e-9).flatten(1, -2).log()
        return log - log.logsumexp(-1, keepdim=True)


class Histograms(_GreyLevels):
    """The grey levels of every pixel, independent of each other within a sector of images; in the pixel basis.

    It knows black, white and the lattice of grey levels.

    Arguments:
        basis, prior: of pixels.
        weight: probability of each grey level of each pixel in each sector, (k, c, h, w, 256).
        share: of the images in each sector, (k,).

    References:
        Dynamical Regimes of Diffusion Models, G. Biroli et al., 2024, https://arxiv.org/abs/2402.18491 (on when, along
        the process, an image takes its sector: speciation)
    """

    name = "histograms"
    knows = "the grey levels of each pixel, in each kind of image"
    share: Tensor
    evidence: Tensor
    means: Tensor
    spread: Tensor

    @door
    def __init__(
        self,
        basis: Basis,
        prior: Prior,
        weight: Float[Tensor, "k c h w 256"],
        share: Float[Tensor, " k"] | None = None,
    ) -> None:
        weight = checks.single(weight)
        super().__init__(basis, prior, weight, "k")
        share = weight.new_ones(len(weight)) if share is None else share
        if share.shape != weight.shape[:1] or not bool((share > 0).all()):
            raise ValueError(f"share must be ({len(weight)},), one for each sector, positive; got {share.tolist()}")
        self.register_buffer("share", share)
        weight = weight + 1e-9  # no grey level is impossible
        w = (weight / weight.sum(-1, keepdim=True)).flatten(1, 3)
        grey = torch.arange(LEVELS, dtype=torch.float64, device=weight.device)
        levels = grey.expand(w.shape[1], -1)
        self._tabulate(w, levels, torch.zeros_like(levels))
        if len(w) > 1:
            self._evidence(w.double(), grey)

    @door
    def nll(self, data: Batch) -> Float[Tensor, " n"]:
        """As `Reference`."""
        level = to_uint8(data).flatten(1).long()
        each = torch.stack([one.gather(1, level.T).sum(0) for one in self._log()], 1).double()
        return -(each + (self.share / self.share.sum()).double().log()).logsumexp(1)

    @classmethod
    @door
    def fit(cls, basis: Basis, prior: Prior, images: Grey, sectors: int = 32, seed: int = 0) -> "Histograms":
        """Histograms of images, in sectors that expectation and maximisation find, smoothed.

        Arguments:
            basis, prior: of pixels.
            images: uint8 (n, c, h, w).
            sectors: how many; 1 is one histogram for each pixel.
            seed: of the sectors' first guess.

        Raises:
            ValueError: if images are not uint8, or sectors fewer than 1 or more than images.
        """
        checks.grey("images", images, basis.shape)
        sectors, seed = checks.whole("sectors", sectors, 0), checks.seed("seed", seed)
        if not 1 <= sectors <= len(images):
            raise ValueError(f"sectors must lie between 1 and the number of images, {len(images)}; got {sectors}")
        x = images.flatten(1).long()
        sector = _sectors(x, sectors, seed) if sectors > 1 else torch.zeros(len(x), dtype=torch.long, device=x.device)
        weight = _smoothed(_counts(x, sector, sectors), basis.shape)
        share = torch.bincount(sector, minlength=sectors).to(weight) + 1
        return cls(basis, prior, weight.unflatten(1, basis.shape), share / share.sum())

    @door
    def patches(self, size: int) -> "PatchHistograms":
        """As `Reference`; of one sector, for several tie the patches together."""
        if len(self.weight) > 1:
            raise ValueError(f"reference must have one sector for patches of its own; it has {len(self.weight)}")
        return PatchHistograms(*self._patch(size), _by_patch(self.weight[0], size))

    def _evidence(self, weight: Tensor, grey: Tensor) -> None:
        """log density of a noised value in each sector, at the bins of every level, for noise of 1.4 bins."""
        pieces = []
        for level in range(len(self.start)):
            size = 2**level
            centre = (torch.arange(-self.reach, (LEVELS >> level) + self.reach, device=grey.device) + 0.5) * size - 0.5
            kernel = (-0.5 * ((grey[:, None] - centre) / (1.4 * size)).square()).exp() / size
            pieces.append((weight @ kernel.to(weight)).clamp(min=1e-30).log())
        table = torch.cat(pieces, 2).permute(1, 2, 0)  # (d, rows, sectors)
        self.register_buffer("evidence", table.float().contiguous(), persistent=False)
        mean = weight @ grey
        self.register_buffer("means", mean.T.float().contiguous(), persistent=False)  # (d, sectors)
        self.register_buffer("spread", (weight @ grey.square() - mean.square()).mean(0).float(), persistent=False)

    def _others(self, z: Tensor, s: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """As in `_Pyramid`; beyond noise of 256 grey levels, sectors differ by their means."""
        precision = (s.square() + self.spread).reciprocal()[..., None]
        far = precision * (z[..., None] * self.means - 0.5 * self.means.square())
        log = torch.where((s > LEVELS)[..., None], far, self.evidence.flatten(0, 1)[index])  # (b, d, sectors)
        whole = log.sum(1) + self.share.log()
        sector = whole.topk(min(FEW, len(self.share)), 1).indices
        log = log.take_along_dim(sector[:, None], 2)
        return sector, (whole.take_along_dim(sector, 1)[:, None] - log).softmax(-1).mT


class PatchHistograms(_GreyLevels):
    """The grey levels of every pixel of an image, for one patch at a time, whose place `at` tells: for tokens.

    Arguments:
        basis, prior: of the pixels of a patch (c, p, p).
        weight: probability of each grey level of each pixel of each patch, in reading order, (L, c, p, p, 256).
    """

    name = "patch histograms"
    knows = "the grey levels of each pixel"

    @door
    def __init__(self, basis: Basis, prior: Prior, weight: Float[Tensor, "l c p p 256"]) -> None:
        super().__init__(basis, prior, checks.single(weight), "L")
        self.places: Tensor | None = None
        levels = torch.arange(LEVELS, dtype=torch.float64, device=weight.device).expand(weight[..., 0].numel(), -1)
        self._tabulate(self._log().exp().flatten(0, 1)[None], levels, torch.zeros_like(levels))

    @inner
    def at(self, places: Int64[Tensor, " n"]) -> "PatchHistograms":
        """As `Reference`: a view of the same tables, which move to a device with it; places are 0 .. L - 1."""
        mine = copy.copy(self)
        mine.places = places
        return mine

    @classmethod
    @door
    def fit(cls, basis: Basis, prior: Prior, images: Grey) -> "PatchHistograms":
        """Histograms of the patches of images, smoothed as those of `Histograms`.

        Raises:
            ValueError: if images are not uint8, or not made of such patches.
        """
        checks.grey("images", images)
        x, shape, size = images.flatten(1).long(), shape_of(images[0]), basis.shape[-1]
        if basis.shape != (shape[0], size, size) or shape[1] % size or shape[2] % size:
            raise ValueError(f"images must be made of patches {basis.shape}, as the basis has them; got {shape}")
        weight = _smoothed(_counts(x, torch.zeros_like(x[:, 0]), 1), shape).view(*shape, LEVELS)
        return cls(basis, prior, _by_patch(weight, size))

    @door
    def nll(self, data: Batch) -> Float[Tensor, " n"]:
        """As `Reference`, of patches at their places."""
        return -self._log().flatten(0, 1)[self._component(len(data)), to_uint8(data).flatten(1).long()].sum(1).double()

    @door
    def bits(self, images: UInt8[Tensor, "n c H W"]) -> Float[Tensor, " n"]:
        """As `Reference`, of whole images (n, c, H, W), all their patches in reading order."""
        (c, side, _), shape = self.basis.shape, images.shape
        if shape[1] != c or shape[2] % side or shape[3] % side or shape[2:].numel() // side**2 != len(self.weight):
            raise ValueError(f"images must be of {len(self.weight)} patches of {side}; got {checks.what(images)}")
        patches = functional.pixel_unshuffle(scale(images), self.basis.shape[-1]).flatten(2).mT  # (n, L, D)
        everywhere = self.at(torch.arange(patches.shape[1], device=images.device))
        nats = [everywhere.nll(each.view(-1, *self.basis.shape)).sum() for each in patches]
        return torch.as_tensor(bits_per_dim(torch.stack(nats), images[0].numel(), 1.0))

    def _component(self, n: int) -> Int64[Tensor, "#n d"]:
        count, places = len(self.weight), self.places
        if places is None and count == 1:
            places = torch.zeros(n, dtype=torch.long)
        if places is None or len(places) != n:
            told = "none" if places is None else str(len(places))
            raise ValueError(
                f"places must be {n} of 0 .. {count - 1}, one for each patch, as `at` takes them; got {told}"
            )
        d = math.prod(self.basis.shape)
        return places.to(self.table.device)[:, None] * d + torch.arange(d, device=self.table.device)


class Marginals(_Pyramid):
    """The distribution of every component, whatever its shape, independent of the others: sparsity, skewness, tails.

    It is a mixture of narrow normals, one for each of a number of bins even in x.

    Arguments:
        basis, prior: U, m, S.
        weight, mean, variance: of each component's bins in data units, (c, h, w, bins), the number a power of 2.
        low, step: where each component's bins begin, and how wide they are, (c, h, w).
    """

    name = "marginals"
    knows = "the distribution of each component"
    weight: Tensor
    mean: Tensor
    variance: Tensor
    low: Tensor
    step: Tensor

    @door
    def __init__(
        self,
        basis: Basis,
        prior: Prior,
        weight: Float[Tensor, "c h w bins"],
        mean: Float[Tensor, "c h w bins"],
        variance: Float[Tensor, "c h w bins"],
        low: Float[Tensor, "c h w"],
        step: Float[Tensor, "c h w"],
    ) -> None:
        super().__init__(basis, prior)
        for key, value in {"weight": weight, "mean": mean, "variance": variance, "low": low, "step": step}.items():
            self.register_buffer(key, value)
        w, m, v = (x.flatten(0, 2).double() for x in (weight, mean, variance))
        checks.positive("weight of a component", w.sum(1))
        self._tabulate(w[None], m, v)
        checks.finite("mean and variance, squared and in float32,", self.within)

    @classmethod
    @door
    def fit(cls, basis: Basis, prior: Prior, images: Grey, bins: int = 512) -> "Marginals":
        """Bins of the components of images, dequantised exactly: each normal is as wide as the noise added, at least.

        Arguments:
            basis, prior: of the components.
            images: uint8 (n, c, h, w).
            bins: a power of 2.

        Raises:
            ValueError: if it is none, or images are not uint8.
        """
        checks.grey("images", images, basis.shape)
        bins = checks.whole("bins", bins)
        if bins < 2 or bins & (bins - 1):
            raise ValueError(f"bins must be a power of 2, at least 2; got {bins}")
        parts = [basis(centres(part)).flatten(1).double() for part in images.split(1000)]
        low = torch.stack([part.amin(0) for part in parts]).amin(0)
        high = torch.stack([part.amax(0) for part in parts]).amax(0)
        margin = 0.05 * (high - low) + 0.01
        low, step = low - margin, (high - low + 2 * margin) / bins
        d = len(low)
        sums = low.new_zeros(3, d * bins)
        for x in parts:
            place = ((x - low) / step).long().clamp(0, bins - 1) + torch.arange(d, device=x.device) * bins
            for total, value in zip(sums, (torch.ones_like(x), x, x.square()), strict=True):
                total += torch.bincount(place.flatten(), value.flatten(), d * bins)
        count, first, second = sums.view(3, d, bins)
        middle = low[:, None] + step[:, None] * (torch.arange(bins, device=low.device) + 0.5)
        mean = torch.where(count > 0, first / count.clamp(min=1), middle)
        inside = second / count.clamp(min=1) - mean.square()
        spread = torch.where(count > 0, inside.clamp(min=0), step[:, None].square() / 12)
        spread[:, [0, -1]] = ((high - low)[:, None].square() / 64).clamp(min=0.25**2)  # for what was never seen
        near = functional.avg_pool1d(count[:, None], 9, 1, 4)[:, 0]
        weight = 0.9 * count / len(images) + 0.09 * near / near.sum(1, keepdim=True) + 0.01 / bins
        tables = weight, mean, spread + WITHIN_LEVEL, low, step
        return cls(basis, prior, *(table.unflatten(0, basis.shape).float() for table in tables))

    @door
    def nll(self, data: Batch) -> Float[Tensor, " n"]:
        """As `Reference`."""
        w, m, v = (x.flatten(0, 2).to(data) for x in (self.weight, self.mean, self.variance))
        log = (w / w.sum(1, keepdim=True)).log() - 0.5 * (2 * math.pi * v).log()
        nats = []
        for part in data.split(max(1, 2**20 // w.numel())):  # 8 MB at a time
            off = self.basis(part).flatten(1)[..., None] - m
            nats.append(-(log - 0.5 * off.square() / v).logsumexp(-1).sum(1))
        return torch.cat(nats)

    def _place(self, z: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return (z - self.low.flatten()) / self.step.flatten(), s / self.step.flatten()


class GroupedGaussian(Reference):
    """A normal distribution with correlations among blocks: any within a group of components, none between groups.

    Group g holds m components of every one of the n blocks: one Cholesky factor of (m n)^2 for each group, whatever
    noise level each block has. In cosine waves along the columns (`bases.Blocks.waves`), with m = the three colours of
    one wave, it is nearly the whole covariance of textures, whose statistics do not depend on height.

    Arguments:
        basis: of blocks.
        prior: with one scale, so that noise is the same in all of a block's components.
        members: which components of a block belong to each group, (g, m); each belongs to one.
        covariance: of each group, in white units, component by component, block by block, (g, m n, m n), without the
            dequantisation noise that `decoder` `normal` asks for.
        mean: of each component in white units, the same for all blocks, (g, m).

    Raises:
        ValueError: if the basis is none of blocks, the prior has several scales, or the shapes don't fit.
    """

    name = "grouped gaussian"
    knows = "linear correlations among columns or patches"
    basis: Blocks
    members: Tensor
    covariance: Tensor
    mean: Tensor
    loudest: Tensor
    added = WITHIN_LEVEL  # variance of the noise that is added to the data, in their units
    _values = staticmethod(centres)

    @door
    def __init__(
        self,
        basis: Basis,
        prior: Prior,
        members: Int64[Tensor, "g m"],
        covariance: Float[Tensor, "g k k"],
        mean: Float[Tensor, "g m"],
    ) -> None:
        super().__init__(basis, prior)
        if not isinstance(basis, Blocks):
            raise ValueError(f"basis must be one of blocks (bases.Blocks); it is {basis.name!r}")
        if float(prior.scale.max()) > float(prior.scale.min()) * (1 + 1e-6):
            raise ValueError(
                "prior must have one scale for all components (priors.isotropic); "
                f"it has {float(prior.scale.min()):.3g} to {float(prior.scale.max()):.3g}"
            )
        g, m = members.shape
        count = len(basis.matrix)
        k = m * basis.split(torch.zeros(1, *basis.shape)).shape[1]
        if tuple(covariance.shape) != (g, k, k) or mean.shape != members.shape or g * m != count:
            raise ValueError(
                f"members ({g}, {m}) of the {count} components of a block need covariance ({g}, {k}, {k}) and mean "
                f"({g}, {m}); got {tuple(covariance.shape)} and {tuple(mean.shape)}"
            )
        self.register_buffer("members", members)
        self.register_buffer("covariance", covariance.double())
        self.register_buffer("mean", mean.double())
        loudest = self.covariance.abs().sum(2).amax()  # no variance along any direction is larger
        self.register_buffer("loudest", loudest, persistent=False)

    @classmethod
    @door
    def fit(cls, basis: Basis, prior: Prior, images: Grey, symmetries: str = "none") -> "GroupedGaussian":
        """Covariances of images; in waves with the colours of each wave as a group, else with each component as one.

        Arguments:
            basis: of blocks.
            prior: with one scale.
            images: uint8 (n, c, h, w).
            symmetries: average over `mirror` images or `all` eight symmetries of the square, as `priors.measure`.

        Raises:
            ValueError: if images are not uint8, or fewer, mirror images included, than twice a group's components.
        """
        checks.grey("images", images, basis.shape)
        if not isinstance(basis, Blocks):
            raise ValueError(f"basis must be one of blocks (bases.Blocks); it is {basis.name!r}")
        c, h, _ = basis.shape
        cosines = Blocks.waves(basis.shape).matrix.to(basis.matrix) if not basis.size else None
        waves = cosines is not None and torch.allclose(basis.matrix, cosines, atol=1e-5)
        index = torch.arange(len(basis.matrix), device=images.device)
        members = index.view(c, h).T.contiguous() if waves else index[:, None]
        square, total, count = torch.zeros(()), torch.zeros(()), 0
        for part in images.split(500):
            white = prior.whiten(basis(cls._values(mirrored(part, symmetries)).double()))
            z = basis.split(white).mT[:, members]  # (b, g, m, n)
            flat = z.flatten(2).transpose(0, 1)
            square, total, count = square + flat.mT @ flat, total + z.sum(0), count + len(z)
        if count < 2 * square.shape[1]:
            raise ValueError(
                f"images must be at least {2 * square.shape[1]}, mirror images included, for covariances of "
                f"{square.shape[1]} components; got {count}"
            )
        mean = (total / count).mean(2)
        first, each = (total / count).flatten(1), mean.repeat_interleave(total.shape[2], 1)
        cross = first[:, :, None] * each[:, None, :]
        square = square / count - cross - cross.mT + each[:, :, None] * each[:, None, :]
        return cls(basis, prior, members, square, mean)

    @inner
    def posterior(self, white_t: Batch, gamma: Gamma) -> Posterior:
        """As `Reference`, for noise that is the same in all of a block's components; computed in float64.

        Blocks in which hardly a hundredth of the noise is signal, in any direction, are taken to tell nothing; their
        deviation is that of the distribution itself.
        """
        gamma = gamma[None] if gamma.ndim == 3 else gamma
        y, g = self._groups(white_t.double()), self._groups(gamma.double().expand(len(gamma), *white_t.shape[1:]))
        noise, signal = torch.sigmoid(g), torch.sigmoid(-g)
        silent = g > self.loudest.log() + SILENT
        off, precision = self._solve(y, g, silent)
        carried = (off * signal.sqrt()).masked_fill(silent, 0.0)
        told = self._mean() + (carried.transpose(0, 1) @ self._covariance).transpose(0, 1)
        mean = torch.where(silent, told, (y - noise * off) / signal.sqrt())
        left = (noise - noise.square() * precision).clamp(min=1e-12) / signal
        variance = torch.where(silent, self._covariance.diagonal(dim1=1, dim2=2), left)
        parts = mean, variance.sqrt().expand_as(y), off / precision.sqrt(), noise.sqrt() * off
        return Posterior(*(self._back(part).to(white_t) for part in parts))

    @door
    def nll(self, data: Batch) -> Float[Tensor, " n"]:
        """As `Reference`: a density, of images with the dequantisation noise."""
        return self._density(data, WITHIN_LEVEL)

    def stationary(self) -> "GroupedGaussian":
        """The same with covariances that depend on how far two columns are apart, not on where they are.

        Pictures that grow (`samplers.extend`) need it: what a window's covariances say of its columns must hold for all
        columns to come, or errors add up. Covariances are averaged over places and continued periodically, one lag
        after the last; where a wave of columns would have less than the variance of `added` noise it gets that.

        Raises:
            ValueError: if the blocks are not columns.
        """
        if self.basis.size:
            raise ValueError(f"blocks must be columns; they are patches of {self.basis.size}")
        n, (g, k, _) = self.basis.shape[2], self.covariance.shape
        by_place = self._covariance.view(g, k // n, n, k // n, n)
        lags = torch.stack([by_place.diagonal(d, 2, 4).mean(-1) for d in (*range(n), *range(1 - n, 0))], 1)
        spectrum, vectors = torch.linalg.eigh(torch.fft.fft(lags, dim=1))
        spectrum = spectrum.clamp(min=self.added / float(self._unit) ** 2)
        lags = torch.fft.ifft((vectors * spectrum[..., None, :]) @ vectors.mH, dim=1).real
        column = torch.arange(n, device=lags.device)
        covariance = lags[:, (column - column[:, None]) % (2 * n - 1)].permute(0, 3, 1, 4, 2).reshape(g, k, k)
        return type(self)(self.basis, self.prior, self.members, covariance, self.mean)

    def _density(self, data: Batch, added: float) -> Float[Tensor, " n"]:
        """-log density with noise of a variance (data units) added to the distribution."""
        y = self._groups(self.prior.whiten(self.basis(data)).double()) - self._mean()
        eye = torch.eye(y.shape[2]).to(self._covariance)
        root = torch.linalg.cholesky(self._covariance + added / self._unit**2 * eye)
        square = torch.linalg.solve_triangular(root, y.permute(1, 2, 0), upper=False).square().sum((0, 1))
        log = 2 * root.diagonal(dim1=1, dim2=2).log().sum() + y[0].numel() * math.log(2 * math.pi)
        return 0.5 * (square + log) + self.prior.log_volume.double()

    @property
    def _unit(self) -> Tensor:
        return self.prior.scale.flatten()[0].double()

    def _solve(self, y: Tensor, gamma: Tensor, silent: Tensor) -> tuple[Tensor, Tensor]:
        """K^-1 (y - alpha m) and the diagonal of K^-1, with K = alpha C alpha + sigma^2, (b, g, k).

        On a CPU, whose time goes into factors, each image's has the size of its blocks that are not silent.
        """
        noise, a, covariance = torch.sigmoid(gamma), torch.sigmoid(-gamma).sqrt(), self._covariance
        shifted = y - a * self._mean()
        added = noise + self.added / self._unit**2 * a.square()
        if y.device.type != "cpu":
            root = _root(covariance * a[..., :, None] * a[..., None, :], added)
            return (root.mT @ (root @ shifted[..., None]))[..., 0], root.square().sum(-2)
        off, precision = shifted / noise, noise.reciprocal()
        for i, heard in enumerate(~silent.all(1)):
            at = heard.nonzero()[:, 0]
            among = covariance.index_select(1, at).index_select(2, at)
            s, images = a[i, :, at], slice(None) if len(gamma) == 1 else slice(i, i + 1)
            root = _root(among * s[:, :, None] * s[:, None, :], added[i, :, at])
            off[images, :, at] = (root.mT @ (root @ shifted[images, :, at].permute(1, 2, 0))).permute(2, 0, 1)
            precision[i, :, at] = root.square().sum(-2)
        return off, precision

    @property
    def _covariance(self) -> Tensor:
        return self.covariance.double()

    def _mean(self) -> Tensor:
        return self.mean.double().repeat_interleave(self.covariance.shape[1] // self.mean.shape[1], 1)

    def _groups(self, x: Batch) -> Float[Tensor, "b g k"]:
        return self.basis.split(x).mT[:, self.members].flatten(2)

    def _back(self, x: Float[Tensor, "b g k"]) -> Batch:
        each = x.unflatten(2, (self.members.shape[1], -1)).flatten(1, 2)
        return self.basis.join(each[:, self.members.flatten().argsort()].mT)


class LatticeGaussian(GroupedGaussian):
    """The same for grey levels: each pixel's posterior, a normal distribution, is cut down to the levels it may have.

    Exact for pixels that are independent given the noised image, as they nearly are where the lattice matters, at noise
    of less than a grey level. The probability of an image is that of its cell, one grey level wide in each pixel; for
    its NLL the cell counts as normal: the density at its centre, blurred by a variance of 1/12. That is close where no
    pixel can be told from the others to less than a level, as in textures; for flat images it is no code length.
    """

    name = "lattice gaussian"
    knows = "linear correlations among columns, and that grey levels are whole numbers"
    decoder = "discrete"
    added = 0.01 * WITHIN_LEVEL  # keeps the covariance positive definite
    _values = staticmethod(scale)
    reach = 4  # grey levels to each side that are told apart

    @door
    def nll(self, data: Batch) -> Float[Tensor, " n"]:
        """As `Reference`."""
        return self._density(data, 1 / (12 * HALF**2)) + data[0].numel() * math.log(HALF)

    @property
    def components(self) -> Basis:
        """Pixels."""
        return Pixel(self.basis.shape)

    @inner
    def white(self, estimate: Batch) -> Batch:
        """As `Reference`."""
        return self.basis(estimate)

    @inner
    def posterior(self, white_t: Batch, gamma: Gamma) -> Posterior:
        """As `Reference`, in pixels."""
        of_blocks, basis = super().posterior(white_t, gamma), self.basis
        unit = HALF * self.prior.scale.flatten()[0].to(white_t)  # grey levels in a white unit
        offset = HALF * (1 + basis.inverse(self.prior.mean.to(white_t)[None]))
        energy = basis.matrix.square().to(white_t)
        level = offset + unit * basis.inverse(of_blocks.mean)
        spread = unit * basis.join(basis.split(of_blocks.deviation.square()) @ energy).sqrt()
        window = torch.arange(-self.reach, self.reach + 1, device=level.device)
        at = level.round().clamp(0, LEVELS - 1)[..., None] + window
        log = -0.5 * ((at - level[..., None]) / spread.clamp(min=0.02)[..., None]).square()
        share = log.masked_fill((at < 0) | (at >= LEVELS), -math.inf).softmax(-1)
        mean = (share * at).sum(-1)
        deviation = (share * (at - mean[..., None]).square()).sum(-1).sqrt()
        fine = spread < 0.3 * self.reach
        mean, deviation = torch.where(fine, mean, level), torch.where(fine, deviation.clamp(min=1e-4), spread)
        white = (mean - offset) / unit
        eps = (white_t - alpha(gamma) * self.white(white)) / sigma(gamma)
        return Posterior(white, deviation / unit, basis.inverse(of_blocks.residual), eps)


def _root(matrix: Float[Tensor, "*b k k"], diagonal: Float[Tensor, "*b k"]) -> Float[Tensor, "*b k k"]:
    """R with R^T R = (matrix + diagonal)^-1, positive definite; unchecked, so that nobody waits for a GPU."""
    matrix.diagonal(dim1=-2, dim2=-1).add_(diagonal)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve_triangular(torch.linalg.cholesky_ex(matrix)[0], eye, upper=False)


_ALL = IndependentGaussian, Histograms, PatchHistograms, Marginals, GroupedGaussian, LatticeGaussian
KINDS: dict[str, type[Reference]] = {each.name: each for each in _ALL}


@door
def rebuild(name: str, basis: Basis, prior: Prior, tables: dict[str, Tensor]) -> Reference:
    """The reference of a name and its tables, as `state_dict` names them, for the basis and prior it was made for.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in KINDS:
        raise ValueError(f"a reference must be one of {sorted(KINDS)}; got {name!r}")
    return KINDS[name](basis, prior, **{k: v.float() if v.dtype == torch.half else v for k, v in tables.items()})


@door
def fit(name: str, basis: Basis, prior: Prior, images: Grey) -> Reference:
    """A reference by name, fitted to images; histograms in a sector for every 150 images, as many as memory allows.

    Raises:
        ValueError: for an unknown name, or a basis, prior or images that do not suit it.
    """
    if name == Histograms.name:
        checks.grey("images", images, basis.shape)
        sectors = min(len(images) // 150, 32, LARGEST // images[0].numel())
        return Histograms.fit(basis, prior, images, max(sectors, 1))
    if name not in KINDS:
        raise ValueError(f"a reference must be one of {sorted(KINDS)}; got {name!r}")
    return KINDS[name].fit(basis, prior, images)


@door
def best(names: Sequence[str], basis: Basis, prior: Prior, images: Grey) -> Reference:
    """The reference that, fitted to four fifths of the images, has the least NLL on the others; fitted to all.

    Arguments:
        names: to choose from.
        basis, prior: of all of them; the prior's moments, a few numbers, may be those of all images.
        images: uint8 (n, c, h, w), in random order.
    """
    checks.grey("images", images, basis.shape, least=2)
    if not names:
        raise ValueError("names must be at least one; got none")
    unseen, seen = images.tensor_split([max(len(images) // 5, 1)])
    bits = {name: float(fit(name, basis, prior, seen).bits(unseen[:500]).mean()) for name in names}
    return fit(min(bits, key=lambda name: bits[name]), basis, prior, images)


def _counts(x: Int64[Tensor, "n d"], sector: Int64[Tensor, " n"], sectors: int) -> Float[Tensor, "k d 256"]:
    """How often each sector's images have each grey level at each pixel."""
    n, d = x.shape
    index = (sector[:, None] * d + torch.arange(d, device=x.device)) * LEVELS + x
    return torch.bincount(index.flatten(), minlength=sectors * d * LEVELS).view(sectors, d, LEVELS).float()


def _smoothed(counts: Float[Tensor, "k d 256"], shape: tuple[int, int, int]) -> Float[Tensor, "k d 256"]:
    """Probabilities from counts: a pixel's own, some of its neighbours', of all images, of all pixels."""
    whole = counts.sum(0)
    near = functional.avg_pool1d(whole, 5, 1, 2, count_include_pad=False)
    near = near / near.sum(-1, keepdim=True)
    whole = 0.93 * whole / whole.sum(-1, keepdim=True) + 0.05 * near + 0.02 * whole.sum(0) / whole.sum()
    if len(counts) == 1:
        return whole[None]
    x = torch.arange(-2.0, 3.0, device=counts.device)
    kernel = (-0.5 * (x[:, None].square() + x.square()) / BLUR**2).exp()[None, None]
    inside = functional.conv2d(counts.new_ones(1, 1, *shape[1:]), kernel, padding=2)
    blurred = []
    for one in counts:  # a sector at a time: 256 pictures for each colour
        planes = one.unflatten(0, shape).permute(0, 3, 1, 2).flatten(0, 1)[:, None]
        planes = functional.conv2d(planes, kernel, padding=2) / inside
        blurred.append(planes[:, 0].unflatten(0, (shape[0], LEVELS)).permute(0, 2, 3, 1).flatten(0, 2))
    blur = torch.stack(blurred)
    return (blur + PULL * whole) / (blur.sum(-1, keepdim=True) + PULL)


def _by_patch(weight: Float[Tensor, "c h w 256"], size: int) -> Float[Tensor, "l c p p 256"]:
    planes = functional.pixel_unshuffle(weight.permute(3, 0, 1, 2), size)  # (256, c p p, rows, columns)
    return planes.flatten(2).permute(2, 1, 0).unflatten(1, (weight.shape[0], size, size)).contiguous()


def _sectors(x: Int64[Tensor, "n d"], sectors: int, seed: int) -> Int64[Tensor, " n"]:
    """The likeliest of a mixture's sectors for each image: products of histograms of 9 bins, black on its own.

    Fitted to at most 5,000 images by expectation and maximisation, from k-means.
    """
    generator, d, bins = torch.Generator().manual_seed(seed), x.shape[1], 9
    count = min(5000, 40_000_000 // (bins * d))  # 160 MB
    some = x[torch.randperm(len(x), generator=generator)[: max(count, sectors)].to(x.device)]

    def binned(x: Tensor) -> Tensor:
        return torch.where(x == 0, 0, 1 + x * (bins - 1) // LEVELS) + torch.arange(d, device=x.device) * bins

    pixels = some.float()
    ones = pixels.new_zeros(len(some), d * bins).scatter_(1, binned(some), 1.0)
    centres = pixels[:sectors]
    share, usual = pixels.new_zeros(len(some), sectors), ones.mean(0)
    for _ in range(6):
        share = functional.one_hot(torch.cdist(pixels, centres).argmin(1), sectors).float()
        centres = share.T @ pixels / share.sum(0)[:, None].clamp(min=1)
    log, log_share = ones[:0], ones[:0]
    for _ in range(10):
        size = share.sum(0)
        log = ((share.T @ ones + 8 * usual) / (size + 8)[:, None]).clamp(min=1e-9).log()
        log_share = ((size + 1) / (size + 1).sum()).log()
        share = (ones @ log.T + log_share).softmax(1)
    log = log.T.contiguous()
    each = [functional.embedding_bag(binned(part), log, mode="sum") + log_share for part in x.split(2000)]
    return torch.cat(each).argmax(1)
