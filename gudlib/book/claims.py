"""Claims: what a notebook asserts, as a number with the range in which it counts as true, kept for the record.

A claim is of one of three kinds. An *identity* follows from the mathematics: only a mistake, rounding or chance breaks
it. A *measurement* could have come out otherwise; its range is what the text relies on, set when the number was known.
A *prediction* was written down, range and all, before the number was known.

A claim cell prints PASS or FAIL and adds a row to `runs/claims/NOTEBOOK.json` (under `$GUDLIB_RESULTS` if set). What is
expected to fail, a prediction that turned out wrong, says so: then a failure is the result, and a pass the surprise.
`python -m gudlib claims [DIR]` shows them all.
"""

import math
import os
from pathlib import Path
from typing import Any, Literal, get_args

from filelock import FileLock

from gudlib.files import RUNS, read_json, write_json

Kind = Literal["identity", "measurement", "prediction"]


def results(notebook: str) -> Path:
    """The folder for what a notebook writes, made if need be: `runs/NOTEBOOK/`, or `$GUDLIB_RESULTS/NOTEBOOK/`.

    Notebooks run by `gudlib.book.runs` have it in the output folder of the run.
    """
    folder = Path(os.environ.get("GUDLIB_RESULTS", RUNS)) / notebook
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def claim(
    notebook: str,
    kind: Kind,
    name: str,
    value: float,
    low: float = -float("inf"),
    high: float = float("inf"),
    *,
    error: float | None = None,
    expected: bool = True,
) -> None:
    """Check `low <= value <= high`, print the verdict with all that led to it, and record it.

    Arguments:
        notebook: its number, `06` or `10b`.
        kind: what sort of claim it is.
        name: the claim in words, with the unit; a later claim of the same name replaces it.
        value: what was measured.
        low, high: the accepted range.
        error: the value's standard error, if it has one.
        expected: whether it is to hold.

    Raises:
        ValueError: for another kind.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be {', '.join(get_args(Kind)[:-1])} or {get_args(Kind)[-1]}; got {kind!r}")
    value, error = float(value), None if error is None else float(error)
    holds = low <= value <= high
    row = {
        "kind": kind,
        "value": value,
        "error": error,
        "low": low if low > -float("inf") else None,
        "high": high if high < float("inf") else None,
        "holds": holds,
        "expected": expected,
    }
    print(f"{'PASS' if holds else 'FAIL'}  {kind}: {name}: {measured(row)}  (accepted: {accepted(row)})")
    folder = results("claims")
    path = folder / f"{notebook}.json"
    with FileLock(folder / f".{notebook}.lock"):  # read and written by one at a time
        write_json(path, read_json(path) | {name: row})


def measured(row: dict[str, Any]) -> str:
    """The value of a claim and its error, rounded alike to two digits of the error, or to four of its own."""
    value, error = row["value"], row["error"]
    if not error or not math.isfinite(error):
        return f"{value:.4g}"
    places = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{places}f} ± {error:.{places}f}"


def accepted(row: dict[str, Any]) -> str:
    """The range of a claim, in words."""
    low, high = row["low"], row["high"]
    if low is None:
        return "anything" if high is None else f"at most {high:g}"
    return f"at least {low:g}" if high is None else f"{low:g} to {high:g}"


def recorded(folder: Path) -> list[dict[str, Any]]:
    """All claims that were recorded below a folder of results, each with its `notebook` and `name`, in their order."""
    found = []
    for path in sorted(folder.glob("claims/*.json")):
        rows = {name: row for name, row in read_json(path).items() if _whole(row)}
        found += [{**row, "notebook": path.stem, "name": name} for name, row in rows.items()]
    return found


def _whole(row: Any) -> bool:
    number = float | int | None
    kinds = {
        "kind": str,
        "value": float,
        "error": number,
        "low": number,
        "high": number,
        "holds": bool,
        "expected": bool,
    }
    return isinstance(row, dict) and all(name in row and isinstance(row[name], kind) for name, kind in kinds.items())


def counted(rows: list[dict[str, Any]]) -> str:
    """How many of them hold, and how many turned out as expected."""
    count, wrong = len(rows), sum(row["holds"] != row["expected"] for row in rows)
    told = f"{sum(row['holds'] for row in rows)} of {count} {'claim holds' if count == 1 else 'claims hold'}"
    return f"{told}, {f'{wrong} not' if wrong else 'all'} as expected"


def report(notebook: str, values: dict) -> None:
    """Keep what a run of a notebook measured, as `report.json` in its `results` folder; a sweep makes it a table's row.

    Arguments:
        notebook: its number or name.
        values: names and numbers, texts, arrays or lists; lists of one length belong together.
    """
    write_json(results(notebook) / "report.json", values)
