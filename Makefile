# Everything a newcomer needs; `make` alone lists it. GNU make, and a Python of at least 3.10 with its venv module.
#
#   PYTHON      the Python that makes the virtual environment
#   VENV        where it goes
#   PIP_FLAGS   more options for pip, such as the index of PyTorch's CPU wheels
#   ARGS        more arguments for the program that a target runs
#   WORKERS     processes that tests run in, each with one thread for torch; 0 for none beside pytest itself

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
ARGS ?=
WORKERS ?= 2

BIN := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt
RUNTIME := $(VENV)/.miniflux-installed
TESTING := $(VENV)/.miniflux-test-installed
DEVELOPING := $(VENV)/.miniflux-dev-installed

.DEFAULT_GOAL := help
.PHONY: help venv dev demo ui test check lint format types browser cov nano bench docs clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

# The stamps keep installed packages until pyproject.toml or constraints.txt changes. pip comes last into a new
# environment, so its presence says that the environment is whole.
$(BIN)/pip:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; set PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "error: miniflux needs Python 3.10 or later, $(PYTHON) is $$($(PYTHON) -V 2>&1); set PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
		echo "error: no virtual environment without the venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }

$(RUNTIME): pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) -e .
	@touch $@

$(TESTING): pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) -e '.[test]'
	@touch $@ $(RUNTIME)

$(DEVELOPING): pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) -e '.[dev]'
	@touch $@ $(TESTING) $(RUNTIME)

venv: $(RUNTIME)  ## make the virtual environment and install miniflux into it

dev: $(DEVELOPING)  ## install what developers need, and the pre-commit hooks
	$(BIN)/pre-commit install

demo: $(RUNTIME)  ## draw a picture with the bundled model
	$(BIN)/miniflux generate "a red circle on a blue background" -o demo.png --force $(ARGS)
	@echo "The picture is $(CURDIR)/demo.png"

ui: $(RUNTIME)  ## the page to draw on, in your browser; installs Gradio
	$(INSTALL) -q -e '.[ui]'
	$(BIN)/miniflux ui $(ARGS)

test: $(TESTING)  ## run the tests; the summary counts and names what was skipped
	$(PYTEST) -rs $(ARGS)

check: lint types test  ## lint, types and tests

lint: $(TESTING)  ## ruff: rules and formatting, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(TESTING)  ## ruff: sort imports, mend what can be mended, format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(TESTING)  ## pyright, strict on src
	$(BIN)/pyright --pythonpath $(BIN)/python

browser: $(TESTING)  ## drive the page in headless Chromium; needs chromium and chromedriver
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs -m browser tests/apps $(ARGS)

cov: $(TESTING)  ## run the tests and measure which lines of src they reach
	$(PYTEST) --cov --cov-report=term $(ARGS)

nano: $(RUNTIME)  ## train the bundled models again (hours); stops and resumes at any point
	$(BIN)/python -m miniflux.nano.recipe $(ARGS)

bench: $(TESTING)  ## run the short benchmarks; writes benchmarks/RESULTS.md
	$(BIN)/python benchmarks/short.py

docs: $(RUNTIME)  ## the site of the documents, in site/; installs MkDocs
	$(INSTALL) -q -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)
	@echo "The site is $(CURDIR)/site/index.html; '$(BIN)/python -m http.server -d site' serves it, with its search"

clean:  ## remove caches, builds and demo.png; keeps the virtual environment and training runs
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis .coverage .coverage.* htmlcov site demo.png
	find src tests benchmarks -type d \( -name __pycache__ -o -name '*.egg-info' \) -prune -exec rm -rf {} + 2>/dev/null || true
