r"""Samplers: follow a process backwards, from t = 1 to t = 0, with any model `(white_t, gamma) -> eps_hat`.

A method is one update from t to s < t, for all components at once and each with its own noise levels. It returns the
mean and the standard deviation of the next state; the driver draws. With r = exp(gamma_s - gamma_t) <= 1:

    ancestral        mean = (alpha_s / alpha_t) [chi_t - sigma_t (1 - r) eps],   variance = sigma_s^2 (1 - r)
    ancestral-mmse   the same,                              variance = sigma_s^2 (1 - r) + alpha_s^2 (1 - r)^2 mmse
    euler-maruyama   a plain step of the reverse SDE in t                        (the authors' library)
    ddim             mean = alpha_s x0 + sigma_s eps,                            variance = 0, as below
    heun             ddim, then again with the average of both ends' eps         (second order, two calls)
    dpm++2m          ddim with x0 extrapolated from two calls                    (second order)
    gaussian, gaussian-2m, gaussian-pc                                           (first, second, third order)

The last three know the variance c_i of each white component. They ask which mean m_i a normal component of that
variance would have, to be guessed as x0 = m + (alpha c / v) (chi - alpha m), and hold on to m instead of x0: along the
probability flow, whatever the data and whatever c,

    d (chi / sqrt(v)) = m d (alpha / sqrt(v)),      m = (chi - v eps / sigma) / alpha,      v = alpha^2 c + sigma^2.

For independent normal components m is their mean: one step is exact, from any t to any s. c = 0 is DDIM, with m = x0.
(With rho = arsinh(sqrt(c) alpha / sigma) it is alpha / sqrt(v) = tanh(rho) / sqrt(c).) `gaussian` keeps m for a step,
`gaussian-2m` extrapolates it from two calls, `gaussian-pc` from four, and corrects each step by the m found at its
end, when the next step calls the model there anyway.

Methods with a memory hand over, in `Step.next_method`, that of the next step. A component that is not moving, or has
only begun to, uses no more memory than it has. But for Euler-Maruyama no method needs the schedule's derivative, and
all leave a component that is not moving where it is, up to rounding.

References:
    Denoising Diffusion Probabilistic Models, J. Ho, A. Jain, P. Abbeel, 2020, https://arxiv.org/abs/2006.11239
    Denoising Diffusion Implicit Models, J. Song, C. Meng, S. Ermon, 2021, https://arxiv.org/abs/2010.02502
    Elucidating the Design Space of Diffusion-Based Generative Models, T. Karras et al., 2022,
    https://arxiv.org/abs/2206.00364, algorithm 1
    Analytic-DPM: an Analytic Estimate of the Optimal Reverse Variance in Diffusion Probabilistic Models, F. Bao, C. Li,
    J. Zhu, B. Zhang, 2022, https://arxiv.org/abs/2201.06503
    DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models, C. Lu et al., 2022,
    https://arxiv.org/abs/2211.01095, algorithm 2
    UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models, W. Zhao et al., 2023,
    https://arxiv.org/abs/2302.04867 (the correction without a further call)
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from gudlib import checks
from gudlib.bases import Blocks, Pixel
from gudlib.doors import door, inner
from gudlib.process import Batch, Gamma, Model, Process, diffuse, from_eps
from gudlib.schedules import alpha, held, sigma


@dataclass(frozen=True)
class Step:
    """Where one update leads.

    Attributes:
        mean: of the next state, (b, c, h, w).
        std: of the noise to add, broadcastable to it; 0 for deterministic methods.
        nfe: how often the model was called.
        next_method: of the next step, if that is to remember this one.
    """

    mean: Tensor
    std: Tensor
    nfe: int = 1
    next_method: Callable[..., "Step"] | None = None


Method = Callable[[Model, Process, Batch, Tensor, Tensor], Step]
Now = Float[Tensor, ""]
Evaluation = tuple[Tensor, Tensor]  # noise levels at which the model was called, and the means found there


@inner
def euler_maruyama(model: Model, process: Process, white_t: Batch, t: Now, s: Now) -> Step:
    """One Euler-Maruyama step of the reverse SDE from time t to s < t."""
    drift, diffusion = process.reverse_sde(white_t, t, model(white_t, process.schedule.gamma(t)))
    return Step(white_t + (s - t) * drift, diffusion * (t - s).sqrt())


@inner
def ancestral(model: Model, process: Process, white_t: Batch, t: Now, s: Now) -> Step:
    """One step of ancestral (DDPM) sampling: the exact posterior, given chi_0 = its prediction."""
    gamma_t, gamma_s = process.schedule.gamma(t), process.schedule.gamma(s)
    moved = -torch.expm1(gamma_s - gamma_t)  # 1 - r
    mean = alpha(gamma_s) / alpha(gamma_t) * (white_t - sigma(gamma_t) * moved * model(white_t, gamma_t))
    return Step(mean, sigma(gamma_s) * moved.sqrt())


@door
def analytic(mmse: Callable[[Gamma], Batch] | None = None) -> Method:
    """Ancestral sampling that adds what its guess of chi_0 leaves open: `ancestral-mmse`.

    Exact for independent normals in one step, and for normals generated one component after another in one step each.

    Arguments:
        mmse: E(chi_0 - x0_hat)^2 of each component at noise levels gamma, e^gamma times the error of the noise, as
            measured or from `exact.gaussian_error`. By default that of independent normals, c / (1 + c e^-gamma).
    """

    def step(model: Model, process: Process, white_t: Batch, t: Now, s: Now) -> Step:
        gamma_t, gamma_s = process.schedule.gamma(t), process.schedule.gamma(s)
        plain, c = ancestral(model, process, white_t, t, s), process.prior.white_variance
        unknown = c * torch.sigmoid(gamma_t - c.log()) if mmse is None else mmse(gamma_t)
        return Step(
            plain.mean, (plain.std**2 + (alpha(gamma_s) * torch.expm1(gamma_s - gamma_t)) ** 2 * unknown).sqrt()
        )

    return step


@inner
def ddim(model: Model, process: Process, white_t: Batch, t: Now, s: Now) -> Step:
    """One step of DDIM: the exponential integrator of the probability-flow ODE."""
    gamma_t, gamma_s = process.schedule.gamma(t), process.schedule.gamma(s)
    x0 = from_eps(model(white_t, gamma_t), "x0", white_t, gamma_t)
    return Step(_flow(x0, white_t, gamma_t, gamma_s), torch.zeros_like(gamma_s))


@inner
def heun(model: Model, process: Process, white_t: Batch, t: Now, s: Now) -> Step:
    """One step of Heun's method on d(chi / alpha) = eps d(sigma / alpha); two model calls."""
    gamma_t, gamma_s = process.schedule.gamma(t), process.schedule.gamma(s)
    eps = model(white_t, gamma_t)
    ahead = model(_flow(from_eps(eps, "x0", white_t, gamma_t), white_t, gamma_t, gamma_s), gamma_s)
    x0 = from_eps((eps + ahead) / 2, "x0", white_t, gamma_t)
    return Step(_flow(x0, white_t, gamma_t, gamma_s), torch.zeros_like(gamma_s), nfe=2)


