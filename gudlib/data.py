"""Image sets as tensors: embedded ones, a folder of yours, or the Hugging Face hub.

A split is a parquet table of encoded images; `load` decodes it to grey levels x in {0, ..., 255}. Models see

    scale:       y = x / 127.5 - 1                          in [-1, 1]
    dequantise:  y = (x + u) / 128 - 1,    u ~ U[0, 1)      in [-1, 1)

A density p(y) of dequantised images bounds the probability of their grey levels (A note on the evaluation of
generative models, Theis, van den Oord, Bethge, 2016, https://arxiv.org/abs/1511.01844, section 3.1). With d
pixels times colours, 128 (y + 1) = x + u adds log2(128) = 7 bits to each: bits/dim <= E[-log2 p(y)] / d + 7.

`load_folder` reads any picture files. A split of a named set is taken from the first that has it of
`$GUDLIB_DATA/<name>/<split>.parquet`, the repository's `data/<name>/<split>.parquet` and the hub. A faulty file there
is an error, never passed over.
"""

import io
import json
import os
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from tqdm.auto import tqdm

from gudlib import checks
from gudlib.doors import door
from gudlib.files import DATA, IN_REPOSITORY, with_repository

if TYPE_CHECKING:  # importing them takes a second: only what reads files does
    import PIL.Image
    from datasets import Dataset


COLUMNS = ("image", "img", "label")
TURNED = 0x0112  # EXIF: how the camera was held


@dataclass(frozen=True)
class Source:
    """What a known image set is; `load` checks what it finds against it.

    Rows larger than `shape` are cut into patches on a grid, centred in the row: `strides` gives the pixels from
    patch to patch, in train and test (one wider than the row leaves its central patch; None: no cutting).
    """

    shape: tuple[int, int, int]  # (c, h, w) of the images that `load` returns
    train: int  # how many there are; a folder of `$GUDLIB_DATA` may hold fewer or more
    test: int
    licence: str  # as its publisher states it
    classes: int = 0  # labels are 0 to classes - 1; 0: no labels
    hub: str | None = None  # identifier on the Hugging Face hub; None: embedded
    strides: tuple[int, int] | None = None


KNOWN = {
    "fashion_mnist": Source((1, 28, 28), 10_000, 2_000, "MIT", 10),
    # 69 x 51 patches of one picture's left 384 columns, 33 x 7 of its right 128
    "histology": Source((3, 32, 32), 3_519, 231, "no known copyright restrictions", strides=(7, 15)),
    "fashion_mnist_full": Source((1, 28, 28), 60_000, 10_000, "MIT", 10, "zalando-datasets/fashion_mnist"),
    "cifar10": Source((3, 32, 32), 50_000, 10_000, "not stated", 10, "uoft-cs/cifar10"),
    # the centres of 96 x 96 rows; the first use downloads 7.6 GB
    "pcam": Source((3, 32, 32), 262_144, 32_768, "CC0", 2, "1aurent/PatchCamelyon", (96, 96)),
}


@dataclass(frozen=True, eq=False)
class ImageSet:
    """One split: grey levels, classes and their names (where there are any), and where it came from."""

    name: str
    split: str
    origin: str  # "GUDLIB_DATA", "embedded" or "hub"
    images: UInt8[Tensor, "n c h w"] = field(repr=False)
    labels: Int64[Tensor, " n"] | None = field(repr=False)
    class_names: tuple[str, ...] = field(repr=False)


