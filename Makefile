# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# gloo processes and pytest workers share the cores: one thread each
export OMP_NUM_THREADS ?= 1
WORKERS ?= 2
# of the slow ones, those in these files or folders: make test-slow TESTS=tests/unit/simulator
TESTS ?=

.PHONY: help demo test test-slow validate bands lint format types imports docs schema clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "autopar needs Python 3.11 or later: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(READY)  ## plan a small GPT for four processes of this machine, and run the plan
	$(BIN)/python -m autopar plan examples/gpt/model.py --topology local --devices 4 --output build/demo/plan.json
	$(BIN)/python -m autopar explain build/demo/plan.json
	$(BIN)/python -m autopar run build/demo/plan.json examples/gpt/model.py --steps 5 --compare

test: lint  ## everything this machine can test (needs no GPU; about 14 minutes of one core)
	$(BIN)/python -m pytest -q -n $(WORKERS) -m "not slow"

test-slow: $(READY)  ## the tests that take long, all or those in TESTS
	$(BIN)/python -m pytest -q -n $(WORKERS) -m slow --timeout 1800 $(TESTS)

validate: $(READY)  ## predictions beside published runs: make validate CSV=rows.csv
	@test -n "$(CSV)" || { echo 'give the rows: make validate CSV="a.csv b.csv" (benchmarks/README.md has their columns)'; exit 2; }
	$(BIN)/python -m benchmarks.validate $(CSV) --output build/validation.html

bands: $(READY)  ## how far predictions are off, learnt from published runs: make bands CSV=rows.csv
	@test -n "$(CSV)" || { echo 'give the rows: make bands CSV="a.csv b.csv" (benchmarks/README.md has their columns)'; exit 2; }
	$(BIN)/python -m benchmarks.bands $(CSV)

lint: $(READY) types imports  ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

imports: $(READY)
	$(BIN)/lint-imports

format: $(READY)  ## rewrite the sources as ruff formats them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)  ## rewrite the generated pages: CLI reference, plan schema, picture
	$(BIN)/python docs/generate.py

schema: docs  ## docs/plan.schema.json

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