@door
def multistep(gaussian: bool = True, accuracy: int = 2) -> Method:
    """DDIM of `accuracy` of first or second order, in x0 or, `gaussian`, in the mean of a normal of the white variance.

    The second order holds on to m + (h / 2 h_prev) (m - m_prev), with h = gamma_t - gamma_s of each component.
    """

    def step(model: Model, process: Process, white_t: Batch, t: Now, s: Now, last: Evaluation | None = None) -> Step:
        gamma_t, gamma_s = process.schedule.gamma(t), process.schedule.gamma(s)
        c = process.prior.white_variance if gaussian else torch.zeros(())
        m, reach = _mean(model(white_t, gamma_t), white_t, gamma_t, c), gamma_t - gamma_s
        here = gamma_t, m
        if last:
            m = m + (reach / 2 * _slope(last, here, reach)).nan_to_num(0)
        remember = partial(step, last=here) if accuracy > 1 else None
        return Step(_flow(m, white_t, gamma_t, gamma_s, c), torch.zeros_like(gamma_s), next_method=remember)

    return step


@inner
def predictor_corrector(
    model: Model,
    process: Process,
    white_t: Batch,
    t: Now,
    s: Now,
    evaluations: Sequence[Evaluation] = (),
    start: Tensor | None = None,
) -> Step:
    """`gaussian-pc`: first the last step anew, now that its end has been evaluated, then the next.

    Arguments:
        model, process, white_t, t, s: as for every method.
        evaluations: earlier ones of the model, latest first; three more than the present one are used.
        start: the state, corrected, from which the last step led here.
    """
    gamma_t, gamma_s, c = process.schedule.gamma(t), process.schedule.gamma(s), process.prior.white_variance
    evaluations = [(gamma_t, _mean(model(white_t, gamma_t), white_t, gamma_t, c)), *evaluations[:3]]
    if start is not None:
        white_t = _integrate(evaluations, start, evaluations[1][0], gamma_t, c)
    remember = partial(predictor_corrector, evaluations=evaluations, start=white_t)
    return Step(_integrate(evaluations, white_t, gamma_t, gamma_s, c), torch.zeros_like(gamma_s), next_method=remember)


