r"""Lattice fields in two dimensions: systems with known answers, and their coarse graining.

Fields live on the sites x of a periodic square lattice of size L. In units of the lattice spacing, with F(k) the
unitary Fourier transform, k = 2 pi j / L, khat_mu = 2 sin(k_mu / 2), H the action, and exp(-H) the probability of a
field up to a constant,

    free field    H = sum_x 1/2 [(grad phi)^2 + m^2 phi^2],      E|F(k)|^2 = G(k) = 1 / (khat^2 + m^2),
    phi^4         H = sum_x 1/2 [(grad phi)^2 + m^2 phi^2] + g phi^4,
    Ising         H = -1/T sum_<xy> phi_x phi_y,  phi = +-1,

where (grad phi)^2 sums the squared differences along the bonds to the right and down. Coarse graining by a factor n
takes fields on L to fields on L / n, and their propagator G, whatever it is, to

    block averages    phi' = n^Delta mean of phi over a block,    G'(k) = n^(2 Delta - 2) sum_j |f(k_j)|^2 G(k_j),
    momentum shell    phi' = n^Delta waves |k_mu| < pi / n,       G'(k) = n^(2 Delta - 2) G(k / n),

with the n^2 aliases k_j = (k + 2 pi j) / n and a block's form factor |f|^2 = prod_mu [sin(n k_mu/2) / n sin(k_mu/2)]^2.
With Delta = 0, right for a free field in two dimensions, both take m^2 = 1 / G(0) to n^2 m^2.

References:
    Hybrid Monte Carlo, S. Duane, A. D. Kennedy, B. J. Pendleton, D. Roweth, 1987,
    https://doi.org/10.1016/0370-2693(87)91197-X
    Nonuniversal critical dynamics in Monte Carlo simulations, R. H. Swendsen, J.-S. Wang, 1987,
    https://doi.org/10.1103/PhysRevLett.58.86
    Crystal statistics I, L. Onsager, 1944, https://doi.org/10.1103/PhysRev.65.117
    Crystal statistics II, B. Kaufman, 1949, https://doi.org/10.1103/PhysRev.76.1232
    The spontaneous magnetization of a two-dimensional Ising model, C. N. Yang, 1952,
    https://doi.org/10.1103/PhysRev.85.808
    The pivot algorithm, N. Madras, A. D. Sokal, 1988, https://doi.org/10.1007/BF01022990, appendix C
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int8, Int64
from torch import Tensor
from tqdm.auto import tqdm

from gudlib import checks
from gudlib.doors import door, inner

Fields = Float[Tensor, "*n size size"]
Coarse = Float[Tensor, "*n coarse coarse"]
Spins = Int8[Tensor, "*n size size"]
Momenta = Float[Tensor, "2 *k"]
Propagator = Callable[[Momenta], Float[Tensor, "*k"]]

T_C = 2 / math.log(1 + math.sqrt(2))  # where the infinite Ising model is critical


@door
def momenta(size: int) -> Float[Tensor, "2 size size"]:
    """k = (k_y, k_x) of every wave, radians per lattice spacing within [-pi, pi), in the order of the FFT."""
    size = checks.whole("size", size)
    k = 2 * math.pi * torch.fft.fftfreq(size, dtype=torch.float64)
    return torch.stack(torch.meshgrid(k, k, indexing="ij"))


@inner
def khat2(k: Momenta) -> Float[Tensor, "*k"]:
    """The lattice's k^2, khat^2 = 4 sum_mu sin^2(k_mu / 2): the eigenvalues of minus its Laplacian."""
    return 4 * (k / 2).sin().square().sum(0)


@door
def free(mass2: float) -> Propagator:
    """G(k) = 1 / (khat^2 + m^2) of the free field, with correlation length 1 / m.

    Raises:
        ValueError: if the mass is not positive.
    """
    checks.real("mass2", mass2)
    _expect(mass2 > 0, f"mass2 must be positive, or the field's mean has no distribution; got {mass2}")
    return lambda k: 1 / (khat2(k) + mass2)