@door
def load(name: str, split: str) -> ImageSet:
    """Load "train" or "test" of a set of `KNOWN`, or of a folder of `$GUDLIB_DATA`, in the table's order.

    Raises:
        ValueError: unknown name or split; a file that is corrupt or holds something else than expected.
        FileNotFoundError: the split is nowhere; says where it was searched for, and the ways to get it.

    >>> load("histology", "test").images.shape
    torch.Size([231, 3, 32, 32])
    """
    place, source = locate(name, split), KNOWN.get(name)
    if isinstance(place, Path):
        dataset, origin = _read(place), "embedded" if DATA in place.parents else "GUDLIB_DATA"
    else:
        dataset, origin = _download(name, split, place), "hub"
    _expect(len(dataset) > 0, f"{place}", "no rows", "images")
    labels, names = None, ()
    if "label" in dataset.features or (source and source.classes):
        labels, names = _labels(dataset, f"{place}", source)
    images = _images(dataset, f"{place}", source, split)
    if labels is not None:
        labels = labels.repeat_interleave(len(images) // len(labels))  # patches share their row's
    if source and origin != "GUDLIB_DATA":
        count = source.train if split == "train" else source.test
        _expect(len(images) == count, f"{place}", f"{len(images)} images", f"{count}")
    return ImageSet(name, split, origin, images, labels, names)


@door
def crops(name: str, stride: int) -> UInt8[Tensor, "n c h w"]:
    """Training images of a set that `load` cuts from larger rows, cut anew, `stride` pixels apart both ways.

    Raises:
        ValueError: if the set is unknown or not cut, or for a stride below 1; as `load`.

    >>> crops("histology", 7).shape == load("histology", "train").images.shape
    True
    """
    place, source = locate(name, "train"), KNOWN.get(name)
    if source is None or source.strides is None:
        cut = [n for n, s in KNOWN.items() if s.strides]
        raise ValueError(f"name must be a set whose images are cut from larger ones, {', '.join(cut)}; got {name!r}")
    stride = checks.whole("stride", stride)
    dataset = _read(place) if isinstance(place, Path) else _download(name, "train", place)
    return _images(dataset, f"{place}", replace(source, strides=(stride, stride)), "train")


@door
def load_folder(
    path: str | Path, size: int | tuple[int, int], colours: str = "auto", seed: int = 0, skip_damaged: bool = False
) -> UInt8[Tensor, "n c h w"]:
    """Read all pictures in a folder and the folders in it, each cut to its centre and brought to one size.

    Files are read as `datasets` reads an image folder; what is transparent becomes white, 16 bits become 8, and
    photographs are turned as their camera was held. Hidden files are passed over.

    Arguments:
        path: the folder.
        size: height and width, or one number for both; pictures are cut at two sides to that shape, then resampled.
        colours: `auto` is grey (c = 1) if no picture has colours, else RGB (c = 3); `grey` and `rgb` force it.
        seed: of the order, which is random, so that a slice is a fair sample of the whole.
        skip_damaged: leave out files that can't be read, with a warning that names them, instead of refusing all.

    Raises:
        FileNotFoundError: if there is no such folder, or no picture in it.
        ValueError: for a size or colours that make no sense, or files that can't be read; it names them.
    """
    sides = tuple(size) if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
    height, width = (checks.whole("size", side, least=2) for side in sides)
    checks.one_of("colours", colours, ("auto", "grey", "rgb"))
    seed, skip_damaged = checks.seed("seed", seed), checks.flag("skip_damaged", skip_damaged)
    if not Path(path).is_dir():
        raise FileNotFoundError(f"path must be a folder of pictures; there is none at {path}")
    from datasets import Image
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    files, others = [], 0
    for name in tqdm(_files_in(str(path)), desc="looking for pictures", unit=" files", delay=1):
        known = os.path.splitext(name)[1].lower() in ImageFolder.EXTENSIONS
        files += [name] * known
        others += not known
    if not files:
        raise FileNotFoundError(f"no pictures in {path}: {others} files, none with the ending of an image file")
    files.sort()
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist()
    mode = "L" if colours == "grey" else "RGB"
    pictures = np.empty((len(files), len(mode), height, width), np.uint8)
    broken, small, read = [], 0, 0
    for i in tqdm(order, desc="pictures", delay=1):
        try:
            with open(files[i], "rb") as file:
                picture = Image().decode_example({"path": None, "bytes": file.read()})
            pixels = _sized(picture, height, width, mode).reshape(height, width, -1).transpose(2, 0, 1)
        except Exception as error:  # Pillow raises a dozen types on corrupt files
            broken.append(f"{files[i]} ({type(error).__name__}: {error})")
            continue
        pictures[read] = pixels
        small, read = small + (picture.height < height or picture.width < width), read + 1
    if broken:
        some = "\n  ".join(sorted(broken)[:5] + ["..."] * (len(broken) > 5))
        told = f"{len(broken)} of {len(files)} files can't be read"
        if not skip_damaged or not read:
            raise ValueError(f"{told}; remove or mend them, or say skip_damaged=True:\n  {some}")
        warnings.warn(f"{told} and are left out:\n  {some}", stacklevel=3)
    if small:
        warnings.warn(f"{small} of {len(files)} pictures are smaller than {height} x {width}: enlarged", stacklevel=3)
    images = torch.from_numpy(pictures)[:read]
    if colours == "auto" and all(bool((part == part[:, :1]).all()) for part in images.split(1024)):
        return images[:, :1].contiguous()
    return images


def _files_in(folder: str) -> Iterator[str]:
    """Files in a folder and the folders in it that may be read, one at a time; no hidden files."""
    try:
        listed = os.scandir(folder)
    except PermissionError:
        return
    with listed as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files_in(entry.path)
            elif entry.is_file() and not entry.name.startswith("."):
                yield entry.path


def _sized(picture: "PIL.Image.Image", height: int, width: int, mode: str) -> np.ndarray:
    """An 8-bit array (height, width), or (height, width, 3) if the mode is RGB."""
    from PIL import Image, ImageOps

    return np.asarray(ImageOps.fit(_eight_bits(picture).convert(mode), (width, height), Image.Resampling.LANCZOS))


@door
def locate(name: str, split: str) -> Path | str:
    """Find where `load` takes a split from: a file, or an identifier on the hub. Reads nothing, raises as it.

    >>> locate("fashion_mnist", "train").name, locate("cifar10", "test")
    ('train.parquet', 'uoft-cs/cifar10')
    """
    own = os.environ.get("GUDLIB_DATA")
    if own and not Path(own).is_dir():
        raise FileNotFoundError(f"GUDLIB_DATA={own} is not a folder")
    if name not in KNOWN and not (own and name and (Path(own) / name).is_dir()):
        yours = f"or a folder of GUDLIB_DATA={own}" if own else "GUDLIB_DATA is not set"
        raise ValueError(f"unknown image set {name!r}; known: {', '.join(KNOWN)}; {yours}")
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}; known: train, test")
    if found := [path for path in _files(name, split) if path.exists()]:
        return found[0]
    if name in KNOWN and (hub := KNOWN[name].hub):
        return hub
    if name in KNOWN and not IN_REPOSITORY:
        raise FileNotFoundError(
            with_repository(f"image set {name!r}", f"a folder GUDLIB_DATA with {name}/{split}.parquet")
        )
    raise FileNotFoundError(_missing(name, split))


