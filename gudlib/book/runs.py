"""Run notebooks with papermill: check the parameters, execute in parallel, keep records, continue where a run stopped.

`run_job(Job(...))` is one notebook with one set of parameters. Both ends pickle and nothing global is touched, so any
`concurrent.futures` executor can run it; `run` does many notebooks, `sweep` one notebook on a grid of parameters.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import nbconvert
import nbformat
import papermill
import psutil
import pyarrow
import pyarrow.parquet
from filelock import FileLock, Timeout
from nbclient.exceptions import CellTimeoutError
from nbformat.reader import NotJSONError
from pandas import DataFrame
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, NotebookExecutionManager, papermill_engines
from papermill.exceptions import PapermillExecutionError
from papermill.execute import remove_error_markers
from tqdm import tqdm

from gudlib import __version__, checks
from gudlib.book.notebooks import QUIET, START_TIMEOUT, ThisPython, coalesce, environment, find, parameters_of, start
from gudlib.files import DATA, PACKAGE, ROOT, read_json, replacing, write, write_json

CELL_TIMEOUT = 6 * 3600  # seconds; a training cell of the gpu profile is the longest that there is

LARGE = 2**28  # bytes of a file that is known by its size and date alone
CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # of the control group, if there is one
FACTS = ("seconds", "python", "torch", "numpy", "gudlib", "commit", "changed")  # of a record, for a row

_bar: dict[str, Any] = {"disable": True}  # over cells: shown by the processes of `run`, each on a line of its own


@dataclass(frozen=True)
class Job:
    """One notebook to run with `parameters` into the folder `out`.

    Attributes:
        fresh: run it from nothing, even if it was done before: what it left in its folder of results is set aside.
        timeout: seconds that a cell may take.
    """

    notebook: Path
    out: Path
    parameters: Mapping[str, Any] = field(default_factory=dict)
    fresh: bool = False
    timeout: float = CELL_TIMEOUT


@dataclass(frozen=True)
class Result:
    """What came of a job: completed, skipped (it was completed before), or failed and how."""

    notebook: str
    status: str
    seconds: float
    output: Path
    failure: str = ""


def plan(
    notebooks: Sequence[Path],
    out: Path,
    parameters: Mapping[str, Any],
    profile: str | None = None,
    fresh: bool = False,
    timeout: float = CELL_TIMEOUT,
) -> list[Job]:
    """Jobs for `notebooks`, checked without starting a kernel.

    Arguments:
        notebooks: their paths.
        out: folder for the results.
        parameters: values, or texts to be read as the declared type; each notebook gets those that it declares.
        profile: value for those notebooks that declare a parameter `profile`.
        fresh, timeout: as of `Job`.

    Raises:
        ValueError: for a parameter that no notebook declares or a value not of the declared type (it names what is
            accepted), for two notebooks that would write the same file, and for a timeout that is none.
    """
    timeout = checks.real("timeout, in seconds,", timeout, above=0)
    declared = {notebook: parameters_of(notebook) for notebook in notebooks}
    accepted = "; accepted are:"
    for notebook, types in declared.items():
        accepted += f"\n  {notebook.stem}: {', '.join(map(str, types.values())) or 'none'}"
    unknown = sorted(map(str, set(parameters).difference(*declared.values())))
    if unknown:
        raise ValueError(f"unknown parameter {', '.join(unknown)}{accepted}")
    if len({notebook.stem for notebook in notebooks}) < len(notebooks):
        raise ValueError(f"two notebooks of one name would overwrite each other in {out}")
    wanted = ({"profile": profile} if profile else {}) | dict(parameters)
    jobs = []
    for notebook, types in declared.items():
        try:
            values = {name: types[name].read(value) for name, value in wanted.items() if name in types}
        except ValueError as error:
            raise ValueError(f"mistyped parameter of {notebook.stem}: {error}{accepted}") from error
        jobs.append(Job(notebook, out, values, fresh, timeout))
    return jobs


class _Engine(NBClientEngine):
    """papermill's engine, with settings that it doesn't pass on."""

    @classmethod
    def execute_managed_notebook(cls, nb_man: NotebookExecutionManager, kernel_name: str, **kwargs: Any) -> None:
        client = PapermillNotebookClient(
            nb_man,
            kernel_name=kernel_name,
            timeout=math.ceil(kwargs["seconds"]),
            startup_timeout=START_TIMEOUT,
            interrupt_on_timeout=False,  # else the cell says KeyboardInterrupt
            on_cell_executed=coalesce,
            extra_arguments=QUIET,
            kernel_manager_class=ThisPython,
            resources={"metadata": {"path": str(kwargs["folder"])}},
        )
        start(client, environment() | {"GUDLIB_RESULTS": str(kwargs["results"])})


papermill_engines.register("gudlib", _Engine)


def run_job(job: Job) -> Result:
    """Execute a notebook into `job.out`: NAME.ipynb, NAME.html and the record NAME.json, each replaced in one step.

    A failure of the notebook, `sys.exit` in it included, is a result too; what was executed of it is kept.
    """
    name, key, start = job.notebook.stem, _key(job), time.perf_counter()
    output, page, record = (job.out / f"{name}{suffix}" for suffix in (".ipynb", ".html", ".json"))
    if not job.fresh and output.is_file() and page.is_file() and (before := _completed(job, key)):
        return Result(name, "skipped", before["seconds"], output)
    job.out.mkdir(parents=True, exist_ok=True)
    if job.fresh:
        _set_aside(job.out / name)
    for old in (record, job.out / name / "report.json"):
        old.unlink(missing_ok=True)
    there = _reports(job.out)
    partial, error = job.out / f"{name}.partial.ipynb", None
    partial.unlink(missing_ok=True)
    options = {
        "folder": job.notebook.parent,  # not `cwd`: papermill would change that of this process, shared by its threads
        "results": job.out,
        "kernel_name": "python3",
        "language": "python",
        "engine_name": "gudlib",
        "seconds": job.timeout,
        "progress_bar": {"desc": name, "leave": False, **_bar},
        "autosave_cell_every": 10,
    }
    try:
        source, target = (str(path).replace("{", "{{").replace("}", "}}") for path in (job.notebook, partial))
        papermill.execute_notebook(source, target, dict(job.parameters), **options)  # it takes paths for templates
    except Exception as caught:  # a cell's error, a dead kernel, a timeout: all are this notebook's failure
        error = caught
    if isinstance(error, CellTimeoutError):
        error = TimeoutError(f"longer than the timeout of {job.timeout:g} seconds")
    failure = ""
    try:
        failure = _failure(partial, error)
        if partial.is_file():
            if error and not failure:
                nbformat.write(remove_error_markers(nbformat.read(partial, 4)), partial)
            html = nbconvert.HTMLExporter().from_filename(str(partial))[0]
            html = html.replace('href="../README.md"', f'href="{(ROOT / "README.md").as_uri()}"')
            write(page, re.sub(r'href="(\d\d[a-z]?_\w+)\.ipynb', r'href="\1.html', html))
            os.replace(partial, output)
    except (OSError, NotJSONError) as caught:  # a full disk: half a notebook, or no page
        failure = failure or str(error or caught)
    finally:
        partial.unlink(missing_ok=True)
    result = Result(name, "failed" if failure else "completed", time.perf_counter() - start, output, failure)
    facts = {"output": output.name, "parameters": dict(job.parameters), "key": key, "python": platform.python_version()}
    facts |= {package: importlib.metadata.version(package) for package in ("torch", "numpy")}
    facts |= {
        "gudlib": __version__,
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain")),
    }
    told = [path.relative_to(job.out) for path, state in _reports(job.out).items() if there.get(path) != state]
    write_json(record, asdict(result) | facts | {"reports": [path.as_posix() for path in sorted(told)]})
    return result


def _reports(out: Path) -> dict[Path, tuple[int, int, int]]:
    """Where reports lie, and what changes when one is written anew."""
    states = {path: path.stat() for path in out.glob("*/report.json")}
    return {path: (state.st_ino, state.st_mtime_ns, state.st_size) for path, state in states.items()}


def _completed(job: Job, key: str | None) -> dict[str, Any]:
    """The record of a job that was completed, with this key if one is given, if it and its reports are whole."""
    record = read_json(job.out / f"{job.notebook.stem}.json")
    wanted = {"parameters": dict, "seconds": float, "reports": list} | dict.fromkeys(FACTS, object)
    if record.get("status") != "completed" or (key is not None and record.get("key") != key):
        return {}
    whole = all(isinstance(record.get(name), kind) for name, kind in wanted.items())
    return record if whole and all(read_json(job.out / path) for path in record["reports"]) else {}


def _set_aside(folder: Path) -> None:
    """Rename a folder to NAME.before, in place of what was set aside earlier."""
    if folder.is_dir():
        before = folder.with_name(f"{folder.name}.before")
        shutil.rmtree(before, ignore_errors=True)
        folder.rename(before)


def _key(job: Job) -> str:
    """What a job's results depend on, hashed.

    Cells, parameters, those modules of this package that they import, modules beside the notebook, torch and the data.
    """
    cells = [(cell.cell_type, cell.source) for cell in nbformat.read(job.notebook, 4).cells]
    there = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    there = {name.removesuffix(".__init__"): path.read_text(encoding="utf-8") for name, path in there.items()}
    beside = {path.name: path.read_text(encoding="utf-8") for path in sorted(job.notebook.parent.glob("*.py"))}
    used, queue = {"gudlib"}, ["\n".join(source for kind, source in cells if kind == "code"), *beside.values()]
    while queue:
        found = _imports(queue.pop(), frozenset(there)) - used
        used |= found
        queue += [there[name] for name in found]
    code = [(name, there[name]) for name in sorted(used)]
    versions = {package: importlib.metadata.version(package) for package in ("torch", "numpy")}
    parts = [cells, dict(job.parameters), code, beside, versions, _contents()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _contents() -> list[tuple[str, str]]:
    """Digests of the data that notebooks may read: this repository's, and those of GUDLIB_DATA."""
    folders = [DATA, *filter(None, [os.environ.get("GUDLIB_DATA")])]
    found = []
    for folder in map(Path, folders):
        for path in sorted(path for path in folder.rglob("*") if path.suffix in (".parquet", ".safetensors")):
            state = path.stat()
            digest = _digest(path, state.st_size, state.st_mtime_ns)
            found.append((path.relative_to(folder).as_posix(), digest))
    return found