def _mean(eps: Tensor, white_t: Tensor, gamma: Tensor, c: Tensor) -> Tensor:
    v = torch.sigmoid(-gamma) * c + torch.sigmoid(gamma)
    return (white_t - v / sigma(gamma) * eps) / alpha(gamma)


def _flow(m: Tensor, white_t: Tensor, gamma_t: Tensor, gamma_s: Tensor, c: Tensor | float = 0.0) -> Tensor:
    v_t, v_s = (torch.sigmoid(-gamma) * c + torch.sigmoid(gamma) for gamma in (gamma_t, gamma_s))
    shrink = (v_s / v_t).sqrt()
    return shrink * white_t + (alpha(gamma_s) - shrink * alpha(gamma_t)) * m


REACH = 5  # how far to extrapolate, in units of the distance between two evaluations


def _slope(old: Evaluation, new: Evaluation, reach: Tensor) -> Tensor:
    """Of the mean, per unit of -gamma; nan where the component has not moved far enough between the two to tell."""
    gap = old[0] - new[0]
    return torch.where((gap > 1e-6) & (reach <= REACH * gap), (new[1] - old[1]) / gap, torch.nan)


def _integrate(
    evaluations: Sequence[Evaluation], white_t: Tensor, gamma_t: Tensor, gamma_s: Tensor, c: Tensor
) -> Tensor:
    """`_flow` with m a polynomial in gamma through the evaluations (Newton's form), integrated over alpha / sqrt(v)."""
    nodes, weights = (x.to(gamma_t).view(-1, *[1] * gamma_t.ndim) for x in (NODES, WEIGHTS))
    gamma = (gamma_t + gamma_s) / 2 + (gamma_t - gamma_s) / 2 * nodes
    v = torch.sigmoid(-gamma) * c + torch.sigmoid(gamma)
    weight = (gamma_t - gamma_s) / 4 * weights * alpha(gamma) * torch.sigmoid(gamma) / v**1.5
    levels = [level for level, _ in evaluations]
    terms = [_slope(old, new, gamma_t - gamma_s) for new, old in pairwise(evaluations)]
    more = torch.zeros_like(white_t)
    for k in range(1, len(evaluations)):
        weight = weight * (levels[k - 1] - gamma)
        more = more + weight.sum(0) * terms[0].nan_to_num(0)
        terms = [(new - old) / (levels[i + k + 1] - levels[i]) for i, (new, old) in enumerate(pairwise(terms))]
    v_s = torch.sigmoid(-gamma_s) * c + torch.sigmoid(gamma_s)
    return _flow(evaluations[0][1], white_t, gamma_t, gamma_s, c) + v_s.sqrt() * more


