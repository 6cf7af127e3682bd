"""Training of an autoregressor: denoising regression for each token, given others."""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from gudlib import checks
from gudlib.denoiser import Denoiser
from gudlib.doors import door, inner
from gudlib.families import stratified_times
from gudlib.mar.model import Autoregressor, Conditioned, check_labels, denoising, permutations
from gudlib.mar.networks import Labels, Permutation, Tokens
from gudlib.process import diffuse
from gudlib.schedules import Schedule
from gudlib.training import Data, Loop, TrainingConfig, probe, stream_seed


@door
def mask_ratio(lowest: float, spread: float, generator: torch.Generator) -> float:
    """A share of tokens to mask: normal of mean 1 and standard deviation `spread`, confined to [lowest, 1].

    Published are 0.7 and 0.25. Bounds need a model that has seen every number of known tokens: lowest 0 and a wide
    spread (10 is uniform for all purposes, while 0.25 leaves 1 % of all draws below 0.36).
    """
    checks.real("lowest", lowest, least=0, most=1)
    checks.real("spread", spread, above=0)
    low = torch.special.ndtr(torch.tensor((lowest - 1) / spread, dtype=torch.float64))
    u = torch.rand((), generator=generator, dtype=torch.float64)
    return 1 + spread * float(torch.special.ndtri(low + (0.5 - low) * u))


@dataclass(frozen=True)
class MarTrainingConfig(TrainingConfig):
    """How to train.

    Attributes:
        repeats: draws of noise for each token and z.
        drop: share of images whose label is withheld, for guidance.
        masking: lowest ratio and spread of `mask_ratio`, one ratio a batch (masked only).
    """

    repeats: int = 4
    drop: float = 0.1
    masking: tuple[float, float] = (0.7, 0.25)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.masking, list | tuple) or len(self.masking) != 2:
            raise ValueError(f"masking must be (lowest, spread); got {self.masking!r}")
        lowest = checks.real("masking's lowest ratio", self.masking[0], least=0, below=1)
        spread = checks.real("masking's spread", self.masking[1], above=0)
        drop = checks.real("drop", self.drop, least=0, most=1)
        found = {"repeats": checks.whole("repeats", self.repeats), "drop": drop, "masking": (lowest, spread)}
        checks.settle(self, found)


class TokenTrainer(Loop):
    """What all trainings of models of tokens share; the rest is as for `gudlib.training.Trainer`.

    Arguments:
        model: to be trained in place.
        images: the training data (n, c, h, w): uint8, dequantised at every use, or what the configuration says; or
            floating, codes of images, say, which are taken as they are.
        labels: their classes (n,), for a network that has some.
        config: how to train.
        checkpoint: file to write to every `save_every` steps and at the end, and to resume from if it is there.

    Raises:
        ValueError: as `gudlib.training.Trainer`; and if labels and the network's classes do not fit.
    """

    config: MarTrainingConfig

    @inner
    def __init__(
        self,
        model: Autoregressor,
        images: Data,
        labels: Int64[Tensor, " n"] | None,
        config: MarTrainingConfig,
        checkpoint: str | Path | None = None,
    ) -> None:
        network = model.network
        if (labels is None) != (network.classes == 0):
            raise ValueError(f"labels must be given if the network has classes, only then; it has {network.classes}")
        check_labels(labels, len(images), network.classes)
        plain = Denoiser(network, model.reference)
        self._classes = None if labels is None else hashlib.sha256(labels.cpu().numpy().tobytes()).hexdigest()
        super().__init__(plain, images, network.image, config, checkpoint)
        self.model = model.to(self.images.device)
        self.labels = None if labels is None else labels.to(self.images.device)

    @inner
    def batch(self, index: int, generator: torch.Generator) -> tuple[Tokens, Permutation, int, Labels]:
        """Of step `index`: white tokens, their order, how many are known to a masked trunk, labels, some withheld."""
        s, network, device = self.config, self.model.network, self.images.device
        which = torch.randint(len(self.images), (s.batch,), generator=generator, device=device)
        tokens = self.model.tokens(self.data(which, generator))
        labels = torch.full_like(which, network.classes)
        if self.labels is not None:
            kept = torch.rand(s.batch, generator=generator, device=device) >= s.drop
            labels = torch.where(kept, self.labels[which], labels)
        permutation = permutations(network.kind == "raster", s.batch, network.count, generator)
        start = 0
        if network.kind == "masked":
            host = torch.Generator().manual_seed(stream_seed(s.seed, index + 500_000))  # a number for the host to know
            start = network.count - math.ceil(network.count * mask_ratio(*s.masking, host))
        return tokens, permutation, start, labels

    @property
    def mine(self) -> slice:
        """Which images of a batch are this process's."""
        return slice(self.accelerator.process_index, None, self.accelerator.num_processes)

    def _header(self) -> dict[str, Any]:
        return super()._header() | {"labels": self._classes}

    def averaged(self) -> Autoregressor:
        """A model with the averaged weights, sharing the reference; for sampling."""
        return type(self.model)(self.average, self.model.reference).eval()  # type: ignore[arg-type]


class MarTrainer(TokenTrainer):
    """Trains an autoregressor with the diffusion loss.

    Arguments:
        model, images, labels, config, checkpoint: as for `TokenTrainer`.
        schedule: of one token.

    Raises:
        ValueError: as `TokenTrainer`.
    """

    @inner
    def __init__(
        self,
        model: Autoregressor,
        images: Data,
        labels: Int64[Tensor, " n"] | None,
        schedule: Schedule,
        config: MarTrainingConfig,
        checkpoint: str | Path | None = None,
    ) -> None:
        denoising(model.network.config)
        self.schedule = schedule
        super().__init__(model, images, labels, config, checkpoint)

    @inner
    def loss(self, index: int) -> tuple[Tensor, Tensor]:
        """Weighted loss, and squared noise errors (b m repeats, c, p, p), on the batch of step `index`."""
        s, device, generator, mine = self.config, self.images.device, self.stream(index), self.mine
        tokens, permutation, start, labels = self.batch(index, generator)
        target = tokens.take_along_dim(permutation[:, start:, None], 1).repeat_interleave(s.repeats, 1)
        t = stratified_times(target[..., 0].numel(), generator)
        t = t[torch.randperm(len(t), generator=generator, device=device)].view(target.shape[:2])
        eps = torch.randn(target.shape, generator=generator, device=device, dtype=target.dtype)

        t, shape = t[mine].flatten(), self.model.basis.shape
        white, eps = target[mine].reshape(-1, *shape), eps[mine].reshape(-1, *shape)
        gamma = self.schedule.gamma(t).float()
        context = tokens[mine], permutation[mine], start, labels[mine], s.repeats
        places = permutation[mine, start:].repeat_interleave(s.repeats, 1).flatten()
        model = Denoiser(Conditioned(self.denoiser.network, *context), self.denoiser.reference.at(places))
        with self.seeded(generator):
            error = (eps - model(diffuse(white, gamma, eps), gamma)).square()
        return self.weighted(error, self.schedule, t), error

    def _header(self) -> dict[str, Any]:
        gamma = self.schedule.gamma(torch.linspace(0, 1, 4, dtype=torch.float64))
        return super()._header() | {"schedule": probe({"gamma": gamma})}
