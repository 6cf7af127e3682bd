"""Run notebooks with papermill: check the parameters, execute in parallel, keep records, continue where a run stopped.

`run_job(Job(...))` is one notebook with one set of parameters. Both ends pickle, so a sweep is
`executor.map(run_job, jobs)` for any `concurrent.futures` executor of processes; `run` does it with progress bars.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import RLock
from pathlib import Path
from typing import Any

import nbconvert
import nbformat
import papermill
import yaml
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, NotebookExecutionManager, papermill_engines
from tqdm import tqdm

from gudlib.notebooks import NO_WIDGETS, QUIET, ROOT, parameters_of

CELL_TIMEOUT = 6 * 3600  # seconds; a training cell of the gpu profile is the longest that there is

_bar: dict[str, Any] = {"disable": True}  # over cells: shown by the processes of `run`, each on a line of its own


@dataclass(frozen=True)
class Job:
    """One notebook to run with `parameters` into the folder `out`; `fresh` runs it even if it was done before."""

    notebook: Path
    out: Path
    parameters: Mapping[str, Any] = field(default_factory=dict)
    fresh: bool = False


@dataclass(frozen=True)
class Result:
    """What came of a job: completed, skipped (it was completed before), or failed and how."""

    notebook: str
    status: str
    seconds: float
    output: Path
    failure: str = ""


def plan(
    notebooks: Sequence[Path], out: Path, parameters: Mapping[str, Any], profile: str | None = None, fresh: bool = False
) -> list[Job]:
    """Jobs for `notebooks`, checked without starting a kernel.

    Arguments:
        notebooks: their paths.
        out: folder for the results.
        parameters: values, or texts to be read as the declared type; each notebook gets those that it declares.
        profile: value for those notebooks that declare a parameter `profile`.
        fresh: run also what was done before.

    Raises:
        ValueError: for a parameter that no notebook declares or a value not of the declared type (it names what is
            accepted), and for two notebooks that would write the same file.
    """
    declared = {notebook: parameters_of(notebook) for notebook in notebooks}
    accepted = "; accepted are:"
    for notebook, types in declared.items():
        entries = [f"{name}: {hint} = {default}" for name, (hint, default) in types.items()]
        accepted += f"\n  {notebook.stem}: {', '.join(entries) or 'none'}"
    unknown = sorted(set(parameters).difference(*declared.values()))
    if unknown:
        raise ValueError(f"unknown parameter {', '.join(unknown)}{accepted}")
    if len({notebook.stem for notebook in notebooks}) < len(notebooks):
        raise ValueError(f"two notebooks of one name would overwrite each other in {out}")
    wanted = ({"profile": profile} if profile else {}) | dict(parameters)
    jobs = []
    for notebook, types in declared.items():
        try:
            values = {name: _typed(types[name][0], value) for name, value in wanted.items() if name in types}
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"mistyped parameter of {notebook.stem}: {error}{accepted}") from error
        jobs.append(Job(notebook, out, values, fresh))
    return jobs


def _typed(hint: str, value: Any) -> Any:
    """`value`, or the value that a text says, if it is of the declared type; else a `ValueError`."""
    if isinstance(value, str) and hint not in ("str", "float"):
        value = yaml.safe_load(value)
    if hint == "float" and isinstance(value, str | int | float) and not isinstance(value, bool):
        return float(value)  # text too: YAML takes 1e-2 for a string
    if hint.startswith("list[") and isinstance(value, list):
        return [_typed(hint[5:-1], item) for item in value]
    if type(value).__name__ != hint:
        raise ValueError(f"{value!r} is not {hint}")
    return value


class _Engine(NBClientEngine):
    """papermill's engine, with settings that it doesn't pass on."""

    @classmethod
    def execute_managed_notebook(cls, nb_man: NotebookExecutionManager, kernel_name: str, **kwargs: Any) -> None:
        client = PapermillNotebookClient(
            nb_man, kernel_name=kernel_name, timeout=CELL_TIMEOUT, coalesce_streams=True, extra_arguments=QUIET
        )
        client.widget_registry = NO_WIDGETS
        client.execute()


papermill_engines.register("gudlib", _Engine)


def run_job(job: Job) -> Result:
    """Execute a notebook into `job.out`: NAME.ipynb, NAME.html and the record NAME.json, each replaced in one step.

    A failure of the notebook, `sys.exit` in it included, is a result too; what was executed of it is kept.
    """
    name, key, start = job.notebook.stem, _key(job), time.perf_counter()
    output, page, record = (job.out / f"{name}{suffix}" for suffix in (".ipynb", ".html", ".json"))
    if not job.fresh and output.is_file() and page.is_file() and record.is_file():
        before = json.loads(record.read_text())
        if (before["key"], before["status"]) == (key, "completed"):
            return Result(name, "skipped", before["seconds"], output)
    job.out.mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)
    partial, error = job.out / f"{name}.partial.ipynb", None
    partial.unlink(missing_ok=True)
    options = {
        "cwd": job.notebook.parent,
        "kernel_name": "python3",
        "language": "python",
        "engine_name": "gudlib",
        "progress_bar": {"desc": name, "leave": False, **_bar},
        "autosave_cell_every": 10,
    }
    try:
        os.environ["GUDLIB_RESULTS"] = str(job.out)  # of the kernel, which inherits it
        papermill.execute_notebook(job.notebook, partial, dict(job.parameters), **options)
    except Exception as caught:  # a cell's error, a dead kernel, a timeout: all are this notebook's failure
        error = caught
    failure = _failure(partial, error)
    if partial.is_file():
        html = nbconvert.HTMLExporter().from_filename(str(partial))[0]
        html = html.replace('href="../README.md"', f'href="{(ROOT / "README.md").as_uri()}"')
        _replace(page, re.sub(r'href="(\d\d_\w+)\.ipynb', r'href="\1.html', html))
        os.replace(partial, output)
    result = Result(name, "failed" if failure else "completed", time.perf_counter() - start, output, failure)
    facts = {"output": output.name, "parameters": dict(job.parameters), "key": key, "python": platform.python_version()}
    facts |= {package: importlib.metadata.version(package) for package in ("torch", "numpy", "gudlib")}
    facts |= {"commit": _git("rev-parse", "HEAD"), "changed": bool(_git("status", "--porcelain"))}
    _replace(record, json.dumps(asdict(result) | facts, indent=2) + "\n")
    return result


def _key(job: Job) -> str:
    """What a job's results depend on, hashed: cells, parameters and the code of this package."""
    cells = [(cell.cell_type, cell.source) for cell in nbformat.read(job.notebook, 4).cells]
    code = [path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256(json.dumps([cells, dict(job.parameters), code], sort_keys=True).encode()).hexdigest()


def _failure(notebook: Path, error: Exception | None) -> str:
    """Where a run stopped and why: number and first line of the last cell it began. Empty if all were completed."""
    content = nbformat.read(notebook, 4) if notebook.is_file() else nbformat.v4.new_notebook()
    cells = [cell for cell in content.cells if cell.cell_type == "code"]
    if error is None and all(cell.metadata.papermill.status == "completed" for cell in cells):
        return ""
    for number, cell in reversed([*enumerate(cells, 1)]):
        if cell.metadata.papermill.start_time:
            reason = next((f"{o.ename}: {o.evalue}" for o in cell.outputs if o.output_type == "error"), error)
            return f"cell [{number}] `{cell.source.strip().splitlines()[0]}`: {reason}"
    return str(error)


def _git(*arguments: str) -> str:
    """What git says of this checkout; empty where there is none."""
    try:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def _replace(path: Path, text: str) -> None:
    draft = path.with_name(f"{path.name}.tmp")
    draft.write_text(text)
    os.replace(draft, path)


def run(jobs: Sequence[Job], workers: int = 1) -> list[Result]:
    """Run jobs in `workers` processes that share the cores, with a bar over notebooks and one each over cells.

    An interrupt ends the workers and their kernels, then raises; the same jobs run again continue.
    """
    context, results = multiprocessing.get_context("spawn"), {}
    lines, lock = context.SimpleQueue(), context.RLock()
    for line in range(1, workers + 1):
        lines.put(line)
    tqdm.set_lock(lock)
    threads = max(1, (os.cpu_count() or 1) // workers)
    ours = signal.signal(signal.SIGINT, signal.SIG_IGN)  # workers inherit this: to stop them is up to us
    with (
        ProcessPoolExecutor(workers, context, _start_worker, (lines, lock, threads)) as pool,
        tqdm(total=len(jobs), desc="notebooks", unit="notebook", disable=None) as bar,
    ):
        futures = {pool.submit(run_job, job): number for number, job in enumerate(jobs)}
        signal.signal(signal.SIGINT, ours)
        try:
            for future in as_completed(futures):
                job, error = jobs[futures[future]], future.exception()  # an error: the worker was killed
                result = Result(job.notebook.stem, "failed", 0.0, job.out, str(error)) if error else future.result()
                results[futures[future]] = result
                bar.write(f"{result.notebook} {result.status}, {result.seconds / 60:.1f} min")
                bar.update()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise
    return [results[number] for number in range(len(jobs))]


def _start_worker(lines: SimpleQueue, lock: RLock, threads: int) -> None:
    tqdm.set_lock(lock)
    _bar.update(disable=None, position=lines.get())
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ["TQDM_DISABLE"] = "1"  # in the kernels, that is: this process read it on importing tqdm
