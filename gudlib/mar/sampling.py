"""Drawing images token by token: how many at a time, in how many steps, and with how much guidance.

References:
    DiSA: Diffusion Step Annealing in Autoregressive Image Generation, Q. Zhao et al., 2025,
    https://arxiv.org/abs/2505.20297 (fewer steps of the head for later tokens)
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch

from gudlib import checks, samplers
from gudlib.doors import door
from gudlib.mar.model import Autoregressor, check_labels, permutations
from gudlib.mar.networks import Labels, Permutation
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


@torch.no_grad()
@door
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
    network = model.network
    cuts = unmasking(network.count, network.count if steps is None else steps)
    if network.kind != "masked" and len(cuts) <= network.count:
        raise ValueError(f"a {network.kind} model draws one token a step, steps = {network.count}; got {steps}")
    n, guidance = checks.whole("n", n), checks.real("guidance", guidance)
    each = list(head_steps) if isinstance(head_steps, Sequence) else [head_steps] * (len(cuts) - 1)
    each = [checks.whole("head_steps", number) for number in each]
    if len(each) != len(cuts) - 1:
        raise ValueError(f"head_steps must be one number, or {len(cuts) - 1}, one for each step; got {len(each)}")
    if guidance != 1 and labels is None:
        raise ValueError(f"guidance = {guidance} needs labels")
    check_labels(labels, n, network.classes)
    permutation = permutations(network.kind == "raster", n, network.count, generator)
    size = n, network.count, math.prod(model.basis.shape)
    tokens = torch.zeros(size, dtype=torch.float32, device=generator.device)
    process, cache = model.process(schedule), network.trunk.cache()
    for (start, stop), inner in zip(pairwise(cuts), each, strict=True):
        w = 1 + (guidance - 1) * stop / network.count
        conditional = model.conditional(tokens, permutation, start, stop, labels, w, cache)
        drawn = samplers.sample(
            conditional, process, n * (stop - start), inner, method, generator, temperature=temperature
        )
        places = permutation[:, start:stop, None].expand(-1, -1, tokens.shape[-1])
        tokens = tokens.scatter(1, places, drawn.white.float().reshape(places.shape))
    return model.images(tokens), permutation
