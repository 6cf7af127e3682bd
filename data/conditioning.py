"""Ways to tell a network its noise levels, at equal steps: python data/conditioning.py [--steps N] [--out FILE].

Garments, pixels in columns, b log-uniform; the same reference distribution, batches and noise for all. `film`: means
of the 28 columns scale and shift every layer; `attention`: every place of the picture attends to those 28 (the paper's
cross-attention); `local`: the noise level of each place scales and shifts there. Three seeds take half an hour on one
core; a row that is in the file already is not made again.
"""

import argparse
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from gudlib import GUD, data, denoiser, devices, families
from gudlib.files import DATA, replacing

TOLD = {
    "film": {"groups": 28, "label": "column"},
    "attention": {"groups": 28, "label": "column"},
    "local": {"groups": 1},
}
SOFTNESS = (1.0, 0.5, 0.3)


def row(start: GUD, told: str, seed: int, steps: int) -> dict[str, object]:
    """Train one, and bound 200 test images."""
    torch.manual_seed(seed)
    options = {"width": 16, "patch": 2, "multipliers": (1, 2), "fourier": True, "conditioning": told} | TOLD[told]
    reference = start.denoiser.reference
    built = denoiser.build(reference.basis, reference.prior, reference=reference, **options)
    family = families.Sequential(built.basis, built.prior, "columns", finest=0.25 / 127.5)
    model = GUD(built.to(devices.default()), family)
    settings = {"batch": 32, "lr": 2e-3, "ema": 0.99, "weighting": "likelihood", "seed": seed}
    images, test = (data.load("fashion_mnist", split).images for split in ("train", "test"))
    loss = [record.loss for record in model.train_steps(steps, images=images, progress=False, **settings)][-200:]
    found = {f"bits at b = {b:g}": model.bits_per_dim(test[::10], b=b, draws=4) for b in SOFTNESS}
    weights = sum(p.numel() for p in built.network.parameters())
    return {"told": told, "seed": seed, "steps": steps, "weights": weights, "loss": sum(loss) / len(loss)} | found


def main() -> None:
    """Three ways, three seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--out", type=Path, default=DATA / "grid" / "conditioning.parquet")
    arguments = parser.parse_args()
    done = pd.read_parquet(arguments.out) if arguments.out.exists() else pd.DataFrame(columns=["told", "seed", "steps"])
    start = GUD.fit(data.load("fashion_mnist", "train").images, "pixel", blocks="columns", reference="histograms")
    for seed, told in tqdm(list(product(range(3), TOLD)), desc="models"):
        if ((done["told"] == told) & (done["seed"] == seed) & (done["steps"] == arguments.steps)).any():
            continue
        done = pd.concat([done, pd.DataFrame([row(start, told, seed, arguments.steps)])], ignore_index=True)
        with replacing(arguments.out) as file:
            done.to_parquet(file)


if __name__ == "__main__":
    main()
