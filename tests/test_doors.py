"""Whatever is handed to a public function of images ends in a finite answer, or in an error that names the argument."""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any

import matplotlib
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
    plotting,
    priors,
    references,
    samplers,
    schedules,
    statistics,
    training,
)
from gudlib.exact import gaussian_eps
from gudlib.families import SoftConditioning
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
            assert any(word in str(error) for word in WORDS), f"{type(error).__name__}: {error}"
        else:
            assert finite(answer) or name in MOVING, answer

    check()


MOVING = ("statistics.mirrored", "statistics.randomly_mirrored", "mar.patchify")  # numbers, whatever they are
WORDS = ("images", "values", "data", "real", "generated", "pictures", "fields", "height", "train", "test")
