# Every target makes its own environment: a fresh clone needs nothing but python3 (3.10 or newer) and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One marker file says that the environment holds what pyproject.toml and constraints.txt ask for.
READY := $(VENV)/.ready
REFERENCE ?=

.PHONY: venv demo demo-video demo-text test test-all lint format docs bench clean

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
	rm -rf $(VENV) build dist *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
