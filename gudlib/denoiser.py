r"""A network around a reference distribution: it learns only what the reference leaves.

A reference (`gudlib.references`) has a known posterior, of mean m and standard deviation s in each component. The
network's answer F, an image, enters as

    eps_hat = eps_ref + (alpha / sigma) s V F,      eps_ref = (chi_t - alpha m) / sigma,

with V the basis in which the reference's posterior is written: m - s V F is its estimate of the clean data, so its
target has unit variance in every component at every noise level, and F = 0 is the best denoiser for data that follow
the reference. For independent normals of variance c,

    eps_hat = eps_G + alpha sqrt(c / v) U F,     eps_G = sigma chi_t / v,     v = alpha^2 c + sigma^2,

which for one scale and one gamma is the preconditioning of EDM.

References:
    Elucidating the Design Space of Diffusion-Based Generative Models, T. Karras et al., 2022,
    https://arxiv.org/abs/2206.00364, section 5
"""

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gudlib import __version__, bases, checks, networks, references
from gudlib.doors import door, inner
from gudlib.files import read_tensors, write_tensors
from gudlib.priors import Moments, Prior
from gudlib.process import Batch, Gamma
from gudlib.references import IndependentGaussian, Reference

Network = TypeVar("Network", bound=nn.Module)
_ALONE = threading.Lock()


class Denoiser(nn.Module):
    """A model `(white_t, gamma) -> eps_hat` made of a network and a reference, which has the basis and the prior.

    The network gets two images: the reference's residual of `white_t` (chi_t / sqrt(v) for independent components), and
    its guess of the clean data, without the mean, in data units; if `noised` a third, the noised image in data units.
    It runs in float32 (or under autocast); everything else keeps the dtype of `white_t`.

    A denoiser belongs to its basis and prior: sample it along processes made of `denoiser.basis` and `denoiser.prior`.

    Arguments:
        network: as in `gudlib.networks`, with 2 c input channels, 3 c if `noised`.
        reference: with basis U and prior m, S.
        noised: whether the network sees the noised image; default whether it has `fourier` features of it.
    """

    @inner
    def __init__(self, network: nn.Module, reference: Reference, noised: bool | None = None) -> None:
        super().__init__()
        self.network, self.reference = network, reference
        self.noised = bool(getattr(network, "fourier", False)) if noised is None else noised

    @property
    def basis(self) -> bases.Basis:
        """U."""
        return self.reference.basis

    @property
    def shape(self) -> tuple[int, ...]:
        """(c, h, w)."""
        return self.basis.shape

    @property
    def prior(self) -> Prior:
        """m and S, and the variance c of the white data."""
        return self.reference.prior

    @inner
    def forward(self, white_t: Batch, gamma: Gamma) -> Batch:
        """The predicted noise, same shape and dtype as `white_t`; gamma broadcasts to it."""
        basis, prior, into = self.basis, self.prior, self.reference.components
        mean, deviation, residual, eps = self.reference.posterior(white_t, gamma)
        images = [residual, prior.scale.to(mean) * mean]
        if into is basis:  # one transform for all of them
            images = torch.cat([*images, prior.unwhiten(white_t)] if self.noised else images)
            images = (
                basis.inverse(images.float())
                .unflatten(0, (2 + self.noised, len(white_t)))
                .transpose(0, 1)
                .flatten(1, 2)
            )
        else:
            images = [into.inverse(x.float()) for x in images]
            noised = [basis.inverse(prior.unwhiten(white_t).float())] if self.noised else []
            images = torch.cat(images + noised, dim=1)
        answer = self.network(images, gamma.expand_as(white_t).float()).float()
        correction = self.reference.white(deviation * into(answer).to(white_t))
        signal, noise = torch.sigmoid(-gamma), torch.sigmoid(gamma)
        return eps + (signal / noise).sqrt() * correction


