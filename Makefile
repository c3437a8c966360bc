# Everything runs in a virtual environment of its own; python3, pip and make are all that has to be there.
PYTHON ?= python3
FOLDER ?= runs
VENV := .venv
BIN := $(VENV)/bin
# Any build of PyTorch from 2.6 on will do. Without a GPU the CPU build saves a download of several gigabytes:
#   make demo TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0

.PHONY: install test test-oldest mutants crash fuzz lint demo walkthrough walkthrough-check tables figures docs scale clean

install: $(VENV)/installed

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -q

# The same on the oldest PyTorch that is supported, in an environment of its own (a CUDA build: several gigabytes).
test-oldest:
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet torch==2.6.0
	$(VENV)-oldest/bin/python -m pip install --quiet --editable '.[test]'
	$(VENV)-oldest/bin/python -m pytest -q

mutants: $(VENV)/installed-test
	cd tests && ../$(BIN)/python -m mutants

crash: $(VENV)/installed
	$(BIN)/python -m experiments.crash

fuzz: $(VENV)/installed
	$(BIN)/python -m experiments.fuzz

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: $(VENV)/installed-plot
	$(BIN)/python -m experiments.demo

walkthrough: $(VENV)/installed-docs
	$(BIN)/python docs/execute.py

walkthrough-check: $(VENV)/installed-docs
	$(BIN)/python docs/execute.py --check

# The pages of docs/tables, from the JSON files of docs/.
tables: $(VENV)/installed
	$(BIN)/python -m experiments.tables

# The figures of docs/figures, from the same files.
figures: $(VENV)/installed-docs
	$(BIN)/python -m experiments.figures

# README.md and docs/ as a static site in site/; open site/index.html. The notebook is shown as it was last executed.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# Random weights in the shape of Llama-3.1-8B, then of Mistral-7B (16 and 15 GB on disk), and one LfU step of each kind.
scale: $(VENV)/installed
	$(BIN)/python -m experiments.scale step --shape llama-3.1-8b --folder $(FOLDER)/llama-3.1-8b
	$(BIN)/python -m experiments.scale step --shape mistral-7b-v0.3 --folder $(FOLDER)/mistral-7b-v0.3

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-plot: $(VENV)/torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[plot]'
	touch $@ $(VENV)/installed

$(VENV)/installed-test: $(VENV)/torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@ $(VENV)/installed

$(VENV)/installed-docs: $(VENV)/torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) $(VENV)-oldest runs site
