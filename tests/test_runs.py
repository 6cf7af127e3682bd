"""The runner: what it refuses before a kernel starts, what a failure leaves behind, what a second run does."""

import json
import os
import signal
import subprocess
import sys
import time
import unittest.mock as mock
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import psutil
import pytest

from gudlib import notebooks, runs

PARAMETERS = """steps: int = 2  # how many
rate: float = 1e-3
name: str = 'x'
loud: bool = False
sizes: list[float] = [1.0]"""


def write(path: Path, *codes: str, parameters: str = PARAMETERS) -> Path:
    cell = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    cells = [nbformat.v4.new_markdown_cell("# 00 · Title"), cell, *map(nbformat.v4.new_code_cell, codes)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=notebooks.METADATA), path)
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "gudlib", "run", *map(str, arguments)]


def gudlib(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess, Path]:
    """One run of a good notebook, a failing one, one that exits, one whose kernel dies."""
    folder = tmp_path_factory.mktemp("outcomes")
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
    assert {"torch", "numpy", "python", "gudlib", "commit", "changed"} < {*record}
    assert json.loads((folder / "out/raises.json").read_text())["status"] == "failed"


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


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("stps", "3", "unknown parameter stps"),
        ("steps", "3.5", "3.5 is not int"),
        ("steps", "true", "True is not int"),
        ("rate", "fast", "could not convert string to float: 'fast'"),
        ("rate", True, "True is not float"),
        ("name", 7, "7 is not str"),
        ("loud", "1", "1 is not bool"),
        ("sizes", "[1, a]", "could not convert string to float: 'a'"),
        ("sizes", "3", "3 is not list[float]"),
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


@pytest.mark.parametrize("line", ["steps = 2", "steps: int = other = 2", "import os", "rate: float = f(x=1)"])
def test_a_line_that_is_no_parameter_is_named(tmp_path, line):
    path = write(tmp_path / "a.ipynb", parameters=f"seed: int = 0\n\n# sizes\n{line}")
    with pytest.raises(ValueError, match="a.ipynb: not a parameter of the form") as refused:
        notebooks.parameters_of(path)
    assert str(refused.value).endswith(line)


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


def test_an_interrupt_ends_cleanly_and_the_next_run_continues(tmp_path):
    quick = write(tmp_path / "quick.ipynb", "print('done')")
    slow = write(tmp_path / "slow.ipynb", "import time, pathlib\nif not pathlib.Path('go').exists(): time.sleep(600)")
    arguments = command(quick, slow, "--out", tmp_path / "out")
    marked, pipe = os.environ | {"GUDLIB_TEST": str(tmp_path)}, subprocess.PIPE
    process = subprocess.Popen(arguments, stdout=pipe, stderr=pipe, text=True, env=marked)
    wait_for(lambda: (tmp_path / "out/slow.partial.ipynb").exists())
    wait_for(lambda: len(family(tmp_path)) > 1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors and "the same command continues" in errors
    wait_for(lambda: not family(tmp_path), seconds=5)  # neither workers nor kernels are left

    (tmp_path / "go").touch()
    again = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0, again.stderr
    assert "quick skipped" in again.stdout and "slow completed" in again.stdout


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
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
