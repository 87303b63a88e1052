# Set-up, training and checks. `make train` and `make test` need Linux, make and python3 (3.11 or newer, with venv).
#
# constraints.txt names the tested versions. PyPI's torch for Linux is built for CUDA: several GB. Other builds:
#   make train TORCH_INDEX=https://download.pytorch.org/whl/cpu     for CPUs only
#   make train TORCH_INDEX=https://download.pytorch.org/whl/cu126   for CUDA 12.6
#   make train TORCH=torch==2.12.0                                  another version
# An environment that is set up keeps its torch: `make clean` first.

PYTHON ?= python3
TORCH ?= $(shell sed -n '/^torch==/p' constraints.txt)
TORCH_INDEX ?=
WORKERS ?= 2
# Further words for `bdl train` or pytest: make train ARGS="num_members=4", make test ARGS="-k swag"
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PIP_INSTALL := $(PIP) install --progress-bar off -c .venv/constraints.txt

.PHONY: help train test lint wheel constraints clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1: /p' Makefile

train: .venv/installed ## set up, then train on a data set that needs no download
	$(BIN)/bdl train $(ARGS)

test: .venv/installed-dev ## set up, then run the tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "not ci" $(ARGS)

lint: .venv/installed-dev ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo

wheel: .venv/installed-dev ## build dist/*.whl
	rm -rf build dist
	$(BIN)/python -m build --wheel --no-isolation

constraints: .venv/installed-dev ## write the installed versions to constraints.txt
	$(BIN)/python scripts/freeze.py > constraints.new
	mv constraints.new constraints.txt

clean: ## remove the environment and what was built
	rm -rf .venv build dist *.egg-info

# torch comes first and by itself, so that no resolver replaces its build; what follows must agree with it.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "bdl_train needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": name another with PYTHON=python3.12")'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	sed '/^torch==/d' constraints.txt > .venv/constraints.txt
	echo '$(TORCH)' >> .venv/constraints.txt
	$(PIP_INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	$(PIP_INSTALL) -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(PIP_INSTALL) -e '.[dev]'
	touch $@
