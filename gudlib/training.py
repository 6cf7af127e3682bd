r"""Training: denoising regression along a family of schedules (Gerdes, Welling and Cheng 2024, section 5.1).

For images, times t and schedules drawn at random (`gudlib.families`), with gamma = gamma(t) the vector of noise levels,

    loss = E sum_i w_i (eps_i - eps_hat_i(chi_t, gamma))^2 / D,

where w = 1 is the plain loss and w_i = gamma_i' / mean(gamma') the likelihood's (its integral bounds -log p), with
gamma' = d gamma / dt. One network trained over a family can be sampled along any schedule of it.

A denoiser answers eps_hat = eps_G + alpha sqrt(c / v) U F, v = alpha^2 c + sigma^2, so unit weight on the network's own
answer F is v / (alpha^2 c) = 1 + e^gamma / c on the noise. That is the weighting `answer`, up to a noise level beyond
which hardly anything is left to see:

    w_i = gamma_i' / mean(gamma') (1 + e^(4 - |gamma_i - 4|) / c_i).

It cares for the clean data at high noise levels, which serves fills and denoising; short trainings pay for it in bits.

Every random number of step n comes from (seed, n) alone, so a run that is stopped and resumed is, on a CPU, bit for bit
the run that was not.

References:
    Elucidating the Design Space of Diffusion-Based Generative Models, T. Karras et al., 2022,
    https://arxiv.org/abs/2206.00364, section 5 (unit weight on the network's answer)
"""

import ast
import copy
import functools
import hashlib
import json
import math
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from gudlib import checks, devices, statistics
from gudlib.data import dequantise, scale
from gudlib.denoiser import Denoiser, describe
from gudlib.doors import door, inner
from gudlib.families import Draw, Family, stratified_times
from gudlib.files import read_tensors, write_tensors
from gudlib.networks import Transformer, UNet
from gudlib.process import Batch, Model, diffuse
from gudlib.schedules import Schedule, Time

WEIGHTINGS = ("plain", "likelihood", "answer")

Data = UInt8[Tensor, "n c h w"] | Float[Tensor, "n c h w"]  # grey levels, or data as they are


@dataclass(frozen=True)
class TrainingConfig:
    """How to train, whatever the loss.

    The defaults are for short trainings; over 10,000 steps and more, lr 1e-3 and ema 0.9995 did well.

    Attributes:
        steps: optimiser steps in all.
        batch: images a step, over all processes.
        lr: peak learning rate of AdamW; it warms up over `warmup` steps and falls to zero along a cosine.
        warmup: steps.
        ema: decay of the averaged weights, reached gradually as min(ema, (1 + n) / (10 + n)).
        clip: largest gradient norm; infinite for none.
        weighting: `plain`, `likelihood` or `answer`.
        symmetries: of the images, a random one of which each image undergoes at every use: `none`, `mirror` (left and
            right) or `all` eight of the square.
        discrete: train on grey levels themselves (`data.scale`), not on dequantised ones.
        seed: of everything random.
        save_every: steps between checkpoints.
    """

    steps: int = 1000
    batch: int = 64
    lr: float = 2e-3
    warmup: int = 100
    ema: float = 0.999
    clip: float = 1.0
    weighting: str = "plain"
    symmetries: str = "none"
    discrete: bool = False
    seed: int = 0
    save_every: int = 1000

    def __post_init__(self) -> None:
        sizes = ("steps", "batch", "warmup", "save_every")
        found: dict[str, Any] = {name: checks.whole(name, getattr(self, name)) for name in sizes}
        found["seed"] = checks.seed("seed", self.seed)
        found["lr"] = checks.real("lr", self.lr, above=0)
        found["ema"] = checks.real("ema", self.ema, least=0, below=1)
        found["clip"] = math.inf if self.clip == math.inf else checks.real("clip", self.clip, above=0)
        found["discrete"] = checks.flag("discrete", self.discrete)
        checks.one_of("weighting", self.weighting, WEIGHTINGS)
        checks.one_of("symmetries", self.symmetries, statistics.SYMMETRIES)
        checks.settle(self, found)


class Record:
    """One training step. Its numbers stay on the device until they are read, so that the next step need not wait.

    Attributes:
        step: number of steps done, from 1.
        lr: learning rate.
        seconds: that the host spent on this step.
    """

    @inner
    def __init__(self, step: int, loss: Tensor, by_group: Tensor, lr: float, seconds: float) -> None:
        self.step, self.lr, self.seconds = step, lr, seconds
        self._loss, self._by_group = loss, by_group

    @cached_property
    def loss(self) -> float:
        """Weighted mean square error of the noise; 1 = predicts nothing."""
        return self._loss.item()

    @cached_property
    def by_group(self) -> Float[Tensor, " g"]:
        """Unweighted mean square error in each of the network's component groups, (g,), or of each component."""
        return self._by_group.cpu()

    def __repr__(self) -> str:
        return f"Record(step={self.step}, loss={self.loss:.4g}, lr={self.lr:.3g}, seconds={self.seconds:.3g})"


