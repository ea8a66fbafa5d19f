# make demo   from nothing to a trained tagger on the built-in practice set
# make test   linters, types and the test suite; make test-full adds the long counts
# make bench  every benchmark, each beside its peer

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-full bench clean

demo: .venv/.installed
	$(BIN)/fastat train --proc A4 --model cnn_trans

test: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not full" $(PYTEST_ARGS)

test-full: .venv/.installed-test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

bench: .venv/.installed-test
	$(BIN)/python -m pytest bench $(PYTEST_ARGS)

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable . --constraint constraints.txt
	touch $@

.venv/.installed-test: .venv/.installed
	$(BIN)/pip install --quiet --editable ".[test]" --constraint constraints.txt
	touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
