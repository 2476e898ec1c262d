# Everything a fresh machine with Python >= 3.11, make and git needs: `make demo`, `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test test-all test-gpu mutants lint types clean

setup: $(READY)

# torch first and pinned: left to itself, pip takes the newest release with gigabytes of CUDA.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "deep_delta needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": set PYTHON=python3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/ddl compare --out runs/demo

# Without the tests marked slow; `make test-all` has them too.
test: $(READY)
	$(BIN)/python -m pytest --numprocesses 2 -m "not slow"

test-all: $(READY)
	$(BIN)/python -m pytest --numprocesses 2

# On the machine that has the GPU, with its own CUDA build of torch: PYTEST="python3 -m pytest". Tests are
# named as they begin: GPUs can wait for each other for good.
PYTEST ?= $(BIN)/python -m pytest
test-gpu:
	$(PYTEST) -vv tests/gpu tests/ops/test_fused.py tests/ops/test_fused_memory.py tests/ops/test_wide.py tests/model/test_fused_model.py tests/model/test_sharded.py tests/train/test_processes.py

mutants: $(READY)
	$(BIN)/python scripts/mutants.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
