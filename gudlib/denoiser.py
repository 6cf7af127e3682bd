r"""A network around the exact Gaussian answer: it learns only what is not Gaussian.

If the data were independent Gaussian components of variance c, the best prediction of the noise and its error would be

    eps_G = sigma chi_t / v,     Var(eps | chi_t) = alpha^2 c / v,     v = alpha^2 c + sigma^2.

So the network's answer F, an image, enters as `eps_hat = eps_G + alpha sqrt(c / v) U F`: its target has unit variance
in every component at every noise level, its input chi_t / sqrt(v) too, and F = 0 is already the best denoiser that is
linear in each component (in the PCA basis: the best linear denoiser). For one scale and one gamma this is the
preconditioning of EDM.

References:
    Elucidating the Design Space of Diffusion-Based Generative Models, T. Karras et al., 2022,
    https://arxiv.org/abs/2206.00364, section 5
"""

import copy
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gudlib import bases, networks
from gudlib.exact import gaussian_eps
from gudlib.files import read_tensors, write_tensors
from gudlib.priors import Moments, Prior
from gudlib.process import Batch, Gamma


class Denoiser(nn.Module):
    """A model `(white_t, gamma) -> eps_hat` made of a network, the basis and the prior.

    The network gets two images: `chi_t / sqrt(v)` in `white_data`, and the Gaussian's guess of the clean data, without
    the mean, in data units. It runs in float32 (or under autocast); everything else keeps the dtype of `white_t`.

    A denoiser belongs to its basis and prior: sample it along processes made of `denoiser.basis` and `denoiser.prior`.

    Arguments:
        network: as in `gudlib.networks`, with 2 c input channels.
        basis: U.
        prior: S, and the variance c of the white data.

    Raises:
        ValueError: if basis and prior differ in shape.
    """

    def __init__(self, network: nn.Module, basis: bases.Basis, prior: Prior) -> None:
        super().__init__()
        if basis.shape != tuple(prior.mean.shape):
            raise ValueError(f"basis and prior must have one shape; got {basis.shape} and {tuple(prior.mean.shape)}")
        self.network, self.basis, self.prior = network, basis, prior

    def forward(self, white_t: Batch, gamma: Gamma) -> Batch:
        """The predicted noise, same shape and dtype as `white_t`; gamma broadcasts to it."""
        c = self.prior.white_variance.to(white_t)
        noise, signal = torch.sigmoid(gamma), torch.sigmoid(-gamma)
        v = signal * c + noise
        guess = self.prior.scale.to(white_t) * (signal.sqrt() * c / v) * white_t
        images = torch.cat([self.basis.inverse(x.float()) for x in (white_t / v.sqrt(), guess)], dim=1)
        answer = self.network(images, gamma.expand_as(white_t).float()).float()
        return gaussian_eps(white_t, gamma, c) + (signal * c / v).sqrt() * self.basis(answer).to(white_t)


def build(
    basis: bases.Basis,
    prior: Prior,
    groups: int = 16,
    label: str | Float[Tensor, "c h w"] | None = None,
    **network: Any,
) -> Denoiser:
    """A denoiser with a fresh U-Net for a basis and a prior, which it copies as float32, on the prior's device.

    Arguments:
        basis, prior: the components.
        groups: into how many groups of noise levels the network's conditioning divides the components.
        label: along which they are grouped, by name or itself (c, h, w); default the prior's order (variance).
        network: options of `networks.UNet`.
    """
    along = prior.order.cpu() if label is None else basis.label(label) if isinstance(label, str) else label
    unet = networks.UNet(basis.shape, bases.groups_by(along, groups), inputs=2 * basis.shape[0], **network)
    return Denoiser(unet, copy.deepcopy(basis).float(), copy.deepcopy(prior).float()).to(prior.mean.device)


def save(
    denoiser: Denoiser, path: str | Path, half: bool = False, card: dict[str, Any] | None = None, **header: Any
) -> None:
    """Write everything needed to use the denoiser again to one safetensors file, atomically.

    Arguments:
        denoiser: with a network of `gudlib.networks`.
        path: the file; it is either complete or not there.
        half: store the network's weights as float16 (basis and prior stay float32).
        card: anything worth knowing about how it was trained; JSON values.
        header: more of what it takes to use the denoiser, JSON values: `family`, `recommended`.
    """
    tensors = {k: v.half() if half and k.startswith("network.") and v.is_floating_point() else v
               for k, v in denoiser.state_dict().items()}  # fmt: skip
    write_tensors(path, tensors, describe(denoiser) | {"card": card or {}} | header)


def load(path: str | Path) -> Denoiser:
    """The denoiser of a file written by `save`, in float32 on the CPU, ready to sample.

    Raises:
        ValueError: if the file is not a complete checkpoint of a U-Net; the message names it.
    """
    return rebuild(path, *read_saved(path))


def rebuild(path: str | Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> Denoiser:
    """The denoiser of what `read_saved` read from `path`.

    Raises:
        ValueError: if its network is no U-Net; the message says what opens the file.
    """
    options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in header["network"].items()}
    if options.pop("kind") != "unet":
        raise ValueError(f"{path} holds a network of kind {header['network']['kind']!r}; use gudlib.mar.load")
    network = networks.UNet(groups=tensors["network.levels.groups"], **options)
    denoiser = Denoiser(network, *basis_and_prior(tensors, header))
    denoiser.load_state_dict(tensors)
    return denoiser.eval()


def basis_and_prior(tensors: dict[str, Tensor], header: dict[str, Any]) -> tuple[bases.Basis, Prior]:
    """Basis and prior of what `read_saved` read, in float32 as `build` makes them."""
    shape = tuple(header["shape"])
    if header["basis"]["name"] == "pca":
        basis: bases.Basis = bases.PCA(tensors["basis.matrix"], shape, tensors["basis.eigenvalues"])
    else:
        basis = bases.make(**header["basis"], shape=shape)
    return basis.float(), Prior(
        Moments(tensors["prior.mean"], tensors["prior.variance"], header["floor"]), tensors["prior.scale"]
    )


def card(path: str | Path) -> dict[str, Any]:
    """What `save` was told about the training of a checkpoint.

    Raises:
        ValueError: if the file is not a complete checkpoint.
    """
    return read_saved(path)[1]["card"]


def read_saved(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file written by `save`.

    Raises:
        ValueError: if the file is not a complete checkpoint; the message names it.
    """
    tensors, header = read_tensors(path)
    if "card" not in header:
        raise ValueError(f"{path} is the state of a training run: resume it with a Trainer, and `save` its denoiser")
    return tensors, header


def describe(denoiser: Denoiser) -> dict[str, Any]:
    """The JSON header from which `load` rebuilds the modules."""
    return {
        "shape": list(denoiser.basis.shape),
        "basis": denoiser.basis.spec,
        "floor": denoiser.prior.floor,
        "network": denoiser.network.config,
    }