NODES, WEIGHTS = map(torch.from_numpy, np.polynomial.legendre.leggauss(16))

METHODS: dict[str, Method] = {
    "euler-maruyama": euler_maruyama,
    "ancestral": ancestral,
    "ancestral-mmse": analytic(),
    "ddim": ddim,
    "heun": heun,
    "dpm++2m": multistep(gaussian=False),
    "gaussian": multistep(accuracy=1),
    "gaussian-2m": multistep(),
    "gaussian-pc": predictor_corrector,
}


@door
def time_grid(process: Process, steps: int) -> Float[Tensor, " {steps}+1"]:
    r"""Times from 1 to 0 for `steps` updates, spent where components move that are not decided yet.

    Each step gets an equal share of int [mean_i (gamma_i' sqrt(u_i))^4]^(1/4) dt, where u_i = 1 / (1 + c_i e^-gamma_i)
    is how much of the variance c_i is still unknown (for independent normals). The fourth power lets few components
    count where only few move, the coarse levels of a wavelet basis say, each in its turn; of the powers tried, it and
    the root did best at few evaluations, on normal data with the covariance of Fashion-MNIST. At small errors, in KL
    divergence, equal steps are better there (notebook 09b).

    Steps end where the schedule has kinks, each piece between two of them getting one or more. If the kinks are too
    many, steps end at those close to where they would end anyway. Where nothing moves no step is spent; if nothing ever
    does, the steps are equal.

    Raises:
        ValueError: if steps is below 1.
    """
    steps = checks.whole("steps", steps)
    c, kinks = process.prior.white_variance.cpu(), process.schedule.kinks
    fine = torch.cat([torch.linspace(0, 1, 1001, dtype=torch.float64), kinks]).unique()

    def activity(cells: Float[Tensor, "k 2"]) -> Float[Tensor, " k"]:
        low, high = (process.schedule.gamma(t) for t in cells.split(1, dim=1))
        unknown = torch.sigmoid((low + high) / 2 - c.log())  # mmse / c of independent normals
        return ((high - low) ** 4 * unknown**2).flatten(1).mean(1) ** 0.25

    total = torch.cat([fine.new_zeros(1), *(activity(some) for some in fine.unfold(0, 2, 1).split(16))]).cumsum(0)
    if total[-1] == 0:
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    reached = total[torch.searchsorted(fine, kinks)]
    matters = (torch.cat([reached, total[-1:]]).diff() > 0) & (reached > 0)  # something moves on either side
    ends, reached = kinks[matters], reached[matters]
    if len(ends) >= steps:  # too many: those near to where equal shares would end anyway
        apart = (reached[:, None] - total[-1] * torch.arange(1, steps) / steps).abs()
        near = apart.argmin(0)[apart.amin(0) < total[-1] / steps / 4]
        ends, reached = ends[near], reached[near]
    bounds = torch.cat([total[:1], reached, total[-1:]])
    counts = torch.ones(len(bounds) - 1, dtype=torch.long)
    for _ in range(steps - len(counts)):  # the piece whose steps are largest gets one more
        counts[(bounds.diff() / counts).argmax()] += 1
    shares = [torch.linspace(0, 1, k + 1, dtype=torch.float64)[1:-1] for k in counts.tolist()]
    inner = torch.cat([torch.lerp(a, b, x) for (a, b), x in zip(pairwise(bounds), shares, strict=True)])
    between = torch.from_numpy(np.interp(inner, total, fine))
    return torch.cat([fine[:1], ends, between, fine[-1:]]).sort(descending=True).values


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


