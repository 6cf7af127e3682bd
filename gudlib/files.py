"""Files: where the companion's own lie (in its repository), and how anything is written, whole or not at all.

A writer fills a draft of a name of its own beside the target and then puts it there in one step, so a reader sees the
old file or the new one, however many write. Tensors go to safetensors files with a header in JSON.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gudlib import __version__

FORMAT = 1  # of files of tensors; those of a later one are refused
PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent
DATA = ROOT / "data"
CHECKPOINTS = DATA / "checkpoints"
NOTEBOOKS = ROOT / "notebooks"
IN_REPOSITORY = (ROOT / "pyproject.toml").is_file()
RUNS = (ROOT if IN_REPOSITORY else Path.cwd()) / "runs"  # where results go that are told no other place


def with_repository(what: str, instead: str = "") -> str:
    """Why something is not there where the package is installed without its repository."""
    other = f", or give {instead}" if instead else ""
    return f"{what} comes with gudlib's repository, not with the installed package: clone the repository{other}"


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A draft to be written in the block; after it `path`, whose folder is made if need be, has the draft's content.

    If the block raises, `path` stays as it was and no draft is left.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield draft
        with open(draft, "rb") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:  # a full disk, say, of which the system names no file
        if error.filename in (None, str(draft)) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        draft.unlink(missing_ok=True)


def write(path: str | Path, content: str | bytes) -> None:
    """Write a text (UTF-8) or bytes."""
    with replacing(path) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON values, indented; arrays and tensors as lists, their scalars as numbers."""
    write(path, json.dumps(content, indent=2, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"not a number, a text, an array or a list or mapping of these: {value!r}")


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object of a file; empty where there is none, or what is there is damaged."""
    try:
        found = json.loads(Path(path).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_tensors(path: str | Path, tensors: dict[str, Any], header: dict[str, Any]) -> None:
    """Write named tensors, from whatever device, and a JSON header as one safetensors file, with a digest of both.

    The header also tells the format and the version of the library, which `read_tensors` takes out again.
    """
    from safetensors.torch import save

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(header | {"format": FORMAT, "gudlib": __version__}, default=_plain)
    names, _, data = _parts(save(whole))
    write(path, save(whole, {"header": text, "sha256": _digest(names, text, data)}))


def _parts(content: bytes) -> tuple[dict[str, Any], dict[str, str], bytes]:
    """Of a safetensors file: names, types and shapes, the texts beside them, and the tensors' bytes."""
    start = 8 + int.from_bytes(content[:8], "little")
    names = json.loads(content[8:start])
    return names, names.pop("__metadata__", {}), content[start:]


def _digest(names: dict[str, Any], text: str, data: bytes) -> str:
    return hashlib.sha256(json.dumps([names, text], sort_keys=True).encode() + data).hexdigest()


def read_tensors(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Named tensors and header of a file written by `write_tensors`, from one reading of it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is truncated, not one of ours, of a later format, or not as it was written, which files from
            before digests do not tell; it is named.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    content = Path(path).read_bytes()
    try:
        tensors = load(content)  # it checks sizes and offsets
        names, texts, data = _parts(content)
        header = json.loads(texts["header"])
        if not isinstance(header, dict):
            raise ValueError("its header is no mapping")
        first = "format" not in header  # which told neither format nor, at first, a digest
        written, version = header.pop("format", 1), header.pop("gudlib", "")
        right = _digest(names, texts["header"], data)
        if written <= FORMAT and texts.get("sha256", right if first else "") != right:
            raise ValueError("it is not as it was written: its digest is another one")
    except (SafetensorError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a complete gudlib checkpoint: {error}") from error
    if written > FORMAT:
        raise ValueError(f"{path} was written by gudlib {version}, this is {__version__}: upgrade")
    return tensors, header