@functools.cache
def _digest(path: Path, size: int, changed: int) -> str:
    """Of a file's bytes or, for a large one, of its size and date."""
    return f"{size}, {changed}" if size > LARGE else hashlib.sha256(path.read_bytes()).hexdigest()


@functools.cache  # the points of a sweep share their notebook
def _imports(source: str, there: frozenset[str]) -> frozenset[str]:
    """Modules of this package that a source imports; all of them where it can't be told."""
    if re.search(r"^\s*(import [^#\n]*\bgudlib\b|from gudlib[\w.]* import \*)", source, re.M):
        return there
    found: set[str] = set()
    for module, names in re.findall(r"^\s*from (gudlib[\w.]*) import (\([^)]*\)|.*)", source, re.M):
        found |= {module, module.rpartition(".")[0], *(f"{module}.{name}" for name in re.findall(r"\w+", names))}
    return there & found


def _failure(notebook: Path, error: Exception | None) -> str:
    """Where a run stopped and why: number and first line of the last cell it began. Empty if all were completed."""
    content = nbformat.read(notebook, 4) if notebook.is_file() else nbformat.v4.new_notebook()
    cells = [cell for cell in content.cells if cell.cell_type == "code"]
    expected = error is None or isinstance(error, PapermillExecutionError)  # or of a cell tagged `raises-exception`
    if expected and all(cell.metadata.papermill.status == "completed" for cell in cells):
        return ""
    for number, cell in reversed([*enumerate(cells, 1)]):
        if cell.metadata.papermill.start_time:
            said = (f"{o.ename}: {o.evalue}" for o in cell.outputs if o.output_type == "error")
            reason = error if isinstance(error, TimeoutError) else next(said, error)
            return f"cell [{number}] `{cell.source.strip().splitlines()[0]}`: {reason}"
    return str(error)


