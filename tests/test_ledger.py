"""Claims: the verdict is printed and kept, in the results folder that was asked for."""

import json

from gudlib import ledger


def test_claims_are_judged_printed_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GUDLIB_RESULTS", str(tmp_path))
    ledger.claim("02", "share", 0.4, 0, 1)
    ledger.claim("02", "gain", 0.1, low=0.2)
    ledger.claim("02", "gain", 0.3, low=0.2)
    ledger.claim("02", "error", float("nan"), high=1)
    assert capsys.readouterr().out.splitlines() == [
        "PASS  share  (accepted: 0 to 1)",
        "FAIL  gain  (accepted: at least 0.2)",
        "PASS  gain  (accepted: at least 0.2)",
        "FAIL  error  (accepted: at most 1)",
    ]
    rows = json.loads((tmp_path / "claims/02.json").read_text())
    assert rows["gain"] == {"value": 0.3, "low": 0.2, "high": None, "holds": True}
    assert not rows["error"]["holds"] and list(tmp_path.iterdir()) == [tmp_path / "claims"]