@door
def scale(images: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Map grey levels to y = x / 127.5 - 1 in [-1, 1], float32; `to_uint8` inverts it exactly.

    Raises:
        ValueError: if they are not uint8.
    """
    return checks.levels("images", images).float() / 127.5 - 1


@door
def dequantise(images: UInt8[Tensor, "*shape"], generator: torch.Generator) -> Float[Tensor, "*shape"]:
    """Map grey levels to y = (x + u) / 128 - 1 in [-1, 1), float32; `to_uint8` inverts it exactly.

    u takes 2^16 values, with which x + u is exact in float32: it never rounds up to the next grey level.

    Raises:
        ValueError: if they are not uint8.
    """
    checks.levels("images", images)
    u = torch.randint(2**16, images.shape, generator=generator, dtype=torch.int32, device=images.device)
    return (images + u.float() / 2**16) / 128 - 1


@door
def to_uint8(values: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Map values to grey levels for viewing: floor(128 (y + 1)), clamped to 0 and 255.

    Raises:
        ValueError: if some are not finite.
    """
    checks.finite("values", values)
    return (128 * (values.float() + 1)).floor().clamp(0, 255).to(torch.uint8)


def _files(name: str, split: str) -> list[Path]:
    roots = [os.environ.get("GUDLIB_DATA"), DATA]
    return [Path(root) / name / f"{split}.parquet" for root in roots if root]


def _missing(name: str, split: str, hub: str = "") -> str:
    tried = [f"{path}: no such file" for path in _files(name, split)] + [hub] * bool(hub)
    online, embedded = ([n for n, s in KNOWN.items() if bool(s.hub) is there] for there in (True, False))
    return "\n  ".join([f"{name}/{split} not found. Searched for:", *tried]) + (
        f"\nThree ways to get data: go online (for {', '.join(online)}); set GUDLIB_DATA to a folder with "
        f"{name}/{split}.parquet, columns image (or img) and label; use an embedded set: {', '.join(embedded)}."
    )


def _expect(right: bool, where: str, found: str, expected: str) -> None:
    if not right:
        raise ValueError(f"{where}: found {found}, expected {expected}")


def _read(path: Path) -> "Dataset":
    """Read a file into memory: `datasets.load_dataset` would copy it to a cache in the user's home.

    Only columns that are used; what others hold doesn't matter.
    """
    import pyarrow.parquet as pq
    from datasets import Dataset

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            table = file.read(columns=[name for name in COLUMNS if name in names])
    except (ValueError, OSError) as error:  # pyarrow's are either
        found = f"{path.stat().st_size} bytes, truncated or corrupt ({error})"
        raise ValueError(f"{path}: found {found}, expected a parquet file") from error
    there = bool({"image", "img"} & set(table.schema.names))
    _expect(there, f"{path}", f"columns {', '.join(names)}", "an image column, image or img")
    return Dataset(table.replace_schema_metadata(_features(table.schema.metadata, table.schema.names)))


def _features(metadata: dict[bytes, bytes] | None, names: Sequence[str]) -> dict[bytes, bytes] | None:
    """What a file tells `datasets` of these columns, the names of classes; nothing if it can't be read."""
    try:
        told = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {b"huggingface": json.dumps({"info": {"features": {name: told[name] for name in names}}}).encode()}
    except (KeyError, TypeError, ValueError):
        return None


def _download(name: str, split: str, hub: str) -> "Dataset":
    """Take a split from the hub, or from the cache of `datasets` where the hub is silent for 5 seconds."""
    from datasets import config, load_dataset

    offline, url = config.HF_HUB_OFFLINE, f"{config.HF_ENDPOINT}/datasets/{hub}"
    why = "HF_HUB_OFFLINE is set" if offline else ""
    try:
        if not offline:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5).close()
    except OSError as error:  # a refusal is an answer too: `datasets` will say what is wrong
        why = "" if isinstance(error, urllib.error.HTTPError) else f"no answer ({error})"
    try:
        config.HF_HUB_OFFLINE = bool(why)  # else it retries for half a minute before it turns to its cache
        return load_dataset(hub, split=split)
    except Exception as error:
        why = why or f"{type(error).__name__}: {error}".split("\n")[0]
        raise FileNotFoundError(_missing(name, split, f"{url}: {why}; and not in the cache")) from error
    finally:
        config.HF_HUB_OFFLINE = offline


