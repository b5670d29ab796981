# `make reproduce` and `make test` are all that a fresh machine needs: both create .venv when it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A requirement to install first, where another build of torch than pip's default is wanted: make test TORCH=torch==2.13.0
TORCH ?=
ARGS ?=

.PHONY: reproduce test lint format docs pictures bench bench-kernels bench-gpu clean

reproduce: $(VENV)/.installed
	$(BIN)/lightning-lip reproduce $(ARGS)

test: $(VENV)/.installed
	$(BIN)/pytest -n auto --dist loadfile $(ARGS)

# Types and imports are checked on an installed copy: what users get, not what lies in the checkout.
lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typed build/lib && $(BIN)/pip install --quiet --no-deps --target build/typed .
	cd build/typed && MYPYPATH=. ../../$(BIN)/mypy --config-file ../../pyproject.toml --python-executable ../../$(BIN)/python -p lightning_lip
	cd build/typed && ../../$(BIN)/lint-imports --config ../../pyproject.toml

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

# The pictures in docs/pictures: needs Chromium and its driver.
pictures: $(VENV)/.installed
	$(BIN)/python docs/pictures.py docs/pictures

# What the penalty costs in whole training steps.
bench: $(VENV)/.installed
	$(BIN)/lightning-lip bench $(ARGS)

# The kernels alone, and how closely they follow the weights.
bench-kernels: $(VENV)/.installed
	$(BIN)/python -m lightning_lip.bench.studies.kernels $(ARGS)
	$(BIN)/python -m lightning_lip.bench.studies.tracking $(ARGS)
	$(BIN)/python -m lightning_lip.bench.studies.callbacks $(ARGS)
	$(BIN)/python -m lightning_lip.bench.studies.constraint $(ARGS)

# On a machine with a GPU; DEV=cpu is a dry run.
bench-gpu: $(VENV)/.installed
	PYTHON=$(abspath $(BIN)/python) bash bench/gpu/visit.sh

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(if $(TORCH),$(BIN)/python -m pip install --quiet $(TORCH))
	$(BIN)/python -m pip install --quiet -e ".[paper,bench,dev,docs]"
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
