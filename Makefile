# make quickstart: from a bare machine to a probed and exported encoder. make test: the test suite. make tutorials: the
# pages of the documentation that are run, the plans of recipes, and benchmarks at toy size, as a second stage. make docs: the site, in build/site.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install quickstart test tutorials docs lint clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

quickstart: install
	$(BIN)/prelude quickstart

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

tutorials: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m tutorial --numprocesses 2

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "build/site/index.html is the site; with its search: python3 -m http.server --directory build/site"

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info
