"""`gudlib run | sweep | claims | refresh | data | doctor`: run notebooks, see what they found, and what is here."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RUN = """Execute notebooks with papermill. What was completed before with the same code and parameters is skipped.
Each notebook gets those of the parameters that it declares; one that no notebook declares is refused."""

SWEEP = """Execute one notebook on a grid of parameters, and collect what it reports in a table, one row for each point.
FILE names the notebook, parameters common to all points, and grids, each a mapping from parameters to lists:

  notebook: one_model
  parameters: {steps: 800}
  grids:
    - {basis_name: [pca, haar], seed: [0, 1, 2]}

Points that were completed before with the same code are not run again; a sweep that was stopped goes on."""

FRESH = "run again, from nothing, what was completed before; its results are set aside as NAME.before"
TIMEOUT = "that a cell may take; default six hours"


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0 good, 1 something failed, 2 asked for wrongly, 130 interrupted."""
    called = "gudlib" if Path(sys.argv[0]).stem == "gudlib" else "python -m gudlib"
    parser = argparse.ArgumentParser(called, description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="execute notebooks into a folder", description=RUN)
    run.add_argument("names", nargs="*", metavar="NAME", help="02, 02_bases or a path; default: all notebooks")
    run.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set a parameter")
    run.add_argument("-f", type=Path, metavar="FILE", help="set parameters from a YAML file; -p overrides it")
    run.add_argument("--profile", choices=["laptop", "gpu"], help="of the notebooks that have a parameter `profile`")
    run.add_argument("--jobs", type=int, default=1, metavar="N", help="notebooks at a time; they share the cores")
    run.add_argument("--out", type=Path, default=Path("runs/book"), metavar="DIR", help="default: runs/book")
    run.add_argument("--fresh", action="store_true", help=FRESH)
    run.add_argument("--timeout", type=float, metavar="SECONDS", help=TIMEOUT)
    run.set_defaults(command=_run)

    sweep = commands.add_parser(
        "sweep",
        help="execute one notebook on a grid of parameters",
        description=SWEEP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sweep.add_argument("file", type=Path, metavar="FILE", help="the grid, YAML")
    sweep.add_argument("--jobs", type=int, metavar="N", help="at a time; default: one for each core that may be used")
    sweep.add_argument("--out", type=Path, metavar="DIR", help="default: runs/ and the name of FILE")
    sweep.add_argument("--fresh", action="store_true", help=FRESH)
    sweep.add_argument("--timeout", type=float, metavar="SECONDS", help=TIMEOUT)
    sweep.set_defaults(command=_sweep)

    found = commands.add_parser("claims", help="show what notebooks claimed, and fail if that is not as expected")
    found.add_argument("out", nargs="?", type=Path, default=Path("runs/book"), metavar="DIR", help="default: runs/book")
    found.set_defaults(command=_claims)

    refresh = commands.add_parser("refresh", help="execute notebooks in place, before a commit")
    refresh.add_argument("names", nargs="*", metavar="NAME", help="as for run")
    refresh.set_defaults(command=_refresh)

    commands.add_parser("data", help="list the image sets").set_defaults(command=_data)
    doctor = commands.add_parser("doctor", help="check packages, device, kernels, data, checkpoints")
    doctor.set_defaults(command=_doctor)

    options = parser.parse_args(arguments)
    try:
        with _terminable():
            return options.command(options)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues with what is not done", file=sys.stderr)
        return 130


@contextmanager
def _terminable() -> Iterator[None]:
    """A block that SIGTERM, by which schedulers of clusters end jobs, stops as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(options: argparse.Namespace) -> int:
    from gudlib.book import claims, notebooks, parameters, runs

    try:
        given = parameters.load(options.f) if options.f else {}
        if options.jobs < 1:
            raise ValueError(f"--jobs must be at least 1; got {options.jobs}")
        paths, given = notebooks.find(options.names), given | dict(options.p)
        jobs = runs.plan(paths, options.out.resolve(), given, options.profile, options.fresh, *_seconds(options))
        results = runs.run(jobs, options.jobs)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    width = max(len(result.notebook) for result in results)
    print(f"\n{'notebook':{width}}  status     minutes  output")
    for result in results:
        print(f"{result.notebook:{width}}  {result.status:9}  {result.seconds / 60:7.1f}  {result.output}")
    if rows := claims.recorded(options.out):
        print(f"{claims.counted(rows)}; for their values: gudlib claims {options.out}")
    failed = [result for result in results if result.status == "failed"]
    for result in failed:
        print(f"failed: {result.output}, {result.failure}", file=sys.stderr)
    return 1 if failed else 0


def _seconds(options: argparse.Namespace) -> list[float]:
    return [] if options.timeout is None else [options.timeout]


def _sweep(options: argparse.Namespace) -> int:
    from gudlib.book import parameters, runs

    try:
        grid = parameters.load(options.file)
        workers = runs.cores() if options.jobs is None else options.jobs
        if workers < 1:
            raise ValueError(f"--jobs must be at least 1; got {workers}")
        out = (options.out or Path("runs") / options.file.stem).resolve()
        jobs = runs.points(grid, out, options.fresh, *_seconds(options))
        table = out / f"{options.file.stem}.parquet"
        results, rows = runs.sweep(jobs, table, workers)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed = [result for result in results if result.status == "failed"]
    print(f"\n{len(rows)} rows in {table}, {len(failed)} failed")
    for result in failed:
        print(f"failed: {result.output}, {result.failure}", file=sys.stderr)
    return 1 if failed else 0


def _claims(options: argparse.Namespace) -> int:
    from gudlib.book import claims

    rows = claims.recorded(options.out)
    if not rows:
        print(f"error: no claims in {options.out / 'claims'}; name the folder of a run", file=sys.stderr)
        return 2
    for row in rows:
        verdict = {True: "holds", False: "fails"}[row["holds"]] + ("" if row["holds"] == row["expected"] else " (!)")
        told = f"{claims.measured(row):18} {claims.accepted(row):22} {row['kind']}: {row['name']}"
        print(f"{row['notebook']}  {verdict:9}  {told}")
    print(claims.counted(rows))
    return 0 if all(row["holds"] == row["expected"] for row in rows) else 1


def _refresh(options: argparse.Namespace) -> int:
    from nbclient.exceptions import CellControlSignal

    from gudlib.book import notebooks

    try:
        for path in notebooks.find(options.names):
            print(f"refreshing {path.stem}", flush=True)
            notebooks.refresh(path)
    except (ValueError, OSError, CellControlSignal, RuntimeError) as error:  # the last: a kernel that died
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _data(options: argparse.Namespace) -> int:
    from gudlib import data
    from gudlib.book import doctor

    for name, source in data.KNOWN.items():
        counts = f"{source.train:,} + {source.test:,} images of {'x'.join(map(str, source.shape))}"
        print(f"{name}: {counts}; licence: {source.licence}; {doctor.origin(name)}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from gudlib.book import doctor

    return 0 if doctor.report() else 1


if __name__ == "__main__":
    sys.exit(main())