@door
def gaussian_field(n: int, size: int, propagator: Propagator, generator: torch.Generator) -> Fields:
    """`n` independent Gaussian fields (n, size, size) of any propagator, float64, exact.

    Raises:
        ValueError: for a number or size below 1.
    """
    n, size = checks.whole("n", n), checks.whole("size", size)
    white = torch.randn(n, size, size, generator=generator, dtype=torch.float64, device=generator.device)
    return torch.fft.ifft2(torch.fft.fft2(white) * propagator(momenta(size).to(white)).sqrt()).real


# Markov chains


@dataclass(frozen=True)
class MarkovChains:
    """What independent Markov chains, updated together, went through.

    Attributes:
        fields: (draws, chains, size, size), float32, or int8 for spins.
        acceptance: share of proposals accepted.
    """

    fields: Tensor
    acceptance: float


@inner
def action(phi: Fields, mass2: float, coupling: float) -> Float[Tensor, "*n"]:
    """H of each field: free for coupling g = 0, phi^4 otherwise."""
    gradient = (phi.roll(-1, -1) - phi).square() + (phi.roll(-1, -2) - phi).square()
    return (0.5 * gradient + 0.5 * mass2 * phi**2 + coupling * phi**4).sum((-1, -2))


@inner
def force(phi: Fields, mass2: float, coupling: float) -> Fields:
    """-dH/dphi."""
    neighbours = phi.roll(1, -1) + phi.roll(-1, -1) + phi.roll(1, -2) + phi.roll(-1, -2)
    return neighbours - (4 + mass2 + 4 * coupling * phi**2) * phi


@inner
def leapfrog(
    phi: Fields, momentum: Fields, step: float, steps: int, mass2: float, coupling: float
) -> tuple[Fields, Fields]:
    """Follow the energy momentum^2 / 2 + H for a time step * steps: reversible, and volumes are kept."""
    momentum = momentum + 0.5 * step * force(phi, mass2, coupling)
    for i in range(steps):
        phi = phi + step * momentum
        momentum = momentum + (0.5 if i == steps - 1 else 1) * step * force(phi, mass2, coupling)
    return phi, momentum


@inner
def hmc_update(
    phi: Fields, momentum: Fields, uniform: Float[Tensor, "*n"], step: float, steps: int, mass2: float, coupling: float
) -> tuple[Fields, Bool[Tensor, "*n"]]:
    """One trajectory of each chain and which were accepted, with probability min(1, exp(-change of energy)).

    Arguments:
        phi: current fields.
        momentum: standard normal, of the same shape.
        uniform: on [0, 1), one for each field.
        step, steps: of the leapfrog.
        mass2, coupling: m^2 and g.
    """
    proposed, after = leapfrog(phi, momentum, step, steps, mass2, coupling)
    change = action(proposed, mass2, coupling) - action(phi, mass2, coupling)
    change = change + 0.5 * (after.square() - momentum.square()).sum((-1, -2))
    accepted = uniform < (-change).exp()
    return torch.where(accepted[..., None, None], proposed, phi), accepted