def _git(*arguments: str) -> str:
    """What git says of this checkout; empty where there is none."""
    try:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def run(jobs: Sequence[Job], workers: int = 1) -> list[Result]:
    """Run jobs in `workers` processes that share the cores, with a bar over notebooks and one each over cells.

    An interrupt ends the workers and their kernels, then raises; the same jobs run again continue.

    Raises:
        ValueError: if another run or sweep is writing to one of their folders.
    """
    with _alone({job.out for job in jobs}):
        return _gather(jobs, workers, None, lambda job: job.notebook.stem, lambda job: None)


def sweep(
    jobs: Sequence[Job], table: Path, workers: int = 1, executor: Executor | None = None
) -> tuple[list[Result], DataFrame]:
    """Run one notebook's jobs, each in a folder of its own, and keep a table with one row for each completed job.

    A row holds the parameters, what the notebook reported (`claims.report`), and its time, versions and commit. The
    table is replaced in one step whenever a job is done, so it can be read at any time. Jobs that were completed before
    with the same parameters, code and data are not run again but have their row; rows of other jobs are dropped. A
    report's names that are a parameter's or a fact's get `reported_` before them; columns of unlike kinds become text.

    Arguments:
        jobs: as from `points`.
        table: the parquet file.
        workers: processes on this machine.
        executor: where to run them instead, on machines that share the folder; any of `concurrent.futures`.

    Raises:
        ValueError: if another run or sweep is writing to the table's folder.
    """
    rows: dict[Path, dict[str, Any]] = {}

    def keep(done: Iterable[Job], mine: bool = True) -> DataFrame:
        rows.update({job.out: _row(job, None if mine else _key(job)) for job in done})
        frame = _writable(DataFrame([rows[job.out] for job in jobs if rows.get(job.out)]))
        with replacing(table) as draft:
            frame.to_parquet(draft, index=False)
        return frame

    with _alone({table.parent}):
        keep((job for job in jobs if not job.fresh), mine=False)
        results = _gather(jobs, workers, executor, lambda job: job.out.name, lambda job: keep([job]))
        if stale := sum(bool(rows.get(job.out)) and not _row(job, _key(job)) for job in jobs):
            warnings.warn(f"code or data changed meanwhile: {stale} rows are of before; sweep again", stacklevel=2)
        return results, keep([])


