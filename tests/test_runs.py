"""The runner: what it refuses before a kernel starts, what a failure leaves behind, what a second run does.

A sweep is the same for one notebook and many points, and its table tells the truth at any time.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import unittest.mock as mock
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import nbformat
import pandas
import psutil
import pytest
import yaml
from cases import PATIENCE

from gudlib import __main__
from gudlib import __version__ as version
from gudlib.book import notebooks, runs

PARAMETERS = """steps: int = 2  # how many
rate: float = 1e-3
name: str = 'x'
loud: bool = False
sizes: list[float] = [1.0]"""


def write(path: Path, *codes: str, parameters: str = PARAMETERS) -> Path:
    cell = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    cells = [nbformat.v4.new_markdown_cell("# 00 · Title\n\nSome prose."), cell, *map(nbformat.v4.new_code_cell, codes)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=notebooks.METADATA), path)
    return path


def command(*arguments: object, name: str = "run") -> list[str]:
    return [sys.executable, "-m", "gudlib", name, *map(str, arguments)]


def interruptible(command: list[str]) -> list[str]:
    """The same, heeding SIGINT also where these tests run in a shell's background, which has its jobs ignore it."""
    heed = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    return [sys.executable, "-c", heed, *command]


def gudlib(*arguments: object, name: str = "run") -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments, name=name), capture_output=True, text=True, timeout=PATIENCE)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess, Path]:
    """One run of a good notebook, a failing one, one that exits, one whose kernel dies."""
    folder = tmp_path_factory.mktemp("outcomes") / "{steps}"  # papermill takes such paths for templates
    folder.mkdir()
    write(folder / "good.ipynb", "print(steps, rate, name, sizes)", "import os; print(os.getcwd())")
    write(folder / "raises.ipynb", "x = 1", "# the bad cell\n1 / 0", "print('after')")
    write(folder / "exits.ipynb", "import sys\nsys.exit(0)", "print('after')")
    write(folder / "dies.ipynb", "import os\nos._exit(1)")
    (folder / "values.yaml").write_text("steps: 3\nrate: 1e-2\nsizes: [1, 2e-1]\n")
    names = [folder / f"{name}.ipynb" for name in ("good", "raises", "exits", "dies")]
    arguments = ["-f", folder / "values.yaml", "-p", "steps", "5", "-p", "name", "07", "--jobs", "2"]
    return gudlib(*names, *arguments, "--out", folder / "out"), folder


def test_failures_are_kept_and_named_and_the_others_still_run(outcomes):
    done, folder = outcomes
    assert done.returncode == 1
    status = {line.split()[0]: line.split()[1] for line in done.stdout.split("minutes  output\n")[1].splitlines()}
    assert status == {"good": "completed", "raises": "failed", "exits": "failed", "dies": "failed"}
    failed = [line for line in done.stderr.splitlines() if line.startswith("failed: ")]
    assert [line.split(", ", 1)[0] for line in failed] == [
        f"failed: {folder}/out/{name}.ipynb" for name in ("raises", "exits", "dies")
    ]
    assert failed[0].endswith("cell [4] `# the bad cell`: ZeroDivisionError: division by zero")
    assert failed[1].endswith("cell [3] `import sys`: SystemExit: 0")
    assert failed[2].endswith("cell [3] `import os`: Kernel died")
    assert "after" not in str([cell.get("outputs") for cell in nbformat.read(folder / "out/raises.ipynb", 4).cells])
    assert 'gudlib/runs.py", line' not in done.stderr  # no traceback of ours; a dying kernel may leave its own
    assert not list((folder / "out").glob("*.partial.*"))


def test_results_lie_in_the_output_folder_with_a_record(outcomes):
    _, folder = outcomes
    for name in ("good", "raises", "exits", "dies"):
        assert {(folder / "out" / f"{name}{suffix}").is_file() for suffix in (".ipynb", ".html", ".json")} == {True}
    text = str(nbformat.read(folder / "out/good.ipynb", 4))
    assert "5 0.01 07 [1.0, 0.2]" in text  # -p over -f over the default; YAML's text 1e-2 as a float
    assert f"{folder}\\n" in text  # a notebook runs in its own folder
    record = json.loads((folder / "out/good.json").read_text())
    assert record["parameters"] == {"steps": 5, "rate": 0.01, "name": "07", "sizes": [1.0, 0.2]}
    assert record["status"] == "completed" and record["seconds"] > 0
    assert {"torch", "numpy", "python", "commit", "changed"} < {*record} and record["gudlib"] == version
    assert json.loads((folder / "out/raises.json").read_text())["status"] == "failed"


def test_an_expected_error_is_none_and_a_long_line_is_kept(tmp_path):
    expected = nbformat.v4.new_code_cell("1 / 0", metadata={"tags": ["raises-exception"]})
    for name, last in (("good", "print('y' * 3_000_000)\nprint('half\\rwhole')"), ("bad", "# here\n[][0]")):
        content = nbformat.read(write(tmp_path / f"{name}.ipynb", last), 4)
        content.cells.insert(2, expected)
        nbformat.write(content, tmp_path / f"{name}.ipynb")
    good, bad = (runs.run_job(runs.Job(tmp_path / f"{name}.ipynb", tmp_path / "out")) for name in ("good", "bad"))
    assert good.status == "completed" and not good.failure
    assert bad.failure == "cell [3] `# here`: IndexError: list index out of range"
    *_, fails, long = nbformat.read(good.output, 4).cells
    assert fails.outputs[0].ename == "ZeroDivisionError" and "papermill-error" not in good.output.read_text()
    assert long.outputs[0].text == "y" * 3_000_000 + "\nwhole\n"