@door
@torch.no_grad()
def sample(
    model: Model,
    process: Process,
    n: int,
    steps: int = 50,
    method: str | Method = "heun",
    generator: torch.Generator | None = None,
    start: Batch | None = None,
    keep: int = 0,
    progress: bool = False,
    grid: str | Float[Tensor, " k"] = "uniform",
    temperature: float = 1.0,
) -> Samples:
    """Draw `n` samples by `steps` updates from the prior to the data.

    The state is float64 throughout, whatever the model computes in. A schedule with a batch of its own (one softness
    for each image) must have batch shape (n,).

    Arguments:
        model: `(white_t, gamma) -> eps_hat`.
        process: basis, prior and schedule.
        n: number of samples.
        steps: number of updates.
        method: a name of `METHODS`, or a method.
        generator: of all randomness.
        start: white noise to start from (n, c, h, w); drawn if not given.
        keep: how many intermediate states to return, evenly spread over the steps and including both ends.
        progress: show a bar.
        grid: `uniform`, equal steps of t; `adapted`, those of `time_grid`; or the times themselves, falling from 1 to
            0, which then settle the number of steps.
        temperature: factor of the noise that steps add, not of the start.

    Raises:
        ValueError: for an unknown method or grid, n or steps below 1, keep of 1 or beyond steps + 1, or a start or
            schedule batch that does not fit.
    """
    n, keep = checks.whole("n", n), checks.whole("keep", keep, 0)
    temperature = checks.real("temperature", temperature, least=0)
    update, t = _method(method), times(process, steps, grid)
    steps = len(t) - 1
    if keep == 1 or keep > steps + 1:
        raise ValueError(f"keep must be 0 or between 2 and steps + 1 = {steps + 1}; got {keep}")
    shape = (n, *process.schedule.shape)
    if start is not None and tuple(start.shape) != shape:
        raise ValueError(f"start must have shape {shape}; got {tuple(start.shape)}")
    if tuple(process.schedule.batch) not in {(), (n,)}:
        raise ValueError(f"the schedule is made for a batch of {tuple(process.schedule.batch)}; got n = {n}")
    device = process.prior.mean.device
    if start is None:
        start = torch.randn(shape, generator=generator, dtype=torch.float64, device=device)
    x, nfe, t = start.double(), 0, t.to(device)
    kept = set(torch.linspace(0, steps, keep).round().long().tolist()) if keep else set()
    states = [x] if kept else []
    states_on_the_way = _states(model, process, x, t, update, generator, temperature)
    for i, reached in enumerate(tqdm(states_on_the_way, total=steps, disable=not progress), 1):
        x, nfe = reached
        if i in kept:
            states.append(x)
    return Samples(
        data=process.data(x).float(),
        white=x,
        nfe=nfe,
        times=t[sorted(kept)],
        states=torch.stack(states) if states else x.new_empty(0, *shape),
    )


@inner  # unknown pixels may be anything
@torch.no_grad()
def inpaint(
    model: Model,
    process: Process,
    images: Batch,
    known: Bool[Tensor, "*b c h w"],
    steps: int = 50,
    method: str | Method = "heun",
    generator: torch.Generator | None = None,
    **options: Any,
) -> Samples:
    """Fill in what is not known: known components are not noised, the others are sampled along the schedule as ever.

    No guidance and no replacement on the way: a model that has seen such noise levels in training knows the conditional
    distribution. In the pixel basis this fills holes (inpainting) and surroundings (outpainting); in a hierarchical
    basis with its coarse components known it adds detail (super-resolution).

    Arguments:
        model, process, steps, method, generator: as for `sample`.
        images: in units of the data (n, c, h, w); their unknown components don't matter, and unknown pixels may be NaN.
        known: which components are given, for all images or for each.
        options: further ones of `sample`.

    Raises:
        ValueError: if the mask does not fit the process, or as `sample`.
    """
    path, n = process.along(held(process.schedule, known)), len(checks.batch("images", images))
    if tuple(path.schedule.batch) not in {(), (n,)}:
        raise ValueError(f"known and schedule must be for all {n} images or for each; got {tuple(known.shape)}")
    plain = isinstance(process.basis, Pixel) and images.shape[1:] == known.shape[-3:] and images.is_floating_point()
    given = torch.where(known.to(images.device), images, 0) if plain else images  # unknown pixels may be NaN
    checks.data("images", given, process.schedule.shape)
    return sample(model, path, n, steps, method, generator, _start(path, images, known, generator), **options)


