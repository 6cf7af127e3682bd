"""From pictures to a model: `GUD` fits basis, prior, schedules and network to images, trains, samples and scores.

Everything here is a few calls of other modules, which stay in reach: `model.denoiser`, `model.family`,
`model.process(a=1.0)` are what `gudlib.samplers`, `gudlib.likelihood` and `gudlib.training` take.
"""

import copy
import inspect
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from tqdm.auto import tqdm

from gudlib import checks, denoiser, designs, devices, families, likelihood, networks, references, samplers, windows
from gudlib.data import dequantise, scale, to_uint8
from gudlib.denoiser import Denoiser
from gudlib.doors import door
from gudlib.families import Derived, Family, Known, Permutations, Range, Sequential
from gudlib.process import Process
from gudlib.references import GroupedGaussian, Histograms, IndependentGaussian, LatticeGaussian, PatchHistograms
from gudlib.schedules import PerImage
from gudlib.training import Record, Trainer, TrainingConfig

Pictures = UInt8[Tensor, "n c h w"]
LARGEST_SEQUENCE = 4096  # patches of a picture, whose attention grows with the square
LARGEST_PCA = 6144  # numbers in a picture; the time for principal components grows with the third power
EVALUATIONS = 20  # of the network, for each component while it moves
FINEST_ON_LATTICE = 0.2 / 127.5  # noise at t = 0 if the reference knows grey levels: a fifth of one
# How a network is told noise levels, and what it sees: in pixels, and elsewhere
IN_PIXELS = {"conditioning": "local", "maps": True, "fourier": True, "linear": 16}
ELSEWHERE = {"conditioning": "film", "fourier": True}


