# book: run all notebooks into runs/book · test: all tests, notebooks included · lab: open the notebooks · lint: ruff (rules and format), pyright
# bench: measure beside other libraries
# Each first makes .venv, or makes it anew when a pin, a dependency or the interpreter has changed.

PYTHON ?= $(shell python3.11 -V >/dev/null 2>&1 && echo python3.11 || echo python3)
BIN := .venv/bin

.PHONY: book test lab lint bench venv

book: venv
	@$(BIN)/python -m gudlib run

test: venv
	@$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile --nbval-lax --nbval-cell-timeout 3600 \
	    --nbval-sanitize-with tests/outputs.cfg --nbval-kernel-startup-timeout 600 tests gudlib notebooks

lab: venv
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m jupyterlab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb

lint: venv
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

bench: venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[bench]'
	@$(BIN)/python benchmarks/run.py --out runs/bench.json

# What .venv is made from. The stamp that holds it is written last, so a half-made environment counts as stale.
define FINGERPRINT
import hashlib, os, sys
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(f"Python 3.11 to 3.13 is needed, this is {sys.version.split()[0]}: make PYTHON=/path/to/python3.11")
import tomllib
with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
with open("constraints.txt") as file:
    pins = file.read()
parts = [os.getcwd(), sys.version, pins, project["dependencies"], project["optional-dependencies"]]
print(hashlib.sha256(repr(parts).encode()).hexdigest())
endef
export FINGERPRINT

venv:
	@set -e; wanted=$$($(PYTHON) -c "$$FINGERPRINT"); \
	if [ "$$(cat .venv/made-from 2>/dev/null)" != "$$wanted" ]; then \
	    pip="$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt"; \
	    echo "[1/3] .venv with $$($(PYTHON) -V)"; rm -f .venv/made-from; rm -rf .venv; $(PYTHON) -m venv .venv; \
	    echo "[2/3] torch, as pinned"; $$pip $$(grep -E '^(torch|setuptools)==' constraints.txt); \
	    echo "[3/3] gudlib and what it needs (some minutes on a slow connection)"; \
	    $$pip --no-build-isolation -e '.[test]'; \
	    echo "$$wanted" > .venv/made-from; \
	fi
