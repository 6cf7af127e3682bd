r"""Samplers: walk a process backwards, from t = 1 to t = 0, with any model `(white_t, gamma) -> eps_hat`.

A method is one update from t to s < t, for all components at once and each with its own noise levels. It returns the
mean and the standard deviation of the next state; the driver draws. With r = exp(gamma_s - gamma_t) <= 1:

    ancestral       mean = (alpha_s / alpha_t) [chi_t - sigma_t (1 - r) eps],   variance = sigma_s^2 (1 - r)
    ddim            mean = alpha_s x0 + sigma_s eps,                            variance = 0
    heun            ddim, then again with the average of both ends' eps         (second order)
    euler-maruyama  a plain step of the reverse SDE in t                        (the authors' library)

The first three need no derivative of the schedule and leave a component that is not moving where it is, up to rounding.

References:
    Denoising Diffusion Probabilistic Models, J. Ho, A. Jain, P. Abbeel, 2020, https://arxiv.org/abs/2006.11239
    Denoising Diffusion Implicit Models, J. Song, C. Meng, S. Ermon, 2021, https://arxiv.org/abs/2010.02502
    Elucidating the Design Space of Diffusion-Based Generative Models, T. Karras et al., 2022,
    https://arxiv.org/abs/2206.00364, algorithm 1
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from gudlib.process import Batch, Model, Process, from_eps
from gudlib.schedules import alpha, sigma


@dataclass(frozen=True)
class Step:
    """Where one update leads.

    Attributes:
        mean: of the next state, (b, c, h, w).
        std: of the noise to add, broadcastable to it; 0 for deterministic methods.
        nfe: how often the model was called.
    """

    mean: Tensor
    std: Tensor
    nfe: int = 1


Method = Callable[[Model, Process, Batch, Tensor, Tensor], Step]


def euler_maruyama(model: Model, process: Process, white_t: Batch, t: Tensor, s: Tensor) -> Step:
    """One Euler-Maruyama step of the reverse SDE from time t to s < t."""
    sde = process.reverse_sde(white_t, t, model(white_t, process.schedule.gamma(t)))
    return Step(white_t + (s - t) * sde.drift, sde.diffusion * (t - s).sqrt())


def ancestral(model: Model, process: Process, white_t: Batch, t: Tensor, s: Tensor) -> Step:
    """One step of ancestral (DDPM) sampling: the exact posterior, given chi_0 = its prediction."""
    now, then = process.schedule.gamma(t), process.schedule.gamma(s)
    moved = -torch.expm1(then - now)  # 1 - r
    mean = alpha(then) / alpha(now) * (white_t - sigma(now) * moved * model(white_t, now))
    return Step(mean, sigma(then) * moved.sqrt())


def ddim(model: Model, process: Process, white_t: Batch, t: Tensor, s: Tensor) -> Step:
    """One step of DDIM: the exponential integrator of the probability-flow ODE."""
    now, then = process.schedule.gamma(t), process.schedule.gamma(s)
    return Step(_flow(model(white_t, now), white_t, now, then), torch.zeros_like(then))


def heun(model: Model, process: Process, white_t: Batch, t: Tensor, s: Tensor) -> Step:
    """One step of Heun's method on d(chi / alpha) = eps d(sigma / alpha); two model calls."""
    now, then = process.schedule.gamma(t), process.schedule.gamma(s)
    eps = model(white_t, now)
    ahead = model(_flow(eps, white_t, now, then), then)
    return Step(_flow((eps + ahead) / 2, white_t, now, then), torch.zeros_like(then), nfe=2)


def _flow(eps: Tensor, white_t: Tensor, now: Tensor, then: Tensor) -> Tensor:
    return alpha(then) * from_eps(eps, "x0", white_t, now) + sigma(then) * eps


METHODS: dict[str, Method] = {
    "euler-maruyama": euler_maruyama,
    "ancestral": ancestral,
    "ddim": ddim,
    "heun": heun,
}