@door
def build(
    basis: bases.Basis,
    prior: Prior,
    groups: int = 16,
    label: str | Float[Tensor, "c h w"] | None = None,
    reference: Reference | None = None,
    kind: str = "unet",
    **network: Any,
) -> Denoiser:
    """A denoiser with a fresh network for a basis and a prior, which it copies as float32, on the prior's device.

    Arguments:
        basis, prior: the components.
        groups: into how many groups of noise levels the network's conditioning divides the components.
        label: along which they are grouped, by name or itself (c, h, w); default the prior's order (variance).
        reference: around which the network is put, of this basis and prior; default independent normals.
        kind: `unet` or `transformer`, which is for pixels; groups are its patches, whatever the two above say.
        network: options of `networks.UNet` or `networks.Transformer`.

    Raises:
        ValueError: for another kind or basis, or as the network.
    """
    groups = checks.whole("groups", groups)
    reference = IndependentGaussian(basis, prior) if reference is None else reference
    along = prior.order.cpu() if label is None else basis.label(label) if isinstance(label, str) else label
    net = _network(kind, basis, bases.groups_by(along, groups), network)
    made = copy.deepcopy(reference)
    made.basis.float()
    made.prior.float()  # its tables stay as they are: covariances need float64
    return Denoiser(net, made).to(prior.mean.device)


def _network(
    kind: str, basis: bases.Basis, groups: Tensor, options: dict[str, Any]
) -> networks.UNet | networks.Transformer:
    checks.one_of("kind", kind, networks.KINDS)
    if kind == "transformer":
        if basis.name != "pixel":
            raise ValueError(f"kind 'transformer' is for pixels, whose patches it sees; the basis is {basis.name!r}")
        return networks.Transformer(**{"shape": basis.shape, "inputs": 3 * basis.shape[0]} | options)
    inverse = copy.deepcopy(basis).cpu().inverse if options.get("conditioning") == "local" else None
    options = {"shape": basis.shape, "inputs": (2 + options.get("fourier", False)) * basis.shape[0]} | options
    return networks.UNet(groups=groups, inverse=inverse, **options)


@door
def save(
    denoiser: Denoiser, path: str | Path, half: bool = False, card: dict[str, Any] | None = None, **header: Any
) -> None:
    """Write everything needed to use the denoiser again to one safetensors file, atomically.

    Arguments:
        denoiser: with a network of `gudlib.networks`.
        path: the file; it is either complete or not there.
        half: store the network's weights, and histograms, as float16 (basis and prior stay float32).
        card: anything worth knowing about how it was trained; JSON values.
        header: more of what it takes to use the denoiser, JSON values: `family`, `recommended`.
    """
    tensors = {k: v.half() if half and _halved(k, denoiser) and v.is_floating_point() else v
               for k, v in _named(denoiser).items()}  # fmt: skip
    write_tensors(path, tensors, describe(denoiser) | {"card": card or {}} | header)


