# Everything the project does, each target from a bare clone: `make run`, `make test`, `make lab`.
# The environment is built in .venv when it is missing or older than the lock.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# Two workers with a thread each; the notebooks, which take longest, begin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder
NBVAL  := --nbval --nbval-current-env --nbval-cell-timeout=1200

export PYTHONUTF8 := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: run reference release ablations frontier tiny shapes bench steps writers latency test stress browser lint unit nbval
.PHONY: runtimes lab notebooks site lock clean help

run: $(READY)            ## execute notebooks 01 to 04 headless, train the published network, and summarise
	@$(BIN)/mnist notebooks 01 02 03 04

notebooks: $(READY)      ## execute all notebooks headless (four to eight minutes)
	@$(BIN)/mnist notebooks

reference: $(READY)      ## train the published 20 epochs instead, with their figures (about six minutes)
	@$(BIN)/mnist notebooks 03 -p recipe reference

# The twins of `best` and `careful` and their six teachers are trained with images held out; what is there is resumed
# or kept. With `make -j2 release` two teachers are trained at a time
TWIN := outputs/runs/release
TEACHERS := $(addprefix $(TWIN)/teacher-,0 1 2 3 4 5)
.PHONY: $(TEACHERS)
$(TEACHERS): $(TWIN)/teacher-%: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/mnist train --folder $@ $(if $(wildcard $@/*.pth),--resume $@,\
		--recipe teacher --split writers --seed $*)

release: $(TEACHERS)     ## make temperatures, thresholds, ONNX, robustness, counts, model card and page anew (about two hours)
	@pool=$$($(BIN)/mnist teach $(TWIN)/teacher-*/*.pth) && \
		$(BIN)/mnist train --folder $(TWIN)/twin $(if $(wildcard $(TWIN)/twin/*.pth),--resume $(TWIN)/twin,\
		--recipe best --split writers --pool $$(echo "$$pool" | sed 's/pool \([0-9a-f]*\):.*/\1/'))
	@pool=$$($(BIN)/mnist teach --others 60000 $(TWIN)/teacher-[01]/*.pth) && \
		$(BIN)/mnist train --folder $(TWIN)/careful $(if $(wildcard $(TWIN)/careful/*.pth),--resume $(TWIN)/careful,\
		--recipe careful --start "" --split writers --pool $$(echo "$$pool" | sed 's/pool \([0-9a-f]*\):.*/\1/'))
	@$(BIN)/python -c 'import sys; from mnistlib import released_checkpoint; \
		from mniststudy.use.calibrate import calibrate_released; best, careful = sys.argv[1:]; \
		print(calibrate_released(best), calibrate_released(careful, released_checkpoint("careful")))' \
		$(TWIN)/twin/*.pth $(TWIN)/careful/*.pth
	@$(BIN)/python -c 'from mnistlib import load_mnist, load_model, released_checkpoint; \
		from mniststudy.use.calibrate import load_calibration; from mniststudy.use.rendered import measure; \
		path = released_checkpoint("careful"); \
		counts = measure(load_model(path), load_calibration(path), *load_mnist("mnist").test, n=300); \
		counts.to_csv("outputs/results/pictures.csv", index=False)'
	@$(BIN)/python -c 'from mniststudy.figures.errors import write_robustness; write_robustness()'
	@$(BIN)/mnist export

ablations: $(READY)      ## train the comparisons of notebook 06 again, eight seeds (hours)
	@$(BIN)/python -c 'from dataclasses import replace; from mniststudy.figures.ablations import ablations; \
		from mniststudy.runs.sweep import sweep; \
		sweep([replace(config, seed=seed) for seed in range(8) for config in ablations().values()])'

frontier: $(READY)       ## train eight networks under one protocol, what is missing (minutes on a GPU, a day on two cores)
	@$(BIN)/python -c 'from mniststudy.figures.frontier import train_protocol; train_protocol()'

# Teachers of the smallest file: released networks that were trained on all images
ALL_IMAGES := best best-20k best-7918 best-6174 smoothed teacher

tiny: $(READY)           ## train ten seeds of the recipe `tiny` and measure their files (an hour)
	@$(BIN)/mnist teach $(foreach name,$(ALL_IMAGES),$(wildcard outputs/checkpoints/$(name)/*.pth))
	@for seed in 0 1 2 3 4 5 6 7 8 9; do folder=outputs/runs/tiny/$$seed; \
		$(BIN)/mnist train --folder $$folder --test $$(ls $$folder/*.pth > /dev/null 2>&1 \
		&& echo --resume $$folder || echo --recipe tiny --seed $$seed --threads 1) || exit 1; done
	@$(BIN)/python -c 'import sys; from pathlib import Path; from mniststudy.use.tiny import measure_all; \
		print(measure_all(map(Path, sys.argv[1:])))' outputs/runs/tiny/*/*.pth

shapes: $(READY)         ## time an image in small networks, on an idle machine (minutes)
	@$(BIN)/python -c 'from mniststudy.figures.frontier import TIMED, time_shapes; print(time_shapes(TIMED))'

bench: $(READY)          ## time the trainings of notebook 08 on an idle machine (half an hour)
	@$(BIN)/python -c 'from mniststudy.figures.speed import bench; print(bench())'

steps: $(READY)          ## train the steps and the yardsticks of notebook 08, for their accuracy (hours)
	@$(BIN)/python -c 'from mniststudy.figures.speed import recipe_steps; from mniststudy.runs.sweep import sweep; \
		sweep(list(recipe_steps().values()), data="mnist")'
	@$(BIN)/python -c 'from mniststudy.figures.speed import BASELINES, curves; \
		[print(curves(name)) for name in BASELINES]'

writers: $(READY)        ## how unequal the writers are in the errors of each tested run, for the intervals (needs full MNIST)
	@$(BIN)/python -c 'from mniststudy.runs.writers import write_writers; print(write_writers())'

latency: $(READY)        ## time answers on an idle machine (minutes; OpenVINO too after `make runtimes`)
	@$(BIN)/python -c 'import sys; from mniststudy.use.latency import latency; \
		print(latency(openvino=next(iter(sys.argv[1:]), None)))' $(wildcard build/runtimes/venv/bin/python)

test: lint               ## lint, unit tests, every notebook compared with its committed output
	@$(PYTEST) $(NBVAL) notebooks tests
	@echo "make test: all green"

stress: $(READY)         ## try the faults at length and write outputs/results/faults.csv (about 20 minutes)
	@$(BIN)/python -m pytest -m stress tests

browser: $(READY)        ## try the page to draw on and JupyterLab in an installed Chromium or Chrome (minutes)
	@$(BIN)/python -m pytest -m browser tests/browser

# OpenCV 5 is in their environment, 4 beside it
RUNTIMES := build/runtimes
runtimes: $(READY)       ## try the ONNX files of `best` in foreign runtimes (minutes; needs clang)
	@$(BIN)/python tests/foreign/runtimes.py expect $(RUNTIMES)/digits.npz
	@$(PYTHON) -m venv $(RUNTIMES)/venv
	@$(RUNTIMES)/venv/bin/python -m pip install -q -r tests/foreign/requirements.txt
	@$(RUNTIMES)/venv/bin/python -m pip install -q --upgrade --no-deps --target $(RUNTIMES)/opencv4 \
		opencv-python-headless==4.13.0.92
	@$(RUNTIMES)/venv/bin/python tests/foreign/runtimes.py check $(RUNTIMES)/digits.npz
	@PYTHONPATH=$(RUNTIMES)/opencv4 $(RUNTIMES)/venv/bin/python tests/foreign/runtimes.py check \
		$(RUNTIMES)/digits.npz OpenCV

lint: $(READY)           ## style, format, types, and which file may import which
	@$(BIN)/ruff check --no-cache .
	@$(BIN)/ruff format --no-cache --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache --no-logo

unit: $(READY)           ## the unit tests alone
	@$(PYTEST) tests

nbval: $(READY)          ## the notebooks alone, compared with their committed output
	@$(PYTEST) $(NBVAL) notebooks

lab: $(READY)            ## open JupyterLab on the notebooks
	@$(BIN)/python -c 'from mniststudy.notebooks import open_lab; open_lab()'

site: $(READY)           ## build README, notebooks and texts as a site in build/site (nothing is executed)
	@rm -rf build/site
	@$(BIN)/python -m sphinx -b html -W --keep-going -E -q -c docs -d build/doctrees . build/site
	@echo "The site is in build/site; open build/site/index.html"

lock:                    ## pin what pyproject.toml asks for, pins that exist kept (needs uv)
	@PATH="$$PATH:$(CURDIR)/$(BIN)" uv pip compile pyproject.toml --extra test --universal --generate-hashes \
		--python-version 3.11 --no-header -q -o requirements.lock

clean:                   ## remove the environment and everything that runs left behind
	rm -rf $(VENV) outputs/runs build mnistlib.egg-info .ruff_cache .mypy_cache .pytest_cache .hypothesis
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
