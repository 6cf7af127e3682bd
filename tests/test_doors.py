"""Whatever is handed to a public function of images ends in a finite answer, or in an error that names the argument."""

import dataclasses
import math
import numbers
import re
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gudlib import (
    baselines,
    bases,
    data,
    denoiser,
    designs,
    lattice,
    likelihood,
    mar,
    metrics,
    networks,
    plotting,
    priors,
    references,
    samplers,
    schedules,
    statistics,
    training,
    windows,
    zoo,
)
from gudlib.exact import gaussian_eps
from gudlib.families import Sequential, SoftConditioning
from gudlib.model import GUD
from gudlib.process import Process

matplotlib.use("Agg")
SHAPE = (1, 4, 4)
GREY = torch.randint(0, 256, (12, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
DATA = data.dequantise(GREY, torch.Generator().manual_seed(0))
PIXEL = bases.Pixel(SHAPE)
PRIOR = priors.whitened(priors.measure(PIXEL, GREY))
PATH = Process(PIXEL, PRIOR, schedules.soft_conditioning(PRIOR.order, 1.0))
KNOWN = torch.zeros(SHAPE, dtype=torch.bool)
KNOWN[..., :2] = True
MODEL = GUD.fit(GREY, basis="pixel", known=0.25, width=8, verbose=False)
NETWORK = denoiser.build(PIXEL, PRIOR, groups=2, width=8)
WAVES = bases.Blocks.waves(SHAPE)
ONE_SCALE = priors.isotropic(priors.measure(WAVES, GREY), 0.5)
TOKENS = priors.isotropic(priors.measure(bases.Pixel((1, 2, 2)), mar.patchify(DATA, 2).reshape(-1, 1, 2, 2)))


def exact(x, gamma):
    return gaussian_eps(x, gamma, PRIOR.white_variance.to(x))


class Mean(torch.nn.Module):
    name, num_features = "mean", 2

    def forward(self, x):
        return torch.stack([x.float().mean((1, 2, 3)), x.float().square().mean((1, 2, 3))], 1)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def train(x):
    family = SoftConditioning(PRIOR, (0.5, 1.5))
    trainer = training.Trainer(NETWORK, x, family, training.TrainingConfig(steps=1, batch=2))
    return [record.loss for record in trainer.run()]


def first(x):
    return x[:1] if isinstance(x, torch.Tensor) else x


def fill(x):
    return samplers.inpaint(exact, PATH, x, KNOWN, steps=2, generator=generator()).data


def chain(x):
    path = Process(TOKENS_BASIS, TOKENS, schedules.linear((1, 2, 2), -5.0, 3.0))
    return mar.chain_rule_bound(lambda *_: lambda w, g: torch.zeros_like(w), path, x, range(5)).bits


TOKENS_BASIS = bases.Pixel((1, 2, 2))
DOORS: dict[str, Callable[[Any], Any]] = (
    {
        "statistics.covariance": statistics.covariance,
        "statistics.mirrored": lambda x: statistics.mirrored(x, "all"),
        "statistics.randomly_mirrored": lambda x: statistics.randomly_mirrored(x, "mirror", generator()),
        "priors.measure": lambda x: priors.measure(PIXEL, x),
        "bases.PCA.fit": lambda x: bases.PCA.fit(x).eigenvalues,
        "bases.Blocks.pca": lambda x: bases.Blocks.pca(x).matrix,
        "bases.make": lambda x: bases.make("pca", SHAPE, x).matrix,
        "data.scale": data.scale,
        "data.dequantise": lambda x: data.dequantise(x, generator()),
        "data.to_uint8": data.to_uint8,
        "likelihood.bound": lambda x: likelihood.bound(exact, PATH, x, draws=1).bits,
        "likelihood.bound, discrete": lambda x: likelihood.bound(exact, PATH, x, draws=1, decoder="discrete").bits,
        "likelihood.flow": lambda x: likelihood.flow(exact, PATH, first(x), tolerance=1e-2).bits,
        "samplers.inpaint": fill,
        "metrics.frechet": lambda x: metrics.frechet(x, x, Mean()),
        "metrics.coverage": lambda x: metrics.coverage(x, x, Mean(), k=1),
        "metrics.memorised": lambda x: metrics.memorised(x, x, x),
        "metrics.spectrum_error": lambda x: metrics.spectrum_error(x, x),
        "metrics.embed": lambda x: metrics.embed(x, Mean()),
        "designs.FittedDesign": lambda x: designs.FittedDesign(designs.Design("dct"), x).prior.scale,
        "designs.principal": lambda x: designs.principal(x)[0].matrix,
        "references.best": lambda x: (
            references.best([references.IndependentGaussian.name], PIXEL, PRIOR, x).prior.scale
        ),
        "Reference.bits": lambda x: references.IndependentGaussian(PIXEL, PRIOR).bits(x),
        "GUD.fit": lambda x: GUD.fit(x, width=8, verbose=False).denoiser.prior.scale,
        "GUD.likelihood": lambda x: MODEL.likelihood(x, draws=1).bits,
        "GUD.inpaint": lambda x: MODEL.inpaint(x, KNOWN[0], steps=2),
        "training.Trainer": train,
        "mar.patchify": lambda x: mar.patchify(x, 2),
        "mar.chain_rule_bound": chain,
        "plotting.sample_grid": lambda x: plotting.sample_grid(x).figure.clear(),
        "lattice.power": lattice.power,
        "lattice.block": lambda x: lattice.block(x, 2),
    }
    | {
        f"references.{name}": lambda x, name=name: references.fit(name, PIXEL, PRIOR, x).bits(GREY)
        for name in ("independent gaussian", "histograms", "marginals")
    }
    | {
        f"references.{name}": lambda x, name=name: references.fit(name, WAVES, ONE_SCALE, x).bits(GREY)
        for name in ("grouped gaussian", "lattice gaussian")
    }
)
TABLES = {
    f"baselines.{f.__name__}": lambda x, f=f: f(x, GREY).mean
    for f in (baselines.histograms, baselines.neighbours, baselines.context_table, baselines.normal)
}
TABLES |= {"baselines.webp": lambda x: baselines.webp(x).mean}


def finite(answer: Any) -> bool:
    """Whether all numbers in an answer are."""
    if isinstance(answer, torch.Tensor):
        return bool(answer.isfinite().all())
    if isinstance(answer, numbers.Real):
        return math.isfinite(answer)
    if dataclasses.is_dataclass(answer):
        return all(finite(getattr(answer, each.name)) for each in dataclasses.fields(answer))
    return all(map(finite, answer)) if isinstance(answer, list | tuple) else True


KINDS = ("normal", "constant", "zeros", "nan", "inf", "huge", "levels")
DTYPES = (torch.uint8, torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool)


def made(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of some kind; where they are whole, grey levels."""
    x = torch.randn(shape, generator=generator()) * 0.4
    if not dtype.is_floating_point or kind == "levels":
        x = (x * 100 + 128).clamp(0, 255).round()
    if kind in ("constant", "zeros"):
        x = torch.full_like(x, {"constant": 0.5, "zeros": 0.0}[kind])
    elif kind in ("nan", "inf") and x.numel():
        x.view(-1)[-1] = float(kind)
    return (x * 1e30 if kind == "huge" else x).to(dtype)


shapes = st.tuples(st.integers(0, 5), st.sampled_from([1, 3]), st.sampled_from([1, 3, 4]), st.sampled_from([1, 4]))
odd = st.builds(
    made,
    shapes | st.just((12, *SHAPE)) | st.sampled_from([(4, 4), (2, 1, 4)]),
    st.sampled_from(KINDS),
    st.sampled_from(DTYPES),
)
other = st.sampled_from([None, 3, 0.5, "images", [1, 2], GREY.numpy()])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", DOORS | TABLES)
def test_any_images_are_answered_finitely_or_refused_by_name(name):
    door = (DOORS | TABLES)[name]

    @settings(max_examples=60)
    @given(x=odd | other)
    @example(x=GREY)
    @example(x=DATA)
    def check(x):
        try:
            answer = door(x)
        except (ValueError, TypeError) as error:
            assert re.search(rf"\b({'|'.join(WORDS)})\b", str(error)), f"{type(error).__name__}: {error}"
        else:
            assert finite(answer) or name in MOVING, answer

    check()


MOVING = ("statistics.mirrored", "statistics.randomly_mirrored", "mar.patchify")  # numbers, whatever they are
WORDS = ("images", "known", "values", "data", "real", "generated", "pictures", "fields", "height", "train", "test")


# Numbers

COLUMN = PIXEL.label("column")
SHORT = {"width": 8, "verbose": False}
STRIPS = GUD.fit(GREY, basis="pixel", blocks="columns", b=(0.25, 1.0), **SHORT)
MOMENTS = priors.measure(PIXEL, GREY)
CAUSAL = mar.Network("raster", SHAPE, 2, width=8, depth=1, heads=2, head=(1, 8))
TOKEN_MODEL = mar.Autoregressor(CAUSAL, references.IndependentGaussian(TOKENS_BASIS.float(), TOKENS.float())).eval()
TOKEN_LINE = schedules.linear((1, 2, 2), -5.0, 3.0)
PHI4 = {"size": 2, "chains": 2, "draws": 2, "mass2": 1.0, "coupling": 0.5, "thermalise": 1}


def over(function, *given, **options):
    """One call for each of the options, whose place a number takes."""
    return {name: lambda x, name=name: function(*given, **(options | {name: x})) for name in options}


def network_of(network, /, **options):
    def make(**numbers):
        net = network(**(options | numbers))
        return [p.sum() for p in net.parameters()]

    return make


def gamma_of(make):
    def gamma(*args, **options):
        made = make(*args, **options)
        return getattr(made, "schedule", made).gamma(torch.tensor([0.0, 0.3, 1.0]))

    return gamma


def sampled(**options):
    return samplers.sample(exact, PATH, **({"generator": generator()} | options)).data


def fitted(**options):
    return GUD.fit(GREY, basis="dct", verbose=False, **options).denoiser.prior.scale


def one_step(**options):
    model = GUD.fit(GREY, basis="dct", width=8, verbose=False)
    return [record.loss for record in model.train_steps(progress=False, **({"steps": 1, "batch": 2} | options))]


def generated(**options):
    return mar.generate(TOKEN_MODEL, TOKEN_LINE, generator=generator(), **({"head_steps": 2} | options))[0]


UNET = {"shape": SHAPE, "groups": torch.zeros(SHAPE, dtype=torch.long), "inputs": 2}
MAR = {"kind": "masked", "image": SHAPE, "head": (1, 8)}
FUNCTIONS = {
    "GUD.fit": over(fitted, width=8, dropout=0.0, seed=0, a=1.0),
    "GUD.fit, blocks": over(lambda b: GUD.fit(GREY, "pixel", blocks="columns", b=b, **SHORT).family.default, b=0.5),
    "GUD.fit, known": over(lambda known: GUD.fit(GREY, basis="pixel", known=known, **SHORT).card, known=0.5),
    "GUD.extend": over(STRIPS.extend, GREY[:2], columns=1, moving=2.0, context=1, steps=1, seed=0),
    "GUD.sample": over(MODEL.sample, n=2, steps=2, chunk=2, seed=0, a=1.0),
    "GUD.inpaint": over(MODEL.inpaint, GREY[:2], KNOWN[0], steps=2, seed=0, a=1.0),
    "GUD.likelihood": over(MODEL.likelihood, GREY[:2], draws=1, seed=0, a=1.0),
    "GUD.train_steps": over(one_step, steps=1, batch=2, lr=1e-3, seed=0),
    "samplers.sample": over(sampled, n=2, steps=2, temperature=1.0, keep=2),
    "samplers.time_grid": over(samplers.time_grid, PATH, steps=3),
    "samplers.inpaint": over(
        lambda **o: samplers.inpaint(exact, PATH, DATA[:2], KNOWN, generator=generator(), **o).data, steps=2
    ),
    "likelihood.bound": over(
        lambda **o: likelihood.bound(exact, PATH, DATA, **o), draws=1, seed=0, steps=2, chunk=4
    ),
    "likelihood.flow": over(
        lambda **o: likelihood.flow(exact, PATH, DATA[:1], **({"tolerance": 0.1} | o)),
        draws=1, seed=0, tolerance=0.1, chunk=1,
    ),
    "schedules.linear": over(gamma_of(schedules.linear), SHAPE, gamma_min=-7.0, gamma_max=5.0),
    "schedules.vp": over(gamma_of(schedules.vp), SHAPE, beta_min=0.1, beta_max=20.0),
    "schedules.cosine": over(gamma_of(schedules.cosine), SHAPE, gamma_min=-9.0, gamma_max=9.0, offset=0.008),
    "schedules.soft_conditioning": over(gamma_of(schedules.soft_conditioning), PRIOR.order, a=1.0),
    "schedules.staggered": over(gamma_of(schedules.staggered), PRIOR.order, a=1.0, gamma_min=-7.0, gamma_max=5.0),
    "schedules.sequential": over(gamma_of(schedules.sequential), COLUMN, b=0.5),
    "families.SoftConditioning": over(
        lambda **o: SoftConditioning(PRIOR, (0.5, 1.5), **o)(2, generator()).gamma(torch.tensor([0.0, 1.0])),
        gamma_max_target=5.0, gamma_min_target=-7.0, finest=0.01,
    ),
    "families.SoftConditioning, a": over(lambda a: SoftConditioning(PRIOR, (0.5, a)).default, a=1.5),
    "families.Sequential": over(
        lambda **o: Sequential(PIXEL, PRIOR, "columns", **o)(2, generator()).gamma(torch.tensor([0.0, 1.0])),
        gamma_max_target=5.0, finest=0.01,
    ),
    "priors.isotropic": over(lambda scale: priors.isotropic(MOMENTS, scale).scale, scale=1.0),
    "priors.interpolated": over(lambda r: priors.interpolated(MOMENTS, r).scale, r=0.5),
    "priors.power_law": over(
        lambda exponent: priors.power_law(MOMENTS, bases.DCT(SHAPE).label("wavenumber"), exponent).scale, exponent=2.0
    ),
    "priors.measure": over(lambda floor: priors.measure(PIXEL, GREY, floor).floored, floor=0.1),
    "bases.Haar": over(lambda levels: bases.Haar(SHAPE, levels)(DATA), levels=1),
    "bases.groups_by": over(lambda count: bases.groups_by(COLUMN, count), count=2),
    "bases.Blocks.pca": over(lambda size: bases.Blocks.pca(GREY, size).matrix, size=2),
    "networks.UNet": over(network_of(networks.UNet, **UNET), width=8, patch=2, dropout=0.0, linear=0),
    "networks.Transformer": over(
        network_of(networks.Transformer, shape=SHAPE, inputs=3), patch=2, width=8, depth=1, heads=2
    ),
    "mar.Network": over(
        network_of(mar.Network, **MAR), size=2, classes=0, width=8, depth=1, heads=2, buffer=1, dropout=0.0
    ),
    "mar.generate": over(generated, n=2, head_steps=2, temperature=1.0, guidance=1.0),
    "mar.patchify": over(lambda size: mar.patchify(DATA, size), size=2),
    "mar.unmasking": over(mar.unmasking, count=4, steps=2),
    "windows.annealed": over(windows.annealed, count=3, first=4, last=2),
    "metrics.coverage": over(lambda k: metrics.coverage(DATA, DATA, Mean(), k), k=1),
    "metrics.memorised": over(lambda share: metrics.memorised(DATA, DATA, DATA, share), share=0.1),
    "metrics.embed": over(lambda chunk: metrics.embed(DATA, Mean(), chunk), chunk=4),
    "references.Histograms": over(
        lambda **o: references.Histograms.fit(PIXEL, PRIOR, GREY, **o).bits(GREY), sectors=2, seed=0
    ),
    "references.Marginals": over(lambda bins: references.Marginals.fit(PIXEL, PRIOR, GREY, bins).bits(GREY), bins=16),
    "baselines.regression": over(lambda radius: baselines.regression(GREY, GREY, radius).mean, radius=1),
    "designs.Design": over(lambda r: designs.FittedDesign(designs.Design("dct", r), GREY).prior.scale, r=1.0),
    "designs.principal": over(lambda noise: designs.principal(DATA, noise)[0].eigenvalues, noise=0.1),
    "lattice.phi4": over(
        lambda **o: lattice.phi4(generator=generator(), progress=False, **(PHI4 | o)),
        **PHI4, step=0.1, steps=2, every=1,
    ),
    "lattice.block": over(lambda factor, delta: lattice.block(DATA[:, 0], factor, delta), factor=2, delta=0.5),
    "lattice.gaussian_field": over(
        lambda n, size: lattice.gaussian_field(n, size, lattice.free(1.0), generator()), n=2, size=4
    ),
    "lattice.free": over(lambda mass2: lattice.free(mass2)(lattice.momenta(4)), mass2=1.0),
    "zoo.ddpm": over(gamma_of(zoo.ddpm), SHAPE, steps=4, beta_min=0.1, beta_max=0.2),
    "zoo.improved_ddpm": over(gamma_of(zoo.improved_ddpm), SHAPE, steps=4, cap=0.9),
    "zoo.score_sde_vp": over(gamma_of(zoo.score_sde_vp), SHAPE, beta_min=0.1, beta_max=20.0),
    "zoo.score_sde_sub_vp": over(gamma_of(zoo.score_sde_sub_vp), SHAPE, beta_min=0.1, beta_max=20.0),
    "zoo.score_sde_ve": over(gamma_of(zoo.score_sde_ve), SHAPE, sigma_min=0.1, sigma_max=20.0),
    "zoo.vdm": over(gamma_of(zoo.vdm), SHAPE, gamma_min=-13.3, gamma_max=5.0),
    "zoo.edm": over(
        gamma_of(zoo.edm), SHAPE, sigma_data=0.5, sigma_min=0.1, sigma_max=20.0, rho=7.0, p_mean=-1.2, p_std=1.2
    ),
    "zoo.flow_matching": over(gamma_of(zoo.flow_matching), SHAPE, sigma_min=0.01, reach=10.0),
    "zoo.blurring": over(gamma_of(zoo.blurring), SHAPE, sigma_blur=2.0, floor=0.001, reach=10.0),
    "zoo.mulan": over(gamma_of(zoo.mulan), *[PRIOR.scale] * 3, gamma_min=-13.3, gamma_max=5.0),
    "zoo.diffusion_forcing": over(gamma_of(zoo.diffusion_forcing), COLUMN, steps=4, lag=1.0),
    "zoo.rolling": over(gamma_of(zoo.rolling), COLUMN, window=2),
    "zoo.mar": over(gamma_of(zoo.mar), COLUMN, steps=4, cap=0.9),
    "zoo.wavelet": over(gamma_of(zoo.wavelet), PRIOR.scale, levels=1, share=0.5),
    "zoo.heat_dissipation": over(gamma_of(zoo.heat_dissipation), SHAPE, blur_min=0.5, blur_max=20.0, noise=0.01),
    "data.crops": over(lambda stride: data.crops("histology", stride)[:2], stride=64),
}  # fmt: skip
NUMBERS = {
    f"{name}: {argument}": (argument, door) for name, doors in FUNCTIONS.items() for argument, door in doors.items()
}
ODD = (
    0,
    -1,
    1,
    2,
    3,
    0.5,
    2.5,
    math.nan,
    math.inf,
    -math.inf,
    True,
    None,
    "3",
    [1],
    np.int64(2),
    np.float32(0.5),
)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NUMBERS)
def test_any_number_is_answered_finitely_or_refused_by_name(name):
    argument, door = NUMBERS[name]
    for value in ODD:
        try:
            answer = door(value)
        except (ValueError, TypeError) as error:
            names = "|".join([argument, *ALIASES.get(argument, ())])
            verb = " must" if len(argument) == 1 else ""  # `a` is a word of English, too
            assert re.search(rf"\b({names})\b{verb}", str(error)), f"{value!r}: {error!r}"
        else:
            assert finite(answer), value


ALIASES = {"beta_max": ("betas",), "count": ("steps",), "r": ("scale",), "exponent": ("scale",)}