def test_kernels_are_of_this_python_and_know_time_figures_letters_and_folders(tmp_path):
    """Whatever the environment says, and whatever kernelspecs there are."""
    show = "import matplotlib, os, sys\nprint(matplotlib.get_backend(), sys.executable, 'γ', os.environ['GUDLIB_DATA'])"
    plain = write(tmp_path / "plain.ipynb", show)
    content = nbformat.read(plain, 4)
    content.metadata = {}
    nbformat.write(content, plain)
    slow = write(tmp_path / "slow.ipynb", "import time\ntime.sleep(300)")
    spec = tmp_path / "jupyter/kernels/python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text('{"argv": ["/nowhere/python"], "display_name": "x", "language": "python"}')
    odd = {"MPLBACKEND": "Agg", "LC_ALL": "C", "GUDLIB_DATA": "sets", "JUPYTER_PATH": str(tmp_path / "jupyter")}
    odd = os.environ | odd | {"PYTHONUTF8": "0"}
    shared = {"capture_output": True, "text": True, "timeout": PATIENCE, "cwd": tmp_path, "env": odd}
    assert subprocess.run(command(plain, "--out", tmp_path / "out"), **shared).returncode == 0
    done = subprocess.run(command(slow, "--timeout", "2", "--out", tmp_path / "out"), **shared)  # a time of its own
    assert done.returncode == 1 and "cell [2] `import time`: longer than the timeout of 2 seconds" in done.stderr
    [told] = [o.text for c in nbformat.read(tmp_path / "out/plain.ipynb", 4).cells for o in c.get("outputs", ())]
    assert told.split()[0].endswith("inline") and told.split()[1:] == [sys.executable, "γ", str(tmp_path / "sets")]


def test_done_is_skipped_until_notebook_or_parameters_change(tmp_path):
    job = runs.Job(write(tmp_path / "a.ipynb", "1"), tmp_path / "out", {"steps": 5})

    def status(job: runs.Job) -> str:
        with ThreadPoolExecutor() as executor:  # any executor will do
            return executor.submit(runs.run_job, job).result().status

    assert [status(job), status(job)] == ["completed", "skipped"]
    assert status(runs.Job(job.notebook, job.out, {"steps": 6})) == "completed"
    assert status(runs.Job(job.notebook, job.out, {"steps": 6}, fresh=True)) == "completed"
    (job.out / "a.html").unlink()
    assert status(runs.Job(job.notebook, job.out, {"steps": 6})) == "completed"
    write(job.notebook, "1 / 0")
    assert [status(job), status(job)] == ["failed", "failed"]


def test_a_worker_that_is_killed_takes_no_other_notebook_along(tmp_path):
    bad = write(tmp_path / "bad.ipynb", "import os, signal", "os.kill(os.getppid(), signal.SIGKILL)")
    good = [write(tmp_path / f"{name}.ipynb", "print('done')") for name in "ab"]
    first, *others = runs.run(runs.plan([bad, *good], tmp_path / "out", {}))
    assert first.status == "failed" and first.failure.startswith("the process that ran it was killed")
    assert [result.status for result in others] == ["completed", "completed"]


