"""An autoregressor: a network with the basis and prior of its tokens, and the file it is kept in."""

import math
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from gudlib import bases, checks, denoiser, priors
from gudlib.denoiser import Denoiser
from gudlib.doors import door, inner
from gudlib.mar.networks import KINDS, Cache, Labels, Network, Permutation, Tokens, patch_count
from gudlib.process import Batch, Gamma, Model, Process
from gudlib.references import PatchHistograms, Reference
from gudlib.schedules import Schedule


@inner
def patchify(images: Batch, size: int) -> Tokens:
    """Square patches of images (b, c, h, w) in reading order, each flattened from (c, size, size).

    Raises:
        ValueError: if the patch size does not divide height and width.
    """
    checks.batch("images", images)
    size = checks.whole("size", size)
    patch_count(images.shape[-2], images.shape[-1], size)
    return functional.pixel_unshuffle(images, size).flatten(2).mT


@inner
def unpatchify(tokens: Tokens, shape: tuple[int, int, int], size: int) -> Batch:
    """Images of one shape (c, h, w) from their patches; the inverse of `patchify`.

    Raises:
        ValueError: if the patch size does not divide the shape, or tokens are not as many and as large as it says.
    """
    size, (c, h, w) = checks.whole("size", size), shape
    if tokens.shape[1:] != (patch_count(h, w, size), c * size**2):
        raise ValueError(f"tokens must be the patches of {size} of images {tuple(shape)}; got {checks.what(tokens)}")
    return functional.pixel_shuffle(tokens.mT.unflatten(2, (shape[1] // size, shape[2] // size)), size)


class Conditioned(nn.Module):
    """A network of images and gamma, with whatever else it wants held fixed: for `Denoiser`."""

    def __init__(self, network: nn.Module, *context: Any) -> None:
        super().__init__()
        self.network, self.context = network, context

    @inner
    def forward(self, images: Float[Tensor, "n inputs p p"], gamma: Float[Tensor, "n c p p"]) -> Tensor:
        """Its answer."""
        return self.network(images, gamma, *self.context)


class Autoregressor(nn.Module):
    """A network around a reference of its tokens: images in, models of tokens out.

    Arguments:
        network: trunk and head.
        reference: of the tokens, patches (c, p, p), around which the head is put; it has their basis and prior.

    Raises:
        ValueError: if the reference is not of such patches, or of another number of them.
    """

    @door
    def __init__(self, network: Network, reference: Reference) -> None:
        super().__init__()
        shape = (network.image[0], network.size, network.size)
        if reference.basis.shape != shape:
            raise ValueError(
                f"reference must be of patches {shape}, as the network has them; got {reference.basis.shape}"
            )
        if isinstance(reference, PatchHistograms) and len(reference.weight) != network.count:
            raise ValueError(f"reference must be of the network's {network.count} patches; got {len(reference.weight)}")
        self.network, self.reference = network, reference

    @property
    def basis(self) -> bases.Basis:
        """U of a patch, the tokens' linear code."""
        return self.reference.basis

    @property
    def prior(self) -> priors.Prior:
        """m and S of its components."""
        return self.reference.prior

    @inner
    def process(self, schedule: Schedule) -> Process:
        """The diffusion of one token."""
        return Process(self.basis, self.prior, schedule)

    @inner
    def tokens(self, images: Batch) -> Tokens:
        """White tokens (b, L, D) of images (b, c, h, w)."""
        return white_tokens(self.basis, self.prior, images)

    @inner
    def images(self, tokens: Tokens) -> Batch:
        """Images of white tokens; the inverse of `tokens`."""
        self._fits(tokens)
        data = self.basis.inverse(self.prior.unwhiten(tokens.reshape(-1, *self.basis.shape)))
        return unpatchify(data.reshape(tokens.shape), self.network.image, self.network.size)

    @inner
    def conditional(
        self,
        tokens: Tokens,
        permutation: Permutation,
        start: int,
        stop: int,
        labels: Labels | None = None,
        guidance: float = 1.0,
        cache: Cache | None = None,
    ) -> Model:
        """The model `(white_t, gamma) -> eps_hat` of tokens permutation[:, start:stop], as (b (stop - start), c, p, p).

        A causal kind gives each all tokens before it, which must be there; the masked kind gives all of them
        permutation[:, :start].

        Arguments:
            tokens: white tokens (b, L, D); what is not known may be anything.
            permutation: of 0 .. L - 1, for each image, (b, L).
            start, stop: places in it.
            labels: (b,); none if not given.
            guidance: w, of eps_none + w (eps_label - eps_none).
            cache: the trunk's, if tokens are asked for one after another.
        """
        self._fits(tokens)
        start, stop = checks.whole("start", start, 0), checks.whole("stop", stop, 1, self.network.count)
        none = permutation.new_full((len(permutation),), self.network.classes)
        labels, tokens = none if labels is None else labels, tokens.float()
        places = permutation[:, start:stop].flatten()
        if guidance == 1:
            return self._denoiser(self.network.trunk(tokens, permutation, start, stop, labels, cache), places)
        both = self.network.trunk(
            torch.cat([tokens, tokens]),
            torch.cat([permutation, permutation]),
            start,
            stop,
            torch.cat([labels, none]),
            cache,
        )
        with_label, without = (self._denoiser(z, places) for z in both.chunk(2))

        def guided(white_t: Batch, gamma: Gamma) -> Batch:
            base = without(white_t, gamma)
            return base + guidance * (with_label(white_t, gamma) - base)

        return guided

    def _fits(self, tokens: Tokens) -> None:
        wanted = self.network.count, math.prod(self.basis.shape)
        if tuple(tokens.shape[1:]) != wanted:
            raise ValueError(f"tokens must have shape (b, {wanted[0]}, {wanted[1]}); got {checks.what(tokens)}")

    def _denoiser(self, z: Float[Tensor, "b m width"], places: Int64[Tensor, " n"]) -> Denoiser:
        return Denoiser(Conditioned(self.network.head, z.flatten(0, 1)), self.reference.at(places))


@door
def denoising(config: dict[str, Any]) -> None:
    """Raise a ValueError if it is that of a head which says a token's distribution outright and removes no noise."""
    if "loss" in config:
        raise ValueError(f"the model's head is of loss {config['loss']!r}; see gudlib.mar.mixtures")


@door
def save(model: Autoregressor, path: str | Path, half: bool = False, card: dict[str, Any] | None = None) -> None:
    """Write a model to one safetensors file, as `denoiser.save`, whose arguments these are."""
    denoiser.save(Denoiser(model.network, model.reference), path, half, card)


@door
def load(path: str | Path) -> Autoregressor:
    """The model of a file written by `save`, in float32 on the CPU, ready to sample.

    Raises:
        ValueError: if the file is not a complete checkpoint, or one of another network.
    """
    tensors, header = denoiser.read_saved(path)
    with denoiser.naming(path):
        if header["network"]["kind"] not in KINDS:
            raise ValueError(f"{path} holds a network of kind {header['network']['kind']!r}; use denoiser.load")
        if "loss" in header["network"]:
            raise ValueError(f"{path} holds a head of loss {header['network']['loss']!r}; use mar.mixtures.load")
        reference = denoiser.saved_reference(tensors, header)
        network = denoiser.saved_network(lambda: Network(**header["network"]), tensors)
        return Autoregressor(network, reference).eval()


@inner
def white_tokens(basis: bases.Basis, prior: priors.Prior, images: Batch) -> Tokens:
    """White tokens (b, L, D) of images (b, c, h, w), in a basis and prior of patches."""
    raw = patchify(images, basis.shape[-1])
    return prior.whiten(basis(raw.reshape(-1, *basis.shape))).reshape(raw.shape)


@inner
def permutations(raster: bool, n: int, count: int, generator: torch.Generator) -> Permutation:
    """Reading order, or a new random order for each image, (n, count)."""
    n, count = checks.whole("n", n), checks.whole("count", count)
    if raster:
        return torch.arange(count, device=generator.device).expand(n, -1)
    return torch.rand(n, count, generator=generator, device=generator.device).argsort(1)


@inner
def check_labels(labels: Labels | None, n: int, classes: int) -> None:
    """Raise a ValueError unless labels are n integers below `classes`, or none."""
    if labels is None:
        return
    fits = tuple(labels.shape) == (n,) and labels.dtype == torch.long
    if not (fits and 0 <= int(labels.min()) and int(labels.max()) < classes):
        raise ValueError(
            f"labels must be {n} integers, 0 to {classes - 1}; got {labels.dtype} of shape {tuple(labels.shape)}, "
            f"{labels.min()} to {labels.max()}"
        )