@door
def load(path: str | Path) -> Denoiser:
    """The denoiser of a file written by `save`, in float32 on the CPU, ready to sample.

    Raises:
        ValueError: if the file is not a complete checkpoint of such a network; the message names it.
    """
    with naming(path):
        return rebuild(path, *read_saved(path))


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """A block in which whatever is wrong with a checkpoint's content is a `ValueError` that names the file."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a file may hold anything
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        reason = f"it has no {error}" if isinstance(error, KeyError) else f"{error}".partition("\n")[0]
        raise ValueError(f"{path} is no checkpoint that gudlib {__version__} can read: {reason}") from error


@door
def rebuild(path: str | Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> Denoiser:
    """The denoiser of what `read_saved` read from `path`.

    Raises:
        ValueError: if its network is none of `networks`; the message says what opens the file.
    """
    options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in header["network"].items()}
    kind = options.pop("kind")
    if kind not in networks.KINDS:
        raise ValueError(f"{path} holds a network of kind {kind!r}; use gudlib.mar.load")
    reference, groups = saved_reference(tensors, header), tensors["network.levels.groups"]
    if groups.shape != reference.prior.mean.shape or groups.min() < 0 or groups.max() >= groups.numel():
        raise ValueError(f"network.levels.groups must number the components' groups; got {checks.what(groups)}")
    network = saved_network(lambda: _network(kind, reference.basis, groups, dict(options)), tensors)
    return Denoiser(network, reference, header.get("noised")).eval()


@door
def saved_network(make: Callable[[], Network], tensors: dict[str, Tensor]) -> Network:
    """A network with the tensors of a file, whose names and shapes are compared with its own before it is filled.

    Raises:
        ValueError: if one is missing, or of another shape.
    """
    from accelerate import init_empty_weights

    given = {name.removeprefix("network."): x for name, x in tensors.items() if name.startswith("network.")}
    with _ALONE, init_empty_weights():  # it changes how all modules are made
        wanted = make().state_dict()
    for name in sorted(wanted.keys() | given.keys()):
        shapes = [f"shape {tuple(each[name].shape)}" if name in each else "none" for each in (wanted, given)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"network.{name}: expected {shapes[0]}, found {shapes[1]}")
    network = make()
    network.load_state_dict(given)
    return network


@door
def saved_reference(tensors: dict[str, Tensor], header: dict[str, Any]) -> Reference:
    """The reference of what `read_saved` read, with basis and prior in float32 as `build` makes them."""
    channels, height, width = (checks.whole("shape", size) for size in header["shape"])
    shape = channels, height, width
    if tuple(tensors["prior.mean"].shape) != shape:
        raise ValueError(f"prior.mean must have shape {shape}; got {tuple(tensors['prior.mean'].shape)}")
    for name, values in tensors.items():
        if values.is_floating_point():
            checks.finite(name, values)
    if header["basis"]["name"] == "pca":
        basis: bases.Basis = bases.PCA(tensors["basis.matrix"], shape, tensors["basis.eigenvalues"])
    elif header["basis"]["name"] == "blocks":
        basis = bases.Blocks(tensors["basis.matrix"], shape, header["basis"]["size"])
    else:
        basis = bases.make(**header["basis"], shape=shape)
    moments = Moments(tensors["prior.mean"], tensors["prior.variance"], header["floor"])
    tables = {k.removeprefix("table."): v for k, v in tensors.items() if k.startswith("table.")}
    name = header.get("reference", IndependentGaussian.name)
    return references.rebuild(name, basis.float(), Prior(moments, tensors["prior.scale"]).float(), tables)


@door
def card(path: str | Path) -> dict[str, Any]:
    """What `save` was told about the training of a checkpoint.

    Raises:
        ValueError: if the file is not a complete checkpoint.
    """
    return read_saved(path)[1]["card"]


@door
def read_saved(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file written by `save`.

    Raises:
        ValueError: if the file is not a complete checkpoint; the message names it.
    """
    tensors, header = read_tensors(path)
    if "card" not in header:
        raise ValueError(f"{path} is the state of a training run: resume it with a Trainer, and `save` its denoiser")
    return tensors, header


@door
def describe(denoiser: Denoiser) -> dict[str, Any]:
    """The JSON header from which `load` rebuilds the modules."""
    return {
        "shape": list(denoiser.basis.shape),
        "basis": denoiser.basis.spec,
        "floor": denoiser.prior.floor,
        "network": denoiser.network.config,
        "reference": denoiser.reference.name,
        "noised": denoiser.noised,
    }


def _halved(name: str, denoiser: Denoiser) -> bool:
    histograms = isinstance(denoiser.reference, references.Histograms | references.PatchHistograms)
    return name.startswith("network.") or (histograms and name == "table.weight")


def _named(denoiser: Denoiser) -> dict[str, Tensor]:
    """Tensors as files name them: `network`, `basis`, `prior` and, of the reference, `table`."""
    named = {}
    for key, value in denoiser.state_dict().items():
        key = key.replace("._orig_mod.", ".")  # of a compiled network
        own = key.removeprefix("reference.")
        named[key if own == key else own if own.startswith(("basis.", "prior.")) else f"table.{own}"] = value
    return named
