"""Drawing images token by token: how many at a time, in how many steps, and with how much guidance.

References:
    DiSA: Diffusion Step Annealing in Autoregressive Image Generation, Q. Zhao et al., 2025,
    https://arxiv.org/abs/2505.20297 (fewer steps of the head for later tokens)
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from gudlib import checks, samplers
from gudlib.doors import door, inner
from gudlib.mar.model import Autoregressor, check_labels, denoising, permutations
from gudlib.mar.networks import Labels, Permutation, Tokens
from gudlib.process import Batch
from gudlib.schedules import Schedule


@door
def unmasking(count: int, steps: int) -> list[int]:
    """How many of `count` tokens are known before each of `steps` steps, and at the end: few at first, then many.

    Unknown after step s are count cos(pi/2 s/steps), rounded down, and at least one fewer than before.

    Raises:
        ValueError: if there are more steps than tokens, or none.

    >>> unmasking(16, 4)
    [0, 2, 5, 10, 16]
    """
    count = checks.whole("count", count)
    steps = checks.whole("steps", steps, most=count)
    left = [count]
    for s in range(1, steps + 1):
        left.append(min(left[-1] - 1, math.floor(count * math.cos(math.pi / 2 * (s / steps)))))
    return [count - n for n in left]


@door
@torch.no_grad()
def generate(
    model: Autoregressor,
    schedule: Schedule,
    n: int,
    generator: torch.Generator,
    steps: int | None = None,
    head_steps: int | Sequence[int] = 50,
    method: str = "ancestral",
    temperature: float = 1.0,
    guidance: float = 1.0,
    labels: Labels | None = None,
) -> tuple[Batch, Permutation]:
    """Draw `n` images, some tokens at a time, each token by a sampler of its own; and in which order.

    Arguments:
        model: ready to sample (`eval`).
        schedule: of one token.
        n: number of images.
        generator: of all randomness.
        steps: of the trunk, R; those of a masked model take tokens as `unmasking` says. Default one token a step.
        head_steps: of the head for each token, or one number for each step of the trunk.
        method, temperature: as those of `samplers.sample`.
        guidance: weight w of the label, 1 is without; it grows from 1 with the share of tokens known after the step,
            1 + (w - 1) known / L.
        labels: (n,); default none.

    Raises:
        ValueError: for sizes out of range, head_steps for another number of steps, several tokens a step of a causal
            model, guidance without labels, or labels that do not fit.
    """
    n, guidance = checks.whole("n", n), checks.real("guidance", guidance)
    denoising(model.network.config)
    cuts = rounds(model.network.kind, model.network.count, steps)
    each = [head_steps] * (len(cuts) - 1) if isinstance(head_steps, int) else list(head_steps)
    each = [checks.whole("head_steps", number) for number in each]
    if len(each) != len(cuts) - 1:
        raise ValueError(f"head_steps must be one number, or {len(cuts) - 1}, one for each step; got {len(each)}")
    if guidance != 1 and labels is None:
        raise ValueError(f"guidance = {guidance} needs labels")
    check_labels(labels, n, model.network.classes)
    process, cache, inner = model.process(schedule), model.network.trunk.cache(), iter(each)

    def draw(tokens: Tokens, permutation: Permutation, start: int, stop: int) -> Tensor:
        w = 1 + (guidance - 1) * stop / model.network.count
        conditional = model.conditional(tokens, permutation, start, stop, labels, w, cache)
        size = n * (stop - start)
        return samplers.sample(
            conditional, process, size, next(inner), method, generator, temperature=temperature
        ).white

    return in_order(model, n, cuts, generator, draw)


@door
def rounds(kind: str, count: int, steps: int | None) -> list[int]:
    """How many of `count` tokens are known before each of `steps` steps, and at the end; None for one token a step.

    Raises:
        ValueError: for more steps than tokens, or several tokens a step of a causal network.
    """
    cuts = unmasking(count, count if steps is None else steps)
    if kind != "masked" and len(cuts) <= count:
        raise ValueError(f"a {kind} model draws one token a step, steps = {count}; got {steps}")
    return cuts


@inner
def in_order(
    model: Autoregressor,
    n: int,
    cuts: Sequence[int],
    generator: torch.Generator,
    draw: Callable[[Tokens, Permutation, int, int], Tensor],
) -> tuple[Batch, Permutation]:
    """Draw `n` images step by step, and in which order: `draw` gives white tokens permutation[:, start:stop]."""
    network = model.network
    permutation = permutations(network.kind == "raster", n, network.count, generator)
    size = n, network.count, math.prod(model.basis.shape)
    tokens = torch.zeros(size, dtype=torch.float32, device=generator.device)
    for start, stop in pairwise(cuts):
        places = permutation[:, start:stop, None].expand(-1, -1, size[2])
        tokens = tokens.scatter(1, places, draw(tokens, permutation, start, stop).float().reshape(places.shape))
    return model.images(tokens), permutation
