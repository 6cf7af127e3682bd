"""The notebooks as files: find them, read what parameters they declare, and refresh what is committed of them.

A refresh executes a notebook in place, in the environment that the tests use, and removes all that would differ
the next time: two refreshes write the same bytes, so a diff shows what really changed.
"""

from __future__ import annotations

import atexit
import base64
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbclient
import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbformat import NotebookNode, ValidationError

from gudlib.book.parameters import Parameter, declared
from gudlib.files import IN_REPOSITORY, NOTEBOOKS, ROOT, replacing, with_repository, write

PICTURE = NOTEBOOKS / "figures" / "overview.png"
# Of the kernels in refresh and test alike: one thread gives the same digits again, bars would be stored as text.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "TQDM_DISABLE": "1"}
CELL_TIMEOUT = 3600  # seconds: far beyond what a cell takes, on a busy machine too
# nbclient plays the browser for ipywidgets' Output: its message may cross a cell's reply, for which it then waits
# forever (github.com/jupyter/nbclient/issues/312). Without, what is printed into an Output is the cell's own output.
NO_WIDGETS: dict[str, dict] = {}
START_TIMEOUT = 600  # seconds, for a kernel to start where much else does
QUIET = ["--log-level=ERROR"]  # of the kernel: it warns at each start that its local sockets aren't encrypted
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
}
OVERWRITTEN = re.compile(r"^.*\r(?=[^\n])", re.M)
WIDGET = "application/vnd.jupyter.widget-view+json"


class ThisPython(AsyncKernelManager):
    """Starts kernels of the Python that runs this, whatever kernelspecs there are."""

    @property
    def kernel_spec(self) -> KernelSpec:
        """How to start one."""
        start = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=start, display_name="Python 3", language="python")


def environment() -> dict[str, str]:
    """Of kernels: this process's, with this gudlib, figures in the notebook, UTF-8, and absolute folders."""
    pinned = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "PYTHONUTF8": "1"}
    if IN_REPOSITORY:  # elsewhere it is installed, in that Python
        pinned["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    given = (name for name in ("GUDLIB_DATA", "GUDLIB_RESULTS") if os.environ.get(name))
    return {**os.environ, **pinned, **{name: str(Path(os.environ[name]).resolve()) for name in given}}


def book() -> list[Path]:
    """The notebooks of the companion, in reading order: those that begin with a number, or one and a letter."""
    return sorted(path for path in NOTEBOOKS.glob("*.ipynb") if re.fullmatch(r"\d\d[a-z]?", number(path)))


def number(notebook: Path) -> str:
    """What a notebook's name begins with: `02`, `10b`."""
    return notebook.stem.partition("_")[0]


def find(names: Sequence[str] = ()) -> list[Path]:
    """Notebooks by number (`02`, `10b`), name (`02_bases`, `one_model`) or path; the whole book if no names are given.

    Raises:
        ValueError: for a name that is none of these; it lists the notebooks that there are.
    """
    known = {path.stem: path for path in NOTEBOOKS.glob("*.ipynb")} | {number(path): path for path in book()}
    paths = [known.get(name, Path(name)) for name in names] if names else book()
    if not names and not IN_REPOSITORY:
        raise ValueError(with_repository("the book of notebooks", "the path of a notebook"))
    missing = [str(path) for path in paths if path.suffix != ".ipynb" or not path.is_file()]
    if missing and not IN_REPOSITORY:
        raise ValueError(with_repository(f"notebook {', '.join(missing)}", "the path of one that is there"))
    if missing or not paths:
        there = ", ".join(sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))) or "none"
        raise ValueError(f"no notebook {', '.join(missing)}; there are (in {NOTEBOOKS}): {there}")
    return [path.resolve() for path in paths]


def read(notebook: Path) -> NotebookNode:
    """A notebook as it lies in its file.

    Raises:
        ValueError: if the file is none; it is named.
    """
    try:
        content = nbformat.read(notebook, 4)
        nbformat.validate(content)
    except (ValueError, TypeError, AttributeError, KeyError, ValidationError) as error:
        raise ValueError(f"{notebook} is not a notebook: {str(error).partition(chr(10))[0]}") from error
    return content


