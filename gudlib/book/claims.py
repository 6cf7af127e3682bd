"""Claims: what a notebook asserts, as a number with the range in which it counts as true, kept for the record.

A claim cell prints PASS or FAIL and adds a row to `runs/claims/NOTEBOOK.json` (under `$GUDLIB_RESULTS` if set). What is
expected to fail, a prediction that turned out wrong, says so: then a failure is the result, and a pass the surprise.
`python -m gudlib claims [DIR]` shows them with their values.
"""

import os
from pathlib import Path
from typing import Any

from filelock import FileLock

from gudlib.files import RUNS, read_json, write_json


def results(notebook: str) -> Path:
    """The folder for what a notebook writes, made if need be: `runs/NOTEBOOK/`, or `$GUDLIB_RESULTS/NOTEBOOK/`.

    Notebooks run by `gudlib.book.runs` have it in the output folder of the run.
    """
    folder = Path(os.environ.get("GUDLIB_RESULTS", RUNS)) / notebook
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def claim(
    notebook: str,
    name: str,
    value: float,
    low: float = -float("inf"),
    high: float = float("inf"),
    expected: bool = True,
) -> None:
    """Check `low <= value <= high`, print the verdict and record it.

    Arguments:
        notebook: its number, `06` or `10b`.
        name: the claim in words, with the unit; a later claim of the same name replaces it.
        value: what was measured.
        low, high: the accepted range.
        expected: whether it is to hold.
    """
    value = float(value)
    holds = low <= value <= high
    row = {
        "value": value,
        "low": low if low > -float("inf") else None,
        "high": high if high < float("inf") else None,
        "holds": holds,
        "expected": expected,
    }
    print(f"{'PASS' if holds else 'FAIL'}  {name}  (accepted: {accepted(row)})")
    folder = results("claims")
    path = folder / f"{notebook}.json"
    with FileLock(folder / f".{notebook}.lock"):  # read and written by one at a time
        write_json(path, read_json(path) | {name: row})


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
        found += [{"expected": True, **row, "notebook": path.stem, "name": name} for name, row in rows.items()]
    return found


def _whole(row: Any) -> bool:
    kinds = {"value": float, "low": float | int | None, "high": float | int | None, "holds": bool}
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
