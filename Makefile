# Everything a fresh machine with Python >= 3.11, make and git needs: `make demo`, `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

ECOSYSTEM := $(VENV)/.ecosystem
NEWEST := .venv-newest

.PHONY: setup demo test test-all test-newest test-gpu transformers-source mutants lint types clean

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

test-all: $(READY) $(ECOSYSTEM) transformers-source
	$(BIN)/python -m pytest --numprocesses 2

# The tools that people use with the model (PEFT, TRL and so on), for tests/ecosystem.
$(ECOSYSTEM): $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,ecosystem]'
	touch $@

# transformers' own tests, for tests/common: only its source distribution has them. Their folder is
# meant to be a package, but has lost the file that says so.
transformers-source: $(READY)
	set -e; version=$$($(BIN)/python -c 'from importlib.metadata import version; print(version("transformers"))'); \
	source=$(VENV)/transformers-$$version; \
	test -f $$source/tests/__init__.py || { \
	  $(BIN)/python -m pip download --quiet --no-deps --no-binary transformers --dest $(VENV)/sources "transformers==$$version"; \
	  tar --extract --gzip --file $(VENV)/sources/transformers-$$version.tar.gz --directory $(VENV); \
	  touch $$source/tests/__init__.py; \
	}

# Model and residuals with the newest transformers that pyproject.toml allows: an environment that
# has it, and for everything else looks into the first one.
test-newest: $(READY)
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"), "$(CURDIR)", sep="\n")' \
	  > "$$($(NEWEST)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/first.pth"
	$(NEWEST)/bin/python -m pip install --quiet --upgrade "$$($(BIN)/python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; print(*[d for d in project["dependencies"] if d.startswith("transformers")])')"
	$(NEWEST)/bin/python -c 'import transformers; print("transformers", transformers.__version__)'
	$(NEWEST)/bin/python -m pytest --numprocesses 2 -m "not slow" tests/model tests/residual

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
	rm -rf $(VENV) $(NEWEST) runs build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
