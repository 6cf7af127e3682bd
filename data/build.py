"""Build the embedded image sets: python data/build.py --fashion DIR --picture FILE.

DIR holds Fashion-MNIST's four idx files (Debian's package dataset-fashion-mnist puts them in
/usr/share/datasets/fashion-mnist) and FILE is scikit-image's immunohistochemistry picture (skimage/data/ihc.png in
its wheel). They must have the sums below. The result lies next to this script; two runs write the same bytes.

With --full FOLDER instead of --picture, all 70,000 garments are written to FOLDER/fashion_mnist_full, where
`GUDLIB_DATA=FOLDER` lets `gudlib.data.load("fashion_mnist_full", split)` find them.
"""

import argparse
import gzip
import hashlib
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features
from datasets import Image as ImageFeature
from PIL import Image

HERE = Path(__file__).resolve().parent
INPUTS = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
    "ihc.png": "f8dd1aa387ddd1f49d8ad13b50921b237df8e9b262606d258770687b0ef93cef",
}
CLASSES = "T - shirt / top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(",")  # as the hub's
PER_CLASS: dict[str, int | None] = {"train": 1000, "test": 200}  # the first of each class, in the original order
TRAIN_COLUMNS = 384  # of the picture's 512: train is left of this line, test right of it


def read(path: Path) -> bytes:
    """The file's bytes, if they are the ones this script was written for."""
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != INPUTS.get(path.name):
        raise SystemExit(f"{path}: found sha256 {digest}, expected {INPUTS.get(path.name, list(INPUTS))}")
    return content


def png(pixels: np.ndarray) -> bytes:
    """Encode pixels (h, w) or (h, w, 3), uncompressed: parquet's zstd then works across images."""
    Image.fromarray(pixels).save(buffer := io.BytesIO(), "PNG", compress_level=0)
    return buffer.getvalue()


def write(folder: Path, split: str, columns: dict[str, list], features: Features) -> None:
    """Write `<folder>/<split>.parquet`, with checksums and with the features in Hugging Face's metadata."""
    path = folder / f"{split}.parquet"
    path.parent.mkdir(exist_ok=True, parents=True)
    table = pa.table(columns, schema=features.arrow_schema)
    pq.write_table(
        table, path, compression="zstd", compression_level=19, use_dictionary=False, write_page_checksum=True
    )
    print(f"{folder.name}/{path.name}: {table.num_rows:,} rows, {path.stat().st_size / 1e6:.2f} MB")


def fashion(folder: Path, target: Path, per_class: dict[str, int | None]) -> None:
    """Fashion-MNIST: the first images of every class, or all, kept in the original order."""
    for split, prefix in (("train", "train"), ("test", "t10k")):
        labels, images = (
            np.frombuffer(gzip.decompress(read(folder / f"{prefix}-{file}.gz"))[header:], np.uint8)
            for file, header in (("labels-idx1-ubyte", 8), ("images-idx3-ubyte", 16))
        )
        images = images.reshape(len(labels), 28, 28)
        first = [np.flatnonzero(labels == c)[: per_class[split]] for c in range(len(CLASSES))]
        rows = np.sort(np.concatenate(first))
        cells = [{"bytes": png(images[row]), "path": None} for row in rows]
        features = Features({"image": ImageFeature(), "label": ClassLabel(names=CLASSES)})
        write(target, split, {"image": cells, "label": labels[rows].tolist()}, features)


def histology(picture: Path) -> None:
    """The picture cut into two disjoint regions, a row each."""
    pixels = np.asarray(Image.open(io.BytesIO(read(picture))))  # (512, 512, 3)
    for split, region in (("train", pixels[:, :TRAIN_COLUMNS]), ("test", pixels[:, TRAIN_COLUMNS:])):
        columns = {"image": [{"bytes": png(np.ascontiguousarray(region)), "path": None}]}
        write(HERE / "histology", split, columns, Features({"image": ImageFeature()}))


def sums() -> None:
    """Write SHA256SUMS over every parquet file here: check with `sha256sum -c SHA256SUMS` in this folder."""
    files = sorted(HERE.glob("*/*.parquet"))
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    lines = [f"{d}  {file.relative_to(HERE).as_posix()}\n" for d, file in zip(digests, files, strict=True)]
    (HERE / "SHA256SUMS").write_text("".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fashion", type=Path, required=True, metavar="DIR")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--picture", type=Path, metavar="FILE")
    what.add_argument("--full", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    if arguments.full:
        fashion(arguments.fashion, arguments.full / "fashion_mnist_full", {"train": None, "test": None})
    else:
        fashion(arguments.fashion, HERE / "fashion_mnist", PER_CLASS)
        histology(arguments.picture)
        sums()
