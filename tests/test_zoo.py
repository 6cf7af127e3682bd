"""Published models against their own formulas, written out here again in another form, and against diffusers."""

import inspect
import math
import warnings

import numpy as np
import pytest
import torch
from cases import COVARIANCE, randn
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    ScoreSdeVeScheduler,
)
from diffusers.schedulers.deprecated.scheduling_sde_vp import ScoreSdeVpScheduler
from hypothesis import given
from hypothesis import strategies as st

from gudlib import bases, priors, samplers, schedules, zoo
from gudlib.exact import gaussian_error, information
from gudlib.process import Process, from_eps, to_eps

SHAPE = (1, 4, 6)
COLUMN = bases.Pixel(SHAPE).label("column")
VARIANCE = randn(*SHAPE, seed=40).exp()
SYSTEMS = {system.name: system for system in zoo.everything(SHAPE, lambda basis: VARIANCE)}
EXACT = [name for name, system in SYSTEMS.items() if system.verdict.startswith("exact")]
WITH_CLOCK = [name for name, system in SYSTEMS.items() if system.schedule]

TOLERANCE = 1e-6


def close(got, wanted, tolerance=TOLERANCE):
    torch.testing.assert_close(got, wanted.expand_as(got), rtol=tolerance, atol=tolerance)


def integral(f, t, nodes=60):
    """int_0^t f(s) ds for each t, by Gauss and Legendre."""
    x, w = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(nodes))
    return 0.5 * t * (f(t[:, None] * (x + 1) / 2) * w).sum(1)


# What the papers say: u_t = a u_0 + b eps, at times t; from transition kernels or SDEs where they are given as such


def chain(betas):
    """Transition kernel after transition kernel, q(u_n | u_n-1) = N(sqrt(1 - beta_n) u_n-1, beta_n)."""
    signal, variance, states = 1.0, 0.0, []
    for beta in betas:
        signal, variance = signal * math.sqrt(1 - beta), (1 - beta) * variance + beta
        states.append((signal, math.sqrt(variance)))
    a, b = torch.tensor(states, dtype=torch.float64).T
    t = torch.arange(len(a), dtype=torch.float64) / (len(a) - 1)
    return t, a.reshape(-1, 1, 1, 1), b.reshape(-1, 1, 1, 1)


def linear_betas(n=1000):
    return [1e-4 + (0.02 - 1e-4) * i / (n - 1) for i in range(n)]


def cosine_betas(n=1000):
    def bar(t):
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    return [min(1 - bar((i + 1) / n) / bar(i / n), 0.999) for i in range(n)]


def sde(diffusion, t):
    """du = -beta u dt / 2 + g dW with beta = 0.1 + 19.9 t: v(t) = int g^2(s) exp(-int_s^t beta) ds."""

    def between(s, t):  # the trapezium rule is exact for a line
        return (t - s) * (0.2 + 19.9 * (s + t)) / 2

    def squared(s):
        return diffusion(0.1 + 19.9 * s, between(torch.zeros_like(s), s))

    a = (-between(torch.zeros_like(t), t) / 2).exp()
    v = integral(lambda s: squared(s) * (-between(s, t[:, None])).exp(), t)
    return t, a.reshape(-1, 1, 1, 1), v.sqrt().reshape(-1, 1, 1, 1)


def from_small_times():
    return torch.cat([torch.logspace(-5, -2, 10).double().clamp(min=1e-5), torch.linspace(0.02, 1, 50).double()])


def exploding():
    t, growth = grid(), math.log(50 / 0.01)
    variance = 0.01**2 + integral(lambda s: 2 * growth * 0.01**2 * (2 * growth * s).exp(), t)  # d sigma^2 / dt
    return t, torch.ones(len(t), 1, 1, 1, dtype=torch.float64), variance.sqrt().reshape(-1, 1, 1, 1)


def grid(n=61):
    return torch.linspace(0, 1, n, dtype=torch.float64)


def from_gamma(t, gamma):
    return t, (1 / (1 + gamma.exp())).sqrt(), (1 / (1 + (-gamma).exp())).sqrt()


def karras(n=61):
    """Noise levels of the sampler, from noise to data, as published; times run the other way."""
    i = torch.arange(n, dtype=torch.float64)
    sigma = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    return 1 - i / (n - 1), torch.ones(n, 1, 1, 1, dtype=torch.float64), sigma.reshape(-1, 1, 1, 1)


def blurred():
    t = grid()[:, None, None, None]
    row = math.pi * torch.arange(4, dtype=torch.float64)[:, None] / 4
    column = math.pi * torch.arange(6, dtype=torch.float64)[None, :] / 6
    dissipation = (20 * (t * math.pi / 2).sin() ** 2) ** 2 / 2
    scaling = (-(row**2 + column**2) * dissipation).exp() * (1 - 0.001) + 0.001
    top = math.atan(math.exp(-5))
    log_snr = -2 * torch.tan((math.atan(math.exp(5)) - top) * t + top).log()
    return grid(), (1 / (1 + (-log_snr).exp())).sqrt() * scaling, (1 / (1 + log_snr.exp())).sqrt()


