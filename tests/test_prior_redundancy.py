"""Prior and schedule are partly redundant: equal SNR, equal law of paths, and which samplers keep it.

`one` is any (S, gamma), `other` the same with another prior and the schedule that makes up for it; white components of
one times `factor` are those of other. Oracles: the SDE's own coefficients, integrated, and Brownian motion.
"""

import math

import pytest
import torch
from cases import BASES, COLUMN, COVARIANCE, PRIORS, SHAPE, D, matrix, moments, randn, times
from hypothesis import given
from hypothesis import strategies as st

from gudlib import denoiser, priors, references, samplers, schedules
from gudlib.exact import gaussian, gaussian_eps
from gudlib.process import Process, diffuse, from_eps

END, START = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)


def numbers(low, high):
    entries = st.lists(st.floats(low, high, allow_nan=False), min_size=D, max_size=D)
    return entries.map(lambda values: torch.tensor(values, dtype=torch.float64).reshape(SHAPE))


scales = numbers(-2, 2).map(torch.exp)
starts, rises, bends = numbers(-8, -3), numbers(1, 14), numbers(0, 3)
each_pair = given(scale=scales, scale_other=scales, start=starts, rise=rises, bend=bends)


def pair(scale, scale_other, start, rise, bend):
    """Two processes with one SNR for each component: scales S and S', gamma' = gamma + 2 log(S / S')."""
    basis = BASES["dct"]()
    m = moments(basis)
    schedule = schedules.Schedule(lambda t: start.to(t) + rise.to(t) * t + bend.to(t) * t**2, SHAPE)
    moved = schedules.rescaled(schedule, scale / scale_other)
    return Process(basis, priors.Prior(m, scale), schedule), Process(basis, priors.Prior(m, scale_other), moved)


def factor(one, other, t):
    return one.prior.scale / other.prior.scale * other.schedule.alpha(t) / one.schedule.alpha(t)


def model(process):
    """The exact denoiser for a coupled Gaussian, in this process's white components; its mean is not the prior's."""
    u, s = matrix(process.basis), process.prior.scale.flatten()
    return gaussian(randn(D, seed=20) / s, (u @ COVARIANCE @ u.T) / s / s[:, None])


def draws(method, one, other, steps, n=3):
    """Both processes' samples from corresponding starting points and with one noise, the first in the other's units."""
    z, k = randn(n, *SHAPE, seed=8), factor(one, other, END)
    here, there = (
        samplers.sample(
            model(p), p, n, steps, method, start=x, generator=torch.Generator().manual_seed(3), keep=steps + 1
        )
        for p, x in ((one, z), (other, k * z))
    )
    return factor(one, other, here.times)[:, None] * here.states, there.states


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# The law of paths


