"""Pictures as people have them, in a table's rows and as files in a folder: read as they look, or refused in words."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from gudlib import data
from gudlib.model import GUD

GREY = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
COLOUR = np.stack([GREY, GREY[::-1], 255 - GREY], -1)
TWO = np.where(GREY > 100, 255, 0).astype(np.uint8)
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CLEAR = np.concatenate([COLOUR, np.where(GREY > 100, 255, 0)[..., None]], -1).astype(np.uint8)


def encoded(array, form="PNG", mode=None, **options) -> bytes:
    image = Image.fromarray(array)
    if mode:
        image = image.convert(mode, palette=Image.Palette.ADAPTIVE)
    image.save(file := io.BytesIO(), form, **options)
    return file.getvalue()


def turned(times) -> bytes:
    """A picture that says how the camera was held."""
    exif = Image.Exif()
    exif[0x0112] = {1: 8, 2: 3, 3: 6}[times]  # turned so often, anticlockwise
    return encoded(np.rot90(COLOUR, -times).copy(), "PNG", exif=exif)


def frames() -> bytes:
    first, second = Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)
    first.save(file := io.BytesIO(), "PNG", save_all=True, append_images=[second])
    return file.getvalue()


PICTURES = {
    "grey": (encoded(GREY), GREY),
    "colour": (encoded(COLOUR), COLOUR),
    "palette": (encoded(COLOUR, mode="P"), COLOUR),
    "palette of greys": (encoded(GREY, mode="P"), GREY),
    "grey and opacity": (encoded(GREY, mode="LA"), GREY),
    "colour and opacity": (encoded(COLOUR, mode="RGBA"), COLOUR),
    "colour, in part transparent": (encoded(CLEAR), np.where(CLEAR[..., 3:] > 0, COLOUR, 255)),
    "16 bits": (encoded(GREY.astype(np.uint16) * 257), GREY),
    "32 bits that hold 8": (encoded(GREY.astype(np.int32), "TIFF"), GREY),
    "1 bit": (encoded(TWO, mode="1"), TWO),
    "four inks": (encoded(COLOUR, "TIFF", mode="CMYK"), COLOUR),
    "several frames": (frames(), COLOUR),
    "webp": (encoded(COLOUR, "WEBP", lossless=True), COLOUR),
    "bmp": (encoded(COLOUR, "BMP"), COLOUR),
    **{f"turned {times} times": (turned(times), COLOUR) for times in (1, 2, 3)},
}


def write(folder: Path, *rows, kind=STRUCT, metadata=None, **columns) -> None:
    """A named set with these rows."""
    made = pa.table({"image": pa.array(rows, kind)} | {name: pa.array(x) for name, x in columns.items()})
    (folder / "mine").mkdir(exist_ok=True)
    pq.write_table(made.replace_schema_metadata(metadata), folder / "mine/train.parquet")


@pytest.fixture
def sets(tmp_path, monkeypatch):
    monkeypatch.setenv("GUDLIB_DATA", str(tmp_path))
    return tmp_path


def close(found: torch.Tensor, right: np.ndarray) -> bool:
    right = right[None] if right.ndim == 2 else right.transpose(2, 0, 1)
    apart = (found.int() - torch.from_numpy(right.copy()).int()).abs()
    return found.shape[1:] == right.shape[1:] and int(apart.max()) <= 1


@pytest.mark.parametrize("name", PICTURES)
def test_a_row_is_read_as_it_looks(name, sets):
    content, right = PICTURES[name]
    write(sets, {"bytes": content, "path": None})
    assert close(data.load("mine", "train").images[0], right)


@pytest.mark.parametrize("name", PICTURES)
def test_a_file_is_read_as_it_looks(name, tmp_path):
    content, right = PICTURES[name]
    (tmp_path / f"a.{'tiff' if content[:2] in (b'II', b'MM') else 'png'}").write_bytes(content)
    assert close(data.load_folder(tmp_path, (4, 6))[0], right)


def test_rows_may_name_files_and_have_their_fields_in_any_order(sets):
    (sets / "a.png").write_bytes(PICTURES["grey"][0])
    write(sets, {"bytes": None, "path": str(sets / "a.png")})
    assert close(data.load("mine", "train").images[0], GREY)
    kind = pa.struct([("path", pa.string()), ("bytes", pa.binary())])
    write(sets, {"bytes": PICTURES["grey"][0], "path": "other"}, kind=kind)
    assert close(data.load("mine", "train").images[0], GREY)


def test_columns_that_are_not_used_may_hold_anything(sets):
    names = {"names": ["shoe", "bag"], "_type": "ClassLabel"}
    told = {"image": {"_type": "Image"}, "label": names, "boxes": {"_type": "NotYetKnown"}}
    metadata = {"huggingface": json.dumps({"info": {"features": told}})}
    row = {"bytes": PICTURES["grey"][0], "path": None}
    write(sets, row, row, metadata=metadata, label=[1, 0], boxes=[[1, 2], None], note=["a", None])
    found = data.load("mine", "train")
    assert found.labels.tolist() == [1, 0] and found.class_names == ("shoe", "bag")
    write(sets, row, metadata={"huggingface": "{half"}, label=[1])
    assert data.load("mine", "train").labels.tolist() == [1]


def test_16_bits_are_the_same_greys_however_dark_a_picture_is(sets):
    dark, light = (encoded(GREY.astype(np.uint16) * factor) for factor in (1, 257))
    write(sets, {"bytes": dark, "path": None}, {"bytes": light, "path": None})
    found = data.load("mine", "train").images
    assert int(found[0].max()) == 0 and np.array_equal(found[1, 0].numpy(), GREY)
    write(sets, {"bytes": encoded(GREY.astype(np.int32) * 1000, "TIFF"), "path": None})
    with pytest.raises(ValueError, match="row 0: found numbers from 0 to 230000, expected 0 to 255 or to 65535"):
        data.load("mine", "train")


def test_rows_may_be_bytes_alone(sets):
    write(sets, {"bytes": PICTURES["grey"][0]}, kind=pa.struct([("bytes", pa.binary())]))
    assert close(data.load("mine", "train").images[0], GREY)


def test_labels_that_are_hidden_are_none(sets):
    row = {"bytes": PICTURES["grey"][0], "path": None}
    write(sets, row, row, label=[-1, -1])
    assert data.load("mine", "train").labels is None


ROW = {"bytes": PICTURES["grey"][0], "path": None}


@pytest.mark.parametrize(
    ("rows", "columns", "complaint"),
    [
        ([ROW, None], {}, "row 1: found no picture, expected one in each row"),
        ([ROW, {"bytes": None, "path": None}], {}, "row 1: found no picture"),
        ([ROW, {"bytes": b"\x89PNG half", "path": None}], {}, "row 1: found 9 bytes that are no whole picture"),
        ([{"bytes": None, "path": "/nowhere/a.png"}], {}, "row 0: found a file /nowhere/a.png that can't be read"),
        ([{"bytes": PICTURES["grey"][0][:-30], "path": None}], {}, "row 0: found .* bytes that are no whole picture"),
        ([{"bytes": encoded(GREY.astype(np.float32), "TIFF"), "path": None}], {}, "row 0: found numbers of 32 bits"),
        ([ROW, {"bytes": encoded(COLOUR), "path": None}], {}, r"row 1 of shape \(3, 4, 6\), expected \(1, 4, 6\)"),
        ([ROW], {"label": ["shoe"]}, "labels of type string, expected whole numbers"),
        ([ROW, ROW], {"label": [0, None]}, "found 1 rows without a label"),
        ([ROW, ROW], {"label": [0, -1]}, "found labels from -1 to 0, expected whole numbers"),
        ([ROW], {"label": [0.5]}, "labels of type double, expected whole numbers"),
    ],
)
def test_what_is_wrong_with_a_table_is_said_in_words(rows, columns, complaint, sets):
    write(sets, *rows, **columns)
    with pytest.raises(ValueError, match=complaint) as error:
        data.load("mine", "train")
    assert not any(word in str(error.value) for word in ("Error(", "NoneType", "object at"))


@pytest.mark.parametrize("name", ["one colour", "all the same", "one picture", "few for components", "a line"])
def test_sets_with_little_in_them_are_fitted_or_refused_in_words(name):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8)
    if name == "one colour":
        images[:, 1:] = 128
    elif name == "all the same":
        images = images[:1].repeat(12, 1, 1, 1)
    elif name == "one picture":
        images = images[:1]
    elif name == "a line":
        images = images[:, :, :1]
    fit = lambda: GUD.fit(images, basis="pca" if name[:3] == "few" else "dct", width=8, verbose=False)  # noqa: E731
    if name in ("all the same", "one picture"):
        with pytest.raises(ValueError, match="images must (be .* n at least 4|differ from one another)"):
            fit()
    else:
        drawn = fit().sample(2, steps=2)
        assert drawn.shape == (2, *images.shape[1:]) and drawn.dtype == torch.uint8