@dataclass(frozen=True)
class Samples:
    """What `sample` returns.

    Attributes:
        data: images (n, c, h, w), in units of the data, float32.
        white: their white components, (n, c, h, w), float64.
        nfe: how often the model was called.
        times: the time of each kept state, (k,).
        states: white components on the way, (k, n, c, h, w); k = 0 unless asked for.
    """

    data: Tensor
    white: Tensor
    nfe: int
    times: Float[Tensor, " k"]
    states: Float[Tensor, "k n c h w"]


@torch.no_grad()
def sample(
    model: Model,
    process: Process,
    n: int,
    steps: int = 50,
    method: str = "heun",
    generator: torch.Generator | None = None,
    start: Batch | None = None,
    keep: int = 0,
    progress: bool = False,
    temperature: float = 1.0,
) -> Samples:
    """Draw `n` samples by `steps` equal steps of t from the prior to the data.

    The state is float64 throughout, whatever the model computes in. A schedule with a batch of its own (one softness
    for each image) must have batch shape (n,).

    Arguments:
        model: `(white_t, gamma) -> eps_hat`.
        process: basis, prior and schedule.
        n: number of samples.
        steps: number of updates.
        method: `euler-maruyama`, `ancestral`, `ddim` or `heun`.
        generator: of all randomness.
        start: white noise to start from (n, c, h, w); drawn if not given.
        keep: how many intermediate states to return, evenly spread and including both ends.
        progress: show a bar.
        temperature: factor of the noise that steps add, not of the start.

    Raises:
        ValueError: for an unknown method, n or steps below 1, keep of 1 or beyond steps + 1, or a start or schedule
            batch that does not fit.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {sorted(METHODS)}; got {method!r}")
    if n < 1 or steps < 1:
        raise ValueError(f"n and steps must be at least 1; got n = {n}, steps = {steps}")
    if keep < 0 or keep == 1 or keep > steps + 1:
        raise ValueError(f"keep must be 0 or between 2 and steps + 1 = {steps + 1}; got {keep}")
    shape = (n, *process.schedule.shape)
    if start is not None and tuple(start.shape) != shape:
        raise ValueError(f"start must have shape {shape}; got {tuple(start.shape)}")
    if tuple(process.schedule.batch) not in {(), (n,)}:
        raise ValueError(f"the schedule is made for a batch of {tuple(process.schedule.batch)}; got n = {n}")
    device = process.prior.mean.device
    if start is None:
        start = torch.randn(shape, generator=generator, dtype=torch.float64, device=device)
    x, nfe = start.double(), 0
    grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=device)
    kept = set(torch.linspace(0, steps, keep).round().long().tolist()) if keep else set()
    states = [x] if kept else []
    for i in tqdm(range(steps), desc=method, disable=not progress):
        step = METHODS[method](model, process, x, grid[i], grid[i + 1])
        x, nfe = step.mean, nfe + step.nfe
        if bool(step.std.any()):
            x = x + temperature * step.std * torch.randn(shape, generator=generator, dtype=torch.float64, device=device)
        if i + 1 in kept:
            states.append(x)
    return Samples(
        data=process.data(x).float(),
        white=x,
        nfe=nfe,
        times=grid[sorted(kept)],
        states=torch.stack(states) if states else x.new_empty(0, *shape),
    )


def push(
    model: Model, process: Process, steps: int, method: str, start: Float[Tensor, "d d"]
) -> tuple[Float[Tensor, "d d"], Float[Tensor, "d d"]]:
    """What a sampler does to normal data, without drawing: the covariance it ends with, and its map from start to end.

    For a linear model without offset (`exact.gaussian` of mean 0) a step is a matrix and independent noise.

    Arguments:
        model, process, steps, method: as for `sample`.
        start: covariance of the white components at t = 1, (d, d).
    """
    units = torch.eye(len(start), dtype=torch.float64)
    grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)

    def linear(t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        step = METHODS[method](model, process, units.view(-1, *process.schedule.shape), t, s)
        return step.mean.flatten(1).T, step.std.flatten()[: len(units)]

    covariance, whole = start, units
    for matrix, std in zip(*torch.func.vmap(linear)(grid[:-1], grid[1:]), strict=True):
        covariance, whole = matrix @ covariance @ matrix.T + (std**2).diag(), matrix @ whole
    return covariance, whole
