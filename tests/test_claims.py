"""Claims and reports: what a notebook found is kept, in the results folder that was asked for."""

import configparser
import json
import os
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch

from gudlib.__main__ import main
from gudlib.book import claims


@pytest.mark.usefixtures("unchecked")
def test_claims_are_judged_printed_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GUDLIB_RESULTS", str(tmp_path))
    claims.claim("02", "identity", "share", 0.4, 0, 1)
    claims.claim("02", "measurement", "gain (nats)", 0.1, low=0.2, error=0.04)
    claims.claim("02", "measurement", "gain (nats)", 1234.5678, low=0.2, error=3.21)
    claims.claim("02", "prediction", "error", float("nan"), high=1, expected=False)
    claims.claim("02", "measurement", "number", 12345, error=250)
    assert capsys.readouterr().out.splitlines() == [
        "PASS  identity: share: 0.4  (accepted: 0 to 1)",
        "FAIL  measurement: gain (nats): 0.100 ± 0.040  (accepted: at least 0.2)",
        "PASS  measurement: gain (nats): 1234.6 ± 3.2  (accepted: at least 0.2)",
        "FAIL  prediction: error: nan  (accepted: at most 1)",
        "PASS  measurement: number: 12345 ± 250  (accepted: anything)",
    ]
    rows = json.loads((tmp_path / "claims/02.json").read_text())
    row = {"kind": "measurement", "value": 1234.5678, "error": 3.21, "low": 0.2, "high": None}
    assert rows["gain (nats)"] == row | {"holds": True, "expected": True}
    assert not rows["error"]["holds"] and list(tmp_path.iterdir()) == [tmp_path / "claims"]
    with pytest.raises(ValueError, match="kind must be identity, measurement or prediction; got 'guess'"):
        claims.claim("02", "guess", "share", 0.4)


def test_notebooks_are_compared_without_the_values_of_their_claims():
    """Values may depend on the processor, verdicts may not."""
    config = configparser.ConfigParser()
    config.read(Path(__file__).parent / "outputs.cfg", encoding="utf-8")
    (rule,) = (config[section] for section in config.sections())
    for value in ("0.4", "-1.3e-05", "nan", "inf", "0.100 ± 0.040", "12345 ± 250"):
        told = re.sub(
            rule["regex"], rule["replace"], f"PASS  identity: share (1 to 2): 3.0: {value}  (accepted: 0 to 1)"
        )
        assert told == "PASS  identity: share (1 to 2): 3.0: VALUE  (accepted: 0 to 1)"
    assert re.sub(rule["regex"], rule["replace"], "seen 0.4  (expected: 0.5)") == "seen 0.4  (expected: 0.5)"


def test_the_command_shows_values_and_fails_where_a_verdict_is_not_the_expected_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GUDLIB_RESULTS", str(tmp_path))
    claims.claim("02", "measurement", "a share", 0.4321, 0, 1)
    claims.claim("05", "prediction", "a prediction", 0.1, low=0.2, expected=False)
    capsys.readouterr()
    assert main(["claims", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["02", "holds", "0.4321", "0", "to", "1", "measurement:", "a", "share"]
    assert lines[1].split() == ["05", "fails", "0.1", "at", "least", "0.2", "prediction:", "a", "prediction"]
    assert lines[2] == "1 of 2 claims hold, all as expected"
    claims.claim("05", "prediction", "a surprise", 0.3, low=0.2, expected=False)
    claims.claim("07", "measurement", "a loss", 3.0, high=2.0)
    assert main(["claims", str(tmp_path)]) == 1
    told = capsys.readouterr().out
    assert told.endswith("2 of 4 claims hold, 2 not as expected\n") and told.count("(!)") == 2
    assert main(["claims", str(tmp_path / "nothing")]) == 2 and "no claims in" in capsys.readouterr().err


def claim_many(folder, first):
    os.environ["GUDLIB_RESULTS"] = folder
    for k in range(first, first + 40):
        claims.claim("02", "measurement", f"number {k}", k)


def test_claims_of_several_processes_are_all_kept(tmp_path):
    with ProcessPoolExecutor(3, get_context("spawn")) as executor:
        list(executor.map(claim_many, [str(tmp_path)] * 3, [0, 40, 80]))
    rows = json.loads((tmp_path / "claims/02.json").read_text())
    assert sorted(row["value"] for row in rows.values()) == list(range(120))


def test_a_damaged_file_of_claims_does_not_stop_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setenv("GUDLIB_RESULTS", str(tmp_path))
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims/02.json").write_text('{"half": ')
    claims.claim("02", "measurement", "share", 0.4, 0, 1)
    assert [row["name"] for row in claims.recorded(tmp_path)] == ["share"]


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


def test_a_report_takes_arrays_and_tensors(tmp_path, monkeypatch):
    monkeypatch.setenv("GUDLIB_RESULTS", str(tmp_path))
    values = {"a": np.float32(1.5), "b": np.arange(3), "c": torch.tensor([[1.0], [2.0]]), "d": torch.tensor(3)}
    claims.report("07", values)
    assert json.loads((tmp_path / "07/report.json").read_text()) == {"a": 1.5, "b": [0, 1, 2], "c": [[1], [2]], "d": 3}
    with pytest.raises(TypeError, match="not a number, a text, an array or a list or mapping of these: <object"):
        claims.report("07", {"a": object()})


def test_rows_that_are_no_claims_are_left_out(tmp_path):
    good = {"kind": "identity", "value": 0.5, "error": None, "low": 0, "high": None, "holds": True, "expected": True}
    rows = {"good": good, "a": {"holds": True}, "b": good | {"value": "x"}, "c": good | {"low": "x"}, "d": 3}
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims/02.json").write_text(json.dumps(rows))
    assert [row["name"] for row in claims.recorded(tmp_path)] == ["good"]


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