class GUD:
    """A generative model of pictures: a denoiser, and the family of schedules it is trained for.

    Made by `fit` or `load`. Methods that need a schedule take the parameters of a member of the family: `a` (inverse
    softness) or, for models of blocks, `b` (softness); by default those of `recommended`. Models of patches in random
    orders also take an `order`, int64, (L,): the patches, by their number in reading order, first to last.

    Attributes:
        denoiser: network, basis and prior; weights averaged over training.
        family: of schedules; None for a file that doesn't tell.
        recommended: the member to use where none is asked for, such as `{"a": 1.0}`.
        card: anything worth knowing about the model, JSON values, kept in its file.
    """

    @door
    def __init__(
        self,
        denoiser: Denoiser,
        family: Family | None,
        recommended: dict[str, Any] | None = None,
        card: dict[str, Any] | None = None,
        images: Pictures | None = None,
    ) -> None:
        self.denoiser, self.family, self.card, self._images = denoiser.eval(), family, card or {}, images
        self.recommended = recommended or (family.default if family else {})

    @classmethod
    @door
    def fit(
        cls,
        images: Pictures,
        basis: str | None = None,
        a: float | Range | None = None,
        blocks: str | Sequence[str] | None = None,
        b: float | Range | Sequence[Range] | None = None,
        r: float | None = None,
        known: float | None = None,
        reference: str | None = None,
        network: str = "unet",
        order: str = "raster",
        seed: int = 0,
        verbose: bool = True,
        **options: Any,
    ) -> "GUD":
        """Fit basis, prior, schedules and a reference distribution to images, and put an untrained network around them.

        Untrained, the model is the reference: its NLL is what the network starts from.

        Arguments:
            images: uint8 (n, c, h, w), as `load_folder` gives; at least 4. Kept for `train_steps`.
            basis: `pca` (where images are few, of waves: `designs.principal`), `dct`, `fourier`, `haar` or `pixel`;
                default `pca`, `pixel` for a transformer.
            a: inverse softness, or its range in training; default (0.4, 1.6). Not with blocks.
            blocks: components one after another instead, as `families.Sequential`: `columns`, `rows`, `patches`,
                `levels`, or several inside one another; of `pixel` or, with levels and columns, of `haar`.
            b: softness, or its range, or one for each of the blocks; default from one after another to all at once.
            r: exponent of the prior, 0 noise of one variance to 1 of the data's; default 0 in pixels, else 1.
            known: share of training images some of whose pixels are known, so that `inpaint` and `extend` work; default
                a quarter in pixels, else none.
            reference: what the network need not learn, a name of `references.KINDS`. Default for blocks of pixels the
                better, on held-out images, of `independent gaussian` and `histograms`, else the first;
                `lattice gaussian` and `grouped gaussian` are for textures, with blocks="columns", and without known
                pixels.
            network: `unet`, or `transformer`, for pixels: its tokens are patches, those of blocks="patches" if so.
            order: `raster`, or `random` for blocks="patches": an order of its own for each image in training.
            seed: of the network's weights.
            verbose: print what was chosen.
            options: of `networks.UNet`: `width` (default 32, or 24 for fewer than 1,000 images), `patch`,
                `multipliers`, `conditioning`, `fourier`, ...; or of `networks.Transformer`: `width`, `depth`, ..., and
                `causal=True` for block-causal attention, with which finished patches are computed once.

        Raises:
            ValueError: for images that are not such, or a choice that does not exist or does not fit them.
        """
        basis = ("pixel" if network == "transformer" else "pca") if basis is None else basis
        seed = checks.seed("seed", seed)
        known = known if known is None else checks.real("known", known, least=0, most=1)
        shape = _checked(images, basis, network, a, blocks, b, order, options)
        grouped = reference in (GroupedGaussian.name, LatticeGaussian.name)
        if grouped and not (basis == "pixel" and blocks in ("columns", ["columns"], ("columns",))):
            raise ValueError(f"reference {reference!r} needs basis='pixel' and blocks='columns'")
        if grouped and network == "transformer":
            raise ValueError(f"reference {reference!r} is in waves along columns: it needs network='unet'")
        if reference == PatchHistograms.name:
            raise ValueError(f"reference {reference!r} is for single patches, in gudlib.mar; take 'histograms'")
        if reference == Histograms.name and blocks is None:
            raise ValueError("reference 'histograms' knows grey levels, not dequantised ones: it needs blocks")
        causal = options.pop("causal", False)
        if causal and order != "raster":  # whom a finished patch sees must not change when others finish
            raise ValueError(f"causal=True is for patches in reading order, order='raster'; got {order!r}")
        if causal and blocks not in ("patches", f"patches {_patch(shape, blocks)}"):
            raise ValueError(f"causal=True is for patches one after another, blocks='patches'; got {blocks!r}")
        if causal and options.get("patch", _patch(shape, blocks)) != _patch(shape, blocks):
            raise ValueError(f"causal=True needs patch and blocks of one size; got {options['patch']} and {blocks!r}")
        in_pixels = basis == "pixel" and not grouped
        known = (0.25 if in_pixels else 0.0) if known is None else known
        if known and not in_pixels:
            raise ValueError(f"known = {known} is for pixels; the basis is {basis!r}, the reference {reference!r}")
        low, high = _ends("a", a, (1.0, 1.0) if blocks else (0.4, 1.6))
        b = b if b is None or isinstance(b, list | tuple) else _ends("b", b, (1.0, 1.0))
        r = (0.0 if basis == "pixel" else 1.0) if r is None else r
        kind = "plain" if basis == "pixel" and blocks else basis  # of one mean and variance: strips can grow
        plain = IndependentGaussian.name
        design = designs.Design("waves" if grouped else kind, r, (low, high), reference=reference or plain)
        fitted = designs.FittedDesign(design, images.cpu(), few=True)
        if causal and reference in (None, Histograms.name):  # a sector would tie patches together
            fitted.reference = Histograms.fit(fitted.basis, fitted.prior, images.cpu(), sectors=1)
        elif reference is None and basis == "pixel" and blocks is not None:
            names = (plain, Histograms.name)
            shuffled = images.cpu()[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))]
            fitted.reference = references.best(names, fitted.basis, fitted.prior, shuffled)
        if network == "transformer":
            options = options if "patch" in options else {"patch": _patch(shape, blocks)} | options
        else:
            told = IN_PIXELS if basis == "pixel" else ELSEWHERE
            options = _sizes(shape) | {"width": 24 if len(images) < 1000 else 32} | told | options
        finest = families.FINEST if fitted.reference.decoder == "normal" else FINEST_ON_LATTICE
        family = fitted.family(blocks, b, finest, order)
        groups: dict[str, Any] = {"groups": 1 if basis == "pixel" else 16}
        if causal and isinstance(family, Sequential):
            options |= {"between": (float(family.low.min()), float(family.high.max()))}
        if isinstance(family, Sequential) and basis != "pixel":
            groups = {"groups": 64, "label": family.nest.group.double()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = fitted.basis, fitted.prior
            built = denoiser.build(*made, **groups, reference=fitted.reference, kind=network, **options)
        # Schedules of the prior as the file will have it, in float32
        family = families.rebuild(family.spec, built.basis, built.prior)
        if known:
            family = Known(Known(family, "columns", known) if _columns(family) else family, "rectangles", known)
        card = {"images": len(images), "of_waves": fitted.of_waves, "seed": seed}
        model = cls(built, family, card=card, images=images).to(devices.default())
        if verbose:
            print(model)
        return model

    @classmethod
    @door
    def load(cls, path: str | Path, device: str | torch.device | None = None) -> "GUD":
        """The model of a file written by `save` (or `denoiser.save`), ready to sample.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is something else; it says what, and what opens it.
        """
        tensors, header = denoiser.read_saved(path)
        with denoiser.naming(path):
            built = denoiser.rebuild(path, tensors, header)
            family = families.rebuild(header["family"], built.basis, built.prior) if header.get("family") else None
            model = cls(built, family, header.get("recommended"), header["card"])
        return model.to(device or devices.default())

    @door
    def save(self, path: str | Path, half: bool = False) -> None:
        """Write the model to one safetensors file, whole or not at all.

        Arguments:
            path: the file.
            half: store the network's weights, and histograms, as float16; samples are then equal to about three digits,
                not bit for bit.
        """
        family = self.family.spec if self.family else None
        denoiser.save(self.denoiser, path, half, self.card, family=family, recommended=self.recommended)

    @door
    def train_steps(
        self,
        steps: int = 1000,
        checkpoint: str | Path | None = None,
        images: Pictures | None = None,
        batch: int = 16,
        progress: bool = True,
        **config: Any,
    ) -> Iterator[Record]:
        """Train, yielding a record (`step`, `loss`, ...) after each step; the model is usable at any time.

        Computed on the GPU that CUDA knows, else on the CPU (`devices.default`), where the model is from then on.

        Every call is a run of its own, from the present weights, at a learning rate that falls to zero. With a
        checkpoint, the same call in another process goes on where the last one stopped, by Ctrl-C for instance, and
        ends as if it had not; a run that was completed is read and does nothing.

        Arguments:
            steps: optimiser steps in all.
            checkpoint: file of the run's state, written every 100 steps, at the end and when stopped.
            images: to train on; default those of `fit`.
            batch: images a step.
            progress: show a bar.
            config: further settings of `training.TrainingConfig`: `lr`, `seed`, `ema`, `weighting`, ...

        Raises:
            ValueError: if there are no images, they don't fit, a setting makes no sense, or the checkpoint belongs to
                another run; all before anything is done.
        """
        images = self._images if images is None else images
        if images is None:
            raise ValueError("a model that was loaded has no images: give train_steps(images=...)")
        steps = checks.whole("steps", steps)
        settings: dict[str, Any] = {"warmup": max(1, min(100, steps // 5)), "save_every": 100, "seed": 0} | config
        family, network = self._family(), copy.deepcopy(self.denoiser.network).requires_grad_(True).train()
        mine = Denoiser(network, self.denoiser.reference, self.denoiser.noised)
        settings = {"discrete": self.discrete} | settings
        trainer = Trainer(mine, images, family, TrainingConfig(steps=steps, batch=batch, **settings), checkpoint)
        self.denoiser = trainer.averaged()
        return self._run(trainer, progress)

    @door
    def sample(
        self,
        n: int,
        a: PerImage | None = None,
        b: PerImage | Sequence[PerImage] | None = None,
        steps: int | None = None,
        method: str | samplers.Method | None = None,
        seed: int = 0,
        chunk: int = 64,
        progress: bool = False,
        order: Permutations | None = None,
        **options: Any,
    ) -> Pictures:
        """Draw `n` pictures, uint8 (n, c, h, w).

        Arguments:
            n: how many.
            a, b: the member of the family to follow; default `recommended`.
            steps: updates of the sampler, by default 20 for each component while it moves; in even time for models of
                blocks, else `adapted` (`samplers.sample`).
            method: a name of `samplers.METHODS`, or a method; default `ancestral` for models of blocks, which forgives
                what a network hasn't learnt and at few steps loses some contrast, else `gaussian-pc`.
            seed: of the noise: the same seed draws the same pictures.
            chunk: pictures at a time, which bounds the memory.
            progress: show a bar.
            order: of patches in random orders, for all pictures or (n, L) for each; by default each picture has an
                order of its own, of the same seed.
            options: further ones of `samplers.sample`: `temperature`, `grid`, ...

        A block-causal transformer computes only the patches that move (`windows.generate`).

        Raises:
            ValueError: as `process` and `samplers.sample`.
        """
        n, chunk, seed = checks.whole("n", n), checks.whole("chunk", chunk), checks.seed("seed", seed)
        generator, drawn = torch.Generator(self.device).manual_seed(seed), []
        orders = self._orders(order, n, generator)
        for part in torch.arange(n).split(chunk):
            own = orders[part] if orders is not None and orders.ndim > 1 else orders
            process, sizes = self._sampling(steps, own, **self._member(_rows(a, part), _rows(b, part)))
            sizes |= {"method": method or sizes["method"], "generator": generator, "progress": progress} | options
            drawn.append(to_uint8(self._draw(process, len(part), sizes).data).cpu())
        return torch.cat(drawn)

    @door
    def inpaint(
        self,
        images: Pictures,
        known: Bool[Tensor, "h w"] | Bool[Tensor, "n h w"],
        a: PerImage | None = None,
        b: PerImage | Sequence[PerImage] | None = None,
        steps: int | None = None,
        method: str | samplers.Method | None = None,
        seed: int = 0,
        order: Permutations | None = None,
        **options: Any,
    ) -> Pictures:
        """Fill in the pixels that are not known.

        Arguments:
            images: uint8 (n, c, h, w); their unknown pixels don't matter.
            known: which pixels are given, (h, w) for all or (n, h, w) for each.
            a, b, steps, method, seed, order, options: as for `sample`.

        Raises:
            ValueError: if the model is not of pixels, or was trained without known ones; if the mask does not fit.
        """
        self._knows("inpaint")
        images, (_, h, w) = self._pictures(images), self.denoiser.basis.shape
        if known.dtype != torch.bool or tuple(known.shape) not in {(h, w), (len(images), h, w)}:
            raise ValueError(
                f"known must be a mask (bool) of shape {(h, w)} or {(len(images), h, w)}; "
                f"got {known.dtype} of shape {tuple(known.shape)}"
            )
        mask = known.to(self.device)[..., None, :, :].expand(*known.shape[:-2], *self.denoiser.basis.shape)
        generator = torch.Generator(self.device).manual_seed(checks.seed("seed", seed))
        orders = self._orders(order, len(images), generator)
        process, sizes = self._sampling(steps, orders, **self._member(a, b))
        sizes |= {"method": method or sizes["method"], "generator": generator, "grid": "uniform"} | options
        filled = samplers.inpaint(self.denoiser, process, scale(images), mask, **sizes).data
        return torch.where(mask, images, to_uint8(filled)).cpu()

    @door
    def extend(
        self,
        images: Pictures,
        columns: int,
        moving: float | None = None,
        context: int | None = None,
        steps: int = 3,
        seed: int = 0,
        progress: bool = True,
    ) -> UInt8[Tensor, "n c h longer"]:
        """Let pictures grow to the right, column by column, as far as you like.

        Arguments:
            images: uint8 (n, c, h, k).
            columns: how many to add.
            moving: how many columns move at once; default a quarter of the width the model was trained for.
            context: finished columns that the model is shown; default as many as there is room for, a half at most.
            steps: updates for each column.
            seed: of the noise.
            progress: show a bar.

        Returns:
            The longer pictures, uint8 (n, c, h, k + columns).

        Raises:
            ValueError: if the model is not one of columns in pixels, or the numbers don't fit it.
        """
        self._knows("extend")
        if not _columns(self._family()):
            raise ValueError("extend is for models of columns: GUD.fit(images, basis='pixel', blocks='columns')")
        start = scale(self._pictures(images, any_width=True))
        columns, width = checks.whole("columns", columns), self.denoiser.basis.shape[2]
        moving = width / 4 if moving is None else checks.real("moving", moving, above=0)
        context = min(width // 2, images.shape[-1]) if context is None else context
        try:
            process = self.process(b=moving / (width - 1 + moving))
        except ValueError as error:
            raise ValueError(f"moving must suit what was trained; got {moving:g}: {error}") from error
        generator = torch.Generator(self.device).manual_seed(checks.seed("seed", seed))
        growing = samplers.extend(self.denoiser, process, start, context, steps, generator=generator)
        shown = tqdm(islice(growing, columns), total=columns, desc="columns", disable=not progress)
        return torch.cat([images.cpu(), *(to_uint8(column).cpu() for column in shown)], dim=-1)

    @door
    def likelihood(
        self,
        images: Pictures,
        a: float | None = None,
        b: float | Sequence[float] | None = None,
        draws: int = 4,
        seed: int = 0,
        order: Permutations | None = None,
        **options: Any,
    ) -> likelihood.Likelihood:
        """The variational bound of -log p (ELBO), with its parts and errors; see `discrete` for the decoder.

        Arguments:
            images: uint8 (n, c, h, w).
            a, b: the member of the family; default `recommended`.
            draws: estimates of each image.
            seed: of dequantisation, orders, times and noise.
            order: of patches in random orders, for all images; by default the bound is the average over all orders, of
                which each image has another for each draw.
            options: further ones of `likelihood.bound`.

        Raises:
            ValueError: as `process` and `likelihood.bound`.
        """
        generator = torch.Generator(self.device).manual_seed(checks.seed("seed", seed))
        pictures = self._pictures(images)
        data = scale(pictures) if self.discrete else dequantise(pictures, generator)
        options = {"importance": True, "decoder": "discrete" if self.discrete else "normal"} | options
        if order is not None and order.ndim > 1:
            raise ValueError(f"order must be one for all images, (L,); got {checks.what(order)}")
        if order is None and self._patches():
            options["schedules"] = lambda n, generator: self.process(a, b, self._orders(None, n, generator)).schedule
        return likelihood.bound(self.denoiser, self.process(a, b, order), data, draws, seed, **options)

    @door
    def nll(self, images: Pictures, a: float | None = None, **options: Any) -> Float[Tensor, " n"]:
        """Negative log-likelihood of each image in nats, an upper bound; as `likelihood`."""
        return self.likelihood(images, a, **options).nats.mean(0)

    @door
    def bits_per_dim(self, images: Pictures, a: float | None = None, **options: Any) -> float:
        """The mean of that in bits per dimension, pixels times colours: smaller is better; as `likelihood`.

        8 is what not knowing anything costs. The same number of the untrained model is that of a normal distribution.
        """
        return self.likelihood(images, a, **options).bits

    @door
    def process(
        self,
        a: PerImage | None = None,
        b: PerImage | Sequence[PerImage] | None = None,
        order: Permutations | None = None,
    ) -> Process:
        """Basis, prior and the schedule of one member, for `gudlib.samplers` and `gudlib.likelihood`.

        Patches come in reading order unless an order is given, (L,) or (n, L) for each image of a batch.

        Raises:
            ValueError: if the family has no such parameter, or was not trained for such a value.
        """
        member = self._member(a, b)
        if order is not None:
            if not self._patches():
                raise ValueError(f"order is for models of patches with order='random'; got {checks.what(order)}")
            member = member | {"order": order}
        return Process(self.denoiser.basis, self.denoiser.prior, self._family().schedule(**member))

    @property
    def discrete(self) -> bool:
        """Whether the data are grey levels themselves, with the `discrete` decoder, and not dequantised ones.

        They are for schedules of blocks, whose noise at t = 0 is white in the pixels.
        """
        return isinstance(_innermost(self._family()), Sequential)

    @door
    def choose_finest(
        self, images: Pictures, candidates: Sequence[float] | None = None, draws: int = 2, **member: Any
    ) -> dict[float, float]:
        """Choose the noise at t = 0 by the bits of training images, for a model that was trained down to the finest.

        A model that has not learnt the lattice of grey levels loses bits where it stops too finely, and all lose some
        where they stop too coarsely. What is chosen is part of the model from then on, and kept in its file.

        Arguments:
            images: uint8 (n, c, h, w), of the training set.
            candidates: standard deviations in grey levels, none below what the model was trained for; default those of
                0.2, 0.25, 1/3, 0.4, 0.5 that are not.
            draws: as for `likelihood`.
            member: of the family, by which they are compared; default `recommended`.

        Returns:
            Bits per dimension of each candidate.

        Raises:
            ValueError: for candidates below what was trained, or a family or network that ends where it was trained to.
        """
        family, bits, trained = self._family(), {}, getattr(_innermost(self._family()), "finest", None)
        if trained is None or families.stopping_at(family.spec, 1.0) == family.spec:
            raise ValueError("this model's schedules don't say where they stop by the noise at t = 0")
        if getattr(self.denoiser.network, "between", None):
            raise ValueError("a block-causal transformer takes patches as finished where its training ended")
        least = 127.5 * trained * (1 - 1e-6)
        candidates = [x for x in (0.2, 0.25, 1 / 3, 0.4, 0.5) if x >= least] if candidates is None else candidates
        if not candidates or min(candidates) < least:
            raise ValueError(f"candidates must be at least {127.5 * trained:.3g}, as trained; got {candidates}")
        try:
            for candidate in candidates:
                self.family = self._stopping_at(family, candidate)
                bits[candidate] = self.bits_per_dim(images, draws=draws, **member)
        finally:
            self.family = family
        best = min(bits, key=lambda candidate: bits[candidate])
        self.family = self._stopping_at(family, best)
        self.card |= {"finest": best}
        return bits

    def _stopping_at(self, family: Family, level: float) -> Family:
        spec = families.stopping_at(family.spec, level / 127.5)
        return families.rebuild(spec, self.denoiser.basis, self.denoiser.prior).to(self.device)

    @door
    def to(self, device: str | torch.device) -> "GUD":
        """The same model, moved to a device."""
        self.denoiser.to(device)
        if self.family:
            self.family.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.denoiser.prior.mean.device

    def __repr__(self) -> str:
        c, h, w = self.denoiser.basis.shape
        config = denoiser.describe(self.denoiser)["network"]
        weights = sum(p.numel() for p in self.denoiser.network.parameters())
        shown = ("width", "depth", "patch", "multipliers", "conditioning")
        options = ", ".join(f"{name} {config[name]}" for name in shown if name in config)
        waves = " (of waves: too few pictures for axes of their own)" if self.card.get("of_waves") else ""
        ranges = self.family.ranges if self.family else {}
        spans = ", ".join(f"{k} from {lo:.3g} to {hi:.3g}" for k, pairs in ranges.items() for lo, hi in pairs)
        spans += " in random orders" if self.family and self._patches() else ""
        lines = {
            "pictures": f"{c} x {h} x {w}",
            "basis": self.denoiser.basis.name + waves,
            "reference": self.denoiser.reference.name,
            "prior": f"scales from {self.denoiser.prior.scale.min():.3g} to {self.denoiser.prior.scale.max():.3g}",
            "schedules": f"{spans}; recommended {self.recommended}" if self.family else "not known: set model.family",
            "network": f"{config['kind']}, {options}; {weights:,} weights on {self.device}",
        }
        return "\n".join(["GUD", *(f"  {name:9} {text}" for name, text in lines.items())])

    def _run(self, trainer: Trainer, progress: bool) -> Iterator[Record]:
        total = trainer.config.steps
        with tqdm(total=total, initial=trainer.step, desc="training", disable=not progress) as bar:
            for record in trainer.run():
                bar.update()
                if record.step % 20 == 0 or record.step == total:  # reading the loss waits for the device
                    bar.set_postfix(loss=f"{record.loss:.4f}")
                yield record
        self.card |= {"steps": total, "batch": trainer.config.batch, "seed": trainer.config.seed}

    def _member(self, a: Any, b: Any) -> dict[str, Any]:
        """Parameters of one member, within what was trained."""
        ranges, given = self._family().ranges, {k: v for k, v in {"a": a, "b": b}.items() if v is not None}
        given = given or self.recommended
        if given.keys() != ranges.keys():
            raise ValueError(f"this model's schedules have {' and '.join(ranges)}; got {' and '.join(given)}")
        for name, pairs in ranges.items():
            values = given[name] if isinstance(given[name], list | tuple) else [given[name]]
            if len(values) != len(pairs):
                raise ValueError(
                    f"{name} must hold {len(pairs)} numbers, one for each of the blocks; got {given[name]}"
                )
            for value, (low, high) in zip(values, pairs, strict=True):
                x = value if isinstance(value, Tensor) else torch.tensor(checks.real(name, value), dtype=torch.float64)
                if not bool(((x >= low - 1e-6) & (x <= high + 1e-6)).all()):  # in float32, too
                    raise ValueError(f"{name} must lie in what was trained, {low:.4g} to {high:.4g}; got {value}")
        return given

    def _patches(self) -> Sequential | None:
        """The family within, if it is of patches in random orders."""
        inner = _innermost(self._family())
        return inner if isinstance(inner, Sequential) and inner.order == "random" else None

    def _orders(self, order: Permutations | None, n: int, generator: torch.Generator) -> Permutations | None:
        """The order that is given, for all of n pictures or for each; else one for each, if they are random."""
        patches = self._patches()
        if order is None:
            return patches.random_orders(n, generator) if patches else None
        if order.shape[:-1] not in {(), (n,)}:
            raise ValueError(f"order must be (L,) for all {n} pictures or ({n}, L) for each; got {checks.what(order)}")
        return order

    def _sampling(self, steps: int | None, order: Permutations | None, **member: Any) -> tuple[Process, dict[str, Any]]:
        """The process, with method, steps and grid, which is even where pictures have schedules of their own.

        Along blocks, solvers that extrapolate what the network said make pictures of noise, the more so the later a
        block; ancestral steps in even time don't.
        """
        process, blocks = self.process(**member, order=order), isinstance(_innermost(self._family()), Sequential)
        steps = round(EVALUATIONS / self._family().moving(**member)) if steps is None else checks.whole("steps", steps)
        grid = "uniform" if blocks or process.schedule.batch else "adapted"
        return process, {"steps": steps, "grid": grid, "method": "ancestral" if blocks else "gaussian-pc"}

    def _draw(self, process: Process, n: int, sizes: dict[str, Any]) -> samplers.Samples:
        """By a block-causal transformer with what it remembers of finished patches, where that is possible."""
        if (
            getattr(self.denoiser.network, "between", None)
            and sizes["method"] in windows.METHODS
            and not process.schedule.batch
            and not {"keep", "start"} & sizes.keys()
        ):
            return windows.generate(self.denoiser, process.schedule, n, **sizes)
        return samplers.sample(self.denoiser, process, n, **sizes)

    def _family(self) -> Family:
        if self.family is None:
            raise ValueError("this file does not tell its schedules: set model.family, to one of gudlib.families")
        return self.family

    def _knows(self, what: str) -> None:
        if self.denoiser.basis.name != "pixel" or not isinstance(self._family(), Known):
            raise ValueError(
                f"{what} needs a model of pixels that has been trained with known ones: "
                "GUD.fit(images, basis='pixel', known=0.25)"
            )

    def _pictures(self, images: Pictures, any_width: bool = False) -> Pictures:
        wanted = self.denoiser.basis.shape
        if any_width:
            wanted = (*wanted[:2], *getattr(images, "shape", wanted)[-1:])
        return checks.grey("images", images, wanted).to(self.device)


def _columns(family: Family) -> bool:
    """Single columns one after another, as strips that grow need them."""
    family = _innermost(family)
    return isinstance(family, Sequential) and family.blocks == ["columns"]


def _innermost(family: Family) -> Family:
    return _innermost(family.family) if isinstance(family, Derived) else family


def _checked(
    images: Any, basis: str, network: str, a: Any, blocks: Any, b: Any, order: Any, options: dict[str, Any]
) -> tuple[int, int, int]:
    """The shape of images that can be fitted."""
    known = ("pca", "dct", "fourier", "haar", "pixel")
    checks.grey("images", images, least=4)
    checks.one_of("basis", basis, known)
    checks.one_of("network", network, networks.KINDS)
    if network == "transformer" and basis != "pixel":
        raise ValueError(f"network 'transformer' is for pixels, whose patches it sees; the basis is {basis!r}")
    made = networks.Transformer if network == "transformer" else networks.UNet
    ours = {"self", "shape", "groups", "inputs", "inverse", "between"}
    known_options = (set(inspect.signature(made.__init__).parameters) - ours) | (
        {"causal"} if network == "transformer" else set()
    )
    if unknown := options.keys() - known_options:
        raise ValueError(f"options of a {network} are {sorted(known_options)}; got {sorted(unknown)}")
    if blocks is not None and a is not None:
        raise ValueError(f"a is for schedules without blocks; got a = {a} and blocks = {blocks!r}")
    if blocks is None and b is not None:
        raise ValueError(f"b is the softness of blocks; got b = {b} without blocks")
    if checks.one_of("order", order, families.ORDERS) != "raster" and blocks is None:
        raise ValueError(f"order={order!r} is for blocks='patches'; got no blocks")
    shape = (images.shape[1], images.shape[2], images.shape[3])
    if basis == "pca" and images[0].numel() > LARGEST_PCA:
        raise ValueError(
            f"basis 'pca' takes pictures of {LARGEST_PCA} numbers at most, these of {shape} have "
            f"{images[0].numel()}: choose 'dct', or smaller pictures"
        )
    return shape


def _ends(name: str, value: Any, default: Range) -> Range:
    """Lowest and highest of a range, which may be given as one number."""
    if value is None:
        return default
    pair = value if isinstance(value, list | tuple) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be a number, or (lowest, highest); got {value}")
    return checks.real(name, pair[0]), checks.real(name, pair[1])


def _rows(values: Any, part: Tensor) -> Any:
    """Those of some pictures, where each has a value of its own."""
    if isinstance(values, list | tuple):
        return [_rows(value, part) for value in values]
    return values[part] if isinstance(values, Tensor) and values.ndim else values


def _patch(shape: tuple[int, int, int], blocks: str | Sequence[str] | None) -> int:
    """Side of a transformer's patches: what the blocks say, else the largest that divides a picture, up to 4 or 8."""
    pairs = (block.partition(" ") for block in ([blocks] if isinstance(blocks, str) else blocks or []))
    if sizes := [int(size or 4) for name, _, size in pairs if name == "patches" and (size or "4").isdecimal()]:
        return min(sizes)
    _, h, w = shape
    side = next(p for p in range(8 if min(h, w) >= 96 else 4, 0, -1) if not (h % p or w % p))
    if h * w > LARGEST_SEQUENCE * side**2:
        raise ValueError(
            f"pictures of {h} x {w} make {h * w // side**2} patches of {side} pixels, more than {LARGEST_SEQUENCE}: "
            "load them at another size, or say patch"
        )
    return side


def _sizes(shape: tuple[int, int, int]) -> dict[str, Any]:
    """Patch and resolutions of a U-Net for a picture, as far as they divide it."""
    _, h, w = shape
    side = min(h, w)
    patch = next(p for p, least in ((4, 96), (2, 16), (1, 0)) if side >= least and not (h % p or w % p))
    count = 1
    while count < 3 and side // (fold := patch * 2**count) >= 7 and not (h % fold or w % fold):
        count += 1
    return {"patch": patch, "multipliers": (1, 2, 2)[:count]}
