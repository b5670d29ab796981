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
SHORT := $(addprefix tests/,test_checks.py test_mixin.py kernels norms/test_spectral_norms.py operators/test_known.py \
	penalty $(addprefix callbacks/test_,$(addsuffix .py,certified_validation constraint lightning_cli loggers max_norm \
	monitor noisy_validation penalty resume)))

.PHONY: reproduce test test-short test-libraries lint format docs release pictures bench bench-kernels \
	bench-convolutions bench-gpu zoo scoreboard clean

reproduce: $(VENV)/.installed
	@echo "The paper's experiment on its real data: about 2 minutes."
	$(BIN)/lightning-lip reproduce $(ARGS)

test: $(VENV)/.installed
	@echo "The whole test suite: about 10 minutes on two cores."
	$(BIN)/pytest -n auto --dist loadfile $(ARGS)

test-short: $(VENV)/.installed
	$(BIN)/pytest -n auto --dist loadfile $(SHORT) $(ARGS)

# Libraries of models on Lightning, in an environment of their own; pip decides which versions go together.
test-libraries: $(VENV)-libraries/.installed
	$(VENV)-libraries/bin/pytest -p no:cacheprovider tests/bench/zoo/test_libraries.py $(ARGS)

$(VENV)-libraries/.installed: pyproject.toml
	test -x $(VENV)-libraries/bin/python || $(PYTHON) -m venv $(VENV)-libraries
	$(VENV)-libraries/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-libraries/bin/python -m pip install -e ".[libraries,dev]"
	touch $@

# Types and imports are checked on an installed copy: what users get, not what lies in the checkout.
lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typed build/lib && $(BIN)/python -m pip install --quiet --no-deps --target build/typed .
	cd build/typed && MYPYPATH=. ../../$(BIN)/mypy --config-file ../../pyproject.toml --python-executable ../../$(BIN)/python -p lightning_lip
	cd build/typed && ../../$(BIN)/lint-imports --config ../../pyproject.toml

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

# sdist and wheel in dist/, checked; ARGS=--draft before CHANGELOG.md has the version and its date.
release: $(VENV)/.installed
	$(BIN)/python .ci/release.py $(ARGS)

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
	$(BIN)/python -m lightning_lip.bench.studies.knee $(ARGS)

# Convolutions: cost by norm, tracking at widths 64 to 512, certified bounds after training.
bench-convolutions: $(VENV)/.installed
	$(BIN)/python -m lightning_lip.bench.convolutions.cost $(ARGS)
	$(BIN)/python -m lightning_lip.bench.convolutions.tracking $(ARGS)
	$(BIN)/python -m lightning_lip.bench.convolutions.training $(ARGS)
	$(BIN)/python -m lightning_lip.bench.convolutions.normalisation $(ARGS)

# Popular models with the callbacks at their defaults: bench/results/zoo.csv and the table of docs/zoo.md.
zoo: $(VENV)/.zoo
	nice $(BIN)/python -m lightning_lip.bench.zoo.run $(ARGS)

$(VENV)/.zoo: $(VENV)/.installed
	$(BIN)/python -m pip install -e ".[zoo]"
	touch $@

# Training for certified accuracy beside deel-torchlip and orthogonium; ARGS=--full for all of it.
scoreboard: $(VENV)/.scoreboard
	nice $(BIN)/lightning-lip scoreboard $(ARGS)

$(VENV)/.scoreboard: $(VENV)/.installed
	$(BIN)/python -m pip install -e ".[scoreboard]"
	touch $@

# On a machine with a GPU; DEV=cpu is a dry run.
bench-gpu: $(VENV)/.installed
	PYTHON=$(abspath $(BIN)/python) bash bench/gpu/visit.sh

$(VENV)/.installed: pyproject.toml
	@test -e $@ || echo "Setting up $(VENV): pip downloads torch and the rest, up to 6 GB; 2 to 15 minutes."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(if $(TORCH),$(BIN)/python -m pip install $(TORCH))
	$(BIN)/python -m pip install $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) -e ".[paper,bench,dev,docs]"
	touch $@

clean:
	rm -rf $(VENV) .venv-* build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