@door
def phi4(
    size: int, chains: int, draws: int, generator: torch.Generator, *, mass2: float, coupling: float,
    step: float = 0.15, steps: int = 10, every: int = 1, thermalise: int = 100, progress: bool = True,
) -> MarkovChains:  # fmt: skip
    """phi^4 fields by hybrid Monte Carlo, from the minima of the potential, every other chain in the negative one.

    Arguments:
        size, chains, draws: of the lattice, independent chains, and fields kept from each.
        generator: of all randomness.
        mass2, coupling: m^2, negative only with g > 0, and g >= 0.
        step, steps: of the leapfrog. The number is drawn anew for each trajectory, with mean `steps`: with a fixed one
            a wave whose period fits would never move.
        every: trajectories for each field kept.
        thermalise: trajectories before the first.
        progress: show a bar.

    Raises:
        ValueError: if the action is not bounded from below, or a count is below 1.
    """
    size, chains, draws = checks.whole("size", size), checks.whole("chains", chains), checks.whole("draws", draws)
    every, thermalise = checks.whole("every", every), checks.whole("thermalise", thermalise, 0)
    checks.real("coupling", coupling, least=0)
    checks.real("mass2", mass2)
    checks.real("step", step, above=0)
    _expect(mass2 > 0 or coupling > 0, f"mass2 must be positive where coupling is 0; got {mass2}")
    checks.whole("steps", steps)
    minimum = math.sqrt(max(-mass2, 0) / (4 * coupling)) if coupling else 0.0
    signs = 1 - 2 * (torch.arange(chains, device=generator.device) % 2)

    def update(phi: Tensor) -> tuple[Tensor, float]:
        momentum = torch.randn(phi.shape, generator=generator, dtype=torch.float64, device=phi.device)
        uniform = torch.rand(chains, generator=generator, dtype=torch.float64, device=phi.device)
        length = int(torch.randint(1, 2 * steps, (), generator=generator, device=phi.device))
        phi, accepted = hmc_update(phi, momentum, uniform, step, length, mass2, coupling)
        return phi, float(accepted.double().mean())

    start = minimum * signs[:, None, None] + gaussian_field(chains, size, free(1.0), generator)
    made = _run(update, start, draws, every, thermalise, "phi^4" if progress else "")
    return MarkovChains(made.fields.float(), made.acceptance)


@inner
def clusters(bonds: Bool[Tensor, "n 2 size size"]) -> Int64[Tensor, "n size size"]:
    """Connected sites: each gets the smallest number of its cluster, sites being counted through all n lattices.

    Roots hook onto their smallest neighbour, labels jump to their root, until no bond joins two labels.

    Arguments:
        bonds: whether a site is joined to the one to its right, and to the one below.
    """
    n, _, size, _ = bonds.shape
    site = torch.arange(n * size * size, device=bonds.device).view(n, size, size)
    other = torch.stack([site.roll(-1, 2), site.roll(-1, 1)], 1)
    a, b, label = site[:, None].expand_as(other)[bonds], other[bonds], site.flatten().clone()
    while len(a):
        label.scatter_reduce_(0, torch.maximum(a, b), torch.minimum(a, b), "amin")
        while not torch.equal(jumped := label.index_select(0, label), label):
            label = jumped
        a, b = label.index_select(0, a), label.index_select(0, b)
        apart = (a != b).nonzero()[:, 0]
        a, b = a.index_select(0, apart), b.index_select(0, apart)
    return label.view(n, size, size)


@inner
def swendsen_wang(
    spins: Int8[Tensor, "n size size"],
    uniforms: Float[Tensor, "n 2 size size"],
    coins: Int8[Tensor, "n size size"],
    temperature: float,
) -> Int8[Tensor, "n size size"]:
    """One cluster update: bonds join equal neighbours with probability 1 - exp(-2/T), each cluster gets a new spin.

    Arguments:
        spins: current +-1, (n, size, size).
        uniforms: on [0, 1), for the bonds to the right and down.
        coins: fair +-1; a cluster takes that of its first site.
        temperature: T > 0.
    """
    checks.real("temperature", temperature, above=0)
    equal = torch.stack([spins == spins.roll(-1, 2), spins == spins.roll(-1, 1)], 1)
    return coins.flatten()[clusters(equal & (uniforms < -math.expm1(-2 / temperature)))]


