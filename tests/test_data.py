"""Image sets: what is embedded, where a split comes from, and that nothing wrong is used silently."""

import hashlib
import io
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from gudlib import data, files


def encode(pixels):
    Image.fromarray(pixels).save(buffer := io.BytesIO(), "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write(path, images, labels=None, column="image", **columns):
    """A parquet file as `datasets` writes it, of arrays (h, w) or (h, w, 3)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns[column] = [encode(image) for image in images]
    features = {column: datasets.Image()}
    if labels is not None:
        columns["label"], features["label"] = labels, datasets.Value("int64")
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(path)
    return path


def noise(n, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), np.uint8)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder of one's own, in `$GUDLIB_DATA`."""
    monkeypatch.setenv("GUDLIB_DATA", str(tmp_path))
    return tmp_path


@pytest.fixture(autouse=True)
def nowhere(monkeypatch, tmp_path_factory):
    """Neither a folder of the user's, nor the network, nor the user's cache."""
    monkeypatch.delenv("GUDLIB_DATA", raising=False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize(
    ("name", "split", "digest"),
    [
        ("fashion_mnist", "train", "e1427044c614fabc"),
        ("fashion_mnist", "test", "96315b1732ab731e"),
        ("histology", "train", "0eb74cbcf5ca2a3e"),
        ("histology", "test", "342cac4f57abca32"),
    ],
)
def test_embedded_sets_are_as_declared(name, split, digest):
    found, source = data.load(name, split), data.KNOWN[name]
    assert found.images.dtype == torch.uint8
    assert found.images.shape == (getattr(source, split), *source.shape)
    assert hashlib.sha256(found.images.numpy().tobytes()).hexdigest()[:16] == digest
    assert (found.name, found.split, found.origin) == (name, split, "embedded")
    if source.classes:
        assert found.labels.dtype == torch.int64
        assert found.labels.bincount().tolist() == [len(found.images) // 10] * 10
        assert found.class_names[9] == "Ankle boot"
    else:
        assert found.labels is None and found.class_names == ()


def test_embedded_files_match_their_sums_and_fit():
    lines = (files.DATA / "SHA256SUMS").read_text().splitlines()
    sums = dict(reversed(line.split("  ")) for line in lines)
    found = sorted(path.relative_to(files.DATA).as_posix() for path in files.DATA.glob("*/*.parquet"))
    assert found == sorted(sums)
    for name, digest in sums.items():
        assert hashlib.sha256((files.DATA / name).read_bytes()).hexdigest() == digest
    assert sum((files.DATA / name).stat().st_size for name in found) <= 8e6


def test_histology_patches_are_the_pictures_regions():
    for split, size, stride in (("train", 384, 7), ("test", 128, 15)):
        file = str(files.DATA / f"histology/{split}.parquet")
        picture = np.asarray(datasets.Dataset.from_parquet(file)[0]["image"])
        assert picture.shape == (512, size, 3)
        columns = (size - 32) // stride + 1
        patches = data.load("histology", split).images.permute(0, 2, 3, 1).numpy()
        for i in (0, 1, columns - 1, columns, len(patches) - 1):
            top = (512 - 32) % stride // 2 + stride * (i // columns)
            left = (size - 32) % stride // 2 + stride * (i % columns)
            assert np.array_equal(patches[i], picture[top : top + 32, left : left + 32])


def test_crops_are_cut_anew_from_the_training_rows(own):
    rows = noise(2, 40, 36, 3)
    write(own / "histology/train.parquet", rows)
    found = data.crops("histology", 2).permute(0, 2, 3, 1).numpy().reshape(2, 5, 3, 32, 32, 3)
    for i, j, k in ((0, 0, 0), (0, 4, 2), (1, 2, 1)):
        assert np.array_equal(found[i, j, k], rows[i, 2 * j : 2 * j + 32, 2 * k : 2 * k + 32])


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match="cut from larger ones, histology, pcam; got 'fashion_mnist'"):
        data.crops("fashion_mnist", 1)
    with pytest.raises(ValueError, match="stride must be at least 1; got 0"):
        data.crops("histology", 0)


def test_larger_rows_of_pcam_give_their_centres_with_their_labels(own):
    rows = noise(3, 96, 96, 3)
    write(own / "pcam/test.parquet", rows, [1, 0, 1])
    found = data.load("pcam", "test")
    assert np.array_equal(found.images.permute(0, 2, 3, 1), rows[:, 32:64, 32:64])
    assert found.labels.tolist() == [1, 0, 1]


def test_patches_share_the_label_of_their_row(own):
    write(own / "histology/test.parquet", noise(2, 48, 32, 3), [0, 1])
    assert data.load("histology", "test").labels.tolist() == [0, 0, 1, 1]


def test_own_folder_comes_first_and_may_hold_any_name(own):
    rows = noise(5, 28, 28)
    path = write(own / "fashion_mnist/train.parquet", rows, [0, 9, 3, 3, 1])
    assert data.locate("fashion_mnist", "train") == path
    found = data.load("fashion_mnist", "train")
    assert found.origin == "GUDLIB_DATA" and np.array_equal(found.images[:, 0], rows)
    assert found.labels.tolist() == [0, 9, 3, 3, 1]
    assert data.load("fashion_mnist", "test").origin == "embedded"

    write(own / "mine/train.parquet", noise(2, 5, 7, 3), column="img")
    found = data.load("mine", "train")
    assert found.images.shape == (2, 3, 5, 7) and found.labels is None


@pytest.mark.usefixtures("unchecked")
def test_unknown_names_and_splits_are_refused_by_name(own):
    with pytest.raises(ValueError, match=r"unknown image set 'mnist'; known: fashion_mnist, histology, .*GUDLIB_DATA"):
        data.load("mnist", "train")
    with pytest.raises(ValueError, match="unknown image set ''"):
        data.load("", "train")
    with pytest.raises(ValueError, match="unknown split 'valid'; known: train, test"):
        data.load("fashion_mnist", "valid")


def test_a_mistyped_folder_is_named(monkeypatch):
    monkeypatch.setenv("GUDLIB_DATA", "/no/such/folder")
    with pytest.raises(FileNotFoundError, match="GUDLIB_DATA=/no/such/folder is not a folder"):
        data.locate("fashion_mnist", "train")


def test_a_missing_set_says_where_it_was_searched_for_and_three_ways(own):
    with pytest.raises(FileNotFoundError) as caught:
        data.load("cifar10", "train")
    message = str(caught.value)
    for part in (
        f"{own / 'cifar10/train.parquet'}: no such file",
        f"{files.DATA / 'cifar10/train.parquet'}: no such file",
        "/datasets/uoft-cs/cifar10: HF_HUB_OFFLINE is set",
        "go online",
        "set GUDLIB_DATA",
        "use an embedded set: fashion_mnist, histology",
    ):
        assert part in message
    (own / "mine").mkdir()
    with pytest.raises(FileNotFoundError, match="mine/test.parquet: no such file"):
        data.load("mine", "test")


def test_an_unreachable_hub_fails_at_once_and_leaves_no_trace(monkeypatch):
    with socket.socket() as silent:  # bound, not listening: connections are refused
        silent.bind(("127.0.0.1", 0))
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        with pytest.raises(FileNotFoundError, match=r"uoft-cs/cifar10: no answer .*refused"):
            data.load("cifar10", "test")
    assert datasets.config.HF_HUB_OFFLINE is False


def test_a_hub_repository_goes_the_same_way(tmp_path, monkeypatch):
    """A local folder with the hub's layout in its place: `datasets` builds both alike."""
    rows = noise(4, 32, 32, 3)
    for split, part in (("train", rows[:3]), ("test", rows[3:])):
        write(tmp_path / f"repository/data/{split}-00000-of-00001.parquet", part, [7] * len(part), column="img")
    source = data.Source((3, 32, 32), 3, 1, "MIT", 10, str(tmp_path / "repository"))
    monkeypatch.setitem(data.KNOWN, "cifar10", source)
    found = data.load("cifar10", "train")
    assert found.origin == "hub" and np.array_equal(found.images.permute(0, 2, 3, 1), rows[:3])
    assert found.labels.tolist() == [7, 7, 7]
    monkeypatch.setitem(data.KNOWN, "cifar10", data.Source((3, 32, 32), 4, 1, "MIT", 10, source.hub))
    with pytest.raises(ValueError, match="repository: found 3 images, expected 4"):
        data.load("cifar10", "train")


def test_labels_of_the_hubs_pcam_are_booleans(monkeypatch):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("bool")})
    columns = {"image": [encode(image) for image in noise(2, 96, 96, 3)], "label": [True, False]}
    monkeypatch.setattr(datasets, "load_dataset", lambda hub, split: datasets.Dataset.from_dict(columns, features))
    monkeypatch.setitem(data.KNOWN, "pcam", data.Source((3, 32, 32), 2, 2, "CC0", 2, "a/b", (96, 96)))
    assert data.load("pcam", "train").labels.tolist() == [1, 0]


