"""`python -m gudlib doctor` on a copy of the project: sound, and with several things broken."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cases import PATIENCE

from gudlib.files import ROOT


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """What `doctor` checks, with one small checkpoint."""
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("gudlib", "data"):
        without = shutil.ignore_patterns("checkpoints", "cache", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=without)
    (folder := tmp_path / "data/checkpoints").mkdir()
    (folder / "small.safetensors").write_bytes(b"weights")
    (folder / "SHA256SUMS").write_text(f"{hashlib.sha256(b'weights').hexdigest()}  small.safetensors\n")
    return tmp_path


def doctor(project: Path, **variables: str) -> tuple[int, dict[str, str]]:
    """Exit code, and the remedy (or nothing) of each line."""
    environment = {k: v for k, v in os.environ.items() if k != "GUDLIB_DATA"} | {"HF_HUB_OFFLINE": "1"} | variables
    command = [sys.executable, "-m", "gudlib", "doctor"]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert "Traceback" not in done.stderr
    lines = [*done.stdout.splitlines(), ""]
    following = zip(lines, lines[1:], strict=False)
    return done.returncode, {line: after.removeprefix("  remedy: ") for line, after in following if line[:1].strip()}


def test_a_sound_project_is_all_well(project):
    code, lines = doctor(project)
    assert code == 0 and "all well" in lines and not [line for line in lines if "BROKEN" in line]
    for line in (
        "data fashion_mnist: embedded",
        "data/checkpoints/small.safetensors is intact",
        "data/fashion_mnist/train.parquet is intact",
        "a kernel starts and imports this gudlib",
        "JupyterLab opens notebooks with this Python",
        "the hub is switched off by HF_HUB_OFFLINE",
    ):
        assert line in lines
    assert any(line.startswith("device ") and "threads" in line and "GiB" in line for line in lines)


def test_each_broken_thing_is_named_with_its_remedy(project):
    (project / "torch.py").write_text("raise ImportError('no torch here')")
    (project / "data/checkpoints/small.safetensors").write_bytes(b"weighty")
    (project / "data/checkpoints/stray.safetensors").write_bytes(b"weights")
    with (project / "data/fashion_mnist/test.parquet").open("r+b") as file:
        file.truncate(1000)
    (project / "data/histology/test.parquet").unlink()
    with (project / "constraints.txt").open("a") as file:
        file.write("numpy==1.0\n")
    code, lines = doctor(project)
    assert code == 1
    broken = {line.removeprefix("BROKEN: "): remedy for line, remedy in lines.items() if line.startswith("BROKEN: ")}
    assert broken.pop("device: ImportError: no torch here").startswith("remove .venv and run make venv")
    assert broken.pop("image sets: ImportError: no torch here")
    assert broken == {
        "data/checkpoints/small.safetensors is corrupt, or not in SHA256SUMS": "git checkout -- data/checkpoints",
        "data/checkpoints/stray.safetensors is corrupt, or not in SHA256SUMS": "git checkout -- data/checkpoints",
        "data/fashion_mnist/test.parquet is corrupt, or not in SHA256SUMS": "git checkout -- data",
        "data/histology/test.parquet is missing": "git checkout -- data/histology/test.parquet",
    }
    assert "6 broken" in lines
    assert any(line.startswith("numpy ") and line.endswith(", not the tested 1.0") for line in lines)


def test_a_data_folder_that_is_none_is_named(project):
    code, lines = doctor(project, GUDLIB_DATA=str(project / "nowhere"))
    assert code == 1
    assert lines[f"BROKEN: GUDLIB_DATA={project}/nowhere is not a folder"].startswith("unset GUDLIB_DATA")


def test_what_a_run_and_jupyterlab_would_meet_is_said(project):
    spec = project / "jupyter/kernels/python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text('{"argv": ["/nowhere/python"], "display_name": "x", "language": "python"}')
    (project / "ipykernel_launcher.py").write_text("raise SystemExit(1)")
    odd = {"JUPYTER_PATH": str(project / "jupyter"), "HF_ENDPOINT": "hub.example", "HF_HUB_OFFLINE": "0"}
    code, lines = doctor(project, **odd)
    assert code == 1 and "3 broken" in lines
    assert lines[
        f"BROKEN: a kernel of {sys.executable} can't import gudlib: Kernel died before replying to kernel_info"
    ]
    assert lines[f"BROKEN: JupyterLab opens notebooks with /nowhere/python, not with {sys.executable}"]
    assert lines["BROKEN: HF_ENDPOINT=hub.example is no address"] == "export HF_ENDPOINT=https://hub.example"