@each_pair
def test_equal_snr_and_equal_joint_law_of_any_two_times(**parts):
    """Cov(chi(s), chi(t)) = v(s) exp(-1/2 int beta), the SDE's own, by quadrature of each process's beta."""
    one, other = pair(**parts)
    snr = [p.schedule.snr(times(5), p.prior.white_variance) for p in (one, other)]
    close(*snr)
    grid, nodes = times(5), (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    zero = torch.zeros(1, *SHAPE, dtype=torch.float64)

    def joint(p):
        v = torch.sigmoid(-p.schedule.gamma(grid)) * p.prior.white_variance + torch.sigmoid(p.schedule.gamma(grid))
        damped = 0.5 * p.schedule.beta(nodes).cumsum(0) / 4000  # int beta / 2
        damped = torch.cat([zero, damped])[::1000]
        return torch.stack([v[i] * (damped[i] - damped[j]).exp() for i in range(5) for j in range(i, 5)])

    k = factor(one, other, grid)
    both = torch.stack([k[i] * k[j] for i in range(5) for j in range(i, 5)])
    close(joint(other), both * joint(one), 1e-5)


@each_pair
def test_one_noise_makes_one_path(**parts):
    """Followed by the SDE's transitions; over alpha each is X_0 plus one Brownian motion of variance S^2 e^gamma."""
    one, other = pair(**parts)
    grid, noise, data = times(21), randn(21, *SHAPE, seed=6), randn(1, *SHAPE, seed=7)

    def trajectory(p):
        gamma = p.schedule.gamma(grid)
        states = [diffuse(p.white(data)[0], gamma[0], noise[0])]
        for now, then, z in zip(gamma[:-1], gamma[1:], noise[1:], strict=True):
            keep = schedules.alpha(then) / schedules.alpha(now)
            states.append(keep * states[-1] + (1 - keep**2).sqrt() * z)  # variance-preserving
        return torch.stack(states)

    close(trajectory(other), factor(one, other, grid) * trajectory(one), 1e-7)  # 1 - keep^2 cancels
    variance = one.prior.scale**2 * one.schedule.gamma(grid).exp()
    motion = (torch.cat([variance[:1], variance.diff(dim=0)]).sqrt() * noise).cumsum(0)
    images = one.prior.scale * trajectory(one) / one.schedule.alpha(grid)
    close(images, one.basis(data) - one.prior.mean + motion, 1e-7)


# Samplers


@pytest.mark.parametrize("method", ["ddim", "heun", "ancestral"])
@each_pair
def test_samplers_in_gamma_cannot_tell_the_two_apart(method, **parts):
    here, there = draws(method, *pair(**parts), steps=6)
    scale = there.abs().amax(0)
    close(here / scale, there / scale)


PLAIN = {
    "scale": torch.tensor([[[3.0, 1.0, 0.5], [2.0, 0.2, 0.1]]], dtype=torch.float64),
    "scale_other": torch.ones(SHAPE, dtype=torch.float64),
    "start": torch.full(SHAPE, -6.0, dtype=torch.float64),
    "rise": torch.full(SHAPE, 11.0, dtype=torch.float64),
    "bend": torch.zeros(SHAPE, dtype=torch.float64),
}


def test_euler_maruyama_respects_it_only_in_the_limit_of_small_steps():
    """Its mean, a linear map of the starting point: the difference falls like the size of the steps."""
    one, other = pair(**PLAIN)
    apart = []
    for steps in (100, 200):
        grid, x = torch.linspace(1, 0, steps + 1, dtype=torch.float64), randn(3, *SHAPE, seed=8)
        y = factor(one, other, END) * x
        for t, s in zip(grid[:-1], grid[1:], strict=True):
            x, y = (samplers.euler_maruyama(model(p), p, state, t, s).mean for p, state in ((one, x), (other, y)))
        apart.append(float((factor(one, other, START) * x - y).abs().max() / y.abs().max()))
    assert apart[0] > 1e-3 and math.log2(apart[0] / apart[1]) == pytest.approx(1, abs=0.1)


def test_starting_points_must_correspond():
    """The same standard noise in both is not it: the factor at t = 1 is one only for gamma -> infinity."""
    for high, apart in ((11.0, True), (40.0, False)):
        one, other = pair(**PLAIN | {"rise": torch.full(SHAPE, high, dtype=torch.float64)})
        assert (float((factor(one, other, END) - 1).abs().max()) > 0.1) == apart
        assert (float((one.prior.kl(one.schedule.gamma(END)) - other.prior.kl(other.schedule.gamma(END))).abs().max())
                > 1e-3) == apart  # fmt: skip


# Predictions, losses and the preconditioned denoiser


@each_pair
def test_noise_is_predicted_alike_other_targets_with_another_weight(**parts):
    one, other = pair(**parts)
    t, white, eps = times(3, 0.2, 0.8), one.white(randn(3, *SHAPE, seed=9)), randn(3, *SHAPE, seed=10)
    ratio = one.prior.scale / other.prior.scale
    errors = []
    for p, x in ((one, white), (other, ratio * white)):
        gamma = p.schedule.gamma(t)
        chi = diffuse(x, gamma, eps)
        guess = gaussian_eps(chi, gamma, p.prior.white_variance)
        close(model(p)(chi, gamma), model(one)(diffuse(white, one.schedule.gamma(t), eps), one.schedule.gamma(t)), 1e-7)
        kinds = ("eps", "x0", "v")
        errors.append({k: from_eps(guess, k, chi, gamma) - from_eps(eps, k, chi, gamma) for k in kinds})
    here, there = errors
    close(there["eps"], here["eps"])
    close(there["x0"], ratio * here["x0"], 1e-7)
    close(there["v"], one.schedule.alpha(t) / other.schedule.alpha(t) * here["v"], 1e-7)


class Probe(torch.nn.Module):
    """A network that answers something of its input, and nothing of gamma."""

    def forward(self, seen, gamma):
        return torch.tanh(seen[:, :1] + 0.3 * seen[:, 1:] ** 2)


@each_pair
def test_a_denoiser_that_divides_its_input_by_its_size_undoes_the_prior(**parts):
    one, other = pair(**parts)
    t, chi = times(3, 0.1, 0.9), randn(3, *SHAPE, seed=11)
    here, there = (
        denoiser.Denoiser(Probe(), references.IndependentGaussian(p.basis, p.prior))(x, p.schedule.gamma(t))
        for p, x in ((one, chi), (other, factor(one, other, t) * chi))
    )
    close(there, here, 1e-4)  # the network works in float32


# The paper's comparison


@given(a=st.floats(-1, 4), kind=st.sampled_from(["interpolated", "power law", "isotropic"]))
def test_soft_conditioning_at_one_softness_is_one_process_in_any_prior(a, kind):
    """Its schedules are made of SNRs: for whitened and other priors they differ by 2 log S."""
    m = moments(BASES["pca"]())
    white, prior = priors.whitened(m), PRIORS[kind](m)
    own, moved = (schedules.soft_conditioning(p.order, a, p.log_variance) for p in (prior, white))
    close(own.gamma(times()), schedules.rescaled(moved, white.scale / prior.scale).gamma(times()), 1e-9)
    unrelated = schedules.soft_conditioning(COLUMN, a, white.log_variance)
    close(schedules.rescaled(unrelated, white.scale / prior.scale).gamma(times()),
          schedules.soft_conditioning(COLUMN, a, prior.log_variance).gamma(times()), 1e-9)  # fmt: skip
