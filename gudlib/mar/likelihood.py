"""The likelihood bound of an autoregressor, by the chain rule."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from gudlib import checks, likelihood
from gudlib.doors import door
from gudlib.mar.model import patchify, permutations, white_tokens
from gudlib.mar.networks import Labels, Permutation, Tokens
from gudlib.process import Batch, Model, Process

Conditional = Callable[[Tokens, Permutation, int, int, Labels | None], Model]


@dataclass(frozen=True)
class ChainRuleLikelihood(likelihood.Likelihood):
    """A bound by the chain rule; `diffusion` has its groups by place in the order.

    Attributes:
        tokens: all terms of each place, in nats, (k, n, L).
    """

    tokens: Float[Tensor, "k n l"]

    @property
    def curve(self) -> Float[Tensor, " l"]:
        """Bits per dimension of each place in the order; their mean is `bits`."""
        nats = self.tokens.mean((0, 1))
        return torch.as_tensor(likelihood.bits_per_dim(nats, self.dims // len(nats), self.width))


@door
@torch.no_grad()
def chain_rule_bound(
    conditional: Conditional,
    process: Process,
    data: Batch,
    cuts: Sequence[int],
    raster: bool = False,
    draws: int = 1,
    seed: int = 0,
    decoder: str = "normal",
    steps: int | None = None,
    labels: Labels | None = None,
    chunk: int = 256,
) -> ChainRuleLikelihood:
    """The variational bound of images by the chain rule: `likelihood.bound` of each token given others.

    Averaged over random orders it is a bound still. Where several tokens fall between two cuts and the model gives each
    only what is before the first cut, it is the bound of a product of conditionals, which knows less.

    Arguments:
        conditional: `(tokens, permutation, start, stop, labels) -> model` of tokens permutation[:, start:stop], as
            `Autoregressor.conditional`, or anything else.
        process: basis, prior and schedule of one token, whose shape is the patch's.
        data: images (n, c, h, w), as for `likelihood.bound`.
        cuts: 0, ..., L, rising: between two of them tokens are asked for together.
        raster: take tokens in reading order, not in a random one of each image and draw.
        draws: estimates of each image.
        seed: of orders, times and noise.
        decoder, steps: as for `likelihood.bound`.
        labels: (n,).
        chunk: images at a time, which bounds the memory.

    Raises:
        ValueError: if cuts do not rise from 0 to L, or the images are not of patches; and as `likelihood.bound`.
    """
    checks.data("data", data)
    draws, chunk, seed = checks.whole("draws", draws), checks.whole("chunk", chunk), checks.seed("seed", seed)
    if data.shape[1] != (channels := process.schedule.shape[0]):
        raise ValueError(f"data must have {channels} channels, as the process has; got shape {tuple(data.shape)}")
    cuts = [checks.whole("cuts", cut, 0) for cut in cuts]
    tokens = white_tokens(process.basis, process.prior, data.double())
    n, count = tokens.shape[:2]
    if labels is not None and len(labels) != n:
        raise ValueError(f"labels must be {n}, one for each image; got {len(labels)}")
    if [cuts[0], cuts[-1]] != [0, count] or any(a >= b for a, b in pairwise(cuts)):
        raise ValueError(f"cuts must rise from 0 to the number of tokens, {count}; got {cuts}")
    shape = process.schedule.shape
    raw = patchify(data, shape[-1])
    generator, rows = torch.Generator(data.device).manual_seed(seed), []
    for some in [slice(i, i + chunk) for i in range(0, n, chunk)] * draws:
        known, each = tokens[some], []
        permutation = permutations(raster, len(known), count, generator)
        for start, stop in pairwise(cuts):
            model = conditional(known, permutation, start, stop, None if labels is None else labels[some])
            asked = raw[some].take_along_dim(permutation[:, start:stop, None], 1).reshape(-1, *shape)
            own = int(torch.randint(2**31, (), generator=generator, device=generator.device))
            found = likelihood.bound(
                model, process, asked, draws=1, seed=own, steps=steps, decoder=decoder, chunk=len(asked)
            )
            nats = torch.stack([found.prior[0], found.diffusion[0, :, 0], found.reconstruction[0]])
            each.append(nats.view(3, len(known), -1))
        rows.append(torch.cat(each, 2))
    prior, diffusion, reconstruction = torch.cat(rows, 1).view(3, draws, n, count)
    return ChainRuleLikelihood(
        prior=prior.sum(-1),
        diffusion=diffusion,
        reconstruction=reconstruction.sum(-1),
        log_volume=count * found.log_volume,
        dims=data[0].numel(),
        width=found.width,
        nfe=count * found.nfe,
        tokens=prior + diffusion + reconstruction + found.log_volume,
    )
