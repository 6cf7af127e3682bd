"""Claims and reports: what a notebook found is kept, in the results folder that was asked for."""

import json
from pathlib import Path

import pytest

from gudlib.book import claims


def test_claims_are_judged_printed_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GUDLIB_RESULTS", str(tmp_path))
    claims.claim("02", "share", 0.4, 0, 1)
    claims.claim("02", "gain", 0.1, low=0.2)
    claims.claim("02", "gain", 0.3, low=0.2)
    claims.claim("02", "error", float("nan"), high=1)
    assert capsys.readouterr().out.splitlines() == [
        "PASS  share  (accepted: 0 to 1)",
        "FAIL  gain  (accepted: at least 0.2)",
        "PASS  gain  (accepted: at least 0.2)",
        "FAIL  error  (accepted: at most 1)",
    ]
    rows = json.loads((tmp_path / "claims/02.json").read_text())
    assert rows["gain"] == {"value": 0.3, "low": 0.2, "high": None, "holds": True}
    assert not rows["error"]["holds"] and list(tmp_path.iterdir()) == [tmp_path / "claims"]


def test_a_report_is_kept_and_replaced_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("GUDLIB_RESULTS", str(tmp_path))
    claims.report("one_model", {"loss": 0.5, "old": 1})
    values = {"a": [0.0, 1.0], "bits": [3.1, float("nan")], "extractor": "pixels", "weights": 7, "fine": True}
    claims.report("one_model", values)
    claims.report("07", {"loss": 2.0})
    found = json.loads((tmp_path / "one_model/report.json").read_text())
    assert str(found) == str(values)  # nan is not itself
    assert json.loads((tmp_path / "07/report.json").read_text()) == {"loss": 2.0}
    assert [path.name for path in tmp_path.glob("*/*")] == ["report.json"] * 2


def test_a_report_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    monkeypatch.setenv("GUDLIB_RESULTS", str(tmp_path))
    claims.report("07", {"loss": 2.0})

    inner = Path.write_bytes

    def fail(path, content):
        inner(path, content[:5])
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr("pathlib.Path.write_bytes", fail)
        claims.report("07", {"loss": 3.0})
    assert json.loads((tmp_path / "07/report.json").read_text()) == {"loss": 2.0}
