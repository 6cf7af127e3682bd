"""The notebooks as files: find them, read what parameters they declare, and refresh what is committed of them.

A refresh executes a notebook in place, in the environment that the tests use, and removes all that would differ
the next time: two refreshes write the same bytes, so a diff shows what really changed.
"""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import nbclient
import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbformat import NotebookNode
from papermill.translators import PythonTranslator

from gudlib.files import IN_REPOSITORY, NOTEBOOKS, replacing, with_repository, write

PICTURE = NOTEBOOKS / "figures" / "overview.png"
# Of the kernels in refresh and test alike: one thread gives the same digits again, bars would be stored as text.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "TQDM_DISABLE": "1"}
CELL_TIMEOUT = 3600  # seconds: far beyond what a cell takes, on a busy machine too
# nbclient plays the browser for ipywidgets' Output: its message may cross a cell's reply, for which it then waits
# forever (github.com/jupyter/nbclient/issues/312). Without, what is printed into an Output is the cell's own output.
NO_WIDGETS: dict[str, dict] = {}
QUIET = ["--log-level=ERROR"]  # of the kernel: it warns at each start that its local sockets aren't encrypted
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
}
WIDGET = "application/vnd.jupyter.widget-view+json"


class ThisPython(AsyncKernelManager):
    """Starts kernels of the Python that runs this, whatever kernelspecs there are."""

    @property
    def kernel_spec(self) -> KernelSpec:
        """How to start one."""
        start = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=start, display_name="Python 3", language="python")


def environment() -> dict[str, str]:
    """Of kernels: this process's, with figures in the notebook, UTF-8, and absolute folders."""
    pinned = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "PYTHONUTF8": "1"}
    given = (name for name in ("GUDLIB_DATA", "GUDLIB_RESULTS") if os.environ.get(name))
    return {**os.environ, **pinned, **{name: str(Path(os.environ[name]).resolve()) for name in given}}


def book() -> list[Path]:
    """The notebooks of the companion, in reading order."""
    return sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


def find(names: Sequence[str] = ()) -> list[Path]:
    """Notebooks by number (`02`), name (`02_bases`, `one_model`) or path; the whole book if no names are given.

    Raises:
        ValueError: for a name that is none of these; it lists the notebooks that there are.
    """
    known = {path.stem: path for path in NOTEBOOKS.glob("*.ipynb")} | {path.stem[:2]: path for path in book()}
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


def parameters_of(notebook: Path) -> dict[str, tuple[str, str]]:
    """(type, default) of every parameter that the cell tagged `parameters` declares, as written there.

    Raises:
        ValueError: for a line of that cell that is no `name: type = default`; it gives the line.
    """
    cells = [cell for cell in nbformat.read(notebook, 4).cells if "parameters" in cell.metadata.get("tags", ())]
    found = PythonTranslator.inspect(cells[0]) if cells else []  # not inspect_notebook: it asks for a kernelspec
    declared = {each.name: (each.inferred_type_name, each.default) for each in found}
    for line in cells[0].source.splitlines() if cells else ():
        code = line.partition("#")[0]
        hint = declared.get(code.partition(":")[0].strip(), ("None", ""))[0]
        if code.strip() and (hint == "None" or code.count("=") != 1):
            raise ValueError(f"{notebook.name}: not a parameter of the form `name: type = default`: {line}")
    return declared


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
    content = nbformat.read(notebook, 4)
    bar = nbformat.v4.new_markdown_cell(navigation(notebook), metadata={"tags": ["navigation"]})
    cells = [cell for cell in content.cells if "navigation" not in cell.metadata.get("tags", ())]
    content.cells = [cells[0], bar, *cells[1:]]
    os.environ.update(ENVIRONMENT)
    client = nbclient.NotebookClient(
        content,
        timeout=CELL_TIMEOUT,
        extra_arguments=QUIET,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        kernel_manager_class=ThisPython,
        resources={"metadata": {"path": str(notebook.parent)}},
    )
    client.widget_registry = NO_WIDGETS
    client.execute(env=environment())
    with replacing(notebook) as draft:
        nbformat.write(settled(content), draft)
    for picture in pictures(content):
        write(PICTURE, picture)


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
