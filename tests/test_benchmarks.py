"""The benchmarks run, and what they compare is the same thing."""

import json
import sys

import pytest

from gudlib.files import ROOT


def test_benchmarks_run_in_small(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import run  # pyright: ignore[reportMissingImports]

    rows = {kind: {32: run.strip(kind, 32, 2)} for kind in ("window", "whole")}  # elsewhere each in its own process
    monkeypatch.setattr(run, "strips", lambda p: {"results": rows})
    monkeypatch.setattr(sys, "argv", ["run.py", "--quick", "--out", str(tmp_path / "new" / "bench.json")])
    run.main()
    assert (tmp_path / "new" / "bench.png").stat().st_size > 10_000
    found = json.loads((tmp_path / "new" / "bench.json").read_text())
    training, sampling = found["training"], found["sampling"]
    assert training["results"]["diffusers"]["ratio_to_diffusers"] == 1
    assert all(row["images_per_second"] > 0 for row in training["results"].values())
    assert all(text.startswith("not available: ") for text in training["missing"].values())
    assert len(training["results"]) + len(training["missing"]) == 5
    for calls, error in sampling["errors"]["diffusers DPM++2M"].items():  # the same method on the same levels
        assert error == pytest.approx(sampling["errors"]["dpm++2m"][calls], rel=1e-3)
    for row in sampling["results"].values():
        assert row["seconds"] > 0 and row["nfe"] in run.QUICK["counts"]
