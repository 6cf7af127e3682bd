"""Lattice fields against closed forms, enumeration, quadrature, autograd and brute force."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gudlib import lattice

MASS2, COUPLING = -0.4, 0.3  # a double well


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def hartley(fields):
    """As many real components as sites: independent normals of variance G(k), if the fields are Gaussian."""
    waves = torch.fft.fft2(fields.double(), norm="ortho")
    return waves.real - waves.imag


def deviation(fields, propagator):
    """(chi^2 - dof) / sqrt(2 dof) of all measured variances against the exact ones."""
    n, size = len(fields), fields.shape[-1]
    z = (hartley(fields).square().mean(0) / propagator(lattice.momenta(size)) - 1) * math.sqrt(n / 2)
    return float((z.square().sum() - size**2) / math.sqrt(2 * size**2 * (1 + 6 / n))), z


def covariance(propagator, size):
    """Cov(phi_x, phi_y) of all pairs of sites by a sum over waves, (size^2, size^2)."""
    k = lattice.momenta(size).flatten(1)
    x = torch.cartesian_prod(torch.arange(size), torch.arange(size)).double()
    return torch.cos((x[:, None] - x) @ k) @ propagator(k) / size**2


# The free field


def test_khat2_are_the_eigenvalues_of_the_lattice_laplacian():
    size = 6
    delta = torch.zeros(size, size, dtype=torch.float64)
    delta[0, 0], delta[0, 1], delta[0, -1], delta[1, 0], delta[-1, 0] = 4, -1, -1, -1, -1
    torch.testing.assert_close(torch.fft.fft2(delta).real, lattice.khat2(lattice.momenta(size)))


def test_momenta_are_those_of_the_transform():
    x = torch.cartesian_prod(torch.arange(5), torch.arange(5)).double().T.view(2, 5, 5)
    for y, n in ((1, 0), (0, 2), (3, 4)):
        wave = torch.exp(1j * (lattice.momenta(5)[:, y, n, None, None] * x).sum(0))
        expected = torch.zeros(5, 5, dtype=wave.dtype)
        expected[y, n] = 25
        torch.testing.assert_close(torch.fft.fft2(wave), expected, rtol=0, atol=1e-12)


def test_free_action_in_waves_is_half_the_sum_of_power_over_propagator():
    phi = randn(3, 6, 6)
    waves = lattice.power(phi) / lattice.free(0.3)(lattice.momenta(6))
    torch.testing.assert_close(lattice.action(phi, 0.3, 0.0), 0.5 * waves.sum((-1, -2)))


@pytest.mark.parametrize("size", [15, 16])
def test_free_fields_have_their_propagator(size):
    exact = lattice.free(0.2)
    off, z = deviation(lattice.gaussian_field(1000, size, exact, seeded()), exact)
    assert abs(off) < 3 and z.abs().max() < 4.5
    assert abs(deviation(lattice.gaussian_field(1000, size, lattice.free(0.3), seeded()), exact)[0]) > 3


def test_fields_come_from_the_generator():
    a, b = (lattice.gaussian_field(2, 4, lattice.free(1.0), seeded(3)) for _ in range(2))
    assert torch.equal(a, b) and not torch.equal(a[0], a[1])


# phi^4


def test_force_is_minus_the_gradient_of_the_action():
    phi = randn(2, 5, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(lattice.action(phi, MASS2, COUPLING).sum(), phi)
    torch.testing.assert_close(lattice.force(phi, MASS2, COUPLING), -gradient)


def test_action_by_hand():
    phi = torch.tensor([[1.0, 2.0], [0.0, -1.0]], dtype=torch.float64)  # each bond of 2 x 2 sites counts twice
    bonds = 2 * (1 + 1 + 1 + 9)
    assert float(lattice.action(phi, MASS2, COUPLING)) == pytest.approx(0.5 * bonds + 0.5 * MASS2 * 6 + COUPLING * 18)


def test_leapfrog_is_reversible_and_of_second_order():
    phi, momentum = randn(3, 4, 4), randn(3, 4, 4, seed=1)
    there, after = lattice.leapfrog(phi, momentum, 0.1, 7, MASS2, COUPLING)
    back, again = lattice.leapfrog(there, -after, 0.1, 7, MASS2, COUPLING)
    torch.testing.assert_close(back, phi, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(-again, momentum, rtol=1e-10, atol=1e-10)
    ends = [lattice.leapfrog(phi, momentum, 1.0 / n, n, MASS2, COUPLING)[0] for n in (20, 40, 80)]
    order = math.log2(float((ends[1] - ends[0]).norm() / (ends[2] - ends[1]).norm()))
    assert order == pytest.approx(2, abs=0.1)


def test_leapfrog_follows_newtons_equation():
    """One free wave is a harmonic oscillator of frequency omega^2 = khat^2 + m^2."""
    wave = torch.cos(2 * math.pi * torch.arange(8, dtype=torch.float64) / 8).expand(1, 8, 8)
    omega = math.sqrt(4 * math.sin(math.pi / 8) ** 2 + 0.5)
    end, momentum = lattice.leapfrog(wave, torch.zeros_like(wave), 1e-3, 1500, 0.5, 0.0)
    torch.testing.assert_close(end, math.cos(1.5 * omega) * wave, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(momentum, -omega * math.sin(1.5 * omega) * wave, rtol=1e-5, atol=1e-5)


def test_leapfrog_keeps_volumes():
    def flow(state):
        phi, momentum = lattice.leapfrog(*state.reshape(2, 2, 2), 0.3, 3, MASS2, COUPLING)
        return torch.stack([phi, momentum]).flatten()

    jacobian = torch.autograd.functional.jacobian(flow, randn(8))
    assert float(torch.linalg.det(jacobian)) == pytest.approx(1, abs=1e-12)
    assert (jacobian - torch.eye(8)).abs().max() > 0.3


def test_a_trajectory_is_accepted_with_the_metropolis_probability():
    phi, momentum = 0.7 * randn(400, 2, 2), randn(400, 2, 2, seed=1)
    proposed, after = lattice.leapfrog(phi, momentum, 0.5, 3, MASS2, COUPLING)

    def energy(phi, momentum):
        return lattice.action(phi, MASS2, COUPLING) + 0.5 * momentum.square().sum((1, 2))

    ratio = (energy(phi, momentum) - energy(proposed, after)).exp()
    assert 0.2 < ratio.clamp(max=1).mean() < 0.9
    for side in (1 - 1e-9, 1 + 1e-9):
        uniform = (ratio * side).clamp(max=1 - 1e-12)
        moved, accepted = lattice.hmc_update(phi, momentum, uniform, 0.5, 3, MASS2, COUPLING)
        assert torch.equal(accepted, (ratio >= 1) | torch.tensor(side < 1))
        torch.testing.assert_close(moved, torch.where(accepted[:, None, None], proposed, phi))


def quadrature(functions, mass2, coupling):
    """Averages of functions of a 2 x 2 field by the trapezoidal rule in four dimensions."""
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)
    phi = torch.stack(torch.meshgrid(x, x, x, x, indexing="ij"), -1).reshape(-1, 2, 2)
    weight = (-lattice.action(phi, mass2, coupling)).exp()
    return [float((f(phi) * weight).sum() / weight.sum()) for f in functions]


def test_phi4_moments_on_four_sites_are_those_of_quadrature():
    functions = [
        lambda phi: phi.square().mean((-1, -2)),
        lambda phi: phi.pow(4).mean((-1, -2)),
        lambda phi: phi[..., 0, 0] * phi[..., 0, 1],
        lambda phi: phi[..., 0, 0] * phi[..., 1, 1],
        lambda phi: lattice.action(phi, MASS2, COUPLING),
    ]
    options = {"mass2": MASS2, "coupling": COUPLING, "step": 0.55, "steps": 3, "progress": False}
    chains = lattice.phi4(2, 500, 150, seeded(), thermalise=30, **options)
    assert 0.5 < chains.acceptance < 0.9  # wrong acceptance would show
    for f, exact in zip(functions, quadrature(functions, MASS2, COUPLING), strict=True):
        series = f(chains.fields.double())
        assert abs(series.mean() - exact) < 4 * lattice.standard_error(series)
        assert lattice.standard_error(series) < 0.03 * abs(exact)


def test_phi4_without_coupling_is_the_free_field():
    chains = lattice.phi4(8, 300, 1, seeded(1), mass2=0.5, coupling=0.0, step=0.2, thermalise=40, progress=False)
    off, z = deviation(chains.fields[0], lattice.free(0.5))
    assert abs(off) < 3 and z.abs().max() < 4


def test_phi4_starts_in_both_minima():
    options = {"mass2": MASS2, "coupling": COUPLING, "step": 1e-6, "thermalise": 0, "progress": False}
    mean = lattice.phi4(16, 40, 1, seeded(), **options).fields[0].mean((1, 2))  # noise: 1 / 16
    minimum = math.sqrt(-MASS2 / (4 * COUPLING))
    assert float(mean[::2].mean()) == pytest.approx(minimum, abs=0.06)
    assert float(mean[1::2].mean()) == pytest.approx(-minimum, abs=0.06)


def test_trajectories_vary_in_length_around_their_mean(monkeypatch):
    lengths, update = [], lattice.hmc_update

    def recording(phi, momentum, uniform, step, steps, mass2, coupling):
        lengths.append(steps)
        return update(phi, momentum, uniform, step, steps, mass2, coupling)

    monkeypatch.setattr(lattice, "hmc_update", recording)
    lattice.phi4(2, 1, 200, seeded(), mass2=1.0, coupling=0.0, steps=3, thermalise=0, progress=False)
    assert set(lengths) == {1, 2, 3, 4, 5} and sum(lengths) / 200 == pytest.approx(3, abs=0.3)


def test_phi4_keeps_one_field_in_every_few_after_thermalisation():
    options = {"mass2": MASS2, "coupling": COUPLING, "progress": False}
    all_of_them = lattice.phi4(2, 3, 7, seeded(), thermalise=0, **options).fields
    some = lattice.phi4(2, 3, 2, seeded(), thermalise=3, every=2, **options).fields
    assert torch.equal(some, all_of_them[[4, 6]]) and some.dtype == torch.float32


# Ising


def spin_states(sites):
    return torch.tensor(list(itertools.product([-1, 1], repeat=sites)), dtype=torch.int8)


@pytest.mark.parametrize("temperature", [0.7, 2.0, 5.0])
def test_swendsen_wang_leaves_the_boltzmann_distribution_in_detailed_balance(temperature):
    """The transition matrix on 2 x 2 sites: 16 states x 2^8 bond patterns x 2^4 coins through the update itself."""
    states, p = spin_states(4), torch.tensor(1 - math.exp(-2 / temperature), dtype=torch.float64)
    bonds, coins = spin_states(8) == 1, spin_states(4)
    i, j, k = (grid.flatten() for grid in torch.meshgrid(*map(torch.arange, (16, 256, 16)), indexing="ij"))
    # uniform numbers just on either side of where a bond must open
    uniforms = torch.where(bonds, p * (1 - 1e-9), p * (1 + 1e-9)).reshape(256, 2, 2, 2)
    after = lattice.swendsen_wang(states[i].view(-1, 2, 2), uniforms[j], coins[k].view(-1, 2, 2), temperature)
    weight = torch.where(bonds, p, 1 - p).prod(1)[j] / 16
    number = ((after.view(-1, 4) + 1) // 2).long() @ torch.tensor([8, 4, 2, 1])
    P = torch.zeros(16, 16, dtype=torch.float64).index_put_((i, number), weight, accumulate=True)

    s = states.double().view(-1, 2, 2)  # on 2 x 2 sites each pair of neighbours is joined by two bonds
    energy = -2 * ((s[:, 0, 0] + s[:, 1, 1]) * (s[:, 0, 1] + s[:, 1, 0]))
    torch.testing.assert_close(4 * lattice.ising_energy(states.view(-1, 2, 2)).double(), energy)
    pi = (-energy / temperature).softmax(0)
    flow = pi[:, None] * P
    torch.testing.assert_close(P.sum(1), torch.ones(16, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(flow, flow.T, rtol=0, atol=1e-12)
    assert (P > 0).all()


def flood(bonds):
    """Clusters of one lattice, by searching."""
    size = bonds.shape[-1]
    label = [[-1] * size for _ in range(size)]
    for start in range(size * size):
        stack = [divmod(start, size)]
        while stack:
            y, x = stack.pop()
            if label[y][x] >= 0:
                continue
            label[y][x] = start
            right, below = (y, (x + 1) % size), ((y + 1) % size, x)
            left, above = (y, (x - 1) % size), ((y - 1) % size, x)
            stack += [right] * bool(bonds[0, y, x]) + [below] * bool(bonds[1, y, x])
            stack += [left] * bool(bonds[0, y, x - 1]) + [above] * bool(bonds[1, y - 1, x])
    return torch.tensor(label)


@pytest.mark.parametrize("density", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_clusters_are_those_found_by_searching(density):
    bonds = torch.rand(4, 2, 9, 9, generator=seeded(2)) < density
    expected = torch.stack([flood(b) + 81 * i for i, b in enumerate(bonds)])
    assert torch.equal(lattice.clusters(bonds), expected)


def test_a_snake_of_bonds_is_one_cluster():
    bonds = torch.zeros(1, 2, 16, 16, dtype=torch.bool)
    bonds[0, 0, :, :-1] = True  # rows, joined alternately at their ends
    bonds[0, 1, 0:-1:2, -1] = bonds[0, 1, 1:-1:2, 0] = True
    assert torch.equal(lattice.clusters(bonds), torch.zeros(1, 16, 16, dtype=torch.long))


def enumerated_energy(size, temperature):
    energy = size**2 * lattice.ising_energy(spin_states(size**2).view(-1, size, size)).double()
    return float(((-energy / temperature).softmax(0) * energy).sum()) / size**2


@pytest.mark.parametrize("temperature", [1.3, lattice.T_C, 3.7])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_kaufmans_energy_is_that_of_enumeration(size, temperature):
    assert lattice.kaufman_energy(temperature, size) == pytest.approx(enumerated_energy(size, temperature), abs=1e-7)


@given(st.floats(1.2, 4.5).filter(lambda t: abs(t - lattice.T_C) > 0.2))
def test_onsagers_energy_is_kaufmans_on_a_large_lattice(temperature):
    assert lattice.onsager_energy(temperature) == pytest.approx(lattice.kaufman_energy(temperature, 160), abs=1e-8)


def test_at_the_critical_temperature():
    assert lattice.T_C == pytest.approx(2.269185314213022)
    assert lattice.onsager_energy(lattice.T_C) == pytest.approx(-math.sqrt(2))
    assert lattice.yang_magnetisation(2.27) == 0 and lattice.yang_magnetisation(2.268) > 0.4


@pytest.fixture(scope="module")
def spins():
    return {
        T: lattice.ising(32, 20, 60, seeded(4), temperature=T, every=2, thermalise=30, progress=False).fields
        for T in (1.8, 2.0, 2.8)
    }


@pytest.mark.parametrize("temperature", [1.8, 2.0, 2.8])
def test_energy_is_onsagers_and_magnetisation_yangs(spins, temperature):
    """Corrections for 32 sites are far below the errors: Kaufman's energy differs from Onsager's by less than 1e-5."""
    energy, m = lattice.ising_energy(spins[temperature]), spins[temperature].double().mean((-1, -2))
    assert lattice.onsager_energy(temperature) == pytest.approx(lattice.kaufman_energy(temperature, 32), abs=1e-5)
    assert lattice.standard_error(energy) < 0.004
    assert abs(energy.mean() - lattice.onsager_energy(temperature)) < 3 * lattice.standard_error(energy)
    assert abs(m.mean()) < 3 * lattice.standard_error(m)
    if temperature < lattice.T_C:
        assert lattice.standard_error(m.abs()) < 0.002
        assert abs(m.abs().mean() - lattice.yang_magnetisation(temperature)) < 3 * lattice.standard_error(m.abs())
    else:  # nothing but the susceptibility divided by the number of sites
        assert 0.001 < m.square().mean() < 0.03


# Coarse graining


@pytest.mark.parametrize(("size", "factor", "delta"), [(6, 2, 0.0), (6, 3, 0.5), (4, 4, 1.0), (5, 1, 0.3)])
def test_block_propagator_is_that_of_the_averaged_covariance(size, factor, delta):
    exact, n = lattice.free(0.3), size // factor
    units = torch.eye(size**2, dtype=torch.float64).view(-1, size, size)
    A = lattice.block(units, factor, delta).flatten(1).T  # phi' = A phi
    for y, x in itertools.product(range(size), repeat=2):  # A by hand
        expected = torch.zeros(n, n, dtype=torch.float64)
        expected[y // factor, x // factor] = factor**delta / factor**2
        torch.testing.assert_close(A[:, y * size + x].view(n, n), expected)
    got = covariance(lattice.blocked(exact, factor, delta), n)
    torch.testing.assert_close(A @ covariance(exact, size) @ A.T, got)


@pytest.mark.parametrize(("size", "factor", "delta"), [(6, 2, 0.0), (9, 3, 0.5), (8, 2, 0.0), (12, 3, 1.0)])
def test_shell_propagator_is_that_of_the_filtered_covariance(size, factor, delta):
    exact = lattice.free(0.3)
    A = lattice.shell(torch.eye(size**2, dtype=torch.float64).view(-1, size, size), factor, delta).flatten(1).T
    got = covariance(lattice.shelled(exact, factor, delta), size // factor)
    torch.testing.assert_close(A @ covariance(exact, size) @ A.T, got)


def test_shell_keeps_long_waves_in_place_and_drops_short_ones():
    x = torch.arange(12, dtype=torch.float64)
    for n, kept in ((1, True), (2, True), (4, False), (5, False)):
        wave = torch.cos(2 * math.pi * n * x / 12 + 0.3).expand(12, 12)
        expected = 2**0.5 * wave[::2, ::2] if kept else torch.zeros(6, 6, dtype=torch.float64)
        torch.testing.assert_close(lattice.shell(wave.T, 2, 0.5), expected.T)


@pytest.mark.parametrize("flow", [lattice.blocked, lattice.shelled])
def test_coarse_graining_composes(flow):
    exact, k = lattice.free(0.3), lattice.momenta(7)
    twice, once = flow(flow(exact, 2, 0.2), 3, 0.2), flow(exact, 6, 0.2)
    torch.testing.assert_close(twice(k), once(k))
    torch.testing.assert_close(once(k + 2 * math.pi), once(k))


def test_couplings_are_taylor_coefficients():
    """khat^2 = k^2 - k^4 / 12 + ..., and a shell takes (m^2, 1, u) to (b^2 m^2, 1, u / b^2)."""
    exact = torch.tensor([0.3, 1, -1 / 12], dtype=torch.float64)
    torch.testing.assert_close(lattice.couplings(lattice.free(0.3)), exact)
    flowed = lattice.couplings(lattice.shelled(lattice.free(0.3), 3))
    torch.testing.assert_close(flowed, exact * torch.tensor([9, 1, 1 / 9]))
    averaged = lattice.blocked(lattice.free(0.3), 2)
    mass2, z, q = lattice.couplings(averaged).tolist()
    k = torch.tensor([[0.05], [0.0]], dtype=torch.float64)
    assert mass2 == pytest.approx(4 * 0.3) and float(1 / averaged(k)) == pytest.approx(
        mass2 + z * 0.05**2 + q * 0.05**4, abs=1e-9
    )


def test_majority_follows_most_spins_and_tosses_where_they_are_divided():
    spins = spin_states(4).view(-1, 2, 2).repeat(500, 1, 1)
    total = spins.sum((1, 2))
    after = lattice.majority(spins, 2, seeded()).flatten()
    assert after.dtype == torch.int8 and torch.equal(after[total != 0], total[total != 0].sign().to(torch.int8))
    assert abs(after[total == 0].double().mean()) < 4 / math.sqrt(int((total == 0).sum()))
    assert set(after[total == 0].tolist()) == {-1, 1}
    assert torch.equal(lattice.majority(spins.roll(1, -1), 1, seeded()), spins.roll(1, -1))


# Observables and errors


def test_correlation_is_the_average_product_of_sites_apart():
    phi = randn(5, 6, 6)
    got = lattice.correlation(lattice.power(phi).mean(0))
    for y, x in ((0, 0), (1, 0), (2, 3), (0, 5)):
        torch.testing.assert_close(got[y, x], (phi * phi.roll((-y, -x), (-2, -1))).mean())


@given(st.floats(0.01, 3), st.integers(3, 20))
def test_correlation_length_of_a_free_field_is_one_over_its_mass(mass2, size):
    spectrum = lattice.free(mass2)(lattice.momenta(size))
    assert float(lattice.correlation_length(spectrum)) == pytest.approx(mass2**-0.5)


def test_correlation_length_counts_both_axes_alike():
    spectrum = torch.rand(2, 4, 4, generator=seeded(), dtype=torch.float64)
    spectrum[:, 0, 0] = 3
    assert torch.equal(lattice.correlation_length(spectrum), lattice.correlation_length(spectrum.mT))
    assert (lattice.correlation_length(spectrum) - lattice.correlation_length(spectrum.roll(1, -1))).abs().min() > 0


def test_radial_averages_are_those_of_a_loop():
    size, bins, values = 12, 5, randn(2, 12, 12)
    k, got = lattice.radial(values, bins)
    width = math.pi / bins
    for b in range(bins):
        ring = [
            (y, x, length)
            for y, x in itertools.product(range(size), repeat=2)
            if b * width < (length := 2 * math.pi / size * math.hypot(min(y, size - y), min(x, size - x)))
            and length <= (b + 1) * width + 1e-9
        ]
        assert float(k[b]) == pytest.approx(sum(length for *_, length in ring) / len(ring))
        torch.testing.assert_close(got[:, b], torch.stack([values[:, y, x] for y, x, _ in ring]).mean(0))


def autoregressive(rho, draws, chains):
    noise, x = randn(draws, chains), randn(chains, seed=1)
    series = []
    for eps in noise:
        series.append(x := rho * x + math.sqrt(1 - rho**2) * eps)
    return torch.stack(series)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_autocorrelation_time_of_an_autoregressive_series(rho):
    """rho(t) = rho^t: tau = (1 + rho) / 2 (1 - rho), and the mean of one chain scatters by sqrt(2 tau / draws)."""
    series, tau = autoregressive(rho, 1000, 200), (1 + rho) / (2 * (1 - rho))
    assert lattice.autocorrelation_time(series) == pytest.approx(tau, rel=0.03)
    assert lattice.standard_error(series) == pytest.approx(math.sqrt(2 * tau / series.numel()), rel=0.03)
    assert lattice.standard_error(series) == pytest.approx(float(series.mean(0).std()) / math.sqrt(200), rel=0.2)


def test_alternating_draws_do_not_count_more_than_independent_ones():
    assert lattice.autocorrelation_time(autoregressive(-0.5, 500, 20)) == 0.5


def test_progress_is_shown_or_not(monkeypatch):
    shown = []
    monkeypatch.setattr(lattice, "tqdm", lambda steps, desc: shown.append((desc, len(steps))) or steps)
    for progress in (True, False):
        lattice.ising(2, 1, 3, seeded(), temperature=2.0, every=2, thermalise=1, progress=progress)
        lattice.phi4(2, 1, 1, seeded(), mass2=1.0, coupling=0.1, thermalise=1, progress=progress)
    assert shown == [("Ising", 7), ("phi^4", 2)]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lattice.free(0.0), "mass2 must be positive.* got 0.0"),
        (lambda: lattice.phi4(4, 1, 1, seeded(), mass2=-1.0, coupling=0.0), "mass2 must be positive where"),
        (lambda: lattice.phi4(4, 1, 1, seeded(), mass2=1.0, coupling=-0.1), "coupling .* got -0.1"),
        (lambda: lattice.phi4(4, 1, 1, seeded(), mass2=1.0, coupling=0.1, steps=0), "steps .* got 0"),
        (lambda: lattice.phi4(4, 1, 0, seeded(), mass2=1.0, coupling=0.1), "draws must be at least 1; got 0"),
        (lambda: lattice.ising(4, 1, 1, seeded(), temperature=0.0), "temperature must be positive; got 0.0"),
        (lambda: lattice.ising(4, 0, 1, seeded(), temperature=2.0), "chains must be at least 1; got 0"),
        (
            lambda: lattice.ising(4, 1, 1, seeded(), temperature=2.0, thermalise=-1),
            "thermalise must be at least 0; got -1",
        ),
        (lambda: lattice.block(randn(6, 6), 4), "factor must divide the size of the fields, 6; got 4"),
        (lambda: lattice.shell(randn(6, 6), 0), "factor must be at least 1; got 0"),
        (lambda: lattice.majority(spin_states(9).view(-1, 3, 3), 2, seeded()), "size of the fields, 3; got 2"),
        (lambda: lattice.radial(randn(6, 6), 4), "bins must lie between 1 and 3 for size 6; got 4"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_acceptance_is_a_share_of_all_proposals(generator):
    made = lattice.phi4(4, 3, 5, generator, mass2=1.0, coupling=0.0, step=1e-3, every=2, thermalise=7, progress=False)
    assert made.acceptance == pytest.approx(1, abs=1e-3)
