"""Kill and crowd: `python tests/stress.py`. Too long for the tests (five minutes), which do the same a few times.

- A training is killed again and again (SIGKILL, at random moments) and ends bit for bit as one that was not.
- Of a sweep, the main process, a worker or a kernel is killed again and again: no row that was there is lost, nothing
  is left running, the table can be read at any time, and it ends complete and right.
- Two writers and a reader share files of every sort: no read is torn, no claim is lost.

It prints what it did and ends with 1 where something was not so.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import nbformat
import pandas
import psutil
import test_training as here
import torch
from tqdm.auto import tqdm

from gudlib.book import claims, notebooks
from gudlib.files import read_json, read_tensors, write_tensors

WITHIN = 30  # seconds after which nothing of a killed process may be left


def training(kills: int) -> None:
    """Kill a training; each process goes on where the one before it was killed."""
    torch.set_num_threads(1)
    config = replace(here.QUICK, steps=12 * kills, save_every=1)
    whole = here.trainer(config, None, "mlp")
    with tempfile.TemporaryDirectory() as folder:
        file, before, done = Path(folder) / "checkpoint", None, 0
        for attempt in tqdm(range(kills), "kills in training"):
            child = os.fork()
            if child == 0:
                try:
                    list(here.trainer(config, file, "mlp", seed=attempt).run())
                finally:
                    os._exit(0)
            deadline = time.monotonic() + WITHIN
            while not file.exists() or file.stat().st_mtime_ns == before:  # it has begun
                assert time.monotonic() < deadline, "the training did not begin"
                time.sleep(0.001)
            time.sleep(random.uniform(0, 0.04))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            assert os.WIFSIGNALED(status), "the training had ended before it was killed"
            before, step = file.stat().st_mtime_ns, read_tensors(file)[1]["step"]
            assert step >= done, f"steps were lost: {done}, then {step}"
            done = step
        last = here.trainer(config, file, "mlp", seed=kills)
        list(last.run())
    list(whole.run())
    here.assert_same(last, whole)
    print(f"training: {kills} kills, the last at step {done} of {config.steps}; the end is that of a run without")


def family(mark: str) -> list[psutil.Process]:
    """Processes whose environment has the mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("GUDLIB_TEST") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            pass
    return found


def role(process: psutil.Process) -> str:
    """What a process of a sweep is."""
    line = " ".join(process.cmdline())
    return "kernel" if "ipykernel" in line else "worker" if "spawn_main" in line else "main" if "gudlib" in line else ""


def sweeps(kills: int) -> None:
    """Kill one process of a sweep of twice as many short points, and start it again where its main process is gone."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        report = "import time\nfrom gudlib.book import claims\ntime.sleep(0.5)\nclaims.report('a', {'square': k**2})"
        cells = [nbformat.v4.new_code_cell("k: int = 0", metadata={"tags": ["parameters"]})]
        cells += [nbformat.v4.new_code_cell(report)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=notebooks.METADATA), root / "a.ipynb")
        points, table = list(range(2 * kills)), root / "out/grid.parquet"
        (root / "grid.yaml").write_text(f"notebook: {root}/a.ipynb\ngrids: [{{k: {points}}}]\n")
        command = [sys.executable, "-m", "gudlib", "sweep", root / "grid.yaml", "--jobs", "2", "--out", root / "out"]
        environment, killed = os.environ | {"GUDLIB_TEST": folder, "OMP_NUM_THREADS": "1"}, dict.fromkeys(ROLES, 0)
        known: set[int] = set()
        log = (root / "log").open("wb")

        def start() -> subprocess.Popen:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

        def rows() -> set[int]:
            frame = pandas.read_parquet(table) if table.is_file() else pandas.DataFrame()
            found = set(frame.k) if len(frame) else set()
            assert known <= found, f"rows are lost: {known - found}"
            return found

        main, bar = start(), tqdm(total=kills, desc="kills in sweeps")
        while bar.n < kills:
            time.sleep(random.uniform(0.2, 2.5))
            known = rows()
            wanted = min(ROLES, key=lambda name: (killed[name], random.random()))
            if victims := [process for process in family(folder) if role(process) == wanted]:
                random.choice(victims).kill()
                killed[wanted] += 1
                bar.update()
            if wanted == "main" and victims:
                main.wait()
                deadline = time.monotonic() + WITHIN
                while left := family(folder):
                    assert time.monotonic() < deadline, f"left running: {[role(process) for process in left]}"
                    time.sleep(0.1)
            if main.poll() is not None:
                main = start()
        bar.close()
        while main.wait() and len(rows()) < len(points):  # 1: a point failed because its process was killed
            main = start()
        frame = pandas.read_parquet(table)
        assert frame.k.tolist() == points and (frame.square == frame.k**2).all()
        deadline = time.monotonic() + WITHIN
        while family(folder):
            assert time.monotonic() < deadline, "left running after the end"
            time.sleep(0.1)
        left = [path for path in root.rglob("*") if path.suffix == ".tmp" or ".partial." in path.name]
        print(f"sweeps: {killed}, {len(points)} rows complete and right; drafts left by killed writers: {len(left)}")


ROLES = ("main", "worker", "kernel")


def _write(folder: str, letter: str, seconds: float) -> int:
    sys.stdout = open(os.devnull, "w")  # a claim prints its verdict
    os.environ["GUDLIB_RESULTS"] = folder
    until, count = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        claims.claim("02", "measurement", f"{letter} {count}", count) if count < 300 else claims.report(
            "07", {"a": letter * 99_999}
        )
        write_tensors(f"{folder}/tensors", {"x": torch.full((50_000,), float(ord(letter)))}, {"letter": letter})
        count += 1
    return count


def writers(seconds: float) -> None:
    """Two processes write the same files while this one reads them."""
    with tempfile.TemporaryDirectory() as folder, get_context("spawn").Pool(2) as pool:
        writing = [pool.apply_async(_write, (folder, letter, seconds)) for letter in "ab"]
        reads = 0
        while not all(each.ready() for each in writing):
            if Path(folder, "tensors").is_file():
                tensors, header = read_tensors(f"{folder}/tensors")
                assert (tensors["x"] == ord(header["letter"])).all(), "two versions in one read"
                reads += 1
            for path in (Path(folder, "claims/02.json"), Path(folder, "07/report.json")):
                if path.is_file():
                    json.loads(path.read_bytes())
                    reads += 1
        counts = [each.get() for each in writing]
        kept = read_json(Path(folder, "claims/02.json"))
        assert len(kept) == sum(min(count, 300) for count in counts), "claims are lost"
        print(f"writers: {sum(counts)} rounds, {reads} reads, none torn; {len(kept)} claims, none lost")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--training", type=int, default=100, metavar="KILLS")
    parser.add_argument("--sweeps", type=int, default=50, metavar="KILLS")
    parser.add_argument("--writers", type=float, default=60, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    for what, how_much in ((training, options.training), (writers, options.writers), (sweeps, options.sweeps)):
        if how_much:
            what(how_much)