@contextmanager
def _alone(folders: Iterable[Path]) -> Iterator[None]:
    """A block in which no other process that asks for it writes to these folders; a lock lies beside each."""
    with ExitStack() as stack:
        for folder in sorted({folder.resolve() for folder in folders}):
            if any(path.exists() and not path.is_dir() for path in (folder, *folder.parents)):
                raise ValueError(f"results can't be written to {folder}: a file is in the way")
            folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(FileLock(folder.parent / f".{folder.name}.lock", timeout=0))
            except Timeout:
                raise ValueError(f"another run writes to {folder}: wait for its end, or give another folder") from None
        yield


def points(grid: Mapping[str, Any], out: Path, fresh: bool = False, timeout: float = CELL_TIMEOUT) -> list[Job]:
    """The jobs of a sweep, checked without starting a kernel, in the order of its grids; a point given twice runs once.

    Arguments:
        grid: `notebook`, a name or path; `parameters`, common to all points (optional); `grids`, a list of mappings
            from parameters to lists of values. Each grid is the product of its lists, the last name running fastest.
        out: folder for the results; each job has one below it, named by a number that its parameters determine.
            Parameters that the grid leaves out are written down with their defaults, so that it is the same point
            whichever way it is given.
        fresh, timeout: as of `Job`.

    Raises:
        ValueError: for another key or a missing one, a grid without values, an unknown or mistyped parameter.
    """
    if set(grid) - {"parameters"} != {"notebook", "grids"}:
        got = ", ".join(map(str, grid)) or "nothing"
        raise ValueError(f"a sweep needs `notebook` and `grids`, and may have `parameters`; got {got}")
    common, grids = grid.get("parameters") or {}, grid["grids"]
    if not isinstance(common, dict):
        raise ValueError(f"`parameters` must be a mapping from parameters to values; got {common!r}")
    if not isinstance(grids, list) or not all(isinstance(g, Mapping) for g in grids) or not grids:
        raise ValueError(f"`grids` must be a list of mappings from parameters to lists of values; got {grids!r}")
    [notebook] = find([str(grid["notebook"])])
    defaults = {each.name: value for each in parameters_of(notebook).values() for value in each.literal}
    jobs: dict[str, Job] = {}
    for each in grids:
        lists = {name: values if isinstance(values, list) else [values] for name, values in each.items()}
        if empty := [name for name, values in lists.items() if not values]:
            raise ValueError(f"no values for {', '.join(empty)}")
        for values in itertools.product(*lists.values()):
            [job] = plan(
                [notebook], out, defaults | common | dict(zip(lists, values, strict=True)), None, fresh, timeout
            )
            said = json.dumps(dict(job.parameters), sort_keys=True)
            name = hashlib.sha256(said.encode()).hexdigest()[:12]
            jobs.setdefault(name, replace(job, out=out / name))
    return list(jobs.values())


def _row(job: Job, key: str | None) -> dict[str, Any]:
    """What a completed job contributes to the table; nothing if it is not, or if it is not of a key that is given."""
    record = _completed(job, key)
    if not record:
        return {}
    facts = {name: record[name] for name in FACTS}
    row = dict(record["parameters"])
    for path in record["reports"]:  # under whatever name it gave itself
        told = read_json(job.out / path).items()
        told = [(_writable_text(name), _writable_text(value)) for name, value in told]
        row |= {f"reported_{name}" if name in record["parameters"] or name in facts else name: x for name, x in told}
    return row | facts


def _has_mapping(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(map(_has_mapping, value)))


def _writable_text(value: Any) -> Any:
    """A text without halves of characters, as names of files may have; anything else as it is."""
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


