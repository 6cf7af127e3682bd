r"""gudlib beside its peers: training, sampling, and pictures that grow, on one thread of the CPU.

    python benchmarks/run.py --out runs/bench.json [--quick] [--authors PATH]

Contenders take turns in one process (A B A B ...), and each is given the median of its turns in CPU seconds, which
another load on the machine disturbs less than elapsed time. Ratios are what lasts from machine to machine. The
file also holds parameters, versions, commit and load; a figure is drawn beside it. What is not installed is listed with
the reason.
"""

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}

import matplotlib.pyplot as plt
import peers
import torch
from torch import Tensor, nn

from gudlib import bases, data, denoiser, designs, plotting, priors, samplers, schedules, training
from gudlib.process import Model, Process

QUICK, FULL = (
    {"images": 200, "batch": 4, "rounds": 2, "side": 7, "counts": [4, 8, 16, 32], "target": 0.1,
     "widths": [32, 64], "updates": 2},
    {"images": 4000, "batch": 64, "rounds": 7, "side": 28, "counts": [4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192],
     "target": 0.01, "widths": [128, 256, 512, 1024], "updates": 6},
)  # fmt: skip
PLAIN = designs.Design("plain", 0.0, (0.0, 0.0), "pooled")
METHODS = ["gaussian-pc", "gaussian-2m", "dpm++2m", "heun", "euler-maruyama"]


