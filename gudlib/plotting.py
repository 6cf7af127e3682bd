"""The house style, and the figures that several notebooks share. Functions draw arrays and return axes.

One palette, distinguishable without colour: lines also differ in dash and darkness (`LINES`), maps run from dark to
light.
"""

import html
import math
from collections.abc import Iterable, Sequence
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
from cycler import cycler
from IPython.display import display
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from torch import Tensor
from torch.nn.functional import one_hot

from gudlib import checks
from gudlib.bases import Basis
from gudlib.doors import door, inner
from gudlib.process import Process
from gudlib.schedules import Schedule

# Okabe and Ito's colours for the colour-blind, from dark to light, each with a dash of its own
COLOURS = ["#000000", "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9"]
DASHES = ["-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)), (0, (9, 2)), (0, (3, 1, 1, 1, 1, 1))]
LINES = [{"color": c, "linestyle": d} for c, d in zip(COLOURS, DASHES, strict=True)]
MAP = "cividis"


def use_style() -> None:
    """Set the style of every figure of the companion."""
    sns.set_theme(context="notebook", style="ticks")
    plt.rcParams.update(
        {
            "figure.figsize": (8, 3.2),
            "figure.dpi": 90,
            "savefig.bbox": "tight",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.prop_cycle": cycler(color=COLOURS) + cycler(linestyle=DASHES),
            "axes.titlesize": "medium",
            "axes.labelsize": "medium",
            "legend.frameon": False,
            "image.cmap": MAP,
            "font.size": 10,
        }
    )


@inner  # NaN is white
def image(ax: Axes, picture: Float[Tensor, "c h w"], title: str = "", limits: tuple[float, float] = (-1, 1)) -> Axes:
    """Draw one image, grey or RGB, without axes; `limits` are the values shown as black and white, NaN is white."""
    if not picture.numel():
        raise ValueError(f"picture must not be empty; got {checks.what(picture)}")
    shown = ((picture.detach().cpu().float() - limits[0]) / (limits[1] - limits[0])).clamp(0, 1)
    ax.imshow(shown.permute(1, 2, 0).numpy() if len(shown) == 3 else shown[0].numpy(), cmap="gray", vmin=0, vmax=1)
    ax.set_title(title, fontsize="small")
    ax.set_xticks([])
    ax.set_yticks([])
    sns.despine(ax=ax, left=True, bottom=True)
    return ax


@door
def image_rows(
    rows: Sequence[Float[Tensor, "n c h w"] | Sequence[Float[Tensor, "c h w"]]],
    labels: Sequence[str],
    titles: Sequence[str] = (),
    limits: tuple[float, float] | None = (-1, 1),
    size: float = 0.9,
) -> list[Axes]:
    """Rows of images with a label at the left of each row and, if given, titles over the columns.

    Arguments:
        rows: for each row its images (n, c, h, w), or one by one if their sizes differ, in units of the data; NaN is
            white.
        labels: one for each row.
        titles: one for each column.
        limits: values shown as black and white; None scales every image to its own largest magnitude.
        size: of one image, inches.
    """
    if not len(rows) or len(rows) != len(labels):
        raise ValueError(f"rows must be at least one, with a label each; got {len(rows)} rows and {len(labels)} labels")
    columns = max(len(row) for row in rows)
    _, axes = plt.subplots(
        len(rows), columns, figsize=(size * columns + 1.3, size * len(rows) + 0.3), squeeze=False,
        gridspec_kw={"wspace": 0.05, "hspace": 0.08},
    )  # fmt: skip
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        for j in range(columns):
            if j >= len(row):
                axes[i, j].axis("off")
                continue
            reach = float(row[j].abs().max()) or 1.0
            image(axes[i, j], row[j], titles[j] if titles and i == 0 else "", limits or (-reach, reach))
        axes[i, 0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize="small")
    return list(axes.flat)


@door
def sample_grid(pictures: Float[Tensor, "n c h w"], columns: int = 8, title: str = "", size: float = 0.8) -> Axes:
    """All images as one mosaic with thin gaps, `columns` to a row."""
    n, c, h, w = checks.data("pictures", pictures).shape
    columns, size = checks.whole("columns", columns), checks.real("size", size, above=0)
    rows = -(-n // columns)
    sheet = torch.ones(c, rows * (h + 1) - 1, columns * (w + 1) - 1)
    for k, picture in enumerate(pictures.detach().cpu().clamp(-1, 1)):
        i, j = divmod(k, columns)
        sheet[:, i * (h + 1) : i * (h + 1) + h, j * (w + 1) : j * (w + 1) + w] = picture
    _, ax = plt.subplots(figsize=(size * columns, size * rows * h / w + 0.3))
    return image(ax, sheet, title)


@door
def forward_strip(
    process: Process, picture: Float[Tensor, "c h w"], times: Sequence[float], noise: Float[Tensor, "c h w"]
) -> Float[Tensor, "t c h w"]:
    """One image diffused to several times with one noise throughout: the rows of the paper's figure 4.

    Arguments:
        process: basis, prior and schedule.
        picture: the image, in units of the data.
        times: t in [0, 1].
        noise: white components of the noise.
    """
    t = torch.tensor(times, dtype=picture.dtype)
    white = process.white(picture[None])
    return process.data(process.schedule.alpha(t) * white + process.schedule.sigma(t) * noise.to(picture))


@door
def snr_fan(ax: Axes, schedule: Schedule, label: Float[Tensor, "c h w"], name: str = "", lines: int = 9) -> Axes:
    """log SNR of unit-variance components along t, from dark (lowest label) to light (highest).

    Arguments:
        ax: where to draw.
        schedule: of the components.
        label: by which components are chosen and coloured.
        name: of the label, with its unit, for the colour bar; no bar without it.
        lines: how many components to draw, at evenly spread labels.
    """
    lines = checks.whole("lines", lines)
    t = torch.linspace(0, 1, 201, dtype=torch.float64)
    log_snr = -schedule.gamma(t).flatten(1)
    low, high = float(label.min()), float(label.max())
    scale, colours = Normalize(low, high if high > low else low + 1), plt.get_cmap(MAP)
    for value, width in zip(np.linspace(low, high, lines), np.linspace(2.6, 1.0, lines), strict=True):
        nearest = int((label.flatten() - value).abs().argmin())
        ax.plot(t, log_snr[:, nearest], color=colours(0.9 * scale(value)), linestyle="-", linewidth=width)
    ax.axhline(0, color="0.6", linewidth=0.8, linestyle=":")
    ax.set(xlabel="time t  (0 = data, 1 = noise)", ylabel="log SNR", xlim=(0, 1))
    if name:
        ax.figure.colorbar(plt.cm.ScalarMappable(scale, colours), ax=ax, pad=0.02).set_label(name)
    return ax


@door
def atoms(basis: Basis, indices: Sequence[int]) -> Float[Tensor, "n c h w"]:
    """The images of single components: rows of U, by their place in the flattened (c, h, w) array."""
    count = math.prod(basis.shape)
    places = [checks.whole("indices", index, 0, count - 1) for index in indices]
    if not places:
        raise ValueError("indices must be at least one; got none")
    return basis.inverse(one_hot(torch.tensor(places), count).float().view(-1, *basis.shape))


@door
def matrix(ax: Axes, values: Float[Tensor, "n m"], title: str = "", limits: tuple[float, float] = (0, 1)) -> Axes:
    """Draw a small matrix with its numbers written in, rows and columns counted from 1."""
    values = checks.single(values.detach().cpu())
    ax.imshow(values, vmin=limits[0], vmax=limits[1])
    for i, row in enumerate(values.tolist()):
        for j, value in enumerate(row):
            ink = "white" if value < limits[0] + 0.6 * (limits[1] - limits[0]) else "black"
            ax.text(j, i, f"{value:.2f}".replace("-0.00", "0.00"), ha="center", va="center", fontsize=8, color=ink)
    ax.set(title=title, xticks=range(values.shape[1]), yticks=range(values.shape[0]))
    ax.set(xticklabels=range(1, values.shape[1] + 1), yticklabels=range(1, values.shape[0] + 1))
    return ax


@door
def trails(ax: Axes, states: Float[Tensor, "k n 2"]) -> LineCollection:
    """Draw n trajectories in the plane, each from dark to light along its own length, with a dot where it ends."""
    states = checks.single(states.detach().cpu())
    steps = torch.stack([states[:-1], states[1:]], dim=2)  # (k - 1, n, 2 ends, 2)
    travelled = steps.diff(dim=2).norm(dim=-1)[..., 0].cumsum(0)
    shade = 0.9 * travelled / travelled[-1]
    lines = LineCollection(list(steps.flatten(0, 1).numpy()), clim=(0, 1), cmap=MAP, linewidths=1.6)
    lines.set_array(shade.flatten().numpy())
    ax.add_collection(lines)
    ax.scatter(*states[-1].T, s=14, color=plt.get_cmap(MAP)(0.9), edgecolor="black", linewidth=0.5, zorder=3)
    return lines


@door
def describe(axes: Axes | Iterable[Axes]) -> None:
    """Say what figures show: title, axis labels and for each line its length, first, last, smallest, largest value.

    The comparison of notebook outputs does not see pictures; it sees this, which a page shows folded.
    """
    told = []
    for ax in [axes] if isinstance(axes, Axes) else axes:
        if not isinstance(ax, Axes):
            raise ValueError(f"axes must be of matplotlib; got {ax!r}")
        if not (ax.lines or ax.images):
            continue
        told.append(f"{ax.get_title() or 'untitled'} | x: {ax.get_xlabel() or '-'} | y: {ax.get_ylabel() or '-'}")
        names = cycle("abcdefghijklmnopqrstuvwxyz")
        for name, line in zip(names, ax.lines, strict=False):
            y = np.asarray(line.get_ydata(), dtype=float)
            label = str(line.get_label())
            shown = name if label.startswith("_") else label
            told.append(f"  {shown}: n={len(y)} first={y[0]:.3g} last={y[-1]:.3g} min={y.min():.3g} max={y.max():.3g}")
        for drawn in ax.images:
            y = np.asarray(drawn.get_array(), dtype=float)
            size = "x".join(map(str, y.shape))
            told.append(f"  image {size}: mean={y.mean():.2g} min={y.min():.2g} max={y.max():.2g}")
    if told:
        display(_Folded("\n".join(told)))


class _Folded:
    """A text that a page shows when it is asked to."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return f"<details><summary>the figure in numbers</summary><pre>{html.escape(self.text)}</pre></details>"
