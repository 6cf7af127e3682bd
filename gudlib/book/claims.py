"""Claims: what a notebook asserts, as a number with the range in which it counts as true, kept for the record.

A claim cell prints PASS or FAIL and adds a row to `runs/claims/NOTEBOOK.json` (under `$GUDLIB_RESULTS` if set).
"""

import json
import os
from pathlib import Path

from gudlib.files import RUNS, write_json


def results(notebook: str) -> Path:
    """The folder for what a notebook writes, made if need be: `runs/NOTEBOOK/`, or `$GUDLIB_RESULTS/NOTEBOOK/`.

    Notebooks run by `gudlib.book.runs` have it in the output folder of the run.
    """
    folder = Path(os.environ.get("GUDLIB_RESULTS", RUNS)) / notebook
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def claim(notebook: str, name: str, value: float, low: float = -float("inf"), high: float = float("inf")) -> None:
    """Check `low <= value <= high`, print the verdict and record it.

    Arguments:
        notebook: two digits, `06`.
        name: the claim in words, with the unit; a later claim of the same name replaces it.
        value: what was measured.
        low, high: the accepted range.
    """
    value = float(value)
    holds = low <= value <= high
    above, below = low > -float("inf"), high < float("inf")
    accepted = f"{low:g} to {high:g}" if above and below else f"at least {low:g}" if above else f"at most {high:g}"
    print(f"{'PASS' if holds else 'FAIL'}  {name}  (accepted: {accepted})")
    path = results("claims") / f"{notebook}.json"
    rows = json.loads(path.read_text()) if path.is_file() else {}
    rows[name] = {"value": value, "low": low if above else None, "high": high if below else None, "holds": holds}
    write_json(path, rows)


def report(notebook: str, values: dict) -> None:
    """Keep what a run of a notebook measured, as `report.json` in its `results` folder; a sweep makes it a table's row.

    Arguments:
        notebook: its number or name.
        values: names and numbers, texts or lists; lists of one length belong together.
    """
    write_json(results(notebook) / "report.json", values)