def interleaved(turns: dict[str, peers.Turn], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each; one turn before the count starts is for warming up."""
    spent: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds + 1):
        for name, turn in turns.items():
            start = time.process_time()
            turn()
            spent[name].append(time.process_time() - start)
    return {name: statistics.median(each[1:]) for name, each in spent.items()}


# Training steps at about equal parameter counts, each in the way its library's own examples train


def ours(images: Tensor, batch: int, width: int, multipliers: tuple[int, ...], patch: int) -> tuple[int, peers.Turn]:
    """`training.Trainer`: dequantisation, clipping and the average of the weights are part of a step."""
    fitted = designs.FittedDesign(PLAIN, images)
    model = fitted.denoiser(width, multipliers=multipliers, patch=patch)
    config = training.TrainingConfig(steps=10**6, batch=batch)
    run = training.Trainer(model, images, fitted.family(), config).run()
    return peers.parameters(model.network), lambda: next(run)


def train(p: dict[str, Any], authors: Path | None) -> dict[str, Any]:
    """Images per CPU second of every library that is there."""
    images = data.load("fashion_mnist", "train").images[: p["images"]]
    builders = {
        "gudlib, patch 1": lambda: ours(images, p["batch"], 16, (1, 2, 4), 1),
        "gudlib, patch 2": lambda: ours(images, p["batch"], 32, (1, 2), 2),
        "diffusers": lambda: peers.diffusers_unet(images, p["batch"]),
        "smalldiffusion": lambda: peers.smalldiffusion_unet(images, p["batch"]),
        "the authors' JAX library": lambda: peers.authors_unet(images, p["batch"], authors),
    }
    found, missing = {}, {}
    for name, build in builders.items():
        try:
            found[name] = build()
            found[name][1]()
        except Exception as error:  # another library, perhaps of another version
            if name in ("gudlib, patch 1", "gudlib, patch 2", "diffusers"):
                raise
            missing[name] = f"not available: {type(error).__name__}: {error}"
    spent = interleaved({name: turn for name, (_, turn) in found.items()}, p["rounds"])
    rows = {name: {"parameters": found[name][0], "images_per_second": p["batch"] / s} for name, s in spent.items()}
    for row in rows.values():
        row["ratio_to_diffusers"] = row["images_per_second"] / rows["diffusers"]["images_per_second"]
    return {"batch": p["batch"], "rounds": p["rounds"], "results": rows, "missing": missing}


# Network evaluations (NFE) and seconds to a given error of the covariance, on the normal distribution of Fashion-MNIST


def normal(side: int) -> tuple[Process, Model, Tensor]:
    """A process with one noise schedule for all pixels, the exact model of normal images, and their covariance."""
    images = data.load("fashion_mnist", "train").images
    images = nn.functional.adaptive_avg_pool2d(images.float(), side).round().byte()
    fitted = designs.FittedDesign(designs.Design("pixel", 0.0, (1.0, 1.0)), images)
    process = fitted.process(1.0)
    white = process.white(data.dequantise(images, torch.Generator().manual_seed(0)).double()).flatten(1)
    values, vectors = torch.linalg.eigh(white.T.cov())

    def model(white_t: Tensor, gamma: Tensor) -> Tensor:
        noise = torch.sigmoid(gamma.flatten()[0])
        solved = white_t.double().flatten(1) @ vectors / ((1 - noise) * values + noise)
        return noise.sqrt() * (solved @ vectors.T).view_as(white_t)

    return process, model, white.T.cov()


def peer(name: str, process: Process, model: Model, n: int) -> Tensor:
    """The map of a scheduler of diffusers from start to end, at the same noise levels as `samplers.push` has."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    levels = process.schedule.gamma(torch.linspace(1, 0, n + 1, dtype=torch.float64)).flatten(1)[:, 0]
    if name == "diffusers DDIM":
        scheduler = DDIMScheduler(num_train_timesteps=n, clip_sample=False, timestep_spacing="leading")
        scheduler.alphas_cumprod = torch.sigmoid(-levels[:-1]).flip(0)
        scheduler.final_alpha_cumprod = torch.sigmoid(-levels[-1])
        scheduler.set_timesteps(n)
    else:
        scheduler = DPMSolverMultistepScheduler(lower_order_final=False, final_sigmas_type="sigma_min")
        scheduler.set_timesteps(n)
        scheduler.sigmas = (levels / 2).exp()
    x = torch.eye(process.prior.mean.numel(), dtype=torch.float64).view(-1, *process.schedule.shape)
    for t, gamma in zip(scheduler.timesteps, levels, strict=False):
        x = scheduler.step(model(x, gamma), t, x).prev_sample
    return x.flatten(1).T.double()


def sample(p: dict[str, Any]) -> dict[str, Any]:
    """NFE to the error aimed at, the error at every NFE, and seconds, which the exact model dominates."""
    process, model, covariance = normal(p["side"])
    ends = process.schedule.gamma(torch.tensor([1.0, 0.0], dtype=torch.float64)).sigmoid()[:, 0, 0, 0]
    start, target = ((1 - noise) * covariance + noise * torch.eye(len(covariance)) for noise in ends)

    def reached(name: str, nfe: int) -> Tensor:
        if name.startswith("diffusers"):
            whole = peer(name, process, model, nfe)
        elif name != "euler-maruyama":
            steps = nfe // (2 if name == "heun" else 1)
            whole = samplers.sample(model, process, len(units), steps, name, start=units).white.flatten(1).T
        else:  # step by step: `push` would hold the matrices of all steps at once
            covariance = start
            for t, s in pairwise(torch.linspace(1, 0, nfe + 1, dtype=torch.float64)):
                step = samplers.euler_maruyama(model, process, units, t, s)
                whole = step.mean.flatten(1).T
                covariance = whole @ covariance @ whole.T + step.std.flatten()[0] ** 2 * torch.eye(len(units))
            return covariance
        return whole @ start @ whole.T

    units = torch.eye(len(covariance), dtype=torch.float64).view(-1, *process.schedule.shape)
    curves, rows = {}, {}
    for name in [*METHODS, "diffusers DPM++2M", "diffusers DDIM"]:
        curves[name] = {}
        for nfe in p["counts"]:
            curves[name][nfe] = float((reached(name, nfe) - target).norm() / target.norm())
            if curves[name][nfe] < p["target"]:
                rows[name] = {"nfe": nfe}
                break
    turns = {name: (lambda name=name, row=row: reached(name, row["nfe"])) for name, row in rows.items()}
    for name, seconds in interleaved(turns, max(p["rounds"] // 3, 1)).items():
        rows[name]["seconds"] = seconds
    missed = [name for name in curves if name not in rows]
    return {"pixels": p["side"] ** 2, "target": p["target"], "results": rows, "missed": missed, "errors": curves}


# Pictures that grow, against a sampler of the whole width; each in a process of its own, whose memory is measured


MOVING, STEPS, CONTEXT = 13, 2, 18  # columns that move at a time, updates for each, finished columns shown


def strip(kind: str, width: int, updates: int) -> dict[str, float]:
    """CPU seconds and peak memory of a picture (3, 32, width): by `samplers.extend` (`window`), or at once (`whole`).

    The network is untrained. All updates of the whole picture are alike, so only some are made and the seconds scaled.
    """
    shape = (3, 32, 32 if kind == "window" else width)
    basis, moments = bases.Pixel(shape), priors.Moments(torch.zeros(shape), torch.full(shape, 0.3))
    prior, b = priors.isotropic(moments), MOVING / (shape[2] - 1 + MOVING)
    model = denoiser.build(basis, prior, 1, width=32, patch=4, conditioning="map")
    process = Process(basis, prior, schedules.sequential(basis.label("column"), b, -12.0, 8.0))
    picture = torch.randn(1, *shape)
    with torch.no_grad():
        model(picture[..., :32], process.schedule.gamma(torch.tensor(0.5))) if kind == "window" else None
    before, start = memory("VmRSS"), time.process_time()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    if kind == "window":
        columns = samplers.extend(model, process, picture, CONTEXT, STEPS)
        made = updates = STEPS * (width + MOVING - 1)
        assert torch.cat(list(islice(columns, width)), dim=-1).shape == (1, 3, 32, width)
    else:
        made, lag = STEPS * (width - 1 + MOVING), (1 - b) / (width - 1)
        times = 0.5 - torch.arange(updates + 1, dtype=torch.float64) * lag / STEPS
        with torch.no_grad():
            for t, s in pairwise(times):
                picture = samplers.METHODS["gaussian"](model, process, picture.double(), t, s).mean
    seconds = (time.process_time() - start) * made / updates
    peak = memory("VmHWM")
    return {"seconds": seconds, "peak_mb": peak, "added_mb": peak - before}


def memory(what: str) -> float:
    """Megabytes of this process, as Linux counts them: resident now (VmRSS) or at most (VmHWM)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[what].split()[0]) / 1024


def strips(p: dict[str, Any]) -> dict[str, Any]:
    """Seconds and memory at every width, and the exponents of their growth from the first to the last."""
    rows: dict[str, dict[int, dict[str, float]]] = {"window": {}, "whole": {}}
    for width in p["widths"]:
        for kind, row in rows.items():
            command = [sys.executable, __file__, "--strip", kind, str(width), str(p["updates"])]
            row[width] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    first, last = p["widths"][0], p["widths"][-1]
    growth = {
        kind: {what: math.log(row[last][what] / row[first][what]) / math.log(last / first) for what in
               ("seconds", "peak_mb")} for kind, row in rows.items()
    }  # fmt: skip
    return {"moving": MOVING, "steps": STEPS, "context": CONTEXT, "results": rows, "exponents": growth}


# Results


def circumstances() -> dict[str, Any]:
    """What the numbers depend on."""
    root, versions = Path(__file__).resolve().parents[1], {}
    for name in ("torch", "diffusers", "smalldiffusion", "jax"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    return {
        "date": time.strftime("%Y-%m-%d"), "commit": git.stdout.strip() or None, "python": platform.python_version(),
        "versions": versions, "processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "load_before": os.getloadavg()[0],
    }  # fmt: skip


def draw(found: dict[str, Any], path: Path) -> None:
    """Three panels: images a second, error against NFE, seconds against width."""
    plotting.use_style()
    _, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    rows = found["training"]["results"]
    bars = left.barh(list(rows), [row["images_per_second"] for row in rows.values()], color="0.6")
    left.bar_label(bars, fmt="%.0f", padding=3)
    left.set(xlabel="images a CPU second", title="training, about 700,000 parameters")
    left.invert_yaxis()
    styles = [*plotting.LINES, {"color": "0.6", "linestyle": "-"}]
    for (name, curve), style in zip(found["sampling"]["errors"].items(), styles, strict=True):
        look = {"marker": "o", "markersize": 3} if name in METHODS else {"marker": "s", "markerfacecolor": "white"}
        middle.loglog(list(curve), list(curve.values()), label=name, **style, **look)
    middle.set(xlabel="network evaluations (NFE)", ylabel="relative error of the covariance", title="sampling a normal")
    middle.legend(fontsize="x-small")
    for (kind, row), style in zip(found["strips"]["results"].items(), plotting.LINES, strict=False):
        right.loglog(list(row), [each["seconds"] for each in row.values()], marker="o", label=kind, **style)
    right.set(xlabel="columns", ylabel="CPU seconds", title="a picture that grows")
    right.set_xticks(list(row), [str(width) for width in row], minor=False)
    right.minorticks_off()
    right.legend()
    plt.savefig(path)


def main() -> None:
    """Read the command line, measure, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="file (.json) to write; the figure goes beside it (.png)")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes that run: a check, no measurement")
    parser.add_argument("--authors", type=Path, help="a checkout of github.com/mathisgerdes/unified-diffusion")
    parser.add_argument("--strip", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.strip:
        kind, width, updates = options.strip
        print(json.dumps(strip(kind, int(width), int(updates))))
        return
    if options.out is None:
        parser.error("--out is needed")
    sizes = QUICK if options.quick else FULL
    found = {"circumstances": circumstances(), "parameters": sizes, "training": train(sizes, options.authors),
             "sampling": sample(sizes), "strips": strips(sizes)}  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    draw(found, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
