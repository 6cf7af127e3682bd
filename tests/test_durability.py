"""Everything that is written over something is written whole or not at all, whoever writes it."""

import errno
from pathlib import Path

import nbformat
import pytest
import test_mar
import test_training

from gudlib import denoiser, files, mar
from gudlib.book import claims, notebooks, runs
from gudlib.model import GUD

GREY = test_training.pictures(16)
WRITERS = {
    "bytes": ("a", lambda path: files.write(path, b"after")),
    "json": ("a.json", lambda path: files.write_json(path, {"a": 1})),
    "tensors": ("a", lambda path: files.write_tensors(path, {}, {})),
    "claims": ("claims/02.json", lambda _: claims.claim("02", "measurement", "a share", 0.5)),
    "report": ("02/report.json", lambda _: claims.report("02", {"loss": 0.5})),
    "table": ("out/a.parquet", lambda path: runs.sweep([], path)),
    "training": ("a", lambda path: test_training.trainer().save(path)),
    "training of MAR": ("a", lambda path: test_mar.trainer().save(path)),
    "denoiser": ("a", lambda path: denoiser.save(test_training.trainer().denoiser, path)),
    "autoregressor": ("a", lambda path: mar.save(test_mar.build("masked"), path)),
    "model": ("a", lambda path: GUD.fit(GREY, basis="dct", width=8).save(path)),
}


def everything(folder: Path) -> dict[str, bytes]:
    """What lies below a folder, but for the locks."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.endswith(".lock")}


@pytest.mark.parametrize("name", WRITERS)
def test_a_writer_that_fails_leaves_what_was_there_and_names_the_file(name, tmp_path, monkeypatch):
    monkeypatch.setenv("GUDLIB_RESULTS", str(tmp_path))
    place, write = WRITERS[name]
    files.write(tmp_path / place, b"before")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for stage in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match=f"No space left on device: .*{place}"):
            patch.setattr(files.os, stage, full)
            write(tmp_path / place)
        assert everything(tmp_path) == {place: b"before"}
    write(tmp_path / place)
    assert list(found := everything(tmp_path)) == [place] and found[place] != b"before"


def test_a_refresh_that_fails_leaves_the_notebook(tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "execute", lambda *_: None)
    content = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title")])
    files.write(tmp_path / "a.ipynb", nbformat.writes(content))
    before = everything(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
        notebooks.refresh(tmp_path / "a.ipynb")
    assert everything(tmp_path) == before
    notebooks.refresh(tmp_path / "a.ipynb")
    assert everything(tmp_path) != before