@door
def extend(
    model: Model,
    process: Process,
    images: Float[Tensor, "n c h k"],
    context: int,
    steps: int = 2,
    stride: int = 1,
    method: str | Method = "gaussian",
    generator: torch.Generator | None = None,
) -> Iterator[Float[Tensor, "n c h stride"]]:
    """Pictures that grow to the right, without end; time and memory of a column do not depend on how many there are.

    On a schedule of columns each one does what its left neighbour did, one lag later. A window moved on by one column
    and its time put back by one lag is in a state the process has had before: so an endless strip needs the network
    for one window only, which holds the last `context` finished columns, those that move, and some not yet touched.

    Arguments:
        model: `(white_t, gamma) -> eps_hat` for the window.
        process: of the window, in pixels or in `bases.Blocks` of columns, with a prior that is the same for all
            columns, and a schedule that is `schedules.sequential` in the column.
        images: what to extend, in units of the data; only the last `context` columns matter.
        context: number of finished columns that the model is shown at least, at all times.
        steps: updates for each new column. While a column moves, `steps` times as many happen as columns move at once.
        stride: how many columns the window moves at once; a method's memory lasts from one move to the next.
        method, generator: as for `sample`.

    Yields:
        The next `stride` columns, in units of the data, float32.

    Raises:
        ValueError: if the process is not of that kind, or the numbers don't fit it. Raised at the first column.
    """
    update, prior, width = _method(method), process.prior, process.schedule.shape[-1]
    same = [bool((x - x[..., :1]).abs().max() <= 1e-6 * x.abs().max()) for x in (prior.mean, prior.scale)]
    of_columns = isinstance(process.basis, Pixel) or (isinstance(process.basis, Blocks) and not process.basis.size)
    if not of_columns or not all(same):
        raise ValueError(
            "process must have pixels, or blocks that are columns, and a prior the same for all columns; "
            f"got {process.basis.name}"
        )
    kinks = process.schedule.kinks
    lag = float(kinks[0]) if len(kinks) else 1.0
    t = torch.tensor([0.3, 0.5, 0.8], dtype=torch.float64) * (1 - lag) + lag
    left, right = process.schedule.gamma(t)[..., :-1], process.schedule.gamma(t - lag)[..., 1:]
    if not torch.allclose(left, right) or torch.allclose(left, right[..., :1]):
        raise ValueError("process must have a schedule of columns, each a lag behind its left neighbour")
    if checks.batch("images", images).shape[1:3] != process.shape[:2]:
        channels, height, _ = process.shape
        raise ValueError(f"images must have shape (n, {channels}, {height}, any width); got {checks.what(images)}")
    stride, steps = checks.whole("stride", stride), checks.whole("steps", steps)
    context = checks.whole("context", context, 0)
    moving = (1 - (width - 1) * lag) / lag  # how many columns move at once
    most = min(math.floor(width - moving - stride + 1 + 1e-6), images.shape[-1])
    if not 1 <= context <= most:
        where = f"this schedule, {images.shape[-1]} columns and stride {stride}"
        raise ValueError(f"context must lie between 1 and {most} for {where}; got {context}")

    images = images.to(prior.mean.device)
    whole = torch.zeros(*images.shape[:-1], width, dtype=images.dtype, device=images.device)
    whole[..., :context] = images[..., -context:]
    known = (torch.arange(width) < context).expand(process.schedule.shape)
    path = process.along(held(process.schedule, known))
    x, start, end = _start(path, whole, known, generator), 1 - context * lag, (width - context - stride) * lag
    while True:
        t = torch.linspace(start, end, max(round((start - end) / lag * steps), 1) + 1, dtype=torch.float64)
        with torch.no_grad():  # not around the function: what the caller does between two strips is his
            x, _ = deque(_states(model, path, x, t.to(x.device), update, generator), maxlen=1).pop()
        yield process.data(x)[..., context : context + stride].float()
        fresh = torch.randn(x[..., :stride].shape, generator=generator, dtype=x.dtype, device=x.device)
        x, start = torch.cat([x[..., stride:], fresh], dim=-1), (width - context) * lag