@pytest.mark.parametrize(
    "text", ["", "{", "{}", "[]", "\udcff", '{"cells": 3, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}']
)
def test_a_file_that_is_no_notebook_is_named(tmp_path, capsys, text):
    (tmp_path / "a.ipynb").write_bytes(text.encode(errors="surrogateescape"))
    assert __main__.main(["run", str(tmp_path / "a.ipynb"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/a.ipynb is not a notebook: ")


@pytest.mark.parametrize("place", ["file", "file/below", "file/far/below"])
def test_a_file_in_the_way_of_results_is_told_before_anything_runs(tmp_path, capsys, place):
    (tmp_path / "file").touch()
    assert __main__.main(["run", str(write(tmp_path / "a.ipynb")), "--out", str(tmp_path / place)]) == 2
    assert f"results can't be written to {tmp_path}/{place}: a file is in the way" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_a_timeout_that_is_none_is_refused(tmp_path, seconds):
    with pytest.raises(ValueError, match="timeout, in seconds, must be a finite number above 0; got"):
        runs.plan([write(tmp_path / "a.ipynb")], tmp_path, {}, timeout=seconds)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("stps", "3", "unknown parameter stps"),
        ("steps", "3.5", "'3.5' is not int"),
        ("steps", "true", "'true' is not int"),
        ("rate", "fast", "'fast' is not float"),
        ("rate", True, "True is not float"),
        ("name", 7, "7 is not str"),
        ("loud", "2", "'2' is not bool"),
        ("sizes", "[1, a]", "'[1, a]' is not list[float]"),
        ("sizes", "3", "'3' is not list[float]"),
        ("steps", "[", "mistyped parameter of a"),
    ],
)
def test_parameters_are_refused_before_a_kernel_starts(tmp_path, monkeypatch, name, value, complaint):
    monkeypatch.setattr("jupyter_client.manager.KernelManager.start_kernel", pytest.fail)
    with pytest.raises(ValueError) as refused:
        runs.plan([write(tmp_path / "a.ipynb")], tmp_path, {name: value})
    assert complaint in str(refused.value)
    assert "\n  a: steps: int = 2, rate: float = 1e-3, name: str = 'x'" in str(refused.value)


def test_each_notebook_gets_the_parameters_that_it_declares(tmp_path):
    one = write(tmp_path / "one.ipynb", parameters='profile: str = "laptop"')
    two = write(tmp_path / "two.ipynb", parameters="steps: int = 1")
    jobs = runs.plan([one, two], tmp_path, {"steps": "3"}, profile="gpu")
    assert [job.parameters for job in jobs] == [{"profile": "gpu"}, {"steps": 3}]


def test_a_line_that_is_no_parameter_is_named_with_its_notebook(tmp_path):
    path = write(tmp_path / "a.ipynb", parameters="seed: int = 0\n\n# sizes\nsteps = 2")
    with pytest.raises(ValueError, match="a.ipynb: not a parameter of the form .*: steps = 2$"):
        notebooks.parameters_of(path)


def test_wrong_requests_exit_2_and_name_what_there_is(tmp_path):
    unknown, refused = gudlib("98_nothing"), gudlib(write(tmp_path / "a.ipynb"), "-p", "stps", "3")
    assert (unknown.returncode, refused.returncode) == (2, 2)
    assert unknown.stderr.startswith("error: no notebook 98_nothing; there are")
    assert all(path.stem in unknown.stderr for path in notebooks.book())
    assert refused.stderr.startswith("error: unknown parameter stps; accepted are:\n  a: steps: int = 2")
    assert not list(tmp_path.glob("**/*.json"))


def test_notebooks_are_found_by_number_name_and_path(tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path)
    first, second = write(tmp_path / "00_first.ipynb"), write(tmp_path / "02_second.ipynb")
    assert notebooks.find() == [first, second]
    assert notebooks.find(["02", "00_first", str(second)]) == [second, first, second]
    with pytest.raises(ValueError, match="no notebook .*03; there are .*: 00_first, 02_second"):
        notebooks.find(["03"])
    extra = write(tmp_path / "extra.ipynb")
    assert notebooks.find(["extra", "02"]) == [extra, second] and notebooks.find() == [first, second]
    with pytest.raises(ValueError, match="no notebook ex; there are .*: 00_first, 02_second, extra$"):
        notebooks.find(["ex"])


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_cleanly_and_the_next_run_continues(tmp_path, by):
    quick = write(tmp_path / "quick.ipynb", "print('done')")
    slow = write(tmp_path / "slow.ipynb", "import time, pathlib\nif not pathlib.Path('go').exists(): time.sleep(600)")
    arguments = command(quick, slow, "--out", tmp_path / "out")
    marked, pipe = os.environ | {"GUDLIB_TEST": str(tmp_path)}, subprocess.PIPE
    process = subprocess.Popen(interruptible(arguments), stdout=pipe, stderr=pipe, text=True, env=marked)
    wait_for(lambda: (tmp_path / "out/slow.partial.ipynb").exists())
    wait_for(lambda: len(family(tmp_path)) > 1)
    process.send_signal(by)
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "Traceback" not in errors and "the same command continues" in errors
    wait_for(lambda: not family(tmp_path))  # neither workers nor kernels are left

    (tmp_path / "go").touch()
    again = subprocess.run(arguments, capture_output=True, text=True, timeout=PATIENCE)
    assert again.returncode == 0, again.stderr
    assert "quick skipped" in again.stdout and "slow completed" in again.stdout


def wait_for(condition) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def family(folder: Path) -> list[int]:
    """Processes that carry the mark of this test in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("GUDLIB_TEST") == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            pass
    return found


def test_a_refresh_repeats_itself_and_sets_the_navigation(tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path)
    for name, value in notebooks.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    widget = "from ipywidgets import interact\n@interact(x=3)\ndef f(x): print(x)"
    first = write(tmp_path / "00_first.ipynb", "print({'a', 'b'}, 1)", widget)
    write(tmp_path / "02_second.ipynb")
    notebooks.refresh(first)
    content = first.read_bytes()
    cells = nbformat.read(first, 4).cells
    assert cells[1].source == "[README](../README.md) | [00 · Title →](02_second.ipynb)"
    outputs = [[output.get("text") for output in cell.outputs] for cell in cells if cell.cell_type == "code"]
    assert outputs == [[], [mock.ANY], ["3\n"]]  # of a widget, what it printed
    notebooks.refresh(first)
    assert first.read_bytes() == content
    write(first, "1 / 0")
    content = first.read_bytes()
    with pytest.raises(Exception, match="ZeroDivisionError"):
        notebooks.refresh(first)
    assert first.read_bytes() == content and not list(tmp_path.glob("*.tmp"))


# Sweeps: the points


def values(jobs: list[runs.Job]) -> list[dict]:
    return [dict(job.parameters) for job in jobs]


def test_a_sweep_is_the_union_of_products_in_their_order_without_repeats(tmp_path):
    notebook = write(tmp_path / "a.ipynb")
    first = {"steps": [3, 1], "sizes": [[0.0], [1.0, 2]]}
    second = {"sizes": [[1, 2.0]], "steps": [4, "1"], "rate": "1e-2"}
    jobs = runs.points({"notebook": notebook, "parameters": {"rate": 1e-2}, "grids": [first, second]}, tmp_path)
    rest = {"name": "x", "loud": False}  # defaults
    assert values(jobs) == [
        rest | {"rate": 0.01, "steps": 3, "sizes": [0.0]},
        rest | {"rate": 0.01, "steps": 3, "sizes": [1.0, 2.0]},
        rest | {"rate": 0.01, "steps": 1, "sizes": [0.0]},
        rest | {"rate": 0.01, "steps": 1, "sizes": [1.0, 2.0]},  # the second grid has it again
        rest | {"rate": 0.01, "steps": 4, "sizes": [1.0, 2.0]},
    ]
    assert len({job.out for job in jobs}) == 5 and {job.out.parent for job in jobs} == {tmp_path}
    alone = runs.points({"notebook": notebook, "grids": [{"rate": 0.01, "steps": 4, "sizes": [[1, 2]]}]}, tmp_path)
    assert alone == jobs[4:]  # the folder depends on the parameters, not on the other points
    spelt = [{"loud": False, "rate": 0.01, "steps": 4, "sizes": [[1, 2]]}]
    assert runs.points({"notebook": notebook, "grids": spelt}, tmp_path) == alone  # nor on defaults written down
    over = {"notebook": notebook, "parameters": {"steps": 7, "name": "x"}, "grids": [{}, {"steps": [1, 8]}]}
    assert [job["steps"] for job in values(runs.points(over, tmp_path))] == [7, 1, 8]
    assert not any(job.fresh for job in jobs) and runs.points(over, tmp_path, fresh=True)[2].fresh


BAD_GRIDS = [
    ("grids: [{stps: [1]}]", "unknown parameter stps; accepted are:\n  a: steps: int = 2, rate: float = 1e-3"),
    ("grids: [{steps: [1]}, {stps: [1]}]", "unknown parameter stps; accepted are:\n  a: steps: int = 2"),
    ("grids: [{1: [1]}]", "unknown parameter 1; accepted are:\n  a: steps: int = 2"),
    ("grids: [{steps: [1, 2.5]}]", "mistyped parameter of a: '2.5' is not int (steps); accepted are:"),
    ("grids: [{sizes: [0.0, 1.0]}]", "mistyped parameter of a: '0.0' is not list[float] (sizes); accepted are:"),
    ("parameters: {loud: 3}\ngrids: [{steps: [1]}]", "mistyped parameter of a: '3' is not bool (loud); accepted are:"),
    ("parameters: [steps]\ngrids: [{steps: [1]}]", "`parameters` must be a mapping from parameters to values; got ["),
    ("grids: [{rate: [0.1], steps: []}]", "no values for steps"),
    ("grids: []", "`grids` must be a list of mappings from parameters to lists of values; got []"),
    ("grids: {steps: [1]}", "`grids` must be a list of mappings from parameters to lists of values; got {'steps'"),
    ("grids: [steps]", "`grids` must be a list of mappings from parameters to lists of values; got ['steps']"),
    ("parameters: {}", "needs `notebook` and `grids`, and may have `parameters`; got notebook, parameters"),
    ("grids: [{}]\nparametrs: {}", "and may have `parameters`; got notebook, grids, parametrs"),
    ("grids: [{}]\n1: {}", "and may have `parameters`; got notebook, grids, 1"),
    ("grids: [{}", "expected ',' or ']'"),
]


@pytest.mark.parametrize(("text", "complaint"), BAD_GRIDS)
def test_a_wrong_grid_exits_2_before_anything_starts(tmp_path, monkeypatch, capsys, text, complaint):
    monkeypatch.setattr("jupyter_client.manager.KernelManager.start_kernel", pytest.fail)
    monkeypatch.setattr(runs, "sweep", pytest.fail)
    (tmp_path / "grid.yaml").write_text(f"notebook: {write(tmp_path / 'a.ipynb')}\n{text}\n")
    assert __main__.main(["sweep", str(tmp_path / "grid.yaml"), "--out", str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and complaint in errors
    assert not (tmp_path / "out").exists()


def test_a_sweep_without_its_file_or_notebook_exits_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "sweep", pytest.fail)
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "no.yaml").write_text("notebook: nothing\ngrids: [{}]\n")
    (tmp_path / "bare.yaml").write_text("grids: [{}]\n")
    (tmp_path / "good.yaml").write_text(f"notebook: {write(tmp_path / 'a.ipynb')}\ngrids: [{{}}]\n")
    for arguments, complaint in [
        (["missing.yaml"], "No such file or directory: 'missing.yaml'"),
        (["list.yaml"], "list.yaml holds no lines `name: value`"),
        (["no.yaml"], "no notebook nothing; there are"),
        (["bare.yaml"], "a sweep needs `notebook` and `grids`, and may have `parameters`; got grids"),
        (["good.yaml", "--jobs", "0"], "--jobs must be at least 1; got 0"),
    ]:
        assert __main__.main(["sweep", *arguments]) == 2
        assert complaint in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


# Sweeps: what a point depends on


EVERYTHING = "designs bases data book book.claims mar mar.model"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = 1", ""),
        ("from gudlib import designs", "designs bases data"),
        ("from gudlib import designs as d, mar", "designs bases data mar mar.model"),
        ("from gudlib.book import claims", "book book.claims"),
        ("from gudlib.mar.model import build", "mar mar.model bases"),
        ("def f():\n    from gudlib.designs import Design", "designs bases data"),
        ("%matplotlib inline\n!ls\nfrom gudlib import bases", "bases"),
        ("# from gudlib import designs\nimport os, torch\nfrom pathlib import Path", ""),
        ("x = !ls\nfrom gudlib import bases", "bases"),  # not Python
        ("from gudlib import (\n    data,\n    designs,\n)", "designs bases data"),
        ("import gudlib", EVERYTHING),
        ("import os, gudlib.bases as b", EVERYTHING),
        ("from gudlib import *", EVERYTHING),
    ],
)
def test_a_point_depends_on_the_modules_that_its_notebook_imports(tmp_path, monkeypatch, source, expected):
    sources = {"__init__": "", "bases": "import math", "data": "", "book/__init__": "", "book/claims": ""}
    sources |= {"mar/__init__": "from gudlib.mar.model import build", "mar/model": "from gudlib import bases"}
    sources["designs"] = "from gudlib import bases\nfrom gudlib.data import scale"
    package = tmp_path / "gudlib"
    for name, text in sources.items():
        (package / f"{name}.py").parent.mkdir(parents=True, exist_ok=True)
        (package / f"{name}.py").write_text(text)
    monkeypatch.setattr(runs, "PACKAGE", package)
    job = runs.Job(write(tmp_path / "a.ipynb", source, "y = 2"), tmp_path, {"steps": 1, "rate": 0.5})
    key, changed = runs._key(job), set()
    for name, text in sources.items():
        (package / f"{name}.py").write_text(text + "\n# changed")
        changed |= {name.removesuffix("/__init__").replace("/", ".")} if runs._key(job) != key else set()
        (package / f"{name}.py").write_text(text)
    assert changed == {"__init__", *expected.split()}
    assert runs._key(runs.Job(job.notebook, tmp_path / "elsewhere", {"rate": 0.5, "steps": 1}, fresh=True)) == key
    assert runs._key(runs.Job(job.notebook, tmp_path, {"steps": 2, "rate": 0.5})) != key
    assert runs._key(runs.Job(write(tmp_path / "a.ipynb", source, "y = 3"), tmp_path, job.parameters)) != key


# Sweeps: the table, with notebooks that are only said to run


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """A sweep of steps = 1, 2, 3 whose notebooks cost nothing; `pretend.ran` is what ran, `pretend.bad` fails."""
    told = mock.Mock(ran=[], bad=set(), report=lambda parameters: {"square": parameters["steps"] ** 2})

    def execute(source, target, parameters, **options):
        content = nbformat.read(source, 4)
        told.ran.append(parameters["steps"])
        for cell in content.cells:
            cell.metadata.papermill = {"status": "completed", "start_time": "now"}
        nbformat.write(content, target)
        if parameters["steps"] in told.bad:
            raise RuntimeError("this one is bad")
        if report := told.report(parameters):
            folder = options["results"] / told.name
            folder.mkdir(exist_ok=True)
            (folder / "report.json").write_text(json.dumps(report))

    def sweep(steps=(1, 2, 3), fresh=False):
        """The status of each point, the table, and what ran."""
        told.ran = []
        grid = {"notebook": tmp_path / "a.ipynb", "grids": [{"steps": list(steps)}]}
        with ThreadPoolExecutor(1) as executor:
            jobs = runs.points(grid, tmp_path / "out", fresh)
            results, frame = runs.sweep(jobs, tmp_path / "out/table.parquet", executor=executor)
        pandas.testing.assert_frame_equal(frame, read(tmp_path / "out/table.parquet"))
        return [result.status for result in results], frame, told.ran

    monkeypatch.setattr("papermill.execute_notebook", execute)
    monkeypatch.setattr("nbconvert.HTMLExporter.from_filename", lambda *_: ("", {}))
    monkeypatch.setattr(runs, "_git", lambda *_: "")
    write(tmp_path / "a.ipynb", "from gudlib.book import claims")
    told.name, told.sweep = "a", sweep
    return told


def read(path: Path) -> pandas.DataFrame:
    """The table, lists as lists; and nothing lies beside it but the points' folders."""
    assert [entry for entry in path.parent.iterdir() if not entry.is_dir()] == [path]
    frame = pandas.read_parquet(path)
    return frame.map(lambda value: value.tolist() if hasattr(value, "tolist") else value)


def test_what_is_done_is_not_run_again_until_it_changes(tmp_path, pretend):
    assert pretend.sweep()[0::2] == (["completed"] * 3, [1, 2, 3])
    status, frame, ran = pretend.sweep()
    assert (status, ran) == (["skipped"] * 3, []) and frame.square.tolist() == [1, 4, 9]
    status, frame, ran = pretend.sweep((4, 2))  # rows of other points are dropped, in the order that is asked for
    assert (status, ran) == (["completed", "skipped"], [4]) and frame.steps.tolist() == [4, 2]
    assert pretend.sweep()[0::2] == (["skipped"] * 3, [])  # but not what they found
    write(tmp_path / "a.ipynb", "from gudlib.book import claims", "# changed")
    pretend.bad = {2}
    status, frame, ran = pretend.sweep()
    assert (status, ran) == (["completed", "failed", "completed"], [1, 2, 3])
    assert frame.steps.tolist() == [1, 3]  # the row of point 2 was of other code


def test_rows_of_other_code_are_gone_before_the_first_point_is_done(tmp_path, pretend):
    pretend.sweep()
    write(tmp_path / "a.ipynb", "from gudlib.book import claims", "# changed")
    pretend.report = lambda parameters: {"seen": len(read(tmp_path / "out/table.parquet")), "square": 0}
    _, frame, _ = pretend.sweep((1,))
    assert frame.seen.tolist() == [0]


def test_a_changed_module_runs_those_again_that_import_it(tmp_path, monkeypatch, pretend):
    package = tmp_path / "gudlib"
    shutil.copytree(runs.PACKAGE, package)
    monkeypatch.setattr(runs, "PACKAGE", package)
    pretend.sweep((1, 2))
    for name, status in (("book/doctor", "skipped"), ("book/claims", "completed")):
        (package / f"{name}.py").write_text("# changed")
        assert pretend.sweep((1, 2))[0] == [status] * 2


def test_a_failing_point_has_no_row_and_runs_alone_once_mended(pretend):
    pretend.bad = {2}
    status, frame, _ = pretend.sweep()
    assert status == ["completed", "failed", "completed"] and frame.square.tolist() == [1, 9]
    assert pretend.sweep()[0::2] == (["skipped", "failed", "skipped"], [2])
    pretend.bad = set()
    status, frame, ran = pretend.sweep()
    assert (status, ran) == (["skipped", "completed", "skipped"], [2]) and frame.square.tolist() == [1, 4, 9]


def test_fresh_runs_all_again_and_keeps_no_row_of_before(tmp_path, pretend):
    pretend.sweep()
    pretend.bad, pretend.report = {2}, lambda parameters: {"square": -parameters["steps"]}
    status, frame, ran = pretend.sweep(fresh=True)
    assert (status, ran) == (["completed", "failed", "completed"], [1, 2, 3])
    assert frame.square.tolist() == [-1, -3]
    pretend.report = lambda parameters: {"seen": len(read(tmp_path / "out/table.parquet"))}
    assert pretend.sweep((3,), fresh=True)[1].seen.tolist() == [0]


def test_a_row_has_the_report_of_its_own_run_under_any_name(tmp_path, pretend):
    pretend.name = "07"
    assert pretend.sweep()[1].square.tolist() == [1, 4, 9]
    pretend.name = "a"
    write(tmp_path / "b.ipynb").replace(tmp_path / "a.ipynb")
    pretend.sweep((5,))
    pretend.report = lambda _: None
    write(tmp_path / "a.ipynb", "# reports nothing any more")
    assert "square" not in pretend.sweep((5,))[1]


def test_a_row_has_nothing_of_a_report_that_its_run_did_not_write(tmp_path, pretend):
    pretend.name, pretend.report = "z", lambda _: {"loss": 0.5, "accuracy": 0.9}
    assert pretend.sweep((5,))[1].accuracy.tolist() == [0.9]
    pretend.name, pretend.report = "a", lambda _: {"loss": 0.1}
    write(tmp_path / "a.ipynb", "# reports under another name")
    frame = pretend.sweep((5,))[1]
    assert frame.loss.tolist() == [0.1] and "accuracy" not in frame


def test_a_table_takes_whatever_is_reported(pretend):
    values = {1: {"x": 1}, 2: {}, 3: {"y": [{}]}}
    pretend.report = lambda p: {
        "mapped": values[p["steps"]],
        "big": 2**70,
        "text": "\udcff",
        "all": [{}],
        "half\ud800": 1,
    }
    frame = pretend.sweep()[1]
    assert [json.loads(text) for text in frame.mapped] == [*values.values()]
    assert [json.loads(text) for text in frame.big] == [2**70] * 3 and frame["all"].tolist() == ["[{}]"] * 3
    assert frame.text.tolist() == ["\\udcff"] * 3 and frame["half\\ud800"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"key": ', "\udcff"])
@pytest.mark.parametrize("name", ["a.json", "a/report.json"])
def test_a_damaged_record_or_report_counts_as_not_done(tmp_path, pretend, name, text):
    pretend.sweep()
    damaged = next(path for path in sorted((tmp_path / "out").glob(f"*/{name}")))
    damaged.write_bytes(text.encode(errors="surrogateescape"))
    status, frame, ran = pretend.sweep()
    assert sorted(status) == ["completed", "skipped", "skipped"] and len(ran) == 1
    assert frame.square.tolist() == [1, 4, 9]


def test_a_report_takes_no_parameters_or_facts_place(pretend):
    pretend.report = lambda parameters: {"steps": 100 + parameters["steps"], "commit": "mine", "loss": 1.0}
    frame = pretend.sweep((1, 2))[1]
    assert frame.steps.tolist() == [1, 2] and frame.reported_steps.tolist() == [101, 102]
    assert frame.commit.tolist() == ["", ""] and frame.reported_commit.tolist() == ["mine", "mine"]


def test_a_column_of_unlike_kinds_is_kept_as_text(pretend):
    pretend.report = lambda parameters: {"bits": {1: 3.5, 2: "diverged", 3: [1, 2]}[parameters["steps"]], "n": 1}
    frame = pretend.sweep()[1]
    assert [json.loads(text) for text in frame.bits] == [3.5, "diverged", [1, 2]] and frame.n.tolist() == [1, 1, 1]


def test_fresh_sets_aside_what_a_run_left(tmp_path, pretend):
    pretend.sweep((1,))
    [kept] = (tmp_path / "out").glob("*/a")
    (kept / "checkpoint").write_text("old")
    write(tmp_path / "a.ipynb", "# other code")
    pretend.sweep((1,))
    assert (kept / "checkpoint").read_text() == "old"  # a stopped run goes on
    pretend.sweep((1,), fresh=True)
    assert [path.name for path in kept.iterdir()] == ["report.json"]
    assert (kept.with_name("a.before") / "checkpoint").read_text() == "old"
    pretend.sweep((1,), fresh=True)
    assert not (kept.with_name("a.before") / "checkpoint").exists()


def test_a_point_depends_on_what_lies_beside_it_and_on_the_data(tmp_path, monkeypatch, pretend):
    sets = tmp_path / "sets/mine"
    sets.mkdir(parents=True)
    monkeypatch.setenv("GUDLIB_DATA", str(tmp_path / "sets"))
    for path in (tmp_path / "helping.py", sets / "train.parquet"):
        for text in ("one", "two"):
            path.write_text(text)
            assert pretend.sweep((1,))[0] == ["completed"]
            assert pretend.sweep((1,))[0] == ["skipped"]
    path.touch()
    assert pretend.sweep((1,))[0] == ["skipped"]  # content counts, not dates
    monkeypatch.setattr(runs.importlib.metadata, "version", lambda package: "other")
    assert pretend.sweep((1,))[0] == ["completed"]


def test_a_folder_belongs_to_one_run_at_a_time(tmp_path, capsys, pretend):
    pretend.sweep((1,))
    (tmp_path / "grid.yaml").write_text(f"notebook: {tmp_path}/a.ipynb\ngrids: [{{steps: [1]}}]\n")
    with runs._alone({tmp_path / "out"}):
        with pytest.raises(ValueError, match=f"another run writes to {tmp_path}/out: wait for its end, or give"):
            pretend.sweep((1,))
        assert __main__.main(["sweep", str(tmp_path / "grid.yaml"), "--out", str(tmp_path / "out"), "--jobs", "1"]) == 2
        assert __main__.main(["run", str(tmp_path / "a.ipynb"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("error: another run writes to") == 2
    assert pretend.sweep((1,))[0] == ["skipped"]


def test_what_changed_while_a_sweep_ran_is_kept_said_and_done_again(tmp_path, pretend):
    def report(parameters):
        if parameters["steps"] == 2:
            write(tmp_path / "a.ipynb", "# changed")
        return {"square": parameters["steps"] ** 2}

    pretend.report = report
    with pytest.warns(UserWarning, match="code or data changed meanwhile: 2 rows are of before; sweep again"):
        status, frame, _ = pretend.sweep()
    assert status == ["completed"] * 3 and frame.square.tolist() == [1, 4, 9]
    assert pretend.sweep()[2] == [1, 2]


def test_cores_are_those_that_the_process_may_use(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "CPU_MAX", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5, 6}, raising=False)
    assert runs.cores() == 4
    for text, expected in (("max 100000", 4), ("150000 100000", 2), ("900000 100000", 4), ("1000 100000", 1)):
        (tmp_path / "cpu.max").write_text(text)
        assert runs.cores() == expected


def test_defaults_and_reports_keep_their_kinds(tmp_path, pretend):
    lines = "steps: int = 2\nrate: float = 1e-3\nname: str = 'x'\nloud: bool = False\nsizes: list[float] = []"
    write(tmp_path / "a.ipynb", parameters=f"{lines}\nbig: int = 60_000\nsquare: int = 2 ** 3")
    pretend.report = lambda parameters: {"a": [0.5] * parameters["steps"], "nothing": [], "gap": float("nan")}
    pretend.sweep((1, 2))
    row = read(tmp_path / "out/table.parquet").iloc[1]
    assert (row.steps, row.rate, row["name"], row.loud, row.sizes) == (2, 0.001, "x", False, [])
    assert row.big == 60_000 and (row.a, row.nothing) == ([0.5, 0.5], [])
    assert row.gap != row.gap and "square" not in row  # no literal: left to the notebook


def test_a_table_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch, pretend):
    pretend.sweep((1, 2))

    def fail(frame, path, **_):
        path.write_bytes(b"PAR1")
        raise OSError("disk full")

    monkeypatch.setattr(pandas.DataFrame, "to_parquet", fail)
    with pytest.raises(OSError, match="disk full"):
        pretend.sweep()
    assert pandas.read_parquet(tmp_path / "out/table.parquet").steps.tolist() == [1, 2]


# Sweeps: with kernels


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess, Path]:
    """One sweep of three points, the first of which fails; the command runs in this process, to save time."""
    folder = tmp_path_factory.mktemp("swept")
    bad = "from pathlib import Path\nassert steps < 3 or Path('mended').exists(), 'three'"
    report = (
        "from gudlib.book import claims\nclaims.report('tiny', {'sum': sum(sizes), 'doubled': [2 * x for x in sizes]})"
    )
    write(folder / "tiny.ipynb", bad, report)
    grids = "[{steps: [3, 1], sizes: [[1.0, 2.0]]}, {steps: 1, sizes: [[1.0, 2.0], []]}]"
    (folder / "grid.yaml").write_text(f"notebook: {folder}/tiny.ipynb\nparameters: {{name: '7'}}\ngrids: {grids}\n")
    arguments, output, errors = ["sweep", str(folder / "grid.yaml"), "--jobs", "1"], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = __main__.main([*arguments, "--out", str(folder / "out")])
    return subprocess.CompletedProcess(arguments, code, output.getvalue(), errors.getvalue()), folder


def test_a_sweep_leaves_a_table_with_a_row_for_each_completed_point(swept):
    done, folder = swept
    frame = read(folder / "out/grid.parquet")
    assert done.returncode == 1
    assert f"2 rows in {folder}/out/grid.parquet, 1 failed" in done.stdout
    [failed] = [line for line in done.stderr.splitlines() if line.startswith("failed: ")]
    bad, *good = runs.points(yaml.safe_load((folder / "grid.yaml").read_text()), folder / "out")
    assert failed == f"failed: {bad.out}/tiny.ipynb, cell [3] `from pathlib import Path`: AssertionError: three"
    declared = ["steps", "rate", "name", "loud", "sizes"]
    assert frame[declared].to_dict("records") == [
        {"steps": 1, "rate": 0.001, "name": "7", "loud": False, "sizes": [1.0, 2.0]},
        {"steps": 1, "rate": 0.001, "name": "7", "loud": False, "sizes": []},
    ]
    assert frame["sum"].tolist() == [3.0, 0.0] and frame.doubled.tolist() == [[2.0, 4.0], []]
    facts = ["seconds", "python", "torch", "numpy", "gudlib", "commit", "changed"]
    assert list(frame) == [*declared, "sum", "doubled", *facts]
    for job, row in zip(good, frame.to_dict("records"), strict=True):
        record = json.loads((job.out / "tiny.json").read_text())
        assert {name: row[name] for name in facts} == {name: record[name] for name in facts} and row["seconds"] > 0


def test_a_mended_point_runs_alone_in_another_process_too(swept, monkeypatch):
    _, folder = swept
    (folder / "mended").touch()
    jobs = runs.points(yaml.safe_load((folder / "grid.yaml").read_text()), folder / "out")
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        results, frame = runs.sweep(jobs, folder / "out/grid.parquet", executor=executor)
    assert [result.status for result in results] == ["completed", "skipped", "skipped"]
    assert frame.steps.tolist() == [3, 1, 1] and frame["sum"].tolist() == [3.0, 3.0, 0.0]
    monkeypatch.setattr("jupyter_client.manager.KernelManager.start_kernel", pytest.fail)
    with ThreadPoolExecutor(1) as executor:
        results, frame = runs.sweep(jobs, folder / "out/grid.parquet", executor=executor)
    assert [result.status for result in results] == ["skipped"] * 3 and frame["sum"].tolist() == [3.0, 3.0, 0.0]


def test_threads_of_one_process_keep_their_points_apart(tmp_path, monkeypatch):
    """Two kernels run at the same time, each with its own results folder; our process stays as it was."""
    together = """import os, time, pathlib
from gudlib.book import claims
pathlib.Path(f"{steps}.here").touch()
end = time.monotonic() + 60
while len(list(pathlib.Path().glob("*.here"))) < 2 and time.monotonic() < end: time.sleep(0.05)"""
    report = "claims.report('a', {'folder': os.getcwd(), 'results': os.environ['GUDLIB_RESULTS'], 'n': steps})"
    (tmp_path / "notebooks").mkdir()
    notebook = write(tmp_path / "notebooks/a.ipynb", together, report)
    monkeypatch.setenv("GUDLIB_RESULTS", "ours")
    jobs = runs.points({"notebook": notebook, "grids": [{"steps": [1, 2]}]}, tmp_path / "out")
    before = dict(os.environ), os.getcwd()
    with ThreadPoolExecutor(2) as executor:
        _, frame = runs.sweep(jobs, tmp_path / "out/table.parquet", executor=executor)
        assert executor.submit(int).result() == 0  # it is the caller's, and goes on
    assert (dict(os.environ), os.getcwd()) == before
    assert frame.n.tolist() == frame.steps.tolist() == [1, 2]
    assert frame.results.tolist() == [str(job.out) for job in jobs]
    assert set(frame.folder) == {str(tmp_path / "notebooks")} and len(list(tmp_path.glob("notebooks/*.here"))) == 2


def test_a_sweep_that_was_killed_or_interrupted_goes_on_with_the_rest(tmp_path, capsys):
    wait = "import time, pathlib\nwhile steps > 1 and not pathlib.Path('go').exists(): time.sleep(0.1)"
    report = "from gudlib.book import claims\nclaims.report('a', {'square': steps**2})"
    write(tmp_path / "a.ipynb", wait, report)
    (tmp_path / "grid.yaml").write_text(f"notebook: {tmp_path}/a.ipynb\ngrids: [{{steps: [1, 2]}}]\n")
    table, arguments = tmp_path / "out/grid.parquet", [tmp_path / "grid.yaml", "--jobs", 1, "--out", tmp_path / "out"]
    first, second = runs.points(yaml.safe_load((tmp_path / "grid.yaml").read_text()), tmp_path / "out")
    marked, pipe = os.environ | {"GUDLIB_TEST": str(tmp_path)}, subprocess.PIPE

    def stop(number: signal.Signals) -> tuple[int, str]:
        """Start the sweep; while the second point waits, send a signal to the command and its workers."""
        process = subprocess.Popen(
            interruptible(command(*arguments, name="sweep")),
            stdout=pipe,
            stderr=pipe,
            text=True,
            env=marked,
            start_new_session=True,
        )
        try:
            wait_for(lambda: (second.out / "a.partial.ipynb").exists() and len(pandas.read_parquet(table)))
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=PATIENCE)
        wait_for(lambda: not family(tmp_path))  # nor kernels
        assert pandas.read_parquet(table).square.tolist() == [1]
        return process.returncode, errors

    assert stop(signal.SIGKILL)[0] == -signal.SIGKILL
    written = (first.out / "a.json").stat().st_mtime_ns
    (second.out / "a.partial.ipynb").unlink()
    code, errors = stop(signal.SIGINT)
    assert code == 130 and "Traceback" not in errors and "the same command continues" in errors
    assert not (second.out / "a.json").exists()
    (tmp_path / "go").touch()
    assert __main__.main(["sweep", *map(str, arguments)]) == 0
    shown = capsys.readouterr().out
    assert f"{first.out.name} skipped" in shown and f"{second.out.name} completed" in shown
    assert read(table).square.tolist() == [1, 4] and (first.out / "a.json").stat().st_mtime_ns == written


def test_runs_start_from_a_thread_too(tmp_path):
    jobs = runs.plan([write(tmp_path / "a.ipynb", "print('steps', steps)")], tmp_path / "out", {"steps": 7})
    with ThreadPoolExecutor() as executor:
        results = executor.submit(runs.run, jobs).result()
    assert [result.status for result in results] == ["completed"]
    assert "steps 7" in (tmp_path / "out/a.ipynb").read_text()


def test_workers_and_kernels_end_with_the_process_that_started_them(tmp_path):
    slow = f"import time\nwith open({str(tmp_path / 'log')!r}, 'a') as log:\n    print(steps, file=log)\ntime.sleep(60)"
    write(tmp_path / "a.ipynb", slow)
    (tmp_path / "grid.yaml").write_text(f"notebook: {tmp_path}/a.ipynb\ngrids: [{{steps: [1, 2, 3]}}]\n")
    arguments = [tmp_path / "grid.yaml", "--jobs", "1", "--out", tmp_path / "out"]
    marked = os.environ | {"GUDLIB_TEST": str(tmp_path)}
    main = subprocess.Popen(command(*arguments, name="sweep"), env=marked, stderr=subprocess.DEVNULL)
    try:
        wait_for((tmp_path / "log").is_file)
        main.kill()
        main.wait()
        wait_for(lambda: not family(tmp_path))
        assert len((tmp_path / "log").read_text().splitlines()) == 1
    finally:
        for number in family(tmp_path):
            os.kill(number, signal.SIGKILL)


def test_an_interrupt_while_a_worker_dies_waits_for_no_further_notebook(tmp_path, monkeypatch):
    """As when a scheduler signals all processes of a job at once."""
    dies = write(tmp_path / "dies.ipynb", "import os, signal", "os.kill(os.getppid(), signal.SIGKILL)")
    slow = write(tmp_path / "slow.ipynb", f"import time, pathlib\ntime.sleep({PATIENCE})")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs.tqdm, "write", interrupted)  # as soon as the first one is told
    jobs = runs.plan([dies, slow], tmp_path / "out", {})
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        runs.run(jobs)
    assert time.monotonic() - start < PATIENCE / 2
