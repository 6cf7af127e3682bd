"""What the README's first screen promises, and that the package keeps it away from its repository."""

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import zipfile

import cases
import numpy as np
import pytest
import torch
from PIL import Image

import gudlib
from gudlib import files

ROOT = files.ROOT
MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16")


def program():
    """The README's first block of Python."""
    return re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)


def make_pictures(folder, n=200):
    """Blurred random colour fields with a bright spot, in many sizes and modes."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for k in range(n):
        w, h = (int(x) for x in rng.integers(24, 150, 2))
        coarse = Image.fromarray(rng.integers(40, 200, (4, 4, 3), dtype=np.uint8))
        picture = coarse.resize((w, h), Image.Resampling.BICUBIC)
        picture.paste((250, 240, 200), (w // 3, h // 3, w // 3 + w // 6, h // 3 + h // 6))
        mode = MODES[k % 50 % len(MODES)] if k % 3 == 0 else "RGB"
        if mode == "I;16":
            picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
        picture = picture.quantize(64) if mode == "P" else picture if mode == "I;16" else picture.convert(mode)
        picture.save(folder / f"{k:03}.{'jpg' if mode == 'CMYK' else 'png'}")


@pytest.mark.filterwarnings("ignore:.* pictures are smaller than 32 x 32")
def test_the_readmes_program_runs_as_written(tmp_path, monkeypatch):
    make_pictures(tmp_path / "my_pictures")
    monkeypatch.chdir(tmp_path)
    names, said = {}, io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(program(), "README.md", "exec"), names)
    model, again, images, test_images = (names[x] for x in ("model", "again", "images", "test_images"))
    assert images.shape == (168, 3, 32, 32) and test_images.shape == (32, 3, 32, 32)
    *losses, bits = (float(x) for x in said.getvalue().split("weights on ")[1].split()[1:])
    assert len(losses) == 600 and np.mean(losses[-100:]) < np.mean(losses[:100])
    untrained = gudlib.GUD.fit(images, verbose=False)
    assert bits == model.bits_per_dim(test_images, a=1.0) < untrained.bits_per_dim(test_images, a=1.0)  # it has learnt
    assert torch.equal(again.sample(16, a=1.0), names["pictures"])
    with contextlib.redirect_stdout(said):  # the same command again: all is done
        exec(compile(program(), "README.md", "exec"), names)
    assert torch.equal(names["pictures"], again.sample(16, a=1.0))


def test_the_package_shows_its_names_and_modules_and_nothing_else():
    modules = {path.stem for path in (ROOT / "gudlib").glob("*.py")} | {"mar", "book"}
    modules -= {"__init__", "__main__"}
    assert set(dir(gudlib)) == {*gudlib.__all__, *modules} and 20 <= len(gudlib.__all__) <= 30
    for name in gudlib.__all__:
        assert getattr(gudlib, name).__name__ == name and getattr(gudlib, name).__doc__
    assert not hasattr(gudlib, "nothing")
    star = {}
    exec("from gudlib import *", star)
    assert set(gudlib.__all__) <= set(star)


def test_one_version():
    cff = (ROOT / "CITATION.cff").read_text()
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^version: (\S+)", cff, re.M).group(1) == gudlib.__version__
    assert re.search(r"^## (\S+)", changes, re.M).group(1) == gudlib.__version__


AWAY = """
import gudlib, os, pytest, torch
from gudlib import data, files, metrics
from gudlib.book import claims, notebooks
assert not files.IN_REPOSITORY and "site" in gudlib.__file__, gudlib.__file__
for call, error in (
    (lambda: data.load("fashion_mnist", "train"), FileNotFoundError),
    (lambda: metrics.features(), RuntimeError),
    (lambda: notebooks.find(), ValueError),
    (lambda: notebooks.find(["02"]), ValueError),
):
    with pytest.raises(error, match="comes with gudlib's repository, not with the installed package: clone the repo"):
        call()
assert claims.results("mine").parent == files.RUNS and files.RUNS.parent.samefile(os.getcwd())
images = gudlib.load_folder("my_pictures", 8)
model = gudlib.GUD.fit(images, width=8)
for step in model.train_steps(3, checkpoint="run.safetensors"):
    print(step.loss)
model.save("mine.safetensors")
assert torch.equal(gudlib.GUD.load("mine.safetensors").sample(2), model.sample(2))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, unpacked into a folder of its own, and an environment that finds it first."""
    place = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "-w", str(place)]
    source = tmp_path_factory.mktemp("source") / "gudlib"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "runs", "data", "build", "*.egg-info"))
    subprocess.run([*pip, str(source)], check=True, timeout=cases.PATIENCE)
    (wheel,) = place.glob("gudlib-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place / "site")
    return wheel, os.environ | {"PYTHONPATH": str(place / "site"), "OMP_NUM_THREADS": "1"}


def test_the_wheel_holds_the_library_and_its_types(installed):
    names = zipfile.ZipFile(installed[0]).namelist()
    inside = {name for name in names if ".dist-info/" not in name}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "gudlib").rglob("*.py")}
    assert inside == modules | {"gudlib/py.typed"}
    info = {name.rpartition("/")[2]: name for name in names if ".dist-info/" in name}
    read = zipfile.ZipFile(installed[0]).read
    assert b"gudlib = gudlib.__main__:main" in read(info["entry_points.txt"])
    metadata = read(info["METADATA"]).decode()
    assert "Project-URL: Paper, https://arxiv.org/abs/2410.02667" in metadata and "Typing :: Typed" in metadata


def test_the_wheel_works_away_from_the_repository_and_says_what_it_lacks(installed, tmp_path):
    make_pictures(tmp_path / "my_pictures", 12)
    away = subprocess.run(
        [sys.executable, "-c", AWAY],
        cwd=tmp_path,
        env=installed[1],
        capture_output=True,
        text=True,
        timeout=cases.PATIENCE,
    )
    assert away.returncode == 0, away.stderr
    command = [sys.executable, "-m", "gudlib", "run", "02"]
    refused = subprocess.run(command, cwd=tmp_path, env=installed[1], capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "notebook 02 comes with gudlib's repository" in refused.stderr
