# make demo   from nothing to a trained tagger on the built-in practice set
# make test   linters, types and the test suite; make test-full adds the long counts
# make test-oldest  the kernels' tests with the oldest torch and Triton (part of test-full)
# make bench  every benchmark, each beside its peer, then the tables; FASTAT_BENCH_FULL=1: at full size

PYTHON ?= python3
BIN := .venv/bin
# Two processes with a thread each get through the tests in less time than one with two.
PARALLEL := -n logical --maxprocesses 4 --dist worksteal

.PHONY: demo test test-full test-oldest bench clean

demo: .venv/.installed
	$(BIN)/fastat train --proc A4 --model cnn_trans

test: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m "not full" $(PYTEST_ARGS)

test-full: .venv/.installed-test test-oldest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m "not quiet" $(PYTEST_ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m quiet $(PYTEST_ARGS)

test-oldest: .venv-oldest/.installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest $(PARALLEL) tests/kernels $(PYTEST_ARGS)

bench: .venv/.installed-test
	$(BIN)/python -m pytest bench --benchmark-columns=median,iqr,rounds --benchmark-sort=name $(PYTEST_ARGS)
	$(BIN)/python -m bench.compare

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable . --constraint constraints.txt
	touch $@

.venv/.installed-test: .venv/.installed
	$(BIN)/pip install --quiet --editable ".[test]" --constraint constraints.txt
	touch $@

# Triton 3.6's interpreter does not run on numpy 2.4.
.venv-oldest/.installed: Makefile
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet torch==2.11.0 triton==3.6.0 "numpy<2.4" scipy timm \
		pytest pytest-timeout pytest-xdist
	touch $@

clean:
	rm -rf .venv .venv-oldest .mypy_cache .ruff_cache .pytest_cache
