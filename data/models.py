"""Make a shipped model anew: python data/models.py NAME [--out FILE] [--steps N] [--threads N].

NAME is fashion_pca, fashion_columns, fashion_haar or histology_columns. Where `GUDLIB_DATA` holds `fashion_mnist_full`
(data/build.py writes it) garments are all 60,000 training images, else the 10,000 embedded ones. The state of the run
is kept beside FILE every 100 steps: the same command goes on where the last one stopped. On two cores the first two
take days, the third an hour; the last is fitted, not trained, in half a minute.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gudlib import GUD, data, families
from gudlib.files import DATA


def principal(images: torch.Tensor) -> GUD:
    """Principal components of the garments, all noise levels from together to one after another."""
    options = {"conditioning": "film", "fourier": True, "linear": 16, "linear_all": True}
    return GUD.fit(images, basis="pca", a=(0.0, 4.0), width=64, patch=2, multipliers=(1, 2), **options)


def columns(images: torch.Tensor) -> GUD:
    """Pixels, column by column; in half of the training a part is known."""
    return GUD.fit(images, basis="pixel", blocks="columns", known=0.5, reference="histograms", width=64)


def haar(images: torch.Tensor) -> GUD:
    """Wavelets, level by level and within each in blocks of columns; one image in eight along standard diffusion."""
    options = {"conditioning": "local", "fourier": True, "linear": 16, "width": 24}
    blocks = ("levels", "columns 8")
    model = GUD.fit(images, "haar", blocks=blocks, b=(0.25, 1.0), reference="marginals", **options)
    assert isinstance(model.family, families.Sequential)
    prior, end = model.denoiser.prior, model.family.gamma_max_target
    model.family = families.Mixed(model.family, families.SoftConditioning(prior, (1.0, 1.0), end), 1 / 8)
    return model


def tissue(images: torch.Tensor) -> GUD:
    """A normal distribution on the lattice of grey levels, as a reference around which no network has been trained."""
    return GUD.fit(images, "pixel", blocks="columns", reference="lattice gaussian", width=8, multipliers=(1,))


LONG = {"batch": 256, "lr": 1e-3, "warmup": 500, "ema": 0.9995, "steps": 10_800}
RECIPES: dict[str, tuple[Callable[[torch.Tensor], GUD], dict[str, Any]]] = {
    "fashion_pca": (principal, LONG | {"weighting": "answer"}),
    "fashion_columns": (columns, LONG | {"weighting": "likelihood"}),
    "fashion_haar": (haar, {"batch": 32, "lr": 2e-3, "ema": 0.999, "steps": 18000, "weighting": "likelihood"}),
    "histology_columns": (tissue, {"steps": 0}),
}


def training_images(name: str) -> tuple[torch.Tensor, str]:
    """What a model is fitted to, and in words: of tissue, crops of the training region."""
    if name == "histology_columns":
        return data.crops("histology", 3), "histology, crops three pixels apart"
    try:
        return data.load("fashion_mnist_full", "train").images, "fashion_mnist_full, all training images"
    except FileNotFoundError:
        return data.load("fashion_mnist", "train").images, "fashion_mnist, the embedded training images"


def main() -> None:
    """Train, and write the file whole."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: the shipped file")
    parser.add_argument("--steps", type=int, help="optimiser steps; default as shipped")
    parser.add_argument("--threads", type=int, help="of the CPU; default all")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    images, what = training_images(arguments.name)
    print(f"{what}: {len(images):,}")
    fit, settings = RECIPES[arguments.name]
    out = arguments.out or DATA / "checkpoints" / f"{arguments.name}.safetensors"
    settings = settings | ({"steps": arguments.steps} if arguments.steps else {})
    model = fit(images)
    if settings["steps"]:
        for _ in model.train_steps(checkpoint=out.with_suffix(".state"), **settings):
            pass
    model.card |= {"data": what, "command": f"python data/models.py {arguments.name}"}
    model.save(out, half=True)


if __name__ == "__main__":
    main()