def _writable(frame: DataFrame) -> DataFrame:
    """The table, with JSON texts in columns whose values a table's column cannot hold together."""
    for name in (name for name, kind in frame.dtypes.items() if kind.kind == "O"):
        try:
            mappings = any(map(_has_mapping, frame[name]))  # each would get the keys of all
            pyarrow.parquet.write_table(pyarrow.Table.from_pandas(frame[[name]]), io.BytesIO())
        except (pyarrow.ArrowException, OverflowError, UnicodeError):
            mappings = True
        if mappings:
            frame[name] = [json.dumps(value) for value in frame[name]]
    return frame


def _gather(
    jobs: Sequence[Job],
    workers: int,
    executor: Executor | None,
    name: Callable[[Job], str],
    done: Callable[[Job], Any],
) -> list[Result]:
    """The jobs' results, in their order; `done` is called with each job that is finished."""
    results: dict[int, Result] = {}
    workers = min(checks.whole("workers", workers), len(jobs) or 1)
    with (
        nullcontext(executor) if executor else _Workers(workers) as executor,
        tqdm(total=len(jobs), desc="notebooks", unit="notebook", disable=None) as bar,
    ):
        futures: dict[Future, int] = {}
        try:
            futures.update((executor.submit(run_job, job), number) for number, job in enumerate(jobs))
            for future in as_completed(futures):
                job, error = jobs[futures[future]], future.exception()  # an error: the worker was killed
                output = job.out / f"{job.notebook.stem}.ipynb"
                result = Result(job.notebook.stem, "failed", 0.0, output, str(error)) if error else future.result()
                results[futures[future]] = result
                bar.write(f"{name(job)} {result.status}, {result.seconds / 60:.1f} min")
                bar.update()
                done(job)
        except BaseException as error:  # an interrupt, a full disk
            if isinstance(executor, _Workers):
                executor.stop()
            elif isinstance(error, KeyboardInterrupt):
                executor.shutdown(wait=False, cancel_futures=True)
            raise
    return [results[number] for number in range(len(jobs))]


class _Workers(ThreadPoolExecutor):
    """Processes that share the cores, each with a thread here that waits for it: a killed one takes no other along."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self._count = count
        self._folder = tempfile.TemporaryDirectory()
        self._told = str(Path(self._folder.name) / "lock"), max(1, cores() // count), os.getpid()
        self._before = tqdm.get_lock()
        tqdm.set_lock(FileLock(self._told[0]))  # the system frees it when a process that holds it is killed
        self._idle: SimpleQueue[tuple[int, ProcessPoolExecutor]] = SimpleQueue()
        for line in range(1, count + 1):
            self._idle.put((line, self._process(line)))

    def _process(self, line: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _start_worker, (line, *self._told))

    def submit(self, do: Callable[[Job], Result], job: Job) -> Future[Result]:  # pyright: ignore
        """Have the next process that is free do a job."""
        return super().submit(self._in_a_process, do, job)

    def _in_a_process(self, do: Callable[[Job], Result], job: Job) -> Result:
        line, process = self._idle.get()
        try:
            with _no_interrupts():
                future = process.submit(do, job)
            return future.result()
        except BrokenProcessPool as error:
            process = self._process(line)
            raise RuntimeError("the process that ran it was killed, for want of memory perhaps") from error
        finally:
            self._idle.put((line, process))

    def stop(self) -> None:
        """End all processes, and begin no job any more."""
        self.shutdown(wait=False, cancel_futures=True)
        while self._idle.qsize() < self._count:  # a thread may just be starting the next process
            for worker in multiprocessing.active_children():
                worker.terminate()
            time.sleep(0.1)

    def __exit__(self, *reason: Any) -> None:
        super().__exit__(*reason)
        while not self._idle.empty():
            self._idle.get()[1].shutdown()
        tqdm.set_lock(self._before)
        self._folder.cleanup()


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """A block whose child processes start without heeding an interrupt: to stop them is up to us."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(line: int, lock: str, threads: int, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # kernels inherit that
    tqdm.set_lock(FileLock(lock))
    _bar.update(disable=None, position=line)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ["TQDM_DISABLE"] = "1"  # in the kernels, that is: this process read it on importing tqdm
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Stop this worker, and its kernels, once the process that started it is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            child.kill()
    os._exit(1)


def cores() -> int:
    """How many cores this process may use, by its affinity and its control group."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no such file, or `max`
        quota, period = CPU_MAX.read_text().split()
        allowed = min(allowed, math.ceil(int(quota) / int(period)))
    return max(1, allowed)