def at_levels(t, level):
    """Cosine amplitudes at levels in [0, 1], with gamma kept between -10 and 10."""
    signal = (((level + 0.008) / 1.008 * math.pi / 2).cos() / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2
    return from_gamma(t, ((1 - signal) / signal).log().clamp(-10, 10))


def pyramid(steps=100, lag=1):
    """The scheduling matrix of the sampler, row by row, with its integer levels."""
    height = steps + int(5 * lag) + 1
    matrix = [[min(max(steps + int(n * lag) - m, 0), steps) for n in range(6)] for m in range(height)]
    level = torch.tensor(matrix, dtype=torch.float64) / steps
    return at_levels(1 - torch.arange(height, dtype=torch.float64) / (height - 1), level[:, None, None, :])


def rolled(window=4, frames=6):
    """The first window from noise, then one after another until the last frame is clean, t from 1 to 0 in each."""
    j, rows, times = torch.arange(window, dtype=torch.float64), [], []
    for place in range(frames):
        for t in torch.linspace(1, 0, 9, dtype=torch.float64):
            inside = (j / window + t).clamp(0, 1) if place == 0 else (j + t) / window
            film = torch.cat([torch.zeros(place), inside, torch.ones(frames)])
            rows.append(film[:frames])
            times.append(window * float(t) + frames - 1 if place == 0 else float(t) + frames - 1 - place)
    return at_levels(torch.tensor(times).double() / (window + frames - 1), torch.stack(rows)[:, None, None, :])


def straight(sigma_min=0.0, reach=10.0):
    """psi = tau x_1 + (1 - (1 - sigma_min) tau) x_0, from noise x_0 at tau = 0 to data, where |log SNR| <= reach."""

    def where(log_snr):  # bisection
        low, high = 0.0, 1.0
        for _ in range(100):
            tau = (low + high) / 2
            low, high = (tau, high) if 2 * math.log(tau / (1 - (1 - sigma_min) * tau)) < log_snr else (low, tau)
        return low

    tau = torch.linspace(where(reach), where(-reach), 61, dtype=torch.float64)
    spread = 1 - (1 - sigma_min) * tau
    return grid(), tau.reshape(-1, 1, 1, 1), spread.reshape(-1, 1, 1, 1)


def learnt_polynomial():
    right = torch.arange(6, dtype=torch.float64) / 5
    gamma = []
    for x in right.tolist():
        a, b, c = 2 * (1 - x), -x, 0.2 + x
        so_far = integral(lambda s, a=a, b=b, c=c: (a * s**2 + b * s + c) ** 2, grid())
        gamma.append(-13.3 + 18.3 * so_far / so_far[-1])
    return from_gamma(grid(), torch.stack(gamma, 1)[:, None, None, :])


def coloured(noise_variance):
    t, a, b = chain(linear_betas())
    return t, a, b * noise_variance.sqrt()


def flipped():
    values = sorted(VARIANCE.flatten().tolist())
    mirror = dict(zip(values, reversed(values), strict=True))
    return torch.tensor([value / mirror[value] for value in VARIANCE.flatten().tolist()]).double().reshape(SHAPE)


ORACLES = {
    "DDPM": lambda: chain(linear_betas()),
    "improved DDPM": lambda: chain(cosine_betas()),
    "score SDE, VP": lambda: sde(lambda beta, B: beta, from_small_times()),
    "score SDE, sub-VP": lambda: sde(lambda beta, B: beta * -torch.expm1(-2 * B), from_small_times()),
    "score SDE, VE": exploding,
    "VDM": lambda: from_gamma(grid(), (-13.3 + 18.3 * grid()).reshape(-1, 1, 1, 1)),
    "EDM": karras,
    "flow matching": straight,
    "EqualSNR": lambda: coloured(VARIANCE),
    "FlippedSNR": lambda: coloured(flipped()),
    "blurring diffusion": blurred,
    "MuLAN": learnt_polynomial,
    "diffusion forcing": pyramid,
    "rolling diffusion": rolled,
}
SCALES = {"EDM": 0.5, "EqualSNR": VARIANCE.sqrt(), "FlippedSNR": flipped().sqrt()}
each_exact = pytest.mark.parametrize("name", EXACT)


def test_every_system_is_listed_and_every_exact_one_has_an_oracle():
    assert set(ORACLES) == set(EXACT) and len(SYSTEMS) >= 14
    functions = [f for _, f in inspect.getmembers(zoo, inspect.isfunction)]
    makers = [f for f in functions if f.__annotations__.get("return") is zoo.System]
    assert len(makers) == len(SYSTEMS)
    for system in SYSTEMS.values():
        assert system.verdict in zoo.Verdict.__args__
        assert system.why.endswith(".") and "https://arxiv.org/abs/" in system.reference
        assert system.schedule is None or system.schedule.shape == SHAPE


def published(name):
    """Times, and the model's amplitudes in full shape; and the scale we give it."""
    t, a, b = ORACLES[name]()
    full = (len(t), *SHAPE)
    return t, a.expand(full), b.expand(full), torch.as_tensor(SCALES.get(name, 1.0), dtype=torch.float64)


@each_exact
def test_amplitudes_are_the_published_ones_in_our_units(name):
    system, (t, a, b, scale) = SYSTEMS[name], published(name)
    length = (a**2 + (b / scale) ** 2).sqrt()
    close(system.schedule.alpha(t), a / length)
    close(system.schedule.sigma(t), b / scale / length)
    close(system.schedule.gamma(t), 2 * (b / a / scale).log())
    if system.verdict == "exact":
        close(length, torch.ones(()).double())
    else:
        assert (length - 1).abs().max() > 0.1
    close(torch.as_tensor(system.scale, dtype=torch.float64), scale)
    data = torch.linspace(0.1, 3, 24, dtype=torch.float64).reshape(SHAPE)
    close(system.schedule.snr(t, data / scale**2).log(), (a**2 * data / b**2).log())


@each_exact
def test_transitions_and_posteriors_are_the_published_ones_in_our_units(name):
    """Both chains from time to time, forwards and, with the data known, backwards: mean and variance."""
    system, (t, a, b, scale) = SYSTEMS[name], published(name)
    some = torch.linspace(0, len(t) - 1, 12).long()
    some = some[t[some].argsort()]
    t, a, b = t[some], a[some], b[some]
    unit = 1 / (a**2 * scale**2 + b**2).sqrt()  # chi = unit u
    u0, eps = randn(1, *SHAPE, seed=41), randn(1, *SHAPE, seed=42)
    flat = priors.Moments(torch.zeros(SHAPE).double(), torch.ones(SHAPE).double())
    process = Process(bases.Pixel(SHAPE), priors.isotropic(flat), system.schedule)
    for s in range(len(t) - 1):
        n = s + 1
        shrink = a[n] / a[s]
        added = b[n] ** 2 - shrink**2 * b[s] ** 2
        now, then = system.schedule.gamma(t[n]), system.schedule.gamma(t[s])
        close(system.schedule.alpha(t[n]) / system.schedule.alpha(t[s]), unit[n] / unit[s] * shrink)
        close(-torch.sigmoid(now) * torch.expm1(then - now), unit[n] ** 2 * added)
        u = a[n] * u0 + b[n] * eps
        mean = (shrink * b[s] ** 2 * u + a[s] * added * u0) / b[n] ** 2
        step = samplers.ancestral(lambda chi, gamma: eps, process, unit[n] * u, t[n], t[s])
        close(step.mean, unit[s] * mean)
        close(step.std, unit[s] * (b[s] ** 2 * added / b[n] ** 2).clamp(min=0).sqrt())
        flow = samplers.ddim(lambda chi, gamma: eps, process, unit[n] * u, t[n], t[s]).mean
        close(flow, unit[s] * (a[s] * u0 + b[s] * eps))


def test_ends_are_those_we_quote():
    both = torch.tensor([0.0, 1.0]).double()
    ends = {name: SYSTEMS[name].schedule.gamma(both)[:, 0, 0, 0].tolist() for name in EXACT}
    for name, expected in {
        "DDPM": (-9.210, 10.118), "improved DDPM": (-10.095, 19.836), "score SDE, VP": (-13.815, 10.050),
        "score SDE, VE": (-9.210, 7.824), "VDM": (-13.3, 5.0), "EDM": (-11.043, 10.15),
        "flow matching": (-10.0, 10.0),
    }.items():  # fmt: skip
        assert ends[name] == pytest.approx(expected, abs=6e-4), name
    last_but_one = SYSTEMS["improved DDPM"].schedule.gamma(torch.tensor(998 / 999).double()).max().item()
    assert last_but_one == pytest.approx(12.928, abs=6e-4)  # the cap then jumps by log 1000


@given(
    a=st.floats(1e-3, 1e3), b=st.floats(1e-3, 1e3), scale=st.floats(0.05, 20), u0=st.floats(-3, 3), e=st.floats(-3, 3)
)
def test_rescaling_makes_any_noising_variance_preserving(a, b, scale, u0, e):
    a, b = torch.tensor([a]).double(), torch.tensor([b]).double()
    gamma, kappa = zoo.rescale(a, b, scale)
    chi = kappa * (a * u0 + b * e) / scale
    alpha, sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
    close(chi, alpha * u0 / scale + sigma * e, 1e-9)
    ours = schedules.rescaled(schedules.linear(SHAPE), torch.full(SHAPE, scale).double()).gamma(torch.tensor(0.3))
    close(zoo.rescale(torch.ones(1), ours.double().div(2).exp(), scale).gamma, torch.tensor(-3.4).double(), 1e-5)


def refined(schedule):
    """With finer pieces beside each kink, for schedules that run off like log t there."""
    ends = torch.cat([torch.tensor([0.0, 1.0]).double(), schedule.kinks])[:, None]
    small = torch.logspace(-6, -1, 11, dtype=torch.float64)
    beside = torch.cat([schedule.kinks, (ends + small).flatten(), (ends - small).flatten()])
    return schedules.Schedule(lambda t: schedule.gamma(t[..., 0, 0, 0]), schedule.shape, beside)


@pytest.mark.parametrize("name", WITH_CLOCK)
def test_kinks_split_the_schedule_into_smooth_pieces(name):
    """Few nodes in each piece integrate the rate to the whole rise only if no jump lies inside."""
    schedule = SYSTEMS[name].schedule
    ends = schedule.gamma(torch.tensor([0.0, 1.0]).double())
    nodes = 64 if name == "blurring diffusion" else 6  # blur comes and saturates quickly
    tabulated = len(schedule.kinks) > 400
    rise = information(schedule if tabulated else refined(schedule), torch.ones_like, 1 if tabulated else nodes)
    close(2 * rise, ends[1] - ends[0], 1e-3)
    assert (schedule.gamma(grid(2001)).diff(dim=0) >= -1e-12).all()
    assert schedule.gamma(grid().float()).dtype == torch.float32


def test_sub_vp_waits_as_long_as_vp():
    for name in ("score SDE, VP", "score SDE, sub-VP"):
        schedule = SYSTEMS[name].schedule
        assert schedule.kinks.tolist() == [1e-5]
        rate = schedule.dgamma_dt(torch.tensor([0.9e-5, 1.1e-5]).double()).flatten(1)
        assert (rate[0] == 0).all() and (rate[1] > 1e4).all()


# diffusers


SCHEDULERS = {"DDPM": ("linear", linear_betas), "improved DDPM": ("squaredcos_cap_v2", cosine_betas)}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_tables_of_diffusers_in_its_own_precision(name):
    bar = DDPMScheduler(beta_schedule=SCHEDULERS[name][0]).alphas_cumprod
    t, schedule = torch.arange(1000).double() / 999, SYSTEMS[name].schedule
    close(schedule.alpha(t)[:, 0, 0, 0].float(), bar.sqrt(), 2e-5)
    close(schedule.sigma(t)[:, 0, 0, 0].float(), (1 - bar).sqrt(), 2e-5)


def in_float64(scheduler, name):
    """diffusers keeps its tables in single precision; here they are the published betas in double."""
    scheduler.betas = torch.tensor(SCHEDULERS[name][1](), dtype=torch.float64)
    scheduler.alphas_cumprod = (1 - scheduler.betas).cumprod(0)
    return scheduler


def process_of(name):
    flat = priors.Moments(torch.zeros(SHAPE).double(), torch.ones(SHAPE).double())
    return Process(bases.Pixel(SHAPE), priors.isotropic(flat), SYSTEMS[name].schedule)


@pytest.mark.parametrize("n", [1, 2, 400, 998, 999])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_one_step_of_diffusers_ddpm_is_our_ancestral_step(name, n):
    scheduler = in_float64(DDPMScheduler(beta_schedule=SCHEDULERS[name][0], clip_sample=False), name)
    chi, eps = randn(2, *SHAPE, seed=43), randn(2, *SHAPE, seed=44)
    theirs = scheduler.step(eps, n, chi, generator=torch.Generator().manual_seed(7)).prev_sample
    noise = torch.randn(chi.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    t, s = torch.tensor([n / 999, (n - 1) / 999], dtype=torch.float64)
    step = samplers.ancestral(lambda chi, gamma: eps, process_of(name), chi, t, s)
    close(theirs, step.mean + step.std * noise)
    close(step.std.square().amax(), scheduler._get_variance(n))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_one_step_of_diffusers_ddim_is_our_ddim_step(name):
    scheduler = in_float64(DDIMScheduler(beta_schedule=SCHEDULERS[name][0], clip_sample=False), name)
    scheduler.set_timesteps(50)
    chi, eps = randn(2, *SHAPE, seed=43), randn(2, *SHAPE, seed=44)
    for n in (980, 500, 20):
        t, s = torch.tensor([n / 999, (n - 20) / 999], dtype=torch.float64)
        step = samplers.ddim(lambda chi, gamma: eps, process_of(name), chi, t, s)
        close(scheduler.step(eps, n, chi).prev_sample, step.mean)


def test_one_step_of_diffusers_vp_sde_is_our_euler_maruyama_step():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = ScoreSdeVpScheduler()
    scheduler.set_timesteps(1000)
    chi, eps = randn(2, *SHAPE, seed=43), randn(2, *SHAPE, seed=44)
    for t in (0.01, 0.3, 1.0):
        t = torch.tensor(t, dtype=torch.float64)
        _, theirs = scheduler.step_pred(eps, chi, t)
        close(samplers.euler_maruyama(lambda chi, g: eps, process_of("score SDE, VP"), chi, t, t - 1e-3).mean, theirs)


def test_noise_levels_of_diffusers_ve_sde_are_ours():
    scheduler = ScoreSdeVeScheduler(sigma_min=0.01, sigma_max=50.0)
    scheduler.set_sigmas(1000)
    ours = (SYSTEMS["score SDE, VE"].schedule.gamma(grid(1000)) / 2).exp()[:, 0, 0, 0]
    close(ours.float(), scheduler.discrete_sigmas, 1e-5)


def test_preconditioning_and_sampler_of_edm_are_ours():
    """c_in u is chi; a network that predicts -v gives the data; an Euler step in sigma is a DDIM step."""
    scheduler, process = EDMEulerScheduler(), process_of("EDM")
    scheduler.set_timesteps(11)
    t, chi, v = grid(11).flip(0), randn(1, *SHAPE, seed=45), randn(1, *SHAPE, seed=46)
    level = process.schedule.gamma(t)
    sigma = 0.5 * (level / 2).exp()[:, 0, 0, 0]
    close(scheduler.sigmas[:-1].double(), sigma, 1e-5)
    for i in range(10):
        u = 0.5 * chi / torch.sigmoid(-level[i]).sqrt()  # chi = alpha u / S
        close(scheduler.precondition_inputs(u, sigma[i]), chi)
        eps = to_eps(v, "v", chi, level[i])
        denoised = scheduler.precondition_outputs(u, -v, sigma[i])
        close(denoised, 0.5 * from_eps(eps, "x0", chi, level[i]))
        step = samplers.ddim(lambda chi, gamma, eps=eps: eps, process, chi, t[i], t[i + 1]).mean
        theirs = u + (sigma[i + 1] - sigma[i]) * (u - denoised) / sigma[i]
        close(torch.sigmoid(-level[i + 1]).sqrt() * theirs / 0.5, step)
        scheduler.sigmas[i : i + 2] = sigma[i : i + 2]
        close(scheduler.step(-v.float(), scheduler.timesteps[i], u.float()).prev_sample.double(), theirs, 1e-3)


# Losses


def test_plain_losses_have_weight_one():
    gamma = randn(*SHAPE, seed=47)
    plain = [name for name, system in SYSTEMS.items() if system.weight is zoo.PLAIN]
    assert len(plain) == 7
    for name in plain:
        assert torch.equal(SYSTEMS[name].weight(gamma, gamma.abs()), torch.ones_like(gamma))


def test_likelihood_weighting_of_the_vp_sde_is_twice_the_bound():
    """g^2 |score + z / sigma|^2 with g^2 = beta."""
    schedule, t = SYSTEMS["score SDE, VP"].schedule, grid()[1:]
    z, guess = randn(len(t), *SHAPE, seed=48), randn(len(t), *SHAPE, seed=49)
    a2 = (-(0.1 * t + 9.95 * t**2)).exp()[:, None, None, None]
    theirs = (0.1 + 19.9 * t)[:, None, None, None] * (-guess / (1 - a2).sqrt() + z / (1 - a2).sqrt()) ** 2
    close(2 * zoo.BOUND(schedule.gamma(t), schedule.dgamma_dt(t)) * (z - guess) ** 2, theirs)


@pytest.mark.parametrize("name", ["VDM", "MuLAN"])
def test_discrete_bound_of_vdm_approaches_half_the_rate(name):
    """T / 2 expm1(gamma(t) - gamma(t - 1 / T)), to first order in 1 / T."""
    system, t = SYSTEMS[name], torch.tensor(0.6).double()
    weight = system.weight(system.schedule.gamma(t), system.schedule.dgamma_dt(t))
    gaps = []
    for steps in (1e4, 1e5):
        climb = system.schedule.gamma(t) - system.schedule.gamma(t - 1 / steps)
        gaps.append((steps / 2 * climb.expm1() - weight).abs().max())
    assert gaps[1] < 1e-2 * weight.max() and gaps[0] / gaps[1] == pytest.approx(10, rel=0.05)


def test_edm_weight_is_its_lambda_and_its_distribution_of_noise():
    """p(log sigma) d(log sigma)/dt lambda |D - x|^2 for any guess of the noise; the density alone sums to one."""
    system, t = SYSTEMS["EDM"], grid(4001)
    _, _, sigma = (x.flatten().flip(0) for x in karras(4001))
    z, guess = randn(len(t), seed=50), randn(len(t), seed=51)
    x = 0.5 * randn(len(t), seed=52)
    denoised = x + sigma * z - sigma * guess
    lam = (sigma**2 + 0.5**2) / (sigma * 0.5) ** 2
    speed = (80 ** (1 / 7) - 0.002 ** (1 / 7)) * 7 * sigma ** (6 / 7) / sigma  # d log sigma / dt
    density = (-0.5 * ((sigma.log() + 1.2) / 1.2) ** 2).exp() / (1.2 * math.sqrt(2 * math.pi))
    gamma, rate = system.schedule.gamma(t)[:, 0, 0, 0], system.schedule.dgamma_dt(t)[:, 0, 0, 0]
    close(system.weight(gamma, rate) * (z - guess) ** 2, density * speed * lam * (denoised - x) ** 2)
    assert torch.trapezoid(system.weight(gamma, rate) / (1 + gamma.exp()), t).item() == pytest.approx(1, abs=1e-4)
    assert r"\gamma; -1.01, 2.4^2" in system.weight.formula


def test_velocity_loss_of_edm_is_its_weight():
    """(1 + e^gamma) (eps - eps_hat)^2 is the squared error of v."""
    chi, gamma, guesses = randn(1, *SHAPE, seed=53), randn(1, *SHAPE, seed=54), randn(2, *SHAPE, seed=55)
    v, w = (from_eps(guess, "v", chi, gamma) for guess in guesses)
    close((v - w) ** 2, (1 + gamma.exp()) * (guesses[0] - guesses[1]) ** 2)


# Flow matching and rectified flow


@pytest.mark.parametrize("sigma_min", [0.0, 1e-3, 0.02, 0.3])
def test_straight_lines_with_a_smallest_noise(sigma_min):
    """Its states at any smallest noise; they start at 2 log sigma_min if that is above -reach, at -reach if not."""
    schedule = zoo.flow_matching(SHAPE, sigma_min, 8.0).schedule
    t, a, b = straight(sigma_min, 8.0)
    close(schedule.gamma(t), (2 * (b / a).log()).expand(len(t), *SHAPE))
    first, last = schedule.gamma(torch.tensor([0.0, 1.0]).double())[:, 0, 0, 0].tolist()
    assert first == pytest.approx(max(-8.0, 2 * math.log(sigma_min)) if sigma_min else -8.0, abs=1e-9)
    assert last == pytest.approx(8.0, abs=1e-9)


@pytest.mark.parametrize("sigma_min", [0.0, 0.02, 0.3])
def test_velocity_loss_of_flow_matching_is_its_weight(sigma_min):
    """|v - (x_1 - (1 - sigma_min) x_0)|^2 at one time and state, for any guess of the noise x_0."""
    system = zoo.flow_matching(SHAPE, sigma_min)
    t, a, b = straight(sigma_min)
    data, noise, guess = (randn(len(t), *SHAPE, seed=seed) for seed in (56, 57, 58))
    state = a * data + b * noise
    target, velocity = data - (1 - sigma_min) * noise, (state - b * guess) / a - (1 - sigma_min) * guess
    gamma, rate = system.schedule.gamma(t), system.schedule.dgamma_dt(t)
    close(system.weight(gamma, rate) * (noise - guess) ** 2, (velocity - target) ** 2)
    assert system.weight.formula == f"$({1 - sigma_min:g} + e^{{\\gamma/2}})^2$"


def test_weight_of_a_unit_of_gamma_in_rectified_flow():
    """e^(gamma/2) / 2 for each unit of its own time, of which a share of tanh(reach / 4) is kept."""
    system, t = SYSTEMS["flow matching"], grid()
    gamma, rate = system.schedule.gamma(t), system.schedule.dgamma_dt(t)
    close(system.weight(gamma, rate) / rate * math.tanh(10 / 4), (gamma / 2).exp() / 2)
    assert zoo.flow_matching(SHAPE).gamma == r"$2\log[t / (1 - t)]$"
    assert zoo.flow_matching(SHAPE, 0.01).gamma == r"$2\log[(0.01 + 0.99\,t) / (1 - t)]$"


def test_states_and_steps_of_diffusers_flow_matching_are_ours():
    """Its noising, and one Euler step along its velocity: a DDIM step."""
    scheduler, process = FlowMatchEulerDiscreteScheduler(), process_of("flow matching")
    scheduler.set_timesteps(sigmas=[0.9, 0.5, 0.2])
    first = 1 / (1 + math.exp(5))
    u0, eps = randn(1, *SHAPE, seed=59).float(), randn(1, *SHAPE, seed=60).float()
    for n, (now, then) in enumerate(((0.9, 0.5), (0.5, 0.2))):
        u = FlowMatchEulerDiscreteScheduler().scale_noise(u0, torch.tensor([1000 * now]), eps)
        t, s = ((torch.tensor(x).double() - first) / (1 - 2 * first) for x in (now, then))
        unit, later = ((x**2 + (1 - x) ** 2) ** -0.5 for x in (now, then))
        level = process.schedule.gamma(t)
        close(unit * u.double(), torch.sigmoid(-level).sqrt() * u0 + torch.sigmoid(level).sqrt() * eps, 1e-5)
        theirs = scheduler.step(eps - u0, scheduler.timesteps[n], u).prev_sample
        step = samplers.ddim(lambda chi, gamma: eps.double(), process, unit * u.double(), t, s).mean
        close(later * theirs.double(), step, 1e-5)


# Other settings


def test_a_learnt_monotone_schedule_is_pinned_to_its_ends():
    schedule = zoo.vdm(SHAPE, -4.0, 2.0, lambda t: 3 + (2 * t).exp()).schedule
    expected = -4 + 6 * ((2 * grid()).exp() - 1) / (math.exp(2) - 1)
    close(schedule.gamma(grid()), expected.reshape(-1, 1, 1, 1))


@pytest.mark.parametrize(("lag", "b"), [(0, 1.0), (2, 10 / 20), (10, 1 / 6)])
def test_diffusion_forcing_goes_from_diffusion_to_autoregression(lag, b):
    ours = zoo.diffusion_forcing(COLUMN, 10, lag).schedule
    t, a, _ = pyramid(10, lag)
    close(ours.alpha(t), a.expand(len(t), *SHAPE))
    active = ((ours.gamma(grid(601)) > -10 + 1e-9) & (ours.gamma(grid(601)) < 10 - 1e-9)).double().mean(0)
    assert active.max().item() == pytest.approx(b, abs=0.02)


def test_rolling_and_forcing_take_one_path():
    forced = zoo.diffusion_forcing(COLUMN, 100, 25.0).schedule  # a window of 4 = 100 levels / lag 25
    close(zoo.rolling(COLUMN, 4).schedule.gamma(grid()), forced.gamma(grid()))


def test_coarse_bands_and_first_tokens_are_noised_last():
    half = torch.tensor(0.5).double()
    coarse = bases.Haar(SHAPE, 1).label("level") == 0
    gamma = SYSTEMS["cascaded diffusion"].schedule.gamma(half)
    assert (gamma[coarse] <= -9.9).all() and (gamma[~coarse] >= 9.9).all()
    for name in ("diffusion forcing", "rolling diffusion"):
        assert (SYSTEMS[name].schedule.gamma(half)[0].diff(dim=1) >= 0).all()
    in_order = SYSTEMS["MAR"].schedule.gamma(half).flatten()
    assert (in_order.diff() >= 0).all() and in_order[0] < -10 < 19 < in_order[-1]
    level, waves = bases.Haar(SHAPE, 2).label("level"), SYSTEMS["wavelet score model"]
    gamma = waves.schedule.gamma(half)
    assert gamma[level == 0].max() < gamma[level == 1].mean() < gamma[level == 2].min()
    for band in range(3):
        close(waves.scale[level == band] ** 2, VARIANCE[level == band].mean())


# Limits

SMALL = (1, 2, 3)
C = COVARIANCE / COVARIANCE.diagonal().mean()


def chain_rule(label, low, high):
    """Information of each group of components, given those of lower labels exactly, between two noise levels."""
    label, expected = label.flatten(), []
    for value in label.unique():
        this, before = (label == value).nonzero().flatten(), (label < value).nonzero().flatten()
        known = C[this][:, before] @ torch.linalg.inv(C[before][:, before]) @ C[before][:, this]
        conditional = C[this][:, this] - known
        eye = torch.eye(len(this), dtype=torch.float64)
        clean, noisy = (torch.logdet(eye + math.exp(-level) * conditional) for level in (low, high))
        expected.append(0.5 * (clean - noisy))
    return torch.stack(expected)


def by_group(schedule, label, points=2):
    parts = information(schedule, lambda gamma: gaussian_error(gamma, C), points).flatten()
    return torch.stack([parts[label.flatten() == value].sum() for value in label.unique()])


def test_mar_is_reached_as_its_context_becomes_clean():
    """The error of each token's information falls like e^gamma_min, in proportion."""
    order = bases.Pixel(SMALL).label("column")
    errors, lows = [], []
    for steps in (50, 100, 200):
        schedule = zoo.mar(order, steps).schedule
        low, high = (schedule.gamma(torch.tensor(t).double()).max().item() for t in (0.0, 1.0))
        errors.append((by_group(schedule, order) - chain_rule(order, low, high)).abs().max().item())
        lows.append(low)
    slope = math.log(errors[0] / errors[2]) / (lows[0] - lows[2])
    assert slope == pytest.approx(1, abs=0.1) and errors[2] < 5e-3


def test_wavelet_bands_in_turn_are_reached_as_the_bands_stop_overlapping():
    variance = C.diagonal().reshape(SMALL)
    level = bases.Haar(SMALL, 2).label("level")
    errors = []
    for extra in (0.6, 0.4, 0.2, 0.0):
        schedule = zoo.wavelet(variance, 2, 1 / 3 + extra).schedule
        low, high = (schedule.gamma(torch.tensor(t).double()).max().item() for t in (0.0, 1.0))
        errors.append((by_group(refined(schedule), level, 12) - chain_rule(level, low, high)).abs().max().item())
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.05 and errors[-1] < 1e-5
    assert torch.equal(zoo.wavelet(variance, 2).schedule.gamma(grid()), schedule.gamma(grid()))


def test_heat_dissipation_has_these_marginals_but_not_this_process():
    """Two of its levels share the image only. In a Markov chain with these marginals they share noise, too."""
    schedule = SYSTEMS["heat dissipation"].schedule
    k = bases.DCT(SHAPE).label("wavenumber")
    sigma = torch.logspace(math.log10(0.5), math.log10(20), 61, dtype=torch.float64)[:, None, None, None]
    log_a = -(k**2) * sigma**2 / 2
    close(schedule.gamma(grid()), 2 * (math.log(0.01) - log_a))
    assert (schedule.dgamma_dt(grid())[:, 0, 0, 0] == 0).all()  # the average is never noised
    shared = (log_a[20] - log_a[10]).exp() * 0.01**2  # (a_t / a_s) b_s^2, theirs is 0
    assert shared.max() == pytest.approx(0.01**2) and shared.flatten()[1] > 1e-6


# Errors


@pytest.mark.usefixtures("unchecked")
def test_impossible_settings_are_refused_with_their_values():
    cases = [
        (lambda: zoo.ddpm(SHAPE, beta_min=0.0), "beta_min must be above zero, 0.0; got 0.0"),
        (lambda: zoo.ddpm(SHAPE, beta_min=0.03), "beta_max must be above beta_min, 0.03; got 0.02"),
        (lambda: zoo.ddpm(SHAPE, beta_max=1.0), "betas between 0 and 1"),
        (lambda: zoo.ddpm(SHAPE, steps=1), "steps must be at least 2; got 1"),
        (lambda: zoo.improved_ddpm(SHAPE, cap=1.0), "one must be above cap, 1.0; got 1"),
        (lambda: zoo.improved_ddpm(SHAPE, steps=1), "steps must be at least 2; got 1"),
        (lambda: zoo.score_sde_vp(SHAPE, 2.0, 1.0), "beta_max"),
        (lambda: zoo.score_sde_sub_vp(SHAPE, 2.0, 1.0), "beta_max"),
        (lambda: zoo.score_sde_ve(SHAPE, 0.0), "sigma_min"),
        (lambda: zoo.vdm(SHAPE, 5.0, 4.0), "gamma_max must be above gamma_min, 5.0; got 4.0"),
        (lambda: zoo.edm(SHAPE, sigma_data=-1.0), "sigma_data must be above zero, 0.0; got -1.0"),
        (lambda: zoo.edm(SHAPE, sigma_min=3.0, sigma_max=2.0), "sigma_max must be above sigma_min, 3.0; got 2.0"),
        (lambda: zoo.blurring(SHAPE, floor=0.0), "floor"),
        (lambda: zoo.flow_matching(SHAPE, -0.1), "sigma_min"),
        (lambda: zoo.flow_matching(SHAPE, 1.0), "one must be above sigma_min, 1.0; got 1"),
        (lambda: zoo.flow_matching(SHAPE, reach=0.0), "reach"),
        (lambda: zoo.rescale(torch.zeros(1), torch.ones(1)), "signal"),
        (lambda: zoo.rescale(torch.ones(1), torch.zeros(1)), "noise"),
        (lambda: zoo.mulan(COLUMN, COLUMN, COLUMN), "finite"),  # no rise at all in column 0
        (lambda: zoo.diffusion_forcing(COLUMN, 10, 11), "steps = 10.*got 11"),
        (lambda: zoo.diffusion_forcing(COLUMN, 10, -1), "got -1"),
        (lambda: zoo.rolling(COLUMN, 7), "window must lie between 1 and the number of frames, 6; got 7"),
        (lambda: zoo.rolling(COLUMN, 0), "got 0"),
        (lambda: zoo.mar(COLUMN, cap=2.0), "cap"),
        (lambda: zoo.wavelet(VARIANCE, 2, 0.1), "at least 0.333334"),
        (lambda: zoo.heat_dissipation(SHAPE, noise=0.0), "noise"),
        (lambda: zoo.heat_dissipation(SHAPE, 20.0, 0.5), "blur_max must be above blur_min, 20.0; got 0.5"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make()