def parameters_of(notebook: Path) -> dict[str, Parameter]:
    """What the cell tagged `parameters` declares, by name.

    Raises:
        ValueError: for a line of that cell that declares none (`parameters.declared`); it gives the line.
    """
    cells = [cell for cell in read(notebook).cells if "parameters" in cell.metadata.get("tags", ())]
    try:
        return declared(cells[0].source) if cells else {}
    except ValueError as error:
        raise ValueError(f"{notebook.name}: {error}") from error


def title(notebook: Path) -> str:
    """The heading that a notebook opens with."""
    return nbformat.read(notebook, 4).cells[0].source.partition("\n")[0].lstrip("# ")


def navigation(notebook: Path) -> str:
    """Markdown links from a notebook to the README and, in the book, to the one before and the one after."""
    paths, links = book(), ["[README](../README.md)"]
    if notebook not in paths:
        return links[0]
    here = paths.index(notebook)
    if here:
        links.insert(0, f"[← {title(paths[here - 1])}]({paths[here - 1].name})")
    if here + 1 < len(paths):
        links.append(f"[{title(paths[here + 1])} →]({paths[here + 1].name})")
    return " | ".join(links)


def refresh(notebook: Path) -> None:
    """Execute a notebook and write it back, its navigation bar up to date.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell fails; the file stays as it was.
    """
    content = read(notebook)
    bar = nbformat.v4.new_markdown_cell(navigation(notebook), metadata={"tags": ["navigation"]})
    cells = [cell for cell in content.cells if "navigation" not in cell.metadata.get("tags", ())]
    content.cells = [cells[0], bar, *cells[1:]]
    os.environ.update(ENVIRONMENT)
    execute(content, notebook.parent)
    with replacing(notebook) as draft:
        nbformat.write(settled(content), draft)
    for picture in pictures(content):
        write(PICTURE, picture)


def coalesce(cell: NotebookNode, **_: Any) -> None:
    """Make what an executed cell printed one output for each stream, without lines that were written over.

    Of two streams side by side the errors come last. As nbclient's `coalesce_streams` does, in a time that grows with
    the square of a line's length.
    """
    streams: dict[str, NotebookNode] = {}
    kept = []
    for output in cell.get("outputs", ()):
        if output.output_type == "stream" and output.name in streams:
            streams[output.name].text += output.text
            continue
        if output.output_type == "stream":
            streams[output.name] = output
            if output.name == "stdout" and kept and kept[-1] is streams.get("stderr"):
                kept.insert(-1, output)
                continue
        kept.append(output)
    for output in streams.values():
        output.text = OVERWRITTEN.sub("", output.text)
    if "outputs" in cell:
        cell.outputs = kept


def execute(content: NotebookNode, folder: Path, seconds: float = CELL_TIMEOUT) -> None:
    """Execute all cells with this Python in a folder; each may take so many seconds.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell fails.
        nbclient.exceptions.CellTimeoutError: if a cell takes longer.
        RuntimeError: if the kernel does not start.
    """
    client = nbclient.NotebookClient(
        content,
        timeout=math.ceil(seconds),
        startup_timeout=min(math.ceil(seconds), START_TIMEOUT),
        extra_arguments=QUIET,
        kernel_name="python3",
        record_timing=False,
        on_cell_executed=coalesce,
        kernel_manager_class=ThisPython,
        resources={"metadata": {"path": str(folder)}},
    )
    start(client, environment())


def start(client: nbclient.NotebookClient, variables: dict[str, str]) -> None:
    """Execute a client's notebook with these environment variables, as all notebooks are."""
    client.widget_registry = NO_WIDGETS
    try:
        client.execute(env=variables)
    finally:
        atexit.unregister(client._cleanup_kernel)  # it is done, and would fail for a kernel that never started


def pictures(content: NotebookNode) -> list[bytes]:
    """The PNG that the cell tagged `picture` shows, for the README; no more than one notebook has such a cell."""
    tagged = [cell for cell in content.cells if "picture" in cell.metadata.get("tags", ())]
    shown = [o.data["image/png"] for cell in tagged for o in cell.outputs if "image/png" in o.get("data", ())]
    return [base64.b64decode(data) for data in shown]


def settled(content: NotebookNode) -> NotebookNode:
    """Remove from `content` what changes from run to run: widgets' random names, cells' ids, versions."""
    content.metadata = nbformat.from_dict(METADATA)
    content.nbformat_minor = 5
    for number, cell in enumerate(content.cells):
        cell.id = f"cell-{number:02d}"
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", ())]
    return content
