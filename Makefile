# Every target makes its own environment: a fresh clone needs nothing but python3 (3.10 or newer) and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One marker file says that the environment holds what pyproject.toml and constraints.txt ask for.
READY := $(VENV)/.ready
REFERENCE ?=
LOWEST := .venv-lowest
NEWEST := .venv-newest
# Another torch for the two: TORCH=2.13.0. Its oldest allowed release has no build for processors on every index.
TORCH ?=

.PHONY: venv demo demo-video demo-text test test-all test-lowest test-newest lint format docs bench clean

venv: $(READY)

$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# torch first and pinned: a bare request for it can pull several gigabytes of CUDA.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/acdit demo --output runs/demo

demo-video: $(READY)
	$(BIN)/acdit demo --video --output runs/demo-video

demo-text: $(READY)
	$(BIN)/acdit demo --text --output runs/demo-text

# A worker a core, a thread a worker: two threads in each of two workers would wait for each other on two cores.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not campaign"

test-all: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

# The suite with every dependency at the lower bound that pyproject.toml names, and with the newest that it allows.
test-lowest: $(LOWEST)/.ready
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n auto -m "not campaign"

test-newest: $(NEWEST)/.ready
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -n auto -m "not campaign"

$(LOWEST)/.ready: pyproject.toml constraints-lowest.txt
	@test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	sed 's/^torch==.*/$(if $(TORCH),torch==$(TORCH),&)/' constraints-lowest.txt > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(LOWEST)/constraints.txt torch
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(LOWEST)/constraints.txt --editable '.[dev]'
	@touch $@

# torch stays at the tested pin unless TORCH names another: a bare request for it can pull CUDA.
$(NEWEST)/.ready: pyproject.toml constraints.txt
	@test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	grep '^torch==' constraints.txt | sed 's/^torch==.*/$(if $(TORCH),torch==$(TORCH),&)/' > $(NEWEST)/constraints.txt
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(NEWEST)/constraints.txt torch
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager \
	  --constraint $(NEWEST)/constraints.txt --editable '.[dev]'
	@touch $@

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The documentation as a site in build/site; a broken link or anchor ends it. The suite builds it too (tests/docs).
docs: $(READY)
	$(BIN)/mkdocs build --quiet --strict
	@echo "look at build/site/index.html"

bench: $(READY)
	$(BIN)/python benchmarks/bench.py $(if $(REFERENCE),--reference $(REFERENCE))

clean:
	rm -rf $(VENV) $(LOWEST) $(NEWEST) build dist *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
