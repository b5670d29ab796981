# `make reproduce` and `make test` are all that a fresh machine needs: both create .venv when it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A requirement to install first, where another build of torch than pip's default is wanted: make test TORCH=torch==2.13.0
TORCH ?=
# A file of pip constraints: make test-short VENV=.venv-oldest CONSTRAINTS=build/oldest.txt
CONSTRAINTS ?=
ARGS ?=
# The core, the callbacks and the kernels: what `.ci/run` runs with other versions as well.
SHORT := $(addprefix tests/test_,$(addsuffix .py, \
	backends checks operators penalties regularizer spectral_norms traced_regularizer \
	certified_validation constraint lightning_cli loggers max_norm mixin monitor noisy_validation penalty resume \
	cpu_kernel cpu_plan cpu_rows gpu_aot gpu_interpreter gpu_ptx gpu_tables reference))

.PHONY: reproduce test test-short lint format docs pictures bench bench-kernels clean

reproduce: $(VENV)/.installed
	$(BIN)/lightning-lip reproduce $(ARGS)

test: $(VENV)/.installed
	$(BIN)/pytest -n auto --dist loadfile $(ARGS)

test-short: $(VENV)/.installed
	$(BIN)/pytest -n auto --dist loadfile $(SHORT) $(ARGS)

# Types are checked on an installed copy: what users get, not what lies in the checkout.
lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typed && $(BIN)/python -m pip install --quiet --no-deps --target build/typed .
	cd build/typed && MYPYPATH=. ../../$(BIN)/mypy --config-file ../../pyproject.toml --python-executable ../../$(BIN)/python -p lightning_lip

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
	$(BIN)/python -m bench.kernels $(ARGS)
	$(BIN)/python -m bench.tracking $(ARGS)
	$(BIN)/python -m bench.step $(ARGS)
	$(BIN)/python -m bench.constraint $(ARGS)

# Without --quiet, so that the downloads show their progress.
$(VENV)/.installed: pyproject.toml
	@test -e $@ || echo "Setting up $(VENV): pip downloads torch and the rest, up to 6 GB; 2 to 15 minutes."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(if $(TORCH),$(BIN)/python -m pip install $(TORCH))
	$(BIN)/python -m pip install $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) -e ".[paper,bench,dev,docs]"
	touch $@

clean:
	rm -rf $(VENV) .venv-* build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