@door
@torch.no_grad()
def evaluate(
    model: Model, white: Batch, schedule: Schedule, generator: torch.Generator, chunk: int = 256
) -> Float[Tensor, "c h w"]:
    """Mean square error of the predicted noise in each component, over data and over t.

    Arguments:
        model: `(white_t, gamma) -> eps_hat`.
        white: held-out data as white components (n, c, h, w).
        schedule: along which they are noised.
        generator: of times and noise; the same seed compares models on the same draws.
        chunk: images at a time.

    Raises:
        ValueError: for a chunk below 1.
    """
    chunk, white = checks.whole("chunk", chunk), checks.single(white)
    if tuple(white.shape[1:]) != schedule.shape:
        raise ValueError(f"white must have the schedule's shape (n, *{schedule.shape}); got {checks.what(white)}")
    total = torch.zeros_like(white[0])
    shuffled = torch.randperm(len(white), generator=generator, device=generator.device)
    for part, t in zip(white[shuffled].split(chunk), stratified_times(len(white), generator).split(chunk), strict=True):
        eps = torch.randn(part.shape, generator=generator, device=generator.device, dtype=part.dtype)
        gamma = schedule.gamma(t).to(part)
        total += (eps - model(diffuse(part, gamma, eps), gamma)).square().sum(0)
    return checks.finite("errors of the model on white", total / len(white))


@inner
def stream_seed(seed: int, index: int) -> int:
    """One of torch's seeds for each step of each run."""
    return (seed * 1_000_003 + index) % checks.SEEDS


