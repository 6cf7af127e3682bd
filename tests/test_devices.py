"""Everything computes on a GPU as it does on the CPU, and training never waits for it; on the one of `emulated.py`.

`PROBES` holds, for each public name of the library that takes or gives tensors, functions of a device that use it
there. A name without one fails a test, and so does a method that no probe of its class calls.
"""

import copy
import dataclasses
import functools
import importlib
import inspect
import itertools
import os
import pkgutil
import sys
import tempfile
import typing
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import emulated
import jaxtyping
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn

import gudlib
from gudlib import (
    baselines,
    bases,
    checks,
    data,
    denoiser,
    designs,
    devices,
    exact,
    families,
    importance,
    lattice,
    likelihood,
    mar,
    metrics,
    networks,
    priors,
    process,
    references,
    samplers,
    schedules,
    statistics,
    training,
    windows,
    zoo,
)
from gudlib.mar import mixtures
from gudlib.mar import model as mar_model
from gudlib.mar import networks as mar_networks
from gudlib.mar import sampling as mar_sampling
from gudlib.model import GUD
from gudlib.process import Process

SHAPE, TOKEN, D = (1, 4, 6), (1, 2, 2), 24
IMAGES = torch.randint(0, 256, (24, *SHAPE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
LABELS = torch.arange(24) % 3
VARIANCE = torch.linspace(2, 0.1, D, dtype=torch.float64).view(SHAPE)
COVARIANCE = VARIANCE.flatten().diag() + 0.05
COLUMN, LEVEL = bases.Pixel(SHAPE).label("column"), bases.Haar(SHAPE, 2).label("level")
KNOWN = COLUMN < 2
UNET = {"width": 8, "patch": 1, "multipliers": (1,)}
RICH = {"fourier": True, "maps": True, "linear": 2}
LINE, TOKEN_LINE = schedules.linear(SHAPE), schedules.linear(TOKEN)

PROBES = {}  # "module.name" or "module.name: what of it": a function of a device

EXEMPT_MODULES = {
    "__main__": "it prints what other modules compute",
    "book": "it runs notebooks and compares files",
    "files": "it writes tensors from any device, as the probes of `save` do, and reads them on the CPU",
    "plotting": "it draws what is on the CPU",
}
FIELDS = "fields only, seen in the probes of what returns it"
EXEMPT = {
    "data.ImageSet": "a file's pictures, on the CPU",
    "data.crops": "reads a file's pictures, on the CPU",
    "data.load": "reads a file's pictures, on the CPU",
    "data.load_folder": "reads pictures, on the CPU",
    "families.Family": "abstract, without a method of its own; each kind has probes",
    "families.Derived": "what Known and Mixed, which have probes, have in common",
    "lattice.MarkovChains": FIELDS,
    "metrics.Inception": "its weights are not in the repository; `metrics.embed` moves images to any extractor",
    "samplers.Samples": FIELDS,
    "samplers.Step": FIELDS,
    "zoo.Rescaled": FIELDS,
    "zoo.System": FIELDS,
}
# What gives tensors on the CPU wherever it computes, and says so or is tables of the host
ON_CPU = {
    "baselines.Baseline", "baselines.context_table", "baselines.frame", "baselines.histograms", "baselines.neighbours",
    "baselines.normal", "baselines.of", "baselines.regression", "baselines.table", "baselines.webp",
    "denoiser.read_saved", "denoiser.save", "designs.score", "exact.curve", "families.known", "lattice.couplings",
    "lattice.momenta",
    "likelihood.Likelihood", "likelihood.bound", "likelihood.flow", "mar.likelihood.ChainRuleLikelihood",
    "mar.likelihood.chain_rule_bound", "mar.model.save", "model.GUD", "networks.energies", "samplers.time_grid",
    "samplers.times", "schedules.patch_order", "windows.annealed",
}  # fmt: skip


def probe(name, *variants):
    """The decorated function, of a device and of each variant if there are any, is a probe of a name."""

    def register(function):
        if not variants:
            PROBES[name] = function
        for variant in variants:
            PROBES[f"{name}: {variant}"] = lambda d, variant=variant: function(d, variant)
        return function

    return register


# On a device


def gen(d, seed=0):
    return torch.Generator(d).manual_seed(seed)


def noise(d, *shape, seed=0):
    return torch.randn(*shape, generator=gen(d, seed), dtype=torch.float64, device=d)


def normals(d, seed=0):
    return noise(d, 3, *SHAPE, seed=seed)


def times(d, n=3):
    return torch.linspace(0, 1, n, dtype=torch.float64, device=d)


def spread(d, low, high):
    return torch.linspace(low, high, 3, dtype=torch.float64, device=d)


def photos(d, n=8):
    return data.dequantise(IMAGES[:n].to(d), gen(d))


def prior_on(d):
    return priors.interpolated(priors.Moments(0.1 * VARIANCE.to(d), VARIANCE.to(d)), 0.5)


def awake(module):
    """With random weights where it starts with zeros."""
    generator = gen(next(module.parameters()).device)
    for part in module.parameters():
        nn.init.normal_(part, std=0.2, generator=generator)
    return module.eval()


def unet(conditioning="film", basis="pixel", **options):
    options = {"conditioning": conditioning} | UNET | options
    return awake(denoiser.build(bases.make(basis, SHAPE), prior_on("cpu"), 4, **options))


def pair(d, schedule=None):
    """A model and a process."""
    model = unet().to(d)
    soft = families.SoftConditioning(model.prior, (1.0, 1.0)).schedule(a=1.0)
    return model, Process(model.basis, model.prior, schedule or soft)


def white_floor(d):
    """The same, with noise at t = 0 that is white in the pixels."""
    model, p = pair(d)
    return model, p.along(schedules.rescaled(LINE, 1 / p.prior.scale))


def path(schedule, d):
    return schedule.gamma(times(d)), schedule.dgamma_dt(times(d)), schedule.kinks.tolist()


def autoregressor(d, kind="masked", classes=3):
    basis, cut = bases.DCT(TOKEN), mar.patchify(data.scale(IMAGES), 2).reshape(-1, *TOKEN)
    network = mar.Network(kind, SHAPE, 2, classes=classes, width=8, depth=1, heads=2, head=(1, 8))
    reference = references.IndependentGaussian(basis, priors.whitened(priors.measure(basis, cut)))
    return awake(mar.Autoregressor(network, reference)).float().to(d)


@contextmanager
def file():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "saved"


# baselines, bases, data


def baseline(d, function, **options):
    return function(IMAGES[:16].to(d), IMAGES[16:].to(d), **options)


@probe("baselines.Baseline")
def use_baseline(d):
    found = baseline(d, baselines.histograms)
    return found.bits, found.mean, found.error


PROBES |= {
    "baselines.histograms": lambda d: baseline(d, baselines.histograms),
    "baselines.neighbours": lambda d: [baseline(d, baselines.neighbours, upper=upper) for upper in (False, True)],
    "baselines.context_table": lambda d: baseline(d, baselines.context_table),
    "baselines.regression": lambda d: baseline(d, baselines.regression, radius=1),
    "baselines.regression: normal": lambda d: baseline(d, baselines.regression, radius=0, residuals="normal"),
    "baselines.normal": lambda d: baseline(d, baselines.normal, symmetries="mirror"),
    "baselines.webp": lambda d: baselines.webp(IMAGES[:2].to(d)),
    "baselines.table": lambda d: baseline(d, baselines.table, which=["context table", "left neighbour"]),
    "baselines.of": lambda d: [
        baselines.of(reference(d, kind), IMAGES[:3].to(d)) for kind in ("Histograms", "GroupedGaussian")
    ],
    "baselines.frame": lambda d: baselines.frame([baseline(d, baselines.histograms)])["bits/dim"].tolist(),
}


def use_basis(d, kind):
    basis = bases.make(kind.lower(), SHAPE, photos(d)).to(d)
    labels = {name: basis.label(name).tolist() for name in basis.labels}
    return basis(normals(d)), basis.inverse(normals(d)), basis.spec, labels


@probe("bases.Blocks", "columns", "patches")
def use_blocks(d, which):
    size = 0 if which == "columns" else 2
    basis = bases.Blocks.pca(photos(d), size)
    basis = basis if size else bases.Blocks.waves(SHAPE).to(d)
    blocks = basis.split(normals(d))
    return basis(normals(d)), basis.inverse(normals(d)), blocks, basis.join(blocks), basis.spec["size"]


for kind in ("Pixel", "PCA", "Fourier", "DCT", "Haar"):
    PROBES[f"bases.{kind}"] = functools.partial(use_basis, kind=kind)

PROBES |= {
    "checks.batch": lambda d: checks.batch("images", IMAGES.to(d)),
    "checks.data": lambda d: checks.data("data", normals(d)),
    "checks.finite": lambda d: checks.finite("data", normals(d)),
    "checks.grey": lambda d: checks.grey("images", IMAGES.to(d)),
    "checks.images": lambda d: [checks.images("images", x) for x in (IMAGES.to(d), normals(d))],
    "checks.lattice": lambda d: checks.lattice("fields", torch.ones(2, 3, 3, dtype=torch.half, device=d)),
    "checks.levels": lambda d: checks.levels("images", IMAGES.to(d)),
    "checks.positive": lambda d: checks.positive("data", normals(d).exp()),
    "checks.single": lambda d: checks.single(normals(d).half()),
    "bases.Basis": lambda d: use_basis(d, "DCT"),
    "bases.PCA: of waves": lambda d: bases.PCA.of_waves(COVARIANCE.to(d)[None], SHAPE)(normals(d)),
    "bases.PCA: grey levels": lambda d: bases.PCA.fit(IMAGES.to(d), symmetries="mirror")(normals(d)),
    "bases.Fourier: stationary": lambda d: bases.Fourier(SHAPE).stationary(VARIANCE.to(d)),
    "bases.make": lambda d: bases.make("pca", SHAPE, photos(d), per_channel=True),
    "bases.groups_by": lambda d: bases.groups_by(COLUMN.to(d), 2),
    "data.scale": lambda d: data.scale(IMAGES.to(d)),
    "data.dequantise": lambda d: data.dequantise(IMAGES.to(d), gen(d)),
    "data.to_uint8": lambda d: data.to_uint8(normals(d)),
}


# denoiser, networks


@probe("denoiser.Denoiser", *networks.CONDITIONINGS)
def use_denoiser(d, conditioning):
    return unet(conditioning, "dct").to(d)(normals(d), normals(d, 1))


REFERENCES = {each.__name__: each for each in references.KINDS.values()}


def reference(d, kind):
    """Fitted on a device."""
    made = REFERENCES[kind]
    if kind in ("GroupedGaussian", "LatticeGaussian"):
        basis = bases.Blocks.waves(SHAPE).to(d)
        moments = priors.Moments(torch.zeros(SHAPE).to(d), torch.ones(SHAPE).to(d))
        return made.fit(basis, priors.isotropic(moments, 0.5), IMAGES.to(d), "mirror")
    if kind == "PatchHistograms":
        basis, cut = bases.Pixel(TOKEN).to(d), mar.patchify(data.scale(IMAGES), 2).reshape(-1, *TOKEN)
        return made.fit(basis, priors.isotropic(priors.measure(basis, cut.to(d)), 0.5), IMAGES.to(d))
    basis = bases.make("haar" if kind == "Marginals" else "pixel", SHAPE, levels=2) if kind == "Marginals" else (
        bases.Pixel(SHAPE)
    )  # fmt: skip
    basis = basis.to(d)
    prior = priors.isotropic(priors.measure(basis, IMAGES.to(d)), 0.5)
    options = {"sectors": 3} if kind == "Histograms" else {}
    return made.fit(basis, prior, IMAGES.to(d), **options)


@probe("references", *REFERENCES)
def use_reference(d, kind):
    places = torch.tensor([3, 5, 0]).to(d)
    made = reference(d, kind).at(places)
    _, h, w = made.basis.shape
    gamma, pixels = torch.linspace(-8, 4, w).to(d).expand(3, *made.basis.shape), IMAGES[:3, :, :h, :w].to(d)
    x = data.scale(pixels) if made.decoder == "discrete" else photos(d, 3)
    white = normals(d)[..., :h, :w]
    found = made.posterior(white, gamma)
    rebuilt = references.rebuild(made.name, made.basis, made.prior, tables_of(made)).at(places)
    found = *found, made(white, gamma), rebuilt(white, gamma), made.white(made.components(white))
    if isinstance(made, references.GroupedGaussian):
        found = *found, made.stationary().covariance
    if kind in ("Histograms", "IndependentGaussian"):
        even = priors.isotropic(priors.Moments(torch.zeros(SHAPE), torch.full(SHAPE, 0.5)), 1.0).to(d)
        alone = type(made)(made.basis, even, *([made.weight[:1]] if kind == "Histograms" else []))
        found = *found, *alone.patches(2).at(places % 2).posterior(white[..., :2, :2], gamma[..., :2, :2])
    return *found, made.nll(x.double()), made.bits(IMAGES[:3].to(d))


def refusal(call):
    with pytest.raises(ValueError) as raised:
        call()
    return str(raised.value)


def tables_of(made):
    return {k: v for k, v in made.state_dict().items() if not k.startswith(("basis.", "prior."))}


for kind in REFERENCES:
    PROBES[f"references.{kind}"] = PROBES.pop(f"references: {kind}")
PROBES |= {
    "references.Reference": lambda d: (
        use_reference(d, "Histograms"),
        reference(d, "Marginals").at(torch.zeros(1).long()).name,
        refusal(lambda: reference(d, "Marginals").patches(2)),
    ),
    "references.Posterior": lambda d: tuple(
        reference(d, "Marginals").posterior(normals(d), torch.zeros(1, *SHAPE).to(d))
    ),
    "references.fit": lambda d: references.fit("marginals", bases.DCT(SHAPE).to(d), prior_on(d), IMAGES.to(d)).weight,
    "references.best": lambda d: (
        references.best(["histograms", "independent gaussian"], bases.Pixel(SHAPE), prior_on(d), IMAGES.to(d)).name
    ),
    "references.rebuild": lambda d: references.rebuild(
        "histograms", bases.Pixel(SHAPE), prior_on(d), tables_of(reference(d, "Histograms"))
    )(normals(d), torch.zeros(1, *SHAPE, device=d)),
}


@probe("denoiser.build")
def use_build(d):
    basis = bases.DCT(SHAPE).to(d)
    return [awake(denoiser.build(basis, prior_on(d), 4, label, **UNET)) for label in (None, "ky", COLUMN.to(d))]


def network_of(tensors, header):
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in header["network"].items() if k != "kind"}
    return denoiser.saved_network(lambda: networks.UNet(groups=tensors["network.levels.groups"], **options), tensors)


def saved(d, read):
    with file() as where:
        denoiser.save(unet(basis="haar").to(d), where, card={"n": 1})
        return read(where)


PROBES |= {
    "denoiser.save": lambda d: saved(d, denoiser.read_saved),
    "denoiser.load": lambda d: saved(d, denoiser.load).to(d)(normals(d), normals(d, 1)),
    "denoiser.read_saved": lambda d: saved(d, denoiser.read_saved),
    "denoiser.rebuild": lambda d: saved(d, lambda f: denoiser.rebuild(f, *denoiser.read_saved(f))).to(d),
    "denoiser.saved_reference": lambda d: saved(d, lambda f: denoiser.saved_reference(*denoiser.read_saved(f))).to(d),
    "denoiser.saved_network": lambda d: saved(d, lambda f: network_of(*denoiser.read_saved(f))).to(d)(
        normals(d).float().repeat(1, 2, 1, 1), normals(d).float()
    ),
    "denoiser.describe": lambda d: denoiser.describe(unet().to(d)),
    "networks.GammaGroups": lambda d: networks.GammaGroups(bases.groups_by(COLUMN, 2)).to(d)(normals(d).float()),
    "networks.GammaGroups: at every place": lambda d: networks.GammaGroups(
        bases.groups_by(LEVEL, 2), networks.energies(bases.Haar(SHAPE, 2).inverse, SHAPE, 2)
    ).to(d)(normals(d).float()),
    "networks.energies": lambda d: networks.energies(bases.DCT(SHAPE).inverse, SHAPE, 2),
    "networks.UNet": lambda d: awake(networks.UNet(SHAPE, COLUMN.long(), 1, 8, (1, 1), 1)).to(d)(
        normals(d).float(), normals(d).float()
    ),
    "networks.UNet: all it can see": lambda d: unet("local", "haar", **RICH).network.to(d)(
        noise(d, 3, 3, 4, 6).float(), normals(d).float()
    ),
    "networks.Transformer": lambda d: awake(networks.Transformer(SHAPE, 3, 2, 8, 2, 2)).to(d)(
        noise(d, 3, 3, 4, 6).float(), normals(d).float()
    ),
    "networks.Transformer: of some patches": lambda d: (
        awake(networks.Transformer(SHAPE, 3, 2, 8, 2, 2, (-5.0, 5.0)))
        .to(d)
        .window(noise(d, 3, 2, 3, 2, 2).float(), noise(d, 3, 2, 1, 2, 2).float(), torch.tensor([0, 3]).to(d), [])
    ),
    "networks.visible": lambda d: networks.visible(normals(d)[0] > 0, normals(d)[0] < -1),
    "networks.Doubling": lambda d: awake(networks.Doubling(1, 2, 3)).to(d)(normals(d).float()),
    "networks.ConvBlock": lambda d: awake(networks.ConvBlock(1, 4, 2)).to(d)(
        normals(d).float(), noise(d, 3, 2, 1, 1).float()
    ),
    "networks.Attention": lambda d: awake(networks.Attention(4, 2)).to(d)(
        noise(d, 3, 4, 2, 2).float(), noise(d, 3, 5, 2).float()
    ),
}


# designs


@probe("designs.FittedDesign", "plain", "pixel", "pca", "fourier", "dct", "haar")
def use_design(d, basis, few=False, conditioning="grouped"):
    fitted = designs.FittedDesign(designs.Design(basis, 0.5, (0.4, 1.6), conditioning), IMAGES.to(d), few=few)
    model, p = awake(fitted.denoiser(**UNET)), fitted.process(0.7)
    white, t = p.white(photos(d)), times(d)
    each = fitted.schedule(spread(d, 0.5, 1.5))
    nested = fitted.sequential([LEVEL.to(d), COLUMN.to(d)], [0.7, 0.7])
    made = [fitted.family()] + ([fitted.family("columns")] if basis in ("pixel", "haar") else [])
    drawn = [family.to(d)(3, gen(d)).gamma(t) for family in made]
    answer = model(white, each.gamma(t)[:1])
    return fitted.prior, fitted.of_waves, fitted.gamma_max_target, white, answer, each.gamma(t), nested.gamma(t), drawn


@probe("designs.score", "features here", "features on the CPU")
def use_score(d, where):
    extractor = awake(metrics.Classifier()).to(d if where == "features here" else "cpu")
    found, images = designs.score(*pair(d), IMAGES, IMAGES[:8], extractor, 16, 3, 2)
    return {k: v for k, v in found.items() if "seconds" not in k}, images


PROBES |= {
    "designs.FittedDesign: few images, pca": lambda d: use_design(d, "pca", few=True),
    "designs.FittedDesign: few images, haar": lambda d: use_design(d, "haar", few=True),
    "designs.FittedDesign: told the time": lambda d: use_design(d, "pca", conditioning="time"),
    "designs.principal": lambda d: designs.principal(photos(d, 24), 1e-4),
    "designs.principal: grey levels": lambda d: designs.principal(IMAGES.to(d)),
}


# exact


@probe("exact.GaussianMixture")
def use_mixture(d):
    found = exact.GaussianMixture(noise(d, 2, D), torch.stack([COVARIANCE, 2 * COVARIANCE]).to(d))
    torch.manual_seed(0)
    drawn, x, gamma = (found.sample(5, gen(d)), found.sample(5)), normals(d), normals(d, 1)
    scores = found(x, gamma), found.score(x, gamma[:1])
    return drawn, scores, found.log_prob(x), found.log_prob(x, gamma), found.covariance(gamma)


def exact_error(d):
    return lambda gamma: exact.gaussian_error(gamma, COVARIANCE.to(d))


PROBES |= {
    "exact.gaussian": lambda d: exact.gaussian(noise(d, D), COVARIANCE.to(d))(normals(d), normals(d, 1)),
    "exact.gaussian_eps": lambda d: exact.gaussian_eps(normals(d), normals(d, 1), VARIANCE.to(d)),
    "exact.gaussian_error": lambda d: exact_error(d)(normals(d)),
    "exact.linear_eps": lambda d: exact.linear_eps(normals(d), COVARIANCE.to(d)),
    "exact.linear_error": lambda d: exact.linear_error(noise(d, 3, D, D), normals(d), COVARIANCE.to(d)),
    "exact.curve": lambda d: exact.curve(4, 1.5),
    "exact.normal_kl": lambda d: exact.normal_kl(COVARIANCE.to(d), 2 * COVARIANCE.to(d)),
    "exact.information": lambda d: exact.information(LINE, exact_error(d), 4, d),
    "exact.information: columns": lambda d: exact.information(
        schedules.sequential(COLUMN.to(d), 0.5), exact_error(d), 4, d
    ),
}


# families

FAMILIES = {  # and a member for each of two images
    "soft": {"a": [0.5, 1.5]},
    "columns": {"b": [0.4, 0.8]},
    "patches in random orders": {"b": [0.4, 0.8]},
    "levels, columns": {"b": ([0.5, 0.9], [0.5, 1.0])},
    "known": {"a": [0.5, 1.5]},
    "mixed": {"b": [0.4, 0.8]},
}


def family_of(name, prior):
    pixel, haar, soft = bases.Pixel(SHAPE), bases.Haar(SHAPE, 2), families.SoftConditioning(prior, (0.4, 1.6))
    return {
        "soft": lambda: soft,
        "columns": lambda: families.Sequential(pixel, prior, "columns"),
        "patches in random orders": lambda: families.Sequential(pixel, prior, "patches 2", order="random"),
        "levels, columns": lambda: families.Sequential(haar, prior, ("levels", "columns")),
        "known": lambda: families.Known(soft, "columns"),
        "mixed": lambda: families.Mixed(families.Sequential(pixel, prior, "patches 2"), soft, 0.3),
    }[name]()


def use_family(d, name):
    results = []
    for made_on in ("cpu", d):
        family = family_of(name, prior_on(made_on)).to(d)
        member = {k: torch.tensor(v, dtype=torch.float64, device=d) for k, v in FAMILIES[name].items()}
        member = {k: list(v) if v.ndim == 2 else v for k, v in member.items()}
        drawn, each = family(3, gen(d)), family.schedule(**member)
        results += [drawn.gamma(times(d)), drawn.dgamma_dt(times(d)), each.gamma(times(d, 2)), family.moving(**member)]
        results += [path(family.schedule(**family.default), d), family.spec, family.ranges]
    return results


def use_orders(d):
    family = family_of("patches in random orders", prior_on("cpu")).to(d)
    orders, b = family.random_orders(3, gen(d)), spread(d, 0.4, 0.8)
    each = [family.schedule(b, order).gamma(times(d)) for order in (orders, orders.cpu(), orders[0])]
    return use_family(d, "patches in random orders"), orders, each


PROBES |= {
    "families.SoftConditioning": lambda d: (
        use_family(d, "soft"),
        family_of("soft", prior_on(d)).gamma_min_target(spread(d, 0.5, 1.5)),
    ),
    "families.Sequential": lambda d: use_family(d, "columns"),
    "families.Sequential: nested": lambda d: use_family(d, "levels, columns"),
    "families.Sequential: random orders": lambda d: use_orders(d),
    "families.Known": lambda d: use_family(d, "known"),
    "families.Mixed": lambda d: use_family(d, "mixed"),
    "families.stratified_times": lambda d: families.stratified_times(5, gen(d)),
    "families.known": lambda d: [families.known(which, SHAPE) for which in ("columns", "rectangles")],
    "families.rebuild": lambda d: path(
        families.rebuild(family_of("mixed", prior_on("cpu")).spec, bases.Pixel(SHAPE), prior_on(d)).schedule(b=0.6), d
    ),
}


# lattice


def fields(d):
    return noise(d, 4, 8, 8)


def spins(d):
    return fields(d).sign().to(torch.int8)


def waves(d):
    return lattice.momenta(8).to(d)


def uniform(d, *shape):
    return torch.rand(*shape, generator=gen(d), device=d)


PROBES |= {
    "lattice.momenta": lambda d: lattice.momenta(4),
    "lattice.khat2": lambda d: lattice.khat2(waves(d)),
    "lattice.free": lambda d: lattice.free(0.5)(waves(d)),
    "lattice.gaussian_field": lambda d: lattice.gaussian_field(3, 8, lattice.free(0.5), gen(d)),
    "lattice.action": lambda d: lattice.action(fields(d), 0.5, 0.1),
    "lattice.force": lambda d: lattice.force(fields(d), 0.5, 0.1),
    "lattice.leapfrog": lambda d: lattice.leapfrog(fields(d), fields(d), 0.1, 3, 0.5, 0.1),
    "lattice.hmc_update": lambda d: lattice.hmc_update(fields(d), fields(d), uniform(d, 4), 0.5, 3, 0.5, 0.1),
    "lattice.phi4": lambda d: lattice.phi4(
        8, 3, 2, gen(d), mass2=-0.5, coupling=0.1, steps=3, thermalise=2, progress=False
    ),
    "lattice.clusters": lambda d: lattice.clusters(noise(d, 3, 2, 8, 8) > 0),
    "lattice.swendsen_wang": lambda d: lattice.swendsen_wang(spins(d), uniform(d, 4, 2, 8, 8), spins(d), 2.0),
    "lattice.ising": lambda d: lattice.ising(8, 3, 2, gen(d), temperature=2.0, thermalise=2, progress=False),
    "lattice.ising_energy": lambda d: lattice.ising_energy(spins(d)),
    "lattice.block": lambda d: lattice.block(fields(d), 2, 0.5),
    "lattice.majority": lambda d: lattice.majority(spins(d), 2, gen(d)),
    "lattice.shell": lambda d: lattice.shell(fields(d), 2, 0.5),
    "lattice.blocked": lambda d: lattice.blocked(lattice.free(0.5), 2)(waves(d)),
    "lattice.shelled": lambda d: lattice.shelled(lattice.free(0.5), 2)(waves(d)),
    "lattice.couplings": lambda d: lattice.couplings(lattice.free(0.5)),
    "lattice.power": lambda d: lattice.power(spins(d)),
    "lattice.correlation": lambda d: lattice.correlation(lattice.power(fields(d))),
    "lattice.correlation_length": lambda d: lattice.correlation_length(lattice.power(fields(d))),
    "lattice.radial": lambda d: lattice.radial(lattice.power(fields(d)), 4),
    "lattice.autocorrelation_time": lambda d: lattice.autocorrelation_time(noise(d, 30, 3)),
    "lattice.standard_error": lambda d: lattice.standard_error(noise(d, 30, 3)),
}


# likelihood, importance


@probe("likelihood.Normal")
def use_normal(d):
    model, p = pair(d)
    decode, x = likelihood.Normal(p), p.white(photos(d))
    return decode(model, x, noise(d, *x.shape)), decode.expected(x), decode.log_volume


@probe("likelihood.Discrete")
def use_discrete(d):
    model, p = white_floor(d)
    x = p.white(data.scale(IMAGES[:3].to(d)))
    return likelihood.Discrete(p)(model, x, noise(d, *x.shape))


@probe("likelihood.flow", SHAPE, (1, 8, 9))
def use_flow(d, shape):
    """The divergence is exact for few components, and estimated for many."""
    prior = priors.isotropic(priors.Moments(torch.zeros(shape), torch.full(shape, 0.7))).to(d)
    p = Process(bases.Pixel(shape), prior, schedules.linear(shape))
    return likelihood.flow(
        lambda x, gamma: exact.gaussian_eps(x, gamma, prior.scale), p, noise(d, 2, *shape), tolerance=0.1
    )


@probe("importance.Proposal")
def use_proposal(d):
    p = pair(d)[1]
    proposal = importance.Proposal(p, p.prior.white_variance)
    first = proposal.times(uniform(d, 9).double())
    proposal.learn(first[0] + 1)
    return first, proposal.times(uniform(d, 9).double())


@probe("likelihood.Likelihood")
def use_estimates(d):
    found = likelihood.bound(*pair(d), photos(d), 2)
    return found.nats, found.bits, found.probe_error, found.image_error


PROBES |= {
    "likelihood.bits_per_dim": lambda d: likelihood.bits_per_dim(noise(d, 3), D),
    "likelihood.bound": lambda d: likelihood.bound(*pair(d), photos(d), 2),
    "likelihood.bound: in steps": lambda d: likelihood.bound(*pair(d), photos(d), 2, steps=5, chunk=3),
    "likelihood.bound: importance": lambda d: likelihood.bound(*pair(d), photos(d), 2, importance=True),
    "likelihood.bound: columns": lambda d: likelihood.bound(
        *pair(d, schedules.sequential(COLUMN.to(d), 0.3)), photos(d), 2, importance=True
    ),
    "likelihood.bound: groups here": lambda d: likelihood.bound(*pair(d), photos(d), 2, groups=COLUMN.long().to(d)),
    "likelihood.bound: groups on the CPU": lambda d: likelihood.bound(*pair(d), photos(d), 2, groups=COLUMN.long()),
    "likelihood.bound: schedules": lambda d: likelihood.bound(
        *pair(d, family_of("columns", prior_on(d)).schedule(0.5)),
        photos(d),
        2,
        schedules=family_of("columns", prior_on(d)),
    ),
    "likelihood.bound: discrete": lambda d: likelihood.bound(
        *white_floor(d), data.scale(IMAGES[:3].to(d)), 2, decoder="discrete"
    ),
}


# mar


def tokens_on(d):
    """Tokens, permutation and labels."""
    return noise(d, 3, 6, 4).float(), mar_model.permutations(False, 3, 6, gen(d)), LABELS[:3].to(d)


@probe("mar.model.Autoregressor", "raster", "random", "masked")
def use_autoregressor(d, kind):
    model, (tokens, orders, labels) = autoregressor(d, kind), tokens_on(d)
    x, gamma = noise(d, 3, *TOKEN), noise(d, 3, *TOKEN, seed=1)
    options = {}, {"labels": labels}, {"labels": labels, "guidance": 2.0}
    answers = [model.conditional(tokens, orders, 1, 2, **more)(x, gamma) for more in options]
    return answers, model.tokens(photos(d)), model.images(tokens), model.process(TOKEN_LINE).white(x)


def use_trunk(d, kind):
    trunk, (tokens, orders, labels) = autoregressor(d, kind).network.trunk, tokens_on(d)
    cache = trunk.cache()
    one_by_one = [trunk(tokens, orders, i, i + 1, labels, cache) for i in range(3)]
    return one_by_one, trunk(tokens, orders, 1, 3, labels)


@probe("mar.networks.Network")
def use_network(d):
    network, x = autoregressor(d).network, noise(d, 24, 2, 2, 2).float()
    return network(x, x[:, :1], *tokens_on(d)[:2], 2, LABELS[:3].to(d), 2)


@probe("mar.sampling.generate", "raster", "random", "masked")
def use_generate(d, kind):
    model = autoregressor(d, kind)
    plain = mar.generate(model, TOKEN_LINE, 3, gen(d), head_steps=3)
    return plain, mar.generate(model, TOKEN_LINE, 3, gen(d), head_steps=3, guidance=2.0, labels=LABELS[:3].to(d))


@probe("mar.likelihood.chain_rule_bound", "raster", "masked")
def use_chain_rule(d, kind):
    model, raster = autoregressor(d, kind), kind == "raster"
    cuts = range(7) if raster else [0, 2, 6]
    p, labels = model.process(TOKEN_LINE), LABELS[:3].to(d)
    return mar.chain_rule_bound(model.conditional, p, photos(d, 3), cuts, raster, draws=2, labels=labels)


def mixed(d, loss, kind="masked"):
    """An autoregressor whose tokens have a density."""
    network = mixtures.MixtureNetwork(loss, kind, SHAPE, 2, 1 if loss == "mean" else 3, width=8, depth=1, heads=2)
    model = awake(mixtures.MixtureAutoregressor(network, autoregressor("cpu").reference)).float()
    if loss == "code":
        model.fit_codewords(IMAGES, sample=50)
    return model.to(d)


@probe("mar.mixtures.MixtureAutoregressor", *mixtures.LOSSES)
def use_mixed(d, loss):
    model = mixed(d, loss)
    if loss == "code":
        model.fit_codewords(IMAGES.to(d), sample=50)
    rounded = model.rounded(photos(d)) if loss == "code" else None
    return rounded, model.bits(IMAGES.to(d), 2), model.generate(3, gen(d), 2)


@probe("mar.mixtures.MixtureNetwork", *mixtures.LOSSES)
def use_mixture_network(d, loss):
    tokens, orders, labels = tokens_on(d)
    return mixed(d, loss, "raster").network(tokens, orders, 1, 3, labels * 0).log_prob(tokens[:, 1:3])


@probe("mar.mixtures.MixtureHead", *mixtures.LOSSES)
def use_mixture_head(d, loss):
    return mixed(d, loss).network.head(noise(d, 3, 8).float()).log_prob(noise(d, 3, 4).float())


def use_mixture_file(d):
    with file() as where:
        mar.save(mixed(d, "code"), where)
        return mixtures.load(where).to(d).rounded(photos(d))


def use_mar_file(d, read):
    with file() as where:
        mar.save(autoregressor(d), where)
        return read(where)


PROBES |= {
    "mar.sampling.in_order": lambda d: mar_sampling.in_order(
        autoregressor(d), 3, [0, 2, 6], gen(d), lambda tokens, order, a, b: tokens[:, a:b] + noise(d, 3, b - a, 4)
    ),
    "mar.mixtures.load": lambda d: use_mixture_file(d),
    "mar.mixtures.codewords": lambda d: mixtures.codewords(noise(d, 40, 4), 3),
    "mar.mixtures.nearest": lambda d: mixtures.nearest(noise(d, 2, 5, 4), noise(d, 3, 4, seed=1)),
    "mar.likelihood.ChainRuleLikelihood": lambda d: use_chain_rule(d, "masked").curve,
    "mar.model.patchify": lambda d: mar.patchify(normals(d), 2),
    "mar.model.unpatchify": lambda d: mar.unpatchify(tokens_on(d)[0], SHAPE, 2),
    "mar.model.Conditioned": lambda d: mar_model.Conditioned(autoregressor(d).network.head, noise(d, 3, 8).float())(
        noise(d, 3, 2, 2, 2).float(), noise(d, 3, *TOKEN).float()
    ),
    "mar.model.save": lambda d: use_mar_file(d, denoiser.read_saved),
    "mar.model.load": lambda d: use_mar_file(d, mar.load).to(d).tokens(photos(d)),
    "mar.model.white_tokens": lambda d: mar_model.white_tokens(
        bases.DCT(TOKEN).to(d), autoregressor(d).prior, photos(d)
    ),
    "mar.model.permutations": lambda d: [mar_model.permutations(raster, 3, 4, gen(d)) for raster in (True, False)],
    "mar.model.check_labels": lambda d: mar_model.check_labels(LABELS.to(d), 24, 3),
    "mar.networks.Causal": lambda d: use_trunk(d, "random"),
    "mar.networks.Masked": lambda d: use_trunk(d, "masked"),
    "mar.networks.TransformerBlock": lambda d: awake(mar_networks.TransformerBlock(4, 2, 0.0)).to(d)(
        noise(d, 3, 5, 4).float(), causal=True
    ),
    "mar.networks.HeadLayer": lambda d: awake(mar_networks.HeadLayer(4)).to(d)(
        noise(d, 3, 4).float(), noise(d, 3, 4).float()
    ),
    "mar.networks.Head": lambda d: autoregressor(d).network.head(
        noise(d, 3, 2, 2, 2).float(), noise(d, 3, *TOKEN).float(), noise(d, 3, 8).float()
    ),
}


# metrics


def sets(d):
    return photos(d, 12), data.dequantise(IMAGES[12:].to(d), gen(d, 1))


def extractor(d):
    return awake(metrics.Classifier()).to(d)


for where in ("here", "on the CPU"):
    for name, use in {
        "embed": lambda d, f: metrics.embed(photos(d), f, 3),
        "frechet": lambda d, f: metrics.frechet(*sets(d), f),
        "coverage": lambda d, f: metrics.coverage(*sets(d), f),
    }.items():
        PROBES[f"metrics.{name}: features {where}"] = lambda d, use=use, where=where: use(
            d, extractor(d if where == "here" else "cpu")
        )

PROBES |= {
    "metrics.Classifier": lambda d: extractor(d)(photos(d)),
    "metrics.features": lambda d: metrics.features().to(d)(photos(d)),
    "metrics.memorised": lambda d: metrics.memorised(sets(d)[0], sets(d)[1], photos(d)),
    "metrics.spectrum_error": lambda d: metrics.spectrum_error(*sets(d)),
}


# priors, process, statistics


@probe("priors.Prior")
def use_prior(d):
    prior, x = prior_on(d), normals(d)
    torch.manual_seed(0)
    drawn = prior.sample(3, gen(d)), prior.sample(3)
    numbers = prior.log_prob(x), prior.kl(), prior.kl(prior.order), prior.log_volume
    tables = prior.white_variance, prior.order, prior.log_variance, prior.moments, prior.ranked(0.1)
    return drawn, numbers, tables, prior.whiten(x), prior.unwhiten(x)


@probe("process.Process")
def use_process(d):
    (model, p), x, t = pair(d), normals(d), times(d)
    eps = model(x, p.schedule.gamma(t))
    moves = p.reverse_sde(x, t, eps), p.velocity(x, t, eps), p.along(LINE).velocity(x, t, eps)
    return moves, p.white(x), p.data(x)


@probe("process.to_eps", "eps", "x0", "score", "v")
def use_kind(d, kind):
    x, gamma, value = (normals(d, seed) for seed in range(3))
    return process.to_eps(value, kind, x, gamma), process.from_eps(value, kind, x, gamma)


def moments(d):
    return priors.measure(bases.DCT(SHAPE).to(d), photos(d))


PROBES |= {
    "priors.Moments": lambda d: (moments(d).floored, moments(d).n_floored),
    "priors.measure": lambda d: moments(d),
    "priors.measure: grey levels": lambda d: priors.measure(bases.DCT(SHAPE).to(d), IMAGES.to(d), symmetries="mirror"),
    "priors.isotropic": lambda d: priors.isotropic(moments(d)),
    "priors.whitened": lambda d: priors.whitened(moments(d)),
    "priors.interpolated": lambda d: priors.interpolated(moments(d), 0.3),
    "priors.power_law": lambda d: priors.power_law(moments(d), bases.DCT(SHAPE).label("wavenumber")),
    "priors.power_law: waves here": lambda d: priors.power_law(moments(d), 1 + COLUMN.to(d)),
    "priors.multi_information": lambda d: priors.multi_information(COVARIANCE.to(d), 0.1),
    "statistics.centres": lambda d: statistics.centres(IMAGES.to(d)),
    "statistics.covariance": lambda d: statistics.covariance(photos(d), "mirror"),
    "statistics.covariance: grey levels": lambda d: statistics.covariance(IMAGES.to(d), "mirror", per_channel=True),
    "statistics.randomly_mirrored": lambda d: statistics.randomly_mirrored(IMAGES.to(d), "mirror", gen(d)),
    "statistics.mirrored": lambda d: statistics.mirrored(IMAGES[..., :4].to(d), "all"),
    "process.from_eps": lambda d: use_kind(d, "v"),
    "process.plain": lambda d: process.plain(LINE).to(d).white(normals(d)),
    "process.diffuse": lambda d: process.diffuse(normals(d), normals(d, 1), normals(d, 2)),
}


# samplers


def sample(d, method="heun", schedule=None, **options):
    return samplers.sample(*pair(d, schedule), 3, 4, method, gen(d), **options)


def use_method(d, method):
    """One update after another."""
    (model, p), state, results = pair(d), normals(d), []
    for t, s in ((1.0, 0.7), (0.7, 0.5)):
        step = method(model, p, state, *torch.tensor([t, s], dtype=torch.float64, device=d))
        state, method = step.mean, step.next_method or method
        results += [step.mean, step.std, step.nfe]
    return results


@probe("samplers.sample", *samplers.METHODS)
def use_sampler(d, method):
    return sample(d, method, keep=2)


def normal_columns(d):
    """A process of columns that are all alike, and its model."""
    basis, alike = bases.Pixel(SHAPE), priors.isotropic(priors.Moments(torch.zeros(SHAPE), torch.full(SHAPE, 0.5)))
    p = Process(basis, alike, schedules.sequential(COLUMN.to(d), 0.4)).to(d)
    return lambda x, gamma: exact.gaussian_eps(x, gamma, p.prior.variance), p


@probe("samplers.times", "uniform", "adapted")
def use_times(d, grid):
    return samplers.times(pair(d)[1], 4, grid)


def windowed(d):
    """A block-causal transformer, and schedules of its patches."""
    basis, even = bases.Pixel(SHAPE), priors.isotropic(priors.Moments(torch.zeros(SHAPE), torch.full(SHAPE, 0.5)), 1.0)
    family = families.Sequential(basis, even, "patches 2")
    options = {
        "patch": 2,
        "width": 8,
        "depth": 1,
        "heads": 2,
        "between": (float(family.low.min()), float(family.high.max())),
    }
    return awake(denoiser.build(basis, even, kind="transformer", **options)).to(d), family.to(d)


@probe("windows.generate")
def use_windows(d):
    model, family = windowed(d)
    return windows.generate(model, family.schedule(0.4), 3, 5, generator=gen(d))


@probe("windows.Window")
def use_window(d):
    window = windows.Window(windowed(d)[0].network, torch.tensor([0, 3]).to(d), [])
    return window(noise(d, 4, 3, 2, 2).float(), noise(d, 4, 1, 2, 2).float().mul(0).add(1))


@probe("windows.annealed")
def use_annealed(d):
    return windows.annealed(3, 4, 2)


@probe("samplers.extend")
def use_extend(d):
    growing = samplers.extend(*normal_columns(d), normals(d), 1, generator=gen(d))
    return [next(growing) for _ in range(3)]


@probe("samplers.push", *samplers.METHODS)
def use_push(d, method):
    model, p = exact.gaussian(torch.zeros(D, dtype=torch.float64, device=d), COVARIANCE.to(d)), pair(d)[1].double()
    return samplers.push(model, p, 3, method, COVARIANCE.to(d))


@probe("samplers.inpaint", "known here", "known on the CPU", "known of each", "columns")
def use_inpaint(d, which):
    known = {"known on the CPU": KNOWN, "known of each": KNOWN.expand(8, *SHAPE)}.get(which, KNOWN.to(d))
    schedule = schedules.sequential(COLUMN.to(d), 0.5) if which == "columns" else None
    return samplers.inpaint(*pair(d, schedule), photos(d), known, 3, generator=gen(d))


PROBES |= {
    "samplers.euler_maruyama": lambda d: use_method(d, samplers.euler_maruyama),
    "samplers.ancestral": lambda d: use_method(d, samplers.ancestral),
    "samplers.analytic": lambda d: use_method(d, samplers.analytic()),
    "samplers.analytic: measured": lambda d: use_method(
        d, samplers.analytic(lambda gamma: exact_error(d)(gamma[None])[0] * gamma.exp())
    ),
    "samplers.ddim": lambda d: use_method(d, samplers.ddim),
    "samplers.heun": lambda d: use_method(d, samplers.heun),
    "samplers.multistep": lambda d: [use_method(d, samplers.multistep(normal)) for normal in (True, False)],
    "samplers.predictor_corrector": lambda d: use_method(d, samplers.predictor_corrector),
    "samplers.time_grid": lambda d: samplers.time_grid(pair(d)[1], 5),
    "samplers.time_grid: columns": lambda d: samplers.time_grid(normal_columns(d)[1], 5),
    "samplers.sample: adapted": lambda d: sample(d, grid="adapted"),
    "samplers.sample: own noise": lambda d: (torch.manual_seed(0), samplers.sample(*pair(d), 3, 4, "ancestral"))[1],
    "samplers.sample: from a start": lambda d: sample(d, start=normals(d)),
    "samplers.sample: times here": lambda d: sample(d, grid=times(d).flip(0)),
    "samplers.sample: times on the CPU": lambda d: sample(d, grid=times("cpu").flip(0)),
    "samplers.sample: a for each": lambda d: sample(
        d, schedule=families.SoftConditioning(prior_on(d), (0.4, 1.6)).schedule(spread(d, 0.4, 1.6))
    ),
    "samplers.sample: a for each, on the CPU": lambda d: sample(
        d, schedule=families.SoftConditioning(prior_on(d), (0.4, 1.6)).schedule(spread("cpu", 0.4, 1.6))
    ),
    "samplers.sample: b for each": lambda d: sample(d, schedule=schedules.sequential(COLUMN, spread(d, 0.4, 0.9))),
}


# schedules


@probe("schedules.Schedule", "here", "on the CPU")
def use_schedule(d, where):
    place, t = d if where == "here" else "cpu", times(d)
    schedule = schedules.soft_conditioning(COLUMN.to(place), 1.5, VARIANCE.log().to(place), -7.0, 5.0, -8.0, 4.0)
    levels = [f(t) for f in (schedule.gamma, schedule.dgamma_dt, schedule.beta, schedule.alpha, schedule.sigma)]
    return levels, schedule.snr(t, VARIANCE), schedule.gamma(0.3).tolist(), schedule.gamma(times("cpu")).tolist()


@probe("schedules.Nest")
def use_nest(d):
    nest = schedules.Nest([LEVEL.to(d), COLUMN.to(d)])
    moves = nest.movement([spread(d, 0.5, 0.9), 0.8])
    columns, backwards = schedules.Nest([COLUMN.to(d)]), torch.arange(6, device=d).flip(0)
    other = columns.exchanged(columns.movement([spread(d, 0.5, 0.9)])[0], backwards)
    return moves, nest.movement([0.6, 0.8]), nest.idle(*moves), nest.least, nest, other


@probe("schedules.sequential", "here", "on the CPU")
def use_sequential(d, where):
    place = d if where == "here" else "cpu"
    column, level = COLUMN.to(place), LEVEL.to(place)
    ends = VARIANCE.to(place) - 7, VARIANCE.to(place) + 5
    made = schedules.sequential(column, 0.5, *ends), schedules.sequential([level, column], [0.7, 0.7])
    return [path(schedule, d) for schedule in (*made, schedules.sequential(column, spread(place, 0.4, 0.9)))]


@probe("schedules.soft_conditioning", "here", "on the CPU")
def use_soft(d, where):
    place = d if where == "here" else "cpu"
    order, a, first = COLUMN.to(place), spread(place, 0.5, 1.5), spread(place, -8.0, -6.0)
    made = (
        schedules.soft_conditioning(order, a, 0.1, first),
        schedules.soft_conditioning(order, 1.2, 0.0, -7.0, 5.0, -6.0, 4.0),
    )
    return [path(schedule, d) for schedule in made]


PROBES |= {
    "schedules.alpha": lambda d: schedules.alpha(normals(d)),
    "schedules.sigma": lambda d: schedules.sigma(normals(d)),
    "schedules.linear": lambda d: path(LINE, d),
    "schedules.vp": lambda d: path(schedules.vp(SHAPE), d),
    "schedules.cosine": lambda d: path(schedules.cosine(SHAPE), d),
    "schedules.offset_lines": lambda d: schedules.offset_lines(
        COLUMN, spread(d, 0.5, 1.5), VARIANCE, -7.0, 5.0, times(d)[:, None, None, None]
    ),
    "schedules.clipped_lines": lambda d: schedules.clipped_lines(
        VARIANCE - 7, VARIANCE + 5, COLUMN / 8, COLUMN / 8 + 0.1, times(d)[:, None, None, None]
    ),
    "schedules.held": lambda d: path(schedules.held(schedules.sequential(COLUMN.to(d), 0.5), KNOWN.to(d)), d),
    "schedules.held: on the CPU": lambda d: path(schedules.held(schedules.sequential(COLUMN, 0.5), KNOWN), d),
    "schedules.patch_order": lambda d: schedules.patch_order(SHAPE, 2),
    "schedules.staggered": lambda d: path(schedules.staggered(COLUMN.to(d), 1.5, -8.0, 4.0), d),
    "schedules.rescaled": lambda d: path(schedules.rescaled(LINE, VARIANCE.to(d)), d),
    "schedules.shape_of": lambda d: schedules.shape_of(COLUMN.to(d)),
}


# training, model


def trainer_of(name="soft", conditioning="film", checkpoint=None, **config):
    settings = training.TrainingConfig(**({"steps": 4, "batch": 6, "warmup": 2} | config))
    family = family_of(name, prior_on("cpu"))
    return training.Trainer(unet(conditioning), IMAGES, family, settings, checkpoint)


def rich_trainer(weighting="likelihood"):
    """Of a network that sees all it can, with dropout, on mirrored grey levels."""
    settings = training.TrainingConfig(
        steps=4, batch=6, warmup=2, symmetries="mirror", discrete=True, weighting=weighting
    )
    model = unet("local", "haar", dropout=0.2, **RICH)
    return training.Trainer(model, IMAGES, family_of("soft", prior_on("cpu")), settings)


def around(kind):
    """Of a network around a reference."""
    made = reference("cpu", kind)
    built = awake(denoiser.build(made.basis, made.prior, 4, reference=made, fourier=True, **UNET))
    family = families.SoftConditioning(made.prior, (0.4, 1.6))
    if "Gaussian" in kind:
        family = families.Sequential(made.basis, made.prior, "columns")
    return training.Trainer(built, IMAGES, family, training.TrainingConfig(steps=4, batch=6, warmup=2))


def told_time():
    """Of a network that is told the time and nothing else."""
    fitted = designs.FittedDesign(designs.Design("pca", 1.0, (0.4, 1.6), "time"), IMAGES)
    settings = training.TrainingConfig(steps=4, batch=6, warmup=2)
    return training.Trainer(awake(fitted.denoiser(**UNET)), IMAGES, fitted.family(), settings)


def mar_trainer_of(kind, classes=3, histograms=False):
    settings = mar.MarTrainingConfig(steps=4, batch=4, warmup=2, repeats=2, discrete=histograms)
    labels, model = LABELS if classes else None, autoregressor("cpu", kind, classes)
    model = mar.Autoregressor(model.network, reference("cpu", "PatchHistograms")) if histograms else model
    return mar.MarTrainer(model, IMAGES, labels, TOKEN_LINE, settings)


def mixture_trainer_of(loss, kind):
    settings = mar.MarTrainingConfig(steps=4, batch=4, warmup=2)
    return mixtures.MixtureTrainer(mixed("cpu", loss, kind), IMAGES, None, settings)


def train(d, trainer, steps=2):
    """Losses of some steps, and the averaged weights."""
    assert trainer.accelerator.device.type == d
    records = itertools.islice(trainer.run(), steps)
    return [(r.loss, r.by_group.tolist()) for r in records], [part.data for part in trainer.averaged().parameters()]


@probe("training.Loop")
def use_loop(d):
    trainer = trainer_of(weighting="answer", symmetries="mirror")
    weighted = trainer.weighted(normals(d), schedules.cosine(SHAPE), times(d)), trainer.data(times(d).long(), gen(d))
    with trainer.seeded(gen(d)):
        assert torch.initial_seed() != 0
    with file() as checkpoint:
        stopped = train(d, trainer_of(checkpoint=checkpoint))
        resumed = trainer_of(checkpoint=checkpoint)
        assert resumed.step == 2
        return weighted, trainer.loss(5), trainer.stream(5).initial_seed(), stopped, train(d, resumed)


@probe("training.evaluate")
def use_evaluate(d):
    model, p = pair(d)
    return training.evaluate(model, p.white(photos(d)), p.schedule, gen(d), chunk=3)


@probe("model.GUD", "pca", "columns", "patches 2")
def use_front_door(d, which):
    """All that a model can do, where it chooses its device itself."""
    design = {} if which == "pca" else {"basis": "pixel", "blocks": which}
    design |= {"order": "random"} if which == "patches 2" else {}
    model = GUD.fit(IMAGES, verbose=False, **UNET, **design)
    losses = [record.loss for record in model.train_steps(2, batch=4, progress=False)]
    with file() as where:
        model.save(where)
        again = GUD.load(where)
    assert model.device.type == again.device.type == d
    options, own = {"steps": 3, "grid": "uniform"}, {next(iter(model.recommended)): spread(d, 0.5, 0.9)}
    drawn = model.sample(3, **options)
    assert torch.equal(again.sample(3, **options), drawn)
    results = [losses, drawn, model.sample(3, **options, **own), str(model).rsplit(" on ")[0], str(again.to("cpu"))]
    few, once = IMAGES[:3].to(d), {"draws": 1}
    results += [model.likelihood(few, draws=2), model.nll(few.cpu(), **once), model.bits_per_dim(few, **once)]
    results.append(model.process().schedule.gamma(0.3))
    if which == "columns":
        for place in ("cpu", d):
            results.append(model.inpaint(few.to(place), KNOWN[0].to(place), steps=3))
            results.append(model.extend(few.to(place), 3, progress=False))
        results.append(model.choose_finest(few, (0.4, 0.6), **once))
    if which == "patches 2":
        for order in (torch.arange(6).flip(0), torch.arange(6, device=d).expand(3, 6)):
            results += [
                model.sample(3, order=order, **own, **options),
                model.inpaint(few, KNOWN[0], steps=3, order=order),
            ]
        results.append(model.nll(few, order=torch.arange(6), b=0.5, **once))
    return results


@probe("training.Trainer", *FAMILIES)
def use_trainer(d, family):
    return train(d, trainer_of(family))


@probe("training.Record")
def use_record(d):
    record = next(trainer_of().run())
    return record.loss, record.by_group.tolist(), repr(record).split(", seconds")[0]


@probe("mar.training.MarTrainer", "raster", "masked")
def use_mar_trainer(d, kind):
    return train(d, mar_trainer_of(kind))


@probe("mar.training.TokenTrainer")
def use_token_trainer(d):
    trainer = mixture_trainer_of("mean", "masked")
    return trainer.batch(2, trainer.stream(2)), train(d, trainer)


@probe("mar.mixtures.MixtureTrainer", *mixtures.LOSSES)
def use_mixture_trainer(d, loss):
    return train(d, mixture_trainer_of(loss, "masked"))


PROBES |= {
    "training.probe": lambda d: training.probe({"x": normals(d)}),
    "training.Trainer: told the time": lambda d: train(d, told_time()),
    "training.Trainer: all that can be": lambda d: train(d, rich_trainer()),
    "mar.training.MarTrainer: no labels": lambda d: train(d, mar_trainer_of("random", 0)),
}


# zoo

SYSTEMS = {
    "equal_snr": lambda d: [VARIANCE.to(d)],
    "flipped_snr": lambda d: [VARIANCE.to(d)],
    "mulan": lambda d: [VARIANCE.to(d) * k for k in (1, -1, 2)],
    "diffusion_forcing": lambda d: [COLUMN.to(d)],
    "rolling": lambda d: [COLUMN.to(d), 2],
    "mar": lambda d: [COLUMN.to(d), 50],
    "wavelet": lambda d: [VARIANCE.to(d), 2],
    "subspace": lambda d: [],
}


def use_system(d, system):
    if system.schedule is None:
        return system.name
    gamma, slope, kinks = path(system.schedule, d)
    return gamma, slope, kinks, system.scale, system.weight(gamma, slope) if system.weight else None


for name, function in vars(zoo).items():
    if inspect.isfunction(function) and inspect.signature(function).return_annotation is zoo.System and name[0] != "_":
        PROBES[f"zoo.{name}"] = lambda d, name=name: use_system(
            d, getattr(zoo, name)(*SYSTEMS.get(name, lambda d: [SHAPE])(d))
        )

PROBES |= {
    "zoo.rescale": lambda d: zoo.rescale(normals(d).exp(), normals(d, 1).exp(), VARIANCE.to(d)),
    "zoo.Weighting": lambda d: [weight(normals(d), normals(d, 1)) for weight in (zoo.PLAIN, zoo.BOUND)],
    "zoo.everything": lambda d: [
        use_system(d, system) for system in zoo.everything(SHAPE, lambda basis: VARIANCE.to(d))
    ],
}


# On a GPU as on the CPU


def values(result):
    """All that a result holds, one after another."""
    if isinstance(result, nn.Module):
        result = [*result.parameters(), *result.buffers()]
    elif dataclasses.is_dataclass(result):
        result = list(vars(result).values())
    elif isinstance(result, dict):
        result = sorted(result.items())
    if isinstance(result, list | tuple):
        return [value for part in result for value in values(part)]
    return [result.detach()] if isinstance(result, Tensor) else [result]


@contextmanager
def no_gpu(mps=False):
    """Torch and accelerate find none, or only `mps`."""
    with ExitStack() as stack:
        for state in (PartialState, AcceleratorState, GradientState):
            stack.enter_context(patch.dict(state._shared_state, clear=True))
        stack.enter_context(patch.dict(os.environ))  # accelerate sets a variable for mps
        stack.enter_context(patch("torch.cuda.is_available", lambda: False))
        stack.enter_context(patch("torch.backends.mps.is_available", lambda: mps))
        stack.enter_context(patch("accelerate.state.is_mps_available", lambda *_, **__: mps))
        yield


@functools.cache
def on_the_cpu(name):
    """What a probe finds there; if it is one of a class, also the code it runs."""
    called, tracer = set(), sys.gettrace()
    if name.split(":")[0] in CLASSES:
        sys.settrace(lambda frame, *_: called.add(frame.f_code))
    try:
        with no_gpu():
            return values(PROBES[name]("cpu")), called
    finally:
        sys.settrace(tracer)


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if isinstance(one, Tensor):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        else:
            assert one == other or (one != one and other != other)


def check(name):
    """A probe on a GPU."""
    expected, _ = on_the_cpu(name)
    with emulated.cuda():
        found = values(PROBES[name]("cuda"))
        places = {value.device.type for value in found if isinstance(value, Tensor)}
    assert places <= {"cpu" if name.split(":")[0] in ON_CPU else "cuda"}
    assert_same(found, expected)


@pytest.mark.parametrize("name", PROBES)
def test_on_a_gpu_nothing_fails_and_numbers_are_those_of_the_cpu(name):
    check(name)


FAULTY = {
    "a table on the CPU": (lambda d: normals(d) + COLUMN, RuntimeError),
    "a generator on the CPU": (lambda d: torch.randn(3, generator=gen("cpu"), device=d), RuntimeError),
    "numpy": (lambda d: normals(d).numpy().sum(), TypeError),
    "a result on the CPU": (lambda d: normals(d).cpu(), AssertionError),
    "another number": (lambda d: normals(d) + 1e-15 * (d == "cuda"), AssertionError),
}


@pytest.mark.parametrize("name", FAULTY)
def test_what_fails_on_a_gpu_only_is_noticed(name, monkeypatch):
    faulty, error = FAULTY[name]
    monkeypatch.setitem(PROBES, name, faulty)
    with pytest.raises(error):
        check(name)


# Nothing is left out


def public():
    """Names of the library's public functions and classes, and these."""
    for info in pkgutil.walk_packages(gudlib.__path__, "gudlib."):
        place = info.name.removeprefix("gudlib.")
        if place.split(".")[0] not in EXEMPT_MODULES:
            for name, value in vars(importlib.import_module(info.name)).items():
                defined_here = getattr(value, "__module__", "") == info.name
                if name[0] != "_" and defined_here and (inspect.isclass(value) or inspect.isfunction(value)):
                    yield f"{place}.{name}", value


def function_of(value):
    """That a property, class method or the like is made of."""
    return getattr(value, "fget", None) or getattr(value, "func", None) or getattr(value, "__func__", value)


def annotations(value):
    """Of a function, or of a class's fields and methods."""
    if not inspect.isclass(value):
        return getattr(function_of(value), "__annotations__", {}).values()
    members = [member for name, member in vars(value).items() if name in ("__init__", "__call__") or name[0] != "_"]
    return [*vars(value).get("__annotations__", {}).values(), *(a for m in members for a in annotations(m))]


def holds_tensors(kind, above=()):
    """Whether a type, as annotated, is one of tensors or of what has some."""
    if isinstance(kind, str):
        return True  # it may be
    if isinstance(kind, list) or typing.get_args(kind):
        return any(holds_tensors(part, above) for part in (kind if isinstance(kind, list) else typing.get_args(kind)))
    if not inspect.isclass(kind) or kind in above:
        return False
    if issubclass(kind, Tensor | nn.Module | jaxtyping.AbstractArray):
        return True
    ours = kind.__module__.startswith("gudlib.")
    return ours and any(holds_tensors(part, (*above, kind)) for part in annotations(kind))


def wanted():
    """Public names that tensors go into or come out of."""
    found = dict(public())
    return {k: v for k, v in found.items() if any(map(holds_tensors, [v] if inspect.isclass(v) else annotations(v)))}


def test_everything_public_that_takes_or_gives_tensors_has_a_probe():
    probed, names = {name.split(":")[0] for name in PROBES}, wanted().keys()
    assert sorted(names - probed) == sorted(EXEMPT)
    assert probed <= names and ON_CPU <= probed
    assert EXEMPT_MODULES.keys() <= {info.name for info in pkgutil.iter_modules(gudlib.__path__)}


def test_a_new_function_without_a_probe_is_noticed(monkeypatch):
    def fresh(x: Tensor | None) -> None: ...

    def plain(n: int, *names: str) -> dict[str, float]: ...

    for function in (fresh, plain):
        function.__module__ = "gudlib.schedules"
        monkeypatch.setattr(schedules, function.__name__, function, raising=False)
    assert "schedules.fresh" in wanted() and "schedules.plain" not in wanted()


def methods_of(value):
    """Code of the public methods and properties that a class itself has."""
    own = {k: v for k, v in vars(value).items() if (k[0] != "_" or k == "__call__") and callable(function_of(v))}
    whole = {k: inspect.unwrap(function_of(v)) for k, v in own.items() if not getattr(v, "__isabstractmethod__", False)}
    return {k: v.__code__ for k, v in whole.items() if inspect.isfunction(v)}


CLASSES = {name: value for name, value in wanted().items() if name not in EXEMPT and inspect.isclass(value)}


@pytest.mark.parametrize("name", CLASSES)
def test_probes_of_a_class_call_all_its_methods(name):
    called = set().union(*(on_the_cpu(each)[1] for each in PROBES if each.split(":")[0] == name))
    assert not [method for method, code in methods_of(CLASSES[name]).items() if code not in called]


# No step of training waits

STEPS = {
    **{
        f"{name}, {weighting}": functools.partial(trainer_of, name, weighting=weighting)
        for name in FAMILIES for weighting in training.WEIGHTINGS
    },
    **{conditioning: functools.partial(trainer_of, "columns", conditioning) for conditioning in networks.CONDITIONINGS},
    **{f"around {kind}": functools.partial(around, kind) for kind in REFERENCES if kind != "PatchHistograms"},
    "told the time": told_time,
    "all that can be": lambda: rich_trainer("answer"),
    **{f"mar, {kind}": functools.partial(mar_trainer_of, kind) for kind in ("raster", "masked")},
    "mar around PatchHistograms": lambda: mar_trainer_of("random", histograms=True),
    **{f"mar, {loss}": functools.partial(mixture_trainer_of, loss, "raster") for loss in mixtures.LOSSES},
}  # fmt: skip


def waits_of_a_step(trainer, log):
    """In the steady state."""
    records = trainer.run()
    next(records)
    log.clear()
    next(records)
    return log.syncs + log.copies


@pytest.mark.parametrize("name", STEPS)
def test_a_training_step_neither_waits_for_the_gpu_nor_copies_to_it(name):
    with emulated.cuda() as log:
        assert not waits_of_a_step(STEPS[name](), log)


def test_a_step_that_waits_is_noticed():
    with emulated.cuda() as log:
        trainer = trainer_of()
        trainer.draw = lambda n, generator: schedules.linear(SHAPE, gamma_max=5.0 + float(times("cuda")[0]))
        waits = waits_of_a_step(trainer, log)
    assert len(waits) == 1 and waits[0].startswith("aten._local_scalar_dense @ gudlib/training.py:")


def test_reading_a_loss_waits_once():
    with emulated.cuda() as log:
        record = next(trainer_of().run())
        log.clear()
        assert record.loss > 0 and len(log.syncs) == 1 and not log.copies
        assert record.loss > 0 and len(log.syncs) == 1
        assert not record.by_group.is_cuda and (len(log.syncs), len(log.copies)) == (2, 1)


# Where to compute


def test_a_gpu_is_the_default_where_there_is_one():
    with no_gpu():
        assert devices.default() == torch.device("cpu") and devices.precision() == "no"
    with emulated.cuda():
        assert devices.default().type == "cuda" and devices.precision() == "bf16"
        model = GUD.fit(IMAGES, verbose=False, **UNET)
        assert {part.device.type for part in (*model.denoiser.parameters(), *model.family.buffers())} == {"cuda"}


def test_where_torch_has_mps_the_cpu_computes():
    with no_gpu(mps=True):
        assert PartialState().device.type == "mps"  # what is to be avoided
    with no_gpu(mps=True):
        assert devices.default().type == "cpu" and devices.precision() == "no"
        trainer, model = trainer_of(), GUD.fit(IMAGES, verbose=False, **UNET)
        next(trainer.run())
        list(model.train_steps(2, batch=4, progress=False))
        for made in (trainer.plain, trainer.average, model.denoiser):
            assert {part.device.type for part in (*made.parameters(), *made.buffers())} == {"cpu"}
        assert model.sample(2, steps=3).shape == (2, *SHAPE)


# The emulated GPU itself


def there(*values):
    return torch.tensor(values, device="cuda")


class _Faulty(torch.autograd.Function):
    """Backward has a table on the CPU."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.ones(2)


TWO = "Expected all tensors to be on the same device"
REFUSED = {  # x lies there, y on the CPU
    "x + y": (lambda x, y: x + y, TWO),
    "y + x": (lambda x, y: y + x, TWO),
    "y + a number": (lambda x, y: y + x[0], TWO),
    "x @ y": (lambda x, y: x @ y, TWO),
    "cat": (lambda x, y: torch.cat([x, y]), TWO),
    "stack of numbers": (lambda x, y: torch.stack([x[0], y[0]]), TWO),
    "a mask": (lambda x, y: torch.where(y > 0, x, x), TWO),
    "in place": (lambda x, y: y.add_(x), TWO),
    "a number in place": (lambda x, y: y[0].add_(x[0]), TWO),
    "gather": (lambda x, y: x.gather(0, y.long()), TWO),
    "values at an index": (lambda x, y: x.index_put_((x.long(),), y), TWO),
    "an index": (lambda x, y: y[x.long()], "indices should be either on cpu"),
    "a layer": (lambda x, y: nn.Linear(2, 2).to("cuda")(y), TWO),
    "derivative": (lambda x, y: torch.func.jvp(lambda z: z * y, (x,), (x,)), TWO),
    "many at once": (lambda x, y: torch.func.vmap(lambda z: z * y)(x[None]), TWO),
    "backward": (lambda x, y: _Faulty.apply(x.requires_grad_()).sum().backward(), TWO),
    "two numbers": (lambda x, y: torch.addcmul(x, y[0], y[1]), "too many CPU scalars"),
    "noise": (lambda x, y: torch.randn(2, generator=gen("cpu"), device="cuda"), "'cuda' device type for generator"),
    "noise in place": (lambda x, y: y.normal_(generator=gen("cuda")), "'cpu' device type for generator"),
    "draws": (lambda x, y: torch.multinomial(x, 1, generator=gen("cpu")), "'cuda' device type for generator"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cuda_refuses_is_refused(name):
    call, message = REFUSED[name]
    with emulated.cuda(), pytest.raises(RuntimeError, match=message):
        call(there(0.0, 1.0), torch.tensor([0.0, 1.0]))


LOGGED = {  # with how many waits and copies
    "arithmetic": (lambda x, y: (x + y[0]) * 2 - x.sum(), 0, 0),
    "item": (lambda x, y: x[0].item(), 1, 0),
    "truth": (lambda x, y: bool(x[0]), 1, 0),
    "float": (lambda x, y: float(x[0]), 1, 0),
    "tolist": (lambda x, y: x.tolist(), 1, 0),
    "place by a number": (lambda x, y: y.to("cuda")[x.argmax()], 1, 1),
    "equal": (lambda x, y: torch.equal(x, x), 1, 0),
    "nonzero": (lambda x, y: x.nonzero(), 1, 0),
    "unique": (lambda x, y: x.unique(), 1, 0),
    "what a mask leaves": (lambda x, y: x[x > 0], 1, 0),
    "a number where a mask is": (lambda x, y: x.masked_fill(x > 0, 0.0), 0, 0),
    "classes counted": (lambda x, y: nn.functional.one_hot(x.long()), 1, 0),
    "classes known": (lambda x, y: nn.functional.one_hot(x.long(), 2), 0, 0),
    "repeats counted": (lambda x, y: x.repeat_interleave(x.long()), 1, 0),
    "eigenvalues": (lambda x, y: torch.linalg.eigvalsh(x.diag()), 1, 0),
    "synchronize": (lambda x, y: torch.cuda.synchronize(), 1, 0),
    "to the CPU": (lambda x, y: x.cpu(), 1, 1),
    "from the CPU": (lambda x, y: y.to("cuda"), 0, 1),
    "a list": (lambda x, y: there(1, 2), 0, 1),
    "an index from the CPU": (lambda x, y: x[y.long()], 0, 1),
    "written over": (lambda x, y: x.copy_(y), 0, 1),
    "where it is": (lambda x, y: x.to("cuda").to(x).double(), 0, 0),
    "a gradient's way": (lambda x, y: y.requires_grad_().to("cuda").sum().backward(), 1, 2),
}


@pytest.mark.parametrize("name", LOGGED)
def test_what_waits_for_a_gpu_or_copies_is_counted(name):
    call, waits, copies = LOGGED[name]
    with emulated.cuda() as log:
        x, y = there(0.0, 1.0), torch.tensor([0.0, 1.0])
        log.clear()
        call(x, y)
        assert (len(log.syncs), len(log.copies)) == (waits, copies), (log.syncs, log.copies)


def test_what_is_made_on_a_gpu_stays_there_and_the_gpu_goes_with_the_block():
    before = {name: getattr(Tensor, name) for name in ("to", "cpu", "numpy", "is_cuda")}, torch.Generator, torch.zeros
    with emulated.cuda():
        x = noise("cuda", 2, 3)
        layer = nn.Linear(3, 2).to(x)
        layer(x).sum().backward()
        made = [x.T, torch.zeros_like(x), x.new_ones(2), copy.deepcopy(layer).weight, layer.weight.grad, x.unbind()[0]]
        assert all(value.is_cuda and value.device == torch.device("cuda", 0) for value in made)
        assert torch.zeros(2).device.type == torch.zeros_like(x, device="cpu").device.type == "cpu"
        with pytest.raises(TypeError, match="copy the tensor to host memory first"):
            x.numpy()
    assert before == ({name: getattr(Tensor, name) for name in before[0]}, torch.Generator, torch.zeros)
    assert torch.equal(x, noise("cpu", 2, 3)) and x.device.type == "cpu"
