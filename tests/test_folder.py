"""A folder of pictures as people have them: any size, mode and name, read as they look."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from gudlib import data

RED, GREY = (200, 30, 40), (90, 90, 90)


def plain(colour=RED, size=(40, 50)):
    """One colour, width x height as Pillow has it."""
    return Image.new("RGB", size, colour)


def read(folder, size=8, **options):
    """One picture, as a tuple of its mean colour."""
    (picture,) = data.load_folder(folder, size, **options)
    return tuple(picture.float().mean((1, 2)).round().int().tolist())


def gradient(width, height):
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 60)], -1).astype(np.uint8))


def test_all_pictures_below_the_folder_come_in_one_size(tmp_path):
    for k, (name, size) in enumerate({"a.png": (40, 50), "b/c.JPG": (100, 30), "b/test_1.bmp": (64, 64)}.items()):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        plain((50 * k, 10, 200), size).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "._a.png").write_bytes(b"what a Mac leaves")
    images = data.load_folder(tmp_path, 24)
    assert images.shape == (3, 3, 24, 24) and images.dtype == torch.uint8
    assert sorted((images[:, 0, 5, 5].float() / 50).round().tolist()) == [0, 1, 2]
    assert data.load_folder(str(tmp_path), (24, 12)).shape == (3, 3, 24, 12)


def test_the_centre_is_cut_out_and_resampled_as_pillow_does(tmp_path):
    picture = gradient(90, 60)
    picture.save(tmp_path / "a.png")
    expected = ImageOps.fit(picture, (16, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(data.load_folder(tmp_path, 16)[0].permute(1, 2, 0).numpy(), np.asarray(expected))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "YCbCr"])
def test_colours_survive_whatever_the_mode(tmp_path, mode):
    picture = plain().quantize(4) if mode == "P" else plain().convert(mode)
    picture.save(tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr") else "a.png"))
    assert np.abs(np.subtract(read(tmp_path), RED)).max() <= 3


@pytest.mark.parametrize("mode", ["L", "LA", "1", "I;16", "I"])
def test_grey_pictures_are_grey(tmp_path, mode):
    grey = plain(GREY).convert("L")
    if mode in ("I;16", "I"):
        values = np.asarray(grey).astype(np.uint16 if mode == "I;16" else np.int32) * 257
        grey = Image.fromarray(values)
    elif mode == "1":
        grey = Image.new("1", (40, 50), 1)
    else:
        grey = grey.convert(mode)
    grey.save(tmp_path / ("a.tif" if mode == "I" else "a.png"))
    assert read(tmp_path) == ((255,) if mode == "1" else (90,))
    assert read(tmp_path, colours="rgb") == (read(tmp_path) * 3)


def test_a_single_colour_picture_makes_all_of_them_rgb_unless_grey_is_asked_for(tmp_path):
    plain(GREY).save(tmp_path / "grey.png")  # stored with three equal colours
    assert data.load_folder(tmp_path, 8).shape == (1, 1, 8, 8)
    plain().save(tmp_path / "red.png")
    assert data.load_folder(tmp_path, 8).shape == (2, 3, 8, 8)
    grey = data.load_folder(tmp_path, 8, colours="grey")
    luminance = plain().convert("L").getpixel((0, 0))
    assert grey.shape == (2, 1, 8, 8) and sorted(grey[:, 0, 0, 0].tolist()) == sorted([luminance, 90])


def test_what_is_transparent_becomes_white(tmp_path):
    picture = plain().convert("RGBA")
    picture.putalpha(0)
    picture.save(tmp_path / "a.png")
    assert read(tmp_path, colours="rgb") == (255, 255, 255)
    palette = plain().quantize(4)
    palette.save(tmp_path / "a.png", transparency=palette.getpixel((0, 0)))
    assert read(tmp_path, colours="rgb") == (255, 255, 255)


def test_photographs_are_turned_as_the_camera_was_held(tmp_path):
    picture, exif = gradient(60, 60), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    picture.save(tmp_path / "a.png", exif=exif)
    turned = data.load_folder(tmp_path, 60)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(turned, np.asarray(picture.transpose(Image.Transpose.ROTATE_270)))


def test_the_order_is_random_and_always_the_same_and_nothing_is_said(tmp_path, capfd):
    for k in range(40):
        plain((k, k, k)).save(tmp_path / f"{k:02}.png")
    order = data.load_folder(tmp_path, 4)[:, 0, 0, 0].tolist()
    assert sorted(order) == list(range(40)) and order != sorted(order)
    assert order == data.load_folder(tmp_path, 4)[:, 0, 0, 0].tolist()
    assert order != data.load_folder(tmp_path, 4, seed=1)[:, 0, 0, 0].tolist()
    assert capfd.readouterr() == ("", "")


def test_small_pictures_are_enlarged_with_a_warning(tmp_path):
    plain(size=(5, 90)).save(tmp_path / "a.png")
    plain().save(tmp_path / "b.png")
    with pytest.warns(UserWarning, match="1 of 2 pictures are smaller than 16 x 16: enlarged"):
        assert data.load_folder(tmp_path, 16).shape == (2, 3, 16, 16)


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="path must be a folder of pictures; there is none at .*missing"):
        data.load_folder(tmp_path / "missing", 8)
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(FileNotFoundError, match="no pictures in .*: 1 files, none with the ending of an image file"):
        data.load_folder(tmp_path, 8)
    plain().save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    Image.fromarray(np.ones((9, 9), np.float32)).save(tmp_path / "floats.tif")
    with pytest.raises(
        ValueError, match=r"(?s)2 of 3 files can't be read; remove or mend them.*:.*bad.png.*floats.tif"
    ):
        data.load_folder(tmp_path, 8)
    for options, message in (
        ({"size": 1}, "size must be at least 2; got 1"),
        ({"size": 8, "colours": "sepia"}, "colours must be one of .*got 'sepia'"),
    ):
        with pytest.raises(ValueError, match=message):
            data.load_folder(tmp_path, **options)


def test_reading_leaves_no_trace(tmp_path, monkeypatch):
    plain().save(tmp_path / "a.png")
    before = sorted(tmp_path.iterdir())
    data.load_folder(tmp_path, 8)
    assert sorted(tmp_path.iterdir()) == before
    plain(GREY).save(tmp_path / "a.png")  # changed since
    assert read(tmp_path) == (90,)


def test_damaged_files_are_left_out_if_asked_and_named(tmp_path):
    for name in ("a", "b", "c"):
        plain().save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"1 of 3 files can't be read; .* say skip_damaged=True:\n  .*b.png"):
        data.load_folder(tmp_path, 8)
    with pytest.warns(UserWarning, match=r"1 of 3 files can't be read and are left out:\n  .*b.png"):
        assert len(data.load_folder(tmp_path, 8, skip_damaged=True)) == 2
    (tmp_path / "a.png").unlink(), (tmp_path / "c.png").unlink()
    with pytest.raises(ValueError, match="1 of 1 files can't be read"):
        data.load_folder(tmp_path, 8, skip_damaged=True)