@door
def ising(
    size: int, chains: int, draws: int, generator: torch.Generator, *, temperature: float,
    every: int = 1, thermalise: int = 100, progress: bool = True,
) -> MarkovChains:  # fmt: skip
    """Ising spins by Swendsen-Wang updates, from aligned ones; arguments as of `phi4`.

    Raises:
        ValueError: if the temperature is not positive, or a count is below 1.
    """
    size, chains, draws = checks.whole("size", size), checks.whole("chains", chains), checks.whole("draws", draws)
    every, thermalise = checks.whole("every", every), checks.whole("thermalise", thermalise, 0)
    _expect(checks.real("temperature", temperature) > 0, f"temperature must be positive; got {temperature}")

    def update(spins: Tensor) -> tuple[Tensor, float]:
        uniforms = torch.rand(chains, 2, size, size, generator=generator, device=spins.device)
        return swendsen_wang(spins, uniforms, _coins(spins.shape, generator), temperature), 1.0

    start = torch.ones(chains, size, size, dtype=torch.int8, device=generator.device)
    return _run(update, start, draws, every, thermalise, "Ising" if progress else "")


def _run(
    update: Callable[[Tensor], tuple[Tensor, float]], state: Tensor, draws: int, every: int, thermalise: int, bar: str
) -> MarkovChains:
    kept, accepted, total = [], 0.0, thermalise + draws * every
    for i in tqdm(range(1, total + 1), desc=bar) if bar else range(1, total + 1):
        state, share = update(state)
        accepted += share / total
        if i > thermalise and (i - thermalise) % every == 0:
            kept.append(state)
    return MarkovChains(torch.stack(kept), accepted)


# Exact results for the Ising model


@door
def ising_energy(spins: Spins) -> Float[Tensor, "*n"]:
    """Energy per site, the mean of -s_x (s_right + s_below): -2 if all are aligned, 0 at infinite temperature."""
    s = spins.float()
    return -(s * (s.roll(-1, -1) + s.roll(-1, -2))).mean((-1, -2))


@door
def onsager_energy(temperature: float) -> float:
    """Energy per site of the infinite Ising model (Onsager), -coth(2/T) [1 + 2/pi (2 tanh^2(2/T) - 1) K_1]."""
    checks.real("temperature", temperature, above=0)
    sinh, cosh = math.sinh(2 / temperature), math.cosh(2 / temperature)
    x, y = 1.0, max(abs(1 - sinh**2) / cosh**2, 1e-300)
    while x - y > 1e-15 * x:  # K_1 = pi / 2 agm(1, sqrt(1 - kappa^2)), the arithmetic-geometric mean
        x, y = (x + y) / 2, math.sqrt(x * y)
    return -cosh / sinh * (1 + (2 * (sinh / cosh) ** 2 - 1) / x)


@door
def yang_magnetisation(temperature: float) -> float:
    """|m| of the infinite Ising model (Yang): (1 - sinh(2/T)^-4)^(1/8) below T_c, zero above."""
    checks.real("temperature", temperature, above=0)
    return max(1 - math.sinh(2 / temperature) ** -4, 0.0) ** 0.125


@door
def kaufman_energy(temperature: float, size: int) -> float:
    """Energy per site of the Ising model on the periodic size x size lattice (Kaufman), at any temperature.

    log Z is differentiated automatically; x are the L gamma_r / 2 of her products, x0 the one that changes sign at T_c.
    """
    size, _ = checks.whole("size", size), checks.real("temperature", temperature, above=0)
    K = torch.tensor(1 / temperature, dtype=torch.float64, requires_grad=True)
    r = torch.arange(1, 2 * size, dtype=torch.float64)
    x = size / 2 * (torch.cosh(2 * K) / torch.tanh(2 * K) - torch.cos(math.pi * r / size)).acosh()
    x0 = size / 2 * (2 * K + K.tanh().log())
    cosh, sinh = x + torch.log1p((-2 * x).exp()), x + torch.log(-torch.expm1(-2 * x))  # log 2cosh, log 2sinh
    logs = torch.stack([cosh[::2].sum(), sinh[::2].sum(), cosh[1::2].sum(), sinh[1::2].sum()])
    weights = torch.stack([torch.ones_like(K), torch.ones_like(K), 2 * x0.cosh(), 2 * x0.sinh()])
    terms = (weights * (logs - logs.max().detach()).exp()).sum().log() + logs.max().detach()
    return -float(torch.autograd.grad(size**2 / 2 * (2 * torch.sinh(2 * K)).log() + terms, K)[0]) / size**2