@door
def push(
    model: Model,
    process: Process,
    steps: int,
    method: str | Method,
    start: Float[Tensor, "d d"],
    grid: str | Float[Tensor, " k"] = "uniform",
) -> tuple[Float[Tensor, "d d"], Float[Tensor, "d d"]]:
    """What a sampler does to normal data, without drawing: the covariance it ends with, and its map from start to end.

    For a linear model without offset (`exact.gaussian` of mean 0) a step is a matrix and independent noise. A method
    with a memory must be deterministic, as those here are: then the unit vectors, sampled, are the map.

    Arguments:
        model, process, steps, method, grid: as for `sample`.
        start: covariance of the white components at t = 1, (d, d).
    """
    update, t, start = _method(method), times(process, steps, grid), start.double()
    if len(start) != math.prod(process.schedule.shape):
        raise ValueError(
            f"start must be of the process's {math.prod(process.schedule.shape)} components; got {len(start)}"
        )
    t, units = t.to(start.device), torch.eye(len(start), dtype=torch.float64, device=start.device)
    images = units.view(-1, *process.schedule.shape)
    if update(model, process, images, t[0], t[1]).next_method:
        whole = sample(model, process, len(units), steps, method, start=images, grid=grid).white.flatten(1).T
        return whole @ start @ whole.T, whole

    def linear(t: Now, s: Now) -> tuple[Tensor, Tensor]:
        step = update(model, process, images, t, s)
        return step.mean.flatten(1).T, step.std.flatten()[: len(units)]

    covariance, whole = start, units
    for matrix, std in zip(*torch.func.vmap(linear)(t[:-1], t[1:]), strict=True):
        covariance, whole = matrix @ covariance @ matrix.T + (std**2).diag(), matrix @ whole
    return covariance, whole


def _states(
    model: Model,
    process: Process,
    x: Batch,
    t: Float[Tensor, " k"],
    update: Method,
    generator: torch.Generator | None,
    temperature: float = 1.0,
) -> Iterator[tuple[Batch, int]]:
    nfe = 0
    for here, there in pairwise(t):
        step = update(model, process, x, here, there)
        x, nfe, update = step.mean, nfe + step.nfe, step.next_method or update
        if bool(step.std.any()):
            x = x + temperature * step.std * torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        yield x, nfe


def _start(process: Process, images: Batch, known: Tensor, generator: torch.Generator | None) -> Batch:
    """Noise, and in the known components the images as they are at t = 0."""
    white = process.white(images.double())
    eps = torch.randn(white.shape, generator=generator, dtype=white.dtype, device=white.device)
    gamma = process.schedule.gamma(torch.zeros((), dtype=white.dtype, device=white.device))
    return torch.where(known.to(white.device), diffuse(white, gamma, eps), eps)


def _method(method: str | Method) -> Method:
    if isinstance(method, str) and method not in METHODS:
        raise ValueError(f"method must be one of {sorted(METHODS)}; got {method!r}")
    return METHODS[method] if isinstance(method, str) else method


@door
def times(process: Process, steps: int, grid: str | Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """The times of a grid, as `sample` takes it.

    Raises:
        ValueError: for an unknown grid, times that don't fall from 1 to 0, or steps below 1.
    """
    if isinstance(grid, Tensor):
        t = grid.double()
        if t.ndim != 1 or len(t) < 2 or t[0] != 1 or t[-1] != 0 or not bool((t.diff() < 0).all()):
            raise ValueError(f"grid must hold times that fall from 1 to 0; got {grid}")
        return t
    if grid not in ("uniform", "adapted"):
        raise ValueError(f"grid must be uniform, adapted or times; got {grid!r}")
    steps = checks.whole("steps", steps)
    return time_grid(process, steps) if grid == "adapted" else torch.linspace(1, 0, steps + 1, dtype=torch.float64)