def _labels(dataset: "Dataset", where: str, source: Source | None) -> tuple[Int64[Tensor, " n"] | None, tuple]:
    _expect("label" in dataset.features, where, f"columns {', '.join(dataset.features)}", "also label")
    column, classes = dataset.data.column("label"), source.classes if source else 0
    wanted = f"whole numbers from 0 to {classes - 1}" if classes else "whole numbers from 0, or -1 in all rows"
    kind = f"{column.type}"
    _expect(kind.startswith(("int", "uint", "bool")), where, f"labels of type {kind}", wanted)
    _expect(not column.null_count, where, f"{column.null_count} rows without a label", wanted)
    labels = column.to_numpy().astype(np.int64)
    if not classes and (labels == -1).all():  # hidden, as in test sets of competitions
        return None, ()
    low, high = labels.min(), labels.max()
    _expect(bool(low >= 0 and (not classes or high < classes)), where, f"labels from {low} to {high}", wanted)
    return torch.from_numpy(labels), tuple(getattr(dataset.features["label"], "names", ()))


def _images(dataset: "Dataset", where: str, source: Source | None, split: str) -> UInt8[Tensor, "n c h w"]:
    """Decode each row, check it against the first and the source, and cut it into patches."""
    column = next((name for name in ("image", "img") if name in dataset.features), "")
    _expect(column != "", where, f"columns {', '.join(dataset.features)}", "an image column, image or img")
    kind = str(dataset.data.schema.field(column).type)
    fits = kind.startswith("struct<") and {"bytes", "path"} & set(dataset.data.schema.field(column).type.names)
    _expect(bool(fits), where, f"column {column} of {kind}", "pictures as datasets.Image() has them, bytes or path")
    cells = dataset.data.column(column)
    full = _pixels(cells[0].as_py(), f"{where}, row 0").shape
    c, h, w = source.shape if source else full
    stride = source.strides[split == "test"] if source and source.strides else 0
    fits = full[0] == c and full[1] >= h and full[2] >= w if stride else full == (c, h, w)
    _expect(fits, where, f"images (c, h, w) = {full}", f"{(c, h, w)}{' or larger' * bool(stride)}")
    rooms = full[1] - h, full[2] - w
    tops, lefts = (range(room % stride // 2, room + 1, stride) if stride else [0] for room in rooms)
    images = np.empty((len(cells), len(tops), len(lefts), c, h, w), np.uint8)
    for i, cell in enumerate(cells):
        pixels = _pixels(cell.as_py(), f"{where}, row {i}")
        _expect(pixels.shape == full, where, f"row {i} of shape {pixels.shape}", f"{full} as in row 0")
        for j, top in enumerate(tops):
            for k, left in enumerate(lefts):
                images[i, j, k] = pixels[:, top : top + h, left : left + w]
    return torch.from_numpy(images.reshape(-1, c, h, w))


def _pixels(cell: dict[str, Any] | None, where: str) -> np.ndarray:
    """Decode a row's picture to an array (c, h, w), 8 bits, grey or RGB as it is itself."""
    from PIL import Image, ImageOps

    encoded, path = (cell or {}).get("bytes"), (cell or {}).get("path")
    if encoded is None and path is None:
        raise ValueError(f"{where}: found no picture, expected one in each row")
    try:
        with Image.open(io.BytesIO(encoded) if encoded is not None else str(path)) as image:
            if image.getexif().get(TURNED, 1) != 1:
                image = ImageOps.exif_transpose(image)
            image = _eight_bits(image)
            shape = image.height, image.width, len(image.getbands())
            return np.frombuffer(image.tobytes(), np.uint8).reshape(shape).transpose(2, 0, 1)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    except Exception as error:  # Pillow raises a dozen types on corrupt bytes
        what = (
            f"a file {path} that can't be read"
            if encoded is None
            else f"{len(encoded)} bytes that are no whole picture"
        )
        raise ValueError(f"{where}: found {what}, expected a picture that Pillow reads") from error


def _eight_bits(picture: "PIL.Image.Image") -> "PIL.Image.Image":
    """The same in 8 bits, grey or RGB; what is transparent on white, of several frames the first."""
    from PIL import Image

    if picture.mode in ("L", "RGB") and not picture.has_transparency_data:
        return picture
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
    if picture.mode == "I":  # 32 bits that hold 8 or 16
        values = np.asarray(picture)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"found numbers from {values.min()} to {values.max()}, expected 0 to 255 or to 65535")
        return Image.fromarray((values // 257 if values.max() > 255 else values).astype(np.uint8))
    if picture.mode == "F":
        raise ValueError("found numbers of 32 bits, whose black and white are not known; save it with 8 or 16")
    grey = picture.mode in ("1", "L", "LA", "La")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("L" if grey else "RGB")