class Loop(ABC):
    """Holds network, average, optimiser and position; `run` goes on from there, with the loss of its subclass.

    Arguments:
        denoiser: its network is trained in place.
        images: the training data (n, c, h, w): uint8, dequantised at every use, or what the configuration says; or
            floating, codes of images, say, which are taken as they are.
        shape: that an image must have, (c, h, w).
        config: how to train.
        checkpoint: file to write to every `save_every` steps and at the end, and to resume from if it is there.

    Raises:
        ValueError: if the checkpoint at that place is of another run, with other images, another configuration,
            network, basis, prior or reference, or by other code; if images are not of that shape, or should undergo all
            symmetries of the square without being one.
    """

    @door
    def __init__(
        self,
        denoiser: Denoiser,
        images: Data,
        shape: tuple[int, ...],
        config: TrainingConfig,
        checkpoint: str | Path | None,
    ) -> None:
        from accelerate import Accelerator

        checks.images("images", images, shape=shape)
        images = images.detach().float() if images.is_floating_point() else images
        if config.symmetries == "all" and shape[-2] != shape[-1]:
            raise ValueError(f"symmetries 'all' are of square images; these are {shape[-2]} x {shape[-1]}")
        self.config, self.checkpoint = config, checkpoint
        on_cpu = devices.default().type == "cpu"
        self.accelerator = Accelerator(cpu=on_cpu, mixed_precision=devices.precision())
        denoiser.to(self.accelerator.device)
        self._digest = hashlib.sha256(images.cpu().numpy().tobytes()).hexdigest()
        self.images = images.to(self.accelerator.device)
        self.plain, self._described = denoiser.network.train(), describe(denoiser)
        self._around = probe(denoiser.reference.state_dict())
        self._white_variance = denoiser.prior.log_variance.exp().float()
        self.average = copy.deepcopy(self.plain).requires_grad_(False)
        optimizer = torch.optim.AdamW(self.plain.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        network, self.optimizer = self.accelerator.prepare(self.plain, optimizer)
        self.denoiser = Denoiser(network, denoiser.reference, denoiser.noised)
        self.step = self._kept = 0
        self._failed = torch.full((), -1, device=self.accelerator.device)  # first step
        if checkpoint is not None and Path(checkpoint).exists():
            self.restore(checkpoint)

    def run(self) -> Iterator[Record]:
        """Train to `config.steps`, yielding a record after each step; stop iterating at any time.

        Ctrl-C waits for the end of a step; then, as when the caller stops iterating, the checkpoint is written.

        Raises:
            FloatingPointError: if a loss is not finite, with its step; the checkpoint stays as it was.
        """
        try:
            while self.step < self.config.steps:
                start = time.perf_counter()
                with _unbroken():
                    loss, by_group, lr = self._advance()
                    seconds = time.perf_counter() - start
                    if loss.device.type == "cpu":  # elsewhere it would have to be waited for
                        self._expect_finite()
                    if self.step % self.config.save_every == 0 or self.step == self.config.steps:
                        self._keep()
                yield Record(self.step, loss, by_group, lr, seconds)
        except (KeyboardInterrupt, GeneratorExit):
            if self._finite():
                self._keep()
            raise

    @abstractmethod
    def loss(self, index: int) -> tuple[Tensor, Tensor]:
        """Weighted loss, and squared noise errors (b, c, h, w), on the batch that belongs to step `index`."""

    @inner
    def stream(self, index: int) -> torch.Generator:
        """The randomness of step `index`: a stream of its own for every step leaves nothing to store for a resume."""
        return torch.Generator(self.accelerator.device).manual_seed(stream_seed(self.config.seed, index))

    @contextmanager
    def seeded(self, generator: torch.Generator) -> Iterator[None]:
        """A block in which torch's global generator, from which dropout draws, is one that belongs to the same step."""
        device = self.accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(~generator.initial_seed())  # masks that know nothing of the noise
            yield

    @inner
    def data(self, which: Int64[Tensor, " b"], generator: torch.Generator) -> Batch:
        """Those images as data (b, c, h, w): after a random symmetry; grey levels dequantised or not, as configured."""
        images = statistics.randomly_mirrored(self.images[which], self.config.symmetries, generator)
        if images.is_floating_point():
            return images
        return scale(images) if self.config.discrete else dequantise(images, generator)

    def weighted(self, error: Batch, schedule: Schedule, t: Time, part: slice = slice(None)) -> Tensor:
        """The mean of the errors at a `part` of the times `t`, weighted as the configuration says."""
        if self.config.weighting == "plain":
            return error.mean()
        weight = rate = schedule.dgamma_dt(t)[part].float()
        if self.config.weighting == "answer":
            gamma = schedule.gamma(t)[part].float()
            weight = rate * (1 + (4 - (gamma - 4).abs()).exp() / self._white_variance)
        return (weight * error).mean() / rate.mean()

    @door
    def save(self, path: str | Path) -> None:
        """Write the whole state to one file, atomically."""
        if not self.accelerator.is_main_process:
            return
        tensors = {f"network.{k}": v for k, v in self.plain.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
        write_tensors(path, tensors, self._header() | {"step": self.step})

    @door
    def restore(self, path: str | Path) -> None:
        """Continue from a file written by `save`.

        Raises:
            ValueError: if it was written by another run.
        """
        tensors, header = read_tensors(path)
        mine = json.loads(json.dumps(self._header()))
        if apart := _apart({name: header.get(name) for name in mine}, mine):
            name, theirs, ours = apart
            raise ValueError(
                f"{path} belongs to another run, which had {name} = {theirs}; this one has {ours}. "
                "Remove it or give another file"
            )
        self.plain.load_state_dict(_part(tensors, "network."))
        self.average.load_state_dict(_part(tensors, "average."))
        state: dict[int, dict[str, Tensor]] = {}
        weights = list(self.plain.parameters())
        for key, value in _part(tensors, "optimizer.").items():
            index, name = key.split(".", 1)
            like = weights[int(index)]
            # The fused optimiser reads moments in their weight's memory layout, whatever their own
            value = torch.empty_like(like).copy_(value) if value.shape == like.shape else value
            state.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.step = self._kept = header["step"]

    def _finite(self) -> bool:
        return int(self._failed) < 0 and all(bool(p.isfinite().all()) for p in self.plain.parameters())

    def _expect_finite(self) -> None:
        if not self._finite():
            failed = int(self._failed)
            what = f"the loss of step {failed} is" if failed >= 0 else f"weights after step {self.step} are"
            kept = f"; {self.checkpoint} holds step {self._kept}" if self._kept else ""
            raise FloatingPointError(f"{what} not finite: a lower lr or clip may help{kept}")

    def _keep(self) -> None:
        self._expect_finite()
        if self.checkpoint and self.step != self._kept:
            self.save(self.checkpoint)
            self._kept = self.step

    def _advance(self) -> tuple[Tensor, Tensor, float]:
        s = self.config
        lr = s.lr * min(1, (self.step + 1) / s.warmup) * 0.5 * (1 + math.cos(math.pi * self.step / s.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss, error = self.loss(self.step)
        first = (self._failed < 0) & ~loss.detach().isfinite()
        self._failed = torch.where(first, self.step + 1, self._failed)
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.plain.parameters(), s.clip)
        self.optimizer.step()
        decay = min(s.ema, (1 + self.step) / (10 + self.step)) if self.step else 0.0
        get_ema_multi_avg_fn(decay)(list(self.average.parameters()), list(self.plain.parameters()), None)
        self.step += 1
        by_group = error.detach().mean(0).flatten()
        if isinstance(self.plain, UNet | Transformer):
            by_group = by_group @ self.plain.levels.pool
        return loss.detach(), by_group, lr

    def _header(self) -> dict[str, Any]:
        images = {"images": list(self.images.shape), "digest": self._digest}
        return {"config": asdict(self.config), **images, **self._described, "around": self._around, "code": code()}


class Trainer(Loop):
    """Trains a denoiser along a family of schedules.

    Arguments:
        denoiser: to be trained in place.
        images: the training data (n, c, h, w), as for `Loop`.
        draw: `(n, generator) -> Schedule`, a schedule for each image of a batch, as in `gudlib.families`.
        config: how to train.
        checkpoint: file to write to every `save_every` steps and at the end, and to resume from if it is there.

    Raises:
        ValueError: as `Loop`, and if the checkpoint was trained along other schedules.
    """

    @door
    def __init__(
        self,
        denoiser: Denoiser,
        images: Data,
        draw: Draw,
        config: TrainingConfig,
        checkpoint: str | Path | None = None,
    ) -> None:
        self.draw = draw
        device = devices.default()
        if isinstance(draw, Family):
            draw.to(device)
            self._schedules: Any = draw.spec
        else:
            drawn = draw(4, torch.Generator(device).manual_seed(0))
            self._schedules = probe({"gamma": drawn.gamma(torch.linspace(0, 1, 4, dtype=torch.float64, device=device))})
        super().__init__(denoiser, images, denoiser.basis.shape, config, checkpoint)

    @inner
    def loss(self, index: int) -> tuple[Tensor, Tensor]:
        """Weighted loss, and squared noise errors (b, c, h, w), on the batch that belongs to step `index`."""
        n, device, generator = self.config.batch, self.accelerator.device, self.stream(index)
        which = torch.randint(len(self.images), (n,), generator=generator, device=device)
        t, schedule = stratified_times(n, generator), self.draw(n, generator)
        data = self.data(which, generator)
        eps = torch.randn(data.shape, generator=generator, device=device, dtype=data.dtype)

        mine = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        gamma, eps = schedule.gamma(t)[mine].float(), eps[mine]
        white = self.denoiser.prior.whiten(self.denoiser.basis(data[mine]))
        with self.seeded(generator):
            error = (eps - self.denoiser(diffuse(white, gamma, eps), gamma)).square()
        return self.weighted(error, schedule, t, mine), error

    def _header(self) -> dict[str, Any]:
        return super()._header() | {"family": self._schedules}

    def averaged(self) -> Denoiser:
        """A denoiser with the averaged weights, sharing basis and prior; for sampling."""
        return Denoiser(self.average, self.denoiser.reference, self.denoiser.noised).eval()


@functools.cache
def code() -> str:
    """A digest of the modules that a training depends on, but for their comments and docstrings."""
    here, seen, queue = Path(__file__).parent, {}, ["training", *(f"mar.{name}" for name in ("model", "training"))]
    while queue:
        name = queue.pop()
        path = here.joinpath(*name.split(".")).with_suffix(".py")
        if name in seen or not path.is_file():
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gudlib":
                room = (node.module or "").split(".")[1:]
                queue += [".".join([*room, each.name]) for each in node.names] + [".".join(room)]
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        seen[name] = ast.dump(tree)
    return hashlib.sha256(json.dumps(sorted(seen.items())).encode()).hexdigest()[:16]


@door
def probe(tensors: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Of each tensor its norm, and its part along a fixed direction, by which a run tells what it was made for.

    Numbers and not a digest: tensors that only rounding sets apart are alike.
    """
    found = {}
    for name, value in tensors.items():
        x = value.detach().double().flatten().cpu()
        along = (torch.arange(1, len(x) + 1, dtype=torch.float64) ** 1.5).cos()
        found[name] = {"norm": float(x.norm()), "along": float(x @ along)}
    return found


def _apart(one: Any, other: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Where two headers differ first, and in what; probes do by more than a thousandth of the norm."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        if one.keys() == {"norm", "along"}:
            near = all(abs(one[key] - value) <= 1e-3 * other["norm"] for key, value in other.items())
            return None if near else (name, one, other)
        found = (_apart(one[key], value, f"{name}.{key}".lstrip(".")) for key, value in other.items())
        return next((each for each in found if each), None)
    return None if one == other else (name, one, other)


@contextmanager
def _unbroken() -> Iterator[None]:
    """A block that Ctrl-C does not break: it takes effect at the end."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield
        return
    asked = []
    signal.signal(signal.SIGINT, lambda *_: asked.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        raise KeyboardInterrupt


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
