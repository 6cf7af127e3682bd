"""What this machine has for the companion, and what is broken: packages, device, data, checkpoints.

Each check yields (what is so, remedy) line by line; the remedy is empty where all is well. No check needs what
another one checks, so a machine without torch still hears about its data files.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import sys
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from gudlib.files import CHECKPOINTS, DATA, IN_REPOSITORY, NOTEBOOKS, PACKAGE, ROOT, with_repository

PATIENCE = 120  # seconds that a kernel may take to start and to import gudlib
INSTALL = "remove .venv and run make venv; without make: pip install -c constraints.txt -e '.[test]'"


def report() -> bool:
    """Print every check, a line for each thing checked, and return whether all is well."""
    broken = 0
    for check in (packages, device, kernel, image_sets, files):
        try:
            found = list(check())
        except Exception as error:  # whatever goes wrong in here is what was asked for
            found = [(f"{check.__name__.replace('_', ' ')}: {type(error).__name__}: {error}", INSTALL)]
        for line, remedy in found:
            print(f"BROKEN: {line}\n  remedy: {remedy}" if remedy else line, flush=True)
        broken += sum(bool(remedy) for _, remedy in found)
    print(f"{broken} broken" if broken else "all well")
    return not broken


def packages() -> Iterator[tuple[str, str]]:
    """Installed versions, against what `pyproject.toml` needs and what `constraints.txt` says was tested."""
    from packaging.requirements import Requirement

    pins, wanted = {}, importlib.metadata.requires("gudlib") or []
    if IN_REPOSITORY:
        pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
        wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    yield f"python {platform.python_version()}", ""
    for needed in map(Requirement, wanted):
        if needed.marker and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            yield f"{needed.name} is not installed", INSTALL
            continue
        pin = pins.get(needed.name, version.split("+")[0])
        tested = "" if version.split("+")[0] == pin else f", not the tested {pin}"
        yield f"{needed.name} {version}{tested}", "" if version in needed.specifier else INSTALL


def device() -> Iterator[tuple[str, str]]:
    """Where torch computes, and the machine's memory."""
    import torch

    from gudlib import devices

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield f"device {devices.default().type}, {torch.get_num_threads()} threads, {memory:.0f} GiB of memory", ""


def kernel() -> Iterator[tuple[str, str]]:
    """A kernel as runs start it, which imports gudlib; and what JupyterLab would start."""
    import nbformat
    from jupyter_client.kernelspec import KernelSpecManager
    from nbclient.exceptions import CellControlSignal

    from gudlib.book import notebooks

    asked = f"import gudlib\nfrom pathlib import Path\nprint(Path(gudlib.__file__).parent == Path({str(PACKAGE)!r}))"
    content = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(asked)])
    try:
        notebooks.execute(content, NOTEBOOKS if NOTEBOOKS.is_dir() else Path.cwd(), PATIENCE)
    except (CellControlSignal, RuntimeError) as error:  # it failed, was slower than our patience, or did not start
        last = (str(error).strip() or type(error).__name__).splitlines()[-1]
        yield f"a kernel of {sys.executable} can't import gudlib: {last}", INSTALL
    else:
        mine = content.cells[0].outputs[0].text.strip() == "True"
        yield f"a kernel starts and imports {'this' if mine else 'another'} gudlib", "" if mine else INSTALL
    python = KernelSpecManager().get_kernel_spec("python3").argv[0]
    same = Path(python).name == python or Path(python).parent == Path(sys.executable).parent
    told = f"JupyterLab opens notebooks with {'this Python' if same else f'{python}, not with {sys.executable}'}"
    yield told, "" if same else f"{sys.executable} -m ipykernel install --sys-prefix, and look at JUPYTER_PATH"


def image_sets() -> Iterator[tuple[str, str]]:
    """Where each known image set would come from. Being offline is not a fault."""
    from datasets import config

    from gudlib import data

    own = os.environ.get("GUDLIB_DATA")
    if own and not Path(own).is_dir():
        yield f"GUDLIB_DATA={own} is not a folder", "unset GUDLIB_DATA, or make it the folder of your image sets"
        return
    if not config.HF_ENDPOINT.startswith(("https://", "http://")):
        yield f"HF_ENDPOINT={config.HF_ENDPOINT} is no address", f"export HF_ENDPOINT=https://{config.HF_ENDPOINT}"
    hub = "can't be reached"
    try:
        if config.HF_HUB_OFFLINE:
            hub = "is switched off by HF_HUB_OFFLINE"
        else:
            urllib.request.urlopen(config.HF_ENDPOINT, timeout=3).close()
            hub = "can be reached"
    except (OSError, ValueError):  # no network, or no address
        pass
    yield f"the hub {hub}", ""
    for name in data.KNOWN:
        place = origin(name)
        yield f"data {name}: {place}", "git checkout -- data" if "missing" in place and IN_REPOSITORY else ""


def origin(name: str) -> str:
    """Where `data.load` takes the splits of a known image set from, in words."""
    from gudlib import data

    places = {}
    for split in ("train", "test"):
        try:
            place = data.locate(name, split)
        except FileNotFoundError:
            places[split] = "missing"
        else:
            embedded = isinstance(place, Path) and DATA in place.parents
            places[split] = "embedded" if embedded else _hub(place) if isinstance(place, str) else str(place)
    return places["train"] if len({*places.values()}) == 1 else ", ".join(f"{k}: {v}" for k, v in places.items())


def _hub(identifier: str) -> str:
    from datasets import config
    from datasets.naming import camelcase_to_snakecase

    owner, name = identifier.split("/")
    cached = (Path(config.HF_DATASETS_CACHE) / f"{owner}___{camelcase_to_snakecase(name)}").is_dir()
    return f"hub, {identifier}, {'cached' if cached else 'not cached'}"


def files() -> Iterator[tuple[str, str]]:
    """The embedded image sets and the checkpoints against the sums that lie beside them."""
    if not IN_REPOSITORY:
        yield with_repository("what is checked here, data and checkpoints,"), ""
        return
    for folder, pattern in ((DATA, "*/*.parquet"), (CHECKPOINTS, "*.safetensors")):
        sums = folder / "SHA256SUMS"
        lines = sums.read_text().splitlines() if sums.is_file() else []
        listed = {folder / name: digest for digest, name in (line.split(maxsplit=1) for line in lines)}
        for path in sorted({sums, *listed, *folder.glob(pattern)}):
            name = path.relative_to(ROOT)
            digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            if not digest:
                yield f"{name} is missing", f"git checkout -- {name}"
            elif path != sums and digest != listed.get(path):
                yield f"{name} is corrupt, or not in {sums.name}", f"git checkout -- {folder.relative_to(ROOT)}"
            else:
                yield f"{name} is intact", ""