def test_a_damaged_file_is_named_and_not_passed_over(own):
    whole = (files.DATA / "fashion_mnist/test.parquet").read_bytes()
    path = own / "fashion_mnist/test.parquet"
    path.parent.mkdir()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for content in (whole[:1000], whole[:-100], b"", b"no parquet at all", flipped):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{path}: found {len(content)} bytes, truncated or corrupt"):
            data.load("fashion_mnist", "test")


def bad_rows(path):
    table = datasets.Dataset.from_dict({"image": [{"bytes": b"\x89PNG\r\n", "path": None}], "label": [1]})
    table.cast_column("image", datasets.Image(decode=False)).to_parquet(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: write(p, noise(2, 32, 32), [1, 2]), r"found images .* = \(1, 32, 32\), expected \(1, 28, 28\)"),
        (lambda p: write(p, noise(2, 28, 28, 3), [1, 2]), r"= \(3, 28, 28\), expected \(1, 28, 28\)"),
        (lambda p: write(p, [*noise(1, 28, 28), *noise(1, 28, 29)], [1, 2]), r"row 1 of shape \(1, 28, 29\)"),
        (lambda p: write(p, noise(2, 28, 28), [1, 2], "picture"), "found columns .*picture.* image or img"),
        (lambda p: write(p, noise(2, 28, 28)), "found columns image, expected also label"),
        (
            lambda p: write(p, noise(2, 28, 28), [1, 10]),
            "found labels from 1 to 10, expected whole numbers from 0 to 9",
        ),
        (
            lambda p: write(p, noise(2, 28, 28), [1, -1]),
            "found labels from -1 to 1, expected whole numbers from 0 to 9",
        ),
        (
            lambda p: write(p, noise(2, 28, 28), [1, None]),
            "found 1 rows without a label, expected whole numbers from 0 to 9",
        ),
        (lambda p: write(p, noise(1, 28, 28, 4), [1]), r"found images .* = \(3, 28, 28\), expected \(1, 28, 28\)"),
        (lambda p: write(p, [], []), "found no rows"),
        (lambda p: datasets.Dataset.from_dict({"image": [1], "label": [1]}).to_parquet(p), "column image of int64"),
        (bad_rows, "row 0: found 6 bytes that are no whole picture"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(own, make, message):
    path = own / "fashion_mnist/train.parquet"
    path.parent.mkdir()
    make(path)
    with pytest.raises(ValueError, match=message) as caught:
        data.load("fashion_mnist", "train")
    assert str(path) in str(caught.value)


@pytest.mark.usefixtures("unchecked")
def test_rows_smaller_than_a_patch_are_refused(own):
    write(own / "histology/train.parquet", noise(1, 31, 64, 3))
    with pytest.raises(ValueError, match=r"= \(3, 31, 64\), expected \(3, 32, 32\) or larger"):
        data.load("histology", "train")


def test_grey_levels_survive_both_maps():
    levels = torch.arange(256, dtype=torch.uint8)
    scaled = data.scale(levels)
    assert scaled.dtype == torch.float32 and (scaled[0], scaled[-1]) == (-1, 1)
    torch.testing.assert_close(scaled.diff(), torch.full((255,), 2 / 255))
    assert torch.equal(data.to_uint8(scaled), levels)

    many = levels.repeat(4000, 1)
    y = data.dequantise(many, torch.Generator().manual_seed(0))
    assert y.dtype == torch.float32 and y.min() >= -1 and y.max() < 1
    assert torch.equal(data.to_uint8(y), many)
    noise = 128 * (y.double() + 1) - many
    assert 0 <= noise.min() and noise.max() < 1
    assert abs(noise.mean() - 1 / 2) < 1e-3 and abs(noise.var() - 1 / 12) < 1e-3
    assert torch.equal(y, data.dequantise(many, torch.Generator().manual_seed(0)))
    assert data.to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def test_importing_is_cheap_and_reading_writes_nothing_at_home(tmp_path):
    code = (
        "import sys, gudlib.data as data; assert 'datasets' not in sys.modules;"
        "data.locate('cifar10', 'test'); assert 'datasets' not in sys.modules; data.load('histology', 'test')"
    )
    root = Path(data.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env={"HOME": str(tmp_path), "PATH": ""})
    assert not list(tmp_path.rglob("*.arrow")) and not list(tmp_path.rglob("*.parquet"))
