"""Files are written whole or not at all, by however many writers, and read as they were written."""

import errno
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

import gudlib
from gudlib import bases, denoiser, files, mar, priors
from gudlib.model import GUD


def test_what_is_written_is_read_and_nothing_lies_beside_it(tmp_path):
    files.write(tmp_path / "new" / "text", "ä\n")
    files.write_json(tmp_path / "new" / "json", {"a": [1, None]})
    tensors = {"x": torch.arange(6.0).view(2, 3).T, "half": torch.ones(2).half(), "none": torch.empty(0, 3)}
    files.write_tensors(tmp_path / "new" / "tensors", tensors, {"b": {"c": 2}})
    assert (tmp_path / "new" / "text").read_text(encoding="utf-8") == "ä\n"
    assert json.loads((tmp_path / "new" / "json").read_text()) == {"a": [1, None]}
    found, header = files.read_tensors(tmp_path / "new" / "tensors")
    assert header == {"b": {"c": 2}} and found.keys() == tensors.keys()
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in tensors.items())
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["json", "tensors", "text"]


@pytest.mark.parametrize("stage", ["block", "fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there_and_no_draft(tmp_path, monkeypatch, stage):
    files.write(tmp_path / "a", "before")

    def fail(*_):
        raise OSError("No space left on device")

    if stage != "block":
        monkeypatch.setattr(files.os, stage, fail)
    with pytest.raises(OSError, match="No space"), files.replacing(tmp_path / "a") as draft:
        draft.write_text("half")
        if stage == "block":
            fail()
    assert (tmp_path / "a").read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_every_writer_has_a_draft_of_its_own(tmp_path):
    with files.replacing(tmp_path / "a") as one, files.replacing(tmp_path / "a") as other:
        assert one != other and one.parent == other.parent == tmp_path and one.name.startswith(".")
        one.write_text("1")
        other.write_text("2")
    assert (tmp_path / "a").read_text() == "1"  # the block that ended last


WRITER = """
import sys
from gudlib import files
for i in range(200):
    files.write(sys.argv[1], sys.argv[2] * 200_000)
"""


def test_two_writers_at_once_never_show_a_reader_anything_but_a_whole_file(tmp_path):
    path = tmp_path / "shared"
    files.write(path, "a" * 200_000)
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), letter]) for letter in "ab"]
    reads = 0
    while any(writer.poll() is None for writer in writers):
        content = path.read_text()
        assert content in ("a" * 200_000, "b" * 200_000)
        reads += 1
    assert reads > 0 and [writer.returncode for writer in writers] == [0, 0] and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("content", [b"", b"\x08", b"\xff" * 100, b"\x02\x00\x00\x00\x00\x00\x00\x00{}"])
def test_what_is_no_file_of_ours_is_named(tmp_path, content):
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(ValueError, match="other is not a complete gudlib checkpoint"):
        files.read_tensors(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*nothing"):
        files.read_tensors(tmp_path / "nothing")


def test_a_full_disk_is_told_by_the_files_name_and_leaves_no_draft(tmp_path, monkeypatch):
    path = tmp_path / "kept.json"
    files.write_json(path, {"a": 1})

    def full(draft, content):
        draft.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*kept.json'") as raised:
        files.write_json(path, {"a": 2})
    assert raised.value.errno == errno.ENOSPC
    assert files.read_json(path) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def mutated(content: bytes, seed: int) -> bytes:
    """The same with a bit flipped, its end gone, a part doubled, or a name changed."""
    generator = random.Random(seed)
    place = generator.randrange(len(content))
    if seed % 4 == 0:
        return content[:place]
    if seed % 4 == 1:
        return content[:place] + content[place : place + 20] + content[place:]
    if seed % 4 == 2:
        names = sorted(set(re.findall(rb'"(?:network|prior|basis)\.[^"]*"', content)))
        name = generator.choice(names)
        return content.replace(name, name[:-2] + bytes([name[-2] ^ 1]) + name[-1:])
    return content[:place] + bytes([content[place] ^ 1 << generator.randrange(8)]) + content[place + 1 :]


@pytest.mark.usefixtures("unchecked")
def test_a_hundred_damaged_checkpoints_are_refused_by_name(tmp_path):
    """One whose damage is only in the blanks of its header may be read; then it is what it was."""
    basis = bases.Haar((1, 4, 4), 1)
    prior = priors.whitened(priors.Moments(torch.zeros(1, 4, 4), torch.rand(1, 4, 4) + 0.5))
    model, path, read = denoiser.build(basis, prior, groups=2, width=8), tmp_path / "model", 0
    denoiser.save(model, path)
    content, weights = path.read_bytes(), model.state_dict()
    for seed in range(100):
        path.write_bytes(damaged := mutated(content, seed))
        if damaged == content:
            continue
        try:
            found = denoiser.load(path).state_dict()
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert all(torch.equal(found[name], value) for name, value in weights.items())
            read += 1
    assert read <= 3


@pytest.mark.parametrize("old, new", [(b"1234", b"1235"), (b"weight", b"height"), (b"\x00\x00\x80?", b"\x00\x00\x80@")])
def test_a_digest_is_of_header_names_and_numbers(tmp_path, old, new):
    files.write_tensors(tmp_path / "a", {"weight": torch.ones(3)}, {"steps": 1234})
    content = (tmp_path / "a").read_bytes()
    assert old in content
    (tmp_path / "a").write_bytes(content.replace(old, new, 1))
    with pytest.raises(ValueError, match="a is not a complete gudlib checkpoint: it is not as it was written"):
        files.read_tensors(tmp_path / "a")


@pytest.mark.parametrize("path", sorted(files.CHECKPOINTS.glob("*.safetensors")), ids=lambda path: path.stem)
def test_a_flipped_bit_of_a_shipped_checkpoint_is_noticed(path, tmp_path):
    content, generator = path.read_bytes(), random.Random(0)
    assert files.read_tensors(path)[0]
    start = 8 + int.from_bytes(content[:8], "little")
    for place in (start, len(content) - 1, generator.randrange(start, len(content))):
        damaged = bytearray(content)
        damaged[place] ^= 1 << generator.randrange(8)
        (tmp_path / path.name).write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{path.name} is not a complete .* not as it was written"):
            files.read_tensors(tmp_path / path.name)


def test_a_file_of_a_later_format_says_which_version_wrote_it(tmp_path, monkeypatch):
    path = tmp_path / "later"
    with monkeypatch.context() as patch:
        patch.setattr(files, "FORMAT", files.FORMAT + 1)
        patch.setattr(files, "__version__", "9.1")
        patch.setattr(files, "_digest", lambda *_: "as it is done then")
        files.write_tensors(path, {"weight": torch.ones(3)}, {"card": {}})
    for read in (files.read_tensors, denoiser.load, mar.load, GUD.load):
        with pytest.raises(ValueError, match=f"later was written by gudlib 9.1, this is {gudlib.__version__}: upgrade"):
            read(path)


def test_a_file_from_before_formats_and_digests_is_read(tmp_path):
    (tmp_path / "old").write_bytes(save({"weight": torch.ones(3)}, {"header": '{"steps": 3}'}))
    tensors, header = files.read_tensors(tmp_path / "old")
    assert torch.equal(tensors["weight"], torch.ones(3)) and header == {"steps": 3}


def test_a_file_that_tells_its_format_has_a_digest(tmp_path):
    (tmp_path / "none").write_bytes(save({"weight": torch.ones(3)}, {"header": '{"format": 1}'}))
    with pytest.raises(ValueError, match="none is not a complete gudlib checkpoint"):
        files.read_tensors(tmp_path / "none")
