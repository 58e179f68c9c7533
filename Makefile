# Everything the project does, each target from a bare clone: `make run`, `make test`, `make lab`.
# The environment is built in .venv when it is missing or older than the lock.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

export PYTHONUTF8 := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: run test stress lint unit nbval lab notebooks lock clean help

run: $(READY)            ## execute the notebooks headless and summarise what came out
	@$(BIN)/python -m mnistlib notebooks

test: lint unit nbval    ## lint, unit tests, every notebook compared with its committed output
	@echo "make test: all green"

stress: $(READY)         ## try the faults at length and write outputs/results/faults.csv (about 20 minutes)
	@MNISTLIB_STRESS=1 $(BIN)/python -m pytest tests/test_faults.py tests/test_headless.py

lint: $(READY)
	@$(BIN)/ruff check --no-cache .
	@$(BIN)/ruff format --no-cache --check .

unit: $(READY)
	@$(BIN)/python -m pytest tests

nbval: $(READY)
	@MNISTLIB_RUNS=$(CURDIR)/outputs/runs/nbval $(BIN)/python -m pytest --nbval --nbval-current-env --nbval-cell-timeout=1200 notebooks

lab: $(READY)            ## open JupyterLab on the notebooks
	@$(BIN)/jupyter lab notebooks

notebooks: $(READY)      ## execute the notebooks in place and clean them for committing (needs full MNIST)
	@$(BIN)/python -m mnistlib notebooks --in-place

lock:                    ## pin every dependency again (needs uv)
	@uv pip compile pyproject.toml --extra test --universal --generate-hashes \
		--python-version 3.11 --no-header -q -o requirements.lock

clean:                   ## remove the environment and everything that runs left behind
	rm -rf $(VENV) outputs/runs build mnistlib.egg-info .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 12

# Hashes in the lock make pip verify each file; the package itself builds offline from it
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "mnistlib needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	@echo "Building $(VENV) from requirements.lock (about 6 GB with the GPU libraries on Linux; once)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install $(if $(CI),-q) --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@