# Coarse graining


@door
def block(fields: Fields, factor: int, delta: float = 0.0) -> Coarse:
    """factor^Delta times the averages over blocks of factor x factor sites, (*n, size / factor, size / factor).

    Raises:
        ValueError: for fields that are not finite, or not square, or a factor that does not divide their size.
    """
    fields, size = _coarse(fields, factor)
    delta = checks.real("delta", delta)
    return factor**delta * fields.unflatten(-1, (size, factor)).unflatten(-3, (size, factor)).mean((-1, -3))


@door
def majority(spins: Spins, factor: int, generator: torch.Generator) -> Int8[Tensor, "*n coarse coarse"]:
    """Block spins: what most spins of a block of factor x factor say; where they are divided, a fair coin."""
    total = block(spins.float(), factor)
    return torch.where(total == 0, _coins(total.shape, generator), total.sign().to(torch.int8))


@door
def shell(fields: Fields, factor: int, delta: float = 0.0) -> Coarse:
    """factor^Delta times the long waves of each field, on the lattice of size / factor on which they still fit.

    Where size / factor is even, the shortest stem from two, j = +- size / 2 factor: their sum over sqrt 2 keeps the
    variance.
    """
    fields, size = _coarse(fields, factor)
    waves = torch.fft.fft2(fields, norm="ortho")
    for dim in (-1, -2):
        j = torch.fft.fftfreq(size, 1 / size, device=waves.device).round().long()
        low = waves.index_select(dim, j % fields.shape[dim])
        if size % 2 == 0:
            edge = low.narrow(dim, size // 2, 1)
            edge.copy_((edge + waves.narrow(dim, size // 2, 1)) / math.sqrt(2))
        waves = low
    return factor ** (delta - 1) * torch.fft.ifft2(waves, norm="ortho").real


@door
def blocked(propagator: Propagator, factor: int, delta: float = 0.0) -> Propagator:
    """The propagator of block averages of fields that have `propagator`, on any lattice."""

    def coarse(k: Momenta) -> Tensor:
        shift = 2 * math.pi * torch.cartesian_prod(torch.arange(factor), torch.arange(factor)).T.to(k)
        fine = (k[:, None] + shift.reshape(2, -1, *[1] * (k.ndim - 1))) / factor
        form = torch.full_like(fine, 1 / factor)  # |f|^2 as a sum of cosines, so that nothing is 0/0 at k = 0
        for j in range(1, factor):
            form = form + 2 * (factor - j) / factor**2 * torch.cos(j * fine)
        return factor ** (2 * delta - 2) * (form.prod(0) * propagator(fine)).sum(0)

    return coarse


@door
def shelled(propagator: Propagator, factor: int, delta: float = 0.0) -> Propagator:
    """The propagator of the long waves (`shell`) of fields that have `propagator`."""

    def coarse(k: Momenta) -> Tensor:
        inside = torch.remainder(k + math.pi, 2 * math.pi) - math.pi
        return factor ** (2 * delta - 2) * propagator(inside / factor)

    return coarse


@door
def couplings(propagator: Propagator) -> Float[Tensor, "3"]:
    """(m^2, Z, q) of the Gaussian action 1/G = m^2 + Z k^2 + q k^4 + ... along an axis, by differentiation."""

    def inverse(k: Tensor) -> Tensor:
        return 1 / propagator(torch.stack([k, torch.zeros_like(k)]))

    second = torch.func.grad(torch.func.grad(inverse))
    fourth = torch.func.grad(torch.func.grad(second))
    zero = torch.zeros((), dtype=torch.float64)
    return torch.stack([inverse(zero), second(zero) / 2, fourth(zero) / 24])


# Observables and their errors


@door
def power(fields: Tensor) -> Fields:
    """|F(k)|^2 of each field, whose mean is the propagator, or structure factor.

    Raises:
        ValueError: for fields that are not finite, or not square.
    """
    fields = checks.lattice("fields", fields)
    waves = torch.fft.fft2(fields if fields.is_floating_point() else fields.float(), norm="ortho")
    return checks.finite("fields, squared,", waves.abs().square())


@door
def correlation(spectrum: Fields) -> Fields:
    """C(d) = E[phi(x) phi(x + d)] averaged over x, from a mean power spectrum (Wiener and Khinchin)."""
    return torch.fft.ifft2(checks.single(spectrum)).real


@door
def correlation_length(spectrum: Fields) -> Float[Tensor, "*n"]:
    """The second-moment correlation length sqrt(P(0) / P(k_1) - 1) / 2 sin(pi / L) of a mean power spectrum.

    k_1 is the longest wave, along either axis. For a free field this is 1 / m, exactly, on any lattice.
    """
    if spectrum.shape[-1] < 2:
        raise ValueError(f"spectrum must have waves; got {checks.what(spectrum)}")
    first = 0.5 * (spectrum[..., 0, 1] + spectrum[..., 1, 0])
    checks.positive("spectrum of the longest wave", first)
    return (spectrum[..., 0, 0] / first - 1).clamp(min=0).sqrt() / (2 * math.sin(math.pi / spectrum.shape[-1]))


@door
def radial(values: Fields, bins: int) -> tuple[Float[Tensor, " bins"], Float[Tensor, "*n bins"]]:
    """Mean |k| and mean of `values` over rings of equal width in 0 < |k| <= pi.

    Raises:
        ValueError: if the rings would be narrower than the longest wave, 2 pi / size.
    """
    size = values.shape[-1]
    _expect(1 <= bins <= size // 2, f"bins must lie between 1 and {size // 2} for size {size}; got {bins}")
    k = momenta(size).to(values.device).norm(dim=0).flatten()
    inside = (k > 0) & (k <= math.pi * (1 + 1e-12))
    ring = (k[inside] * bins / math.pi - 1e-9).long()
    weight = torch.nn.functional.one_hot(ring, bins).double()
    weight = weight / weight.sum(0)
    return k[inside] @ weight, values.flatten(-2)[..., inside].double() @ weight


@door
def autocorrelation_time(series: Float[Tensor, "draws chains"], window: float = 5.0) -> float:
    """tau = 1/2 + sum_t rho(t), in draws, up to the first lag of at least `window` tau (Madras and Sokal)."""
    off = series.double() - series.double().mean()
    if not bool(off.any()):
        raise ValueError(
            f"series must change from draw to draw; got {checks.what(series)}, all {series.flatten()[0]:g}"
        )
    covariance = torch.stack([(off[: len(off) - t] * off[t:]).mean() for t in range(len(off))])
    tau = (covariance / covariance[0]).cumsum(0) - 0.5
    enough = (torch.arange(len(off), device=off.device) >= window * tau).nonzero().flatten().tolist()
    return max(float(tau[enough[0] if enough else -1]), 0.5)


@door
def standard_error(series: Float[Tensor, "draws chains"]) -> float:
    """Of the mean of all draws of all chains: sqrt(2 tau variance / (draws * chains))."""
    return math.sqrt(2 * autocorrelation_time(series) * float(series.double().var()) / series.numel())


def _coins(shape: torch.Size, generator: torch.Generator) -> Spins:
    return 2 * torch.randint(2, shape, generator=generator, dtype=torch.int8, device=generator.device) - 1


def _coarse(fields: Tensor, factor: int) -> tuple[Tensor, int]:
    """The fields, floating, and the size of the coarse lattice."""
    fields, factor = checks.lattice("fields", fields), checks.whole("factor", factor)
    size = fields.shape[-1]
    _expect(size % factor == 0, f"factor must divide the size of the fields, {size}; got {factor}")
    return fields if fields.is_floating_point() else fields.float(), size // factor


def _expect(right: bool, message: str) -> None:
    if not right:
        raise ValueError(message)
