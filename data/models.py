"""Make a shipped model anew: python data/models.py NAME [--out FILE] [--steps N] [--threads N].

NAME is fashion_pca, fashion_columns, fashion_haar, fashion_gud, fashion_causal, fashion_mar_raster, fashion_mar_masked
or histology_columns. Where `GUDLIB_DATA` holds `fashion_mnist_full` (data/build.py writes it) garments are all 60,000
training images, else the 10,000 embedded ones. The state of the run is kept beside FILE every 100 steps: the same
command goes on where the last one stopped. On two cores fashion_haar takes an hour, the others of garments days; the
last is fitted, not trained, in half a minute.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from gudlib import GUD, bases, data, designs, families, mar, priors, references, schedules
from gudlib.files import DATA

QUARTER = 0.25 / 127.5  # of a grey level: the noise at t = 0 of models of patches


def principal(images: Tensor) -> GUD:
    """Principal components of the garments, all noise levels from together to one after another."""
    options = {"conditioning": "film", "fourier": True, "linear": 16, "linear_all": True}
    return GUD.fit(images, basis="pca", a=(0.0, 4.0), width=64, patch=2, multipliers=(1, 2), **options)


def columns(images: Tensor) -> GUD:
    """Pixels, column by column; in half of the training a part is known."""
    return GUD.fit(images, basis="pixel", blocks="columns", known=0.5, reference="histograms", width=64)


def haar(images: Tensor) -> GUD:
    """Wavelets, level by level and within each in blocks of columns; one image in eight along standard diffusion."""
    options = {"conditioning": "local", "fourier": True, "linear": 16, "width": 24}
    blocks = ("levels", "columns 8")
    model = GUD.fit(images, "haar", blocks=blocks, b=(0.25, 1.0), reference="marginals", **options)
    assert isinstance(model.family, families.Sequential)
    prior, end = model.denoiser.prior, model.family.gamma_max_target
    model.family = families.Mixed(model.family, families.SoftConditioning(prior, (1.0, 1.0), end), 1 / 8)
    return model


def transformer(images: Tensor) -> GUD:
    """Patches, at once or one after another, by a transformer."""
    options = {"network": "transformer", "blocks": "patches", "known": 0.0, "width": 192, "depth": 6, "heads": 6}
    model = GUD.fit(images, reference="independent gaussian", **options)
    assert model.family is not None
    spec = families.stopping_at(model.family.spec, QUARTER)
    model.family, model.recommended = families.rebuild(spec, model.denoiser.basis, model.denoiser.prior), {"b": 0.3}
    return model


def causal(images: Tensor) -> GUD:
    """The same, but finished patches don't see others, small enough for two cores."""
    return GUD.fit(images, network="transformer", blocks="patches", known=0.0, causal=True, width=96, depth=4)


def token_by_token(
    kind: str, images: Tensor, labels: Tensor | None, out: Path, settings: dict[str, Any]
) -> mar.Autoregressor:
    """MAR, trained: trunk and head around the grey levels of each pixel, in the same noise as `transformer`."""
    fitted = designs.FittedDesign(designs.Design("plain", 0.0, (0.0, 0.0)), images)
    ends = fitted.family("patches", finest=QUARTER).schedule(b=1.0).gamma(torch.tensor([0.0, 1.0], dtype=torch.float64))
    line = schedules.linear((1, 4, 4), *ends[:, 0, 0, 0].tolist())
    moments = priors.Moments(fitted.prior.mean[:, :4, :4], fitted.prior.variance[:, :4, :4])
    prior = priors.isotropic(moments, float(fitted.prior.scale[0, 0, 0])).float()
    torch.manual_seed(0)
    network = mar.Network(kind, (1, 28, 28), 4, classes=10, width=192, depth=3, heads=6, head=(3, 256))
    model = mar.Autoregressor(network, references.PatchHistograms.fit(bases.Pixel((1, 4, 4)), prior, images))
    config = mar.MarTrainingConfig(**settings, discrete=True, repeats=2, drop=0.5, masking=(0.0, 10.0), save_every=100)
    trainer = mar.MarTrainer(model.train(), images, labels, line, config, out.with_suffix(".state"))
    for _ in tqdm(trainer.run(), total=config.steps, initial=trainer.step, desc=kind):
        pass
    return trainer.averaged()


def tissue(images: Tensor) -> GUD:
    """A normal distribution on the lattice of grey levels, as a reference around which no network has been trained."""
    return GUD.fit(images, "pixel", blocks="columns", reference="lattice gaussian", width=8, multipliers=(1,))


LONG = {"batch": 256, "lr": 1e-3, "warmup": 500, "ema": 0.9995, "steps": 10_800}
SMALL = {"batch": 32, "lr": 2e-3, "ema": 0.999, "weighting": "likelihood"}
RECIPES: dict[str, tuple[Callable[[Tensor], GUD], dict[str, Any]]] = {
    "fashion_pca": (principal, LONG | {"weighting": "answer"}),
    "fashion_columns": (columns, LONG | {"weighting": "likelihood"}),
    "fashion_gud": (transformer, LONG | {"weighting": "likelihood", "steps": 13_900}),
    "fashion_causal": (causal, SMALL | {"warmup": 300, "steps": 3500}),
    "fashion_haar": (haar, SMALL | {"steps": 18000}),
    "histology_columns": (tissue, {"steps": 0}),
}
MAR = {f"fashion_mar_{kind}": LONG | {"weighting": "likelihood", "steps": 7_400} for kind in ("raster", "masked")}


def training_images(name: str) -> tuple[Tensor, Tensor | None, str]:
    """What a model is fitted to, labels, and in words: of tissue, crops of the training region."""
    if name == "histology_columns":
        return data.crops("histology", 3), None, "histology, crops three pixels apart"
    try:
        full = data.load("fashion_mnist_full", "train")
        return full.images, full.labels, "fashion_mnist_full, all training images"
    except FileNotFoundError:
        part = data.load("fashion_mnist", "train")
        return part.images, part.labels, "fashion_mnist, the embedded training images"


def main() -> None:
    """Train, and write the file whole."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*RECIPES, *MAR])
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: the shipped file")
    parser.add_argument("--steps", type=int, help="optimiser steps; default as shipped")
    parser.add_argument("--threads", type=int, help="of the CPU; default all")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    images, labels, what = training_images(arguments.name)
    print(f"{what}: {len(images):,}")
    out = arguments.out or DATA / "checkpoints" / f"{arguments.name}.safetensors"
    given = {"steps": arguments.steps} if arguments.steps else {}
    about = {"data": what, "command": f"python data/models.py {arguments.name}"}
    if arguments.name in MAR:
        settings = MAR[arguments.name] | given
        about["training"] = f"{settings['steps']:,} steps of {settings['batch']} images"
        trained = token_by_token(arguments.name.removeprefix("fashion_mar_"), images, labels, out, settings)
        mar.save(trained, out, half=True, card=about)
        return
    fit, settings = RECIPES[arguments.name]
    settings = settings | given
    model = fit(images)
    if settings["steps"]:
        for _ in model.train_steps(checkpoint=out.with_suffix(".state"), **settings):
            pass
        about["training"] = f"{settings['steps']:,} steps of {settings['batch']} images"
    model.card |= about
    model.save(out, half=True)


if __name__ == "__main__":
    main()
