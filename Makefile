# make demo   from nothing to a trained tagger on the built-in practice set
# make test   linters, types and the test suite; make test-full adds the long counts
# make test-older   the main path once more, with what is chosen on a processor of AVX2 alone
# make test-oldest  the kernels' tests with the oldest torch and Triton (part of test-full)
# make bench  every benchmark, each beside its peer, then the tables; FASTAT_BENCH_FULL=1: at full size

PYTHON ?= python3
BIN := .venv/bin
# uv, where it is installed, takes a fraction of pip's time.
UV := $(shell command -v uv 2>/dev/null)
new_venv = $(if $(UV),$(UV) venv --seed --allow-existing --python $(PYTHON),$(PYTHON) -m venv) $(1)
install = $(if $(UV),$(UV) pip install --python $(1)/bin/python,$(1)/bin/pip install)
# Two processes with a thread each get through the tests in less time than one with two.
PARALLEL := -n logical --maxprocesses 4 --dist worksteal
OLDER := CUDA_VISIBLE_DEVICES= ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2

.PHONY: demo test test-full test-older test-oldest bench clean

# A small set needs less dropout than A4's 0.75, which is meant for two million clips: here A2's.
demo: .venv/.installed
	$(BIN)/fastat train --proc A4 --model cnn_trans --epochs 6 --set model.dropout=0.25

test: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m "not full" $(PYTEST_ARGS)

test-full: .venv/.installed-test test-older test-oldest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m "not quiet" $(PYTEST_ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m quiet $(PYTEST_ARGS)

test-older: .venv/.installed-test
	$(OLDER) $(BIN)/python -m pytest tests/test_main_path.py tests/system

test-oldest: .venv-oldest/.installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest $(PARALLEL) tests/kernels tests/system $(PYTEST_ARGS)

bench: .venv/.installed-test
	$(BIN)/python -m pytest bench --benchmark-columns=median,iqr,rounds --benchmark-sort=name $(PYTEST_ARGS)
	$(BIN)/python -m bench.compare

.venv/.installed: pyproject.toml constraints.txt
	@echo "Installing torch, DALI and the rest into .venv: 7 GB, which takes minutes."
	$(call new_venv,.venv)
	$(call install,.venv) --editable . --constraint constraints.txt
	touch $@

.venv/.installed-test: .venv/.installed
	$(call install,.venv) --editable ".[test]" --constraint constraints.txt
	touch $@

# Triton 3.6's interpreter does not run on numpy 2.4.
.venv-oldest/.installed: Makefile
	$(call new_venv,.venv-oldest)
	$(call install,.venv-oldest) torch==2.11.0 triton==3.6.0 "numpy<2.4" scipy timm \
		pytest pytest-timeout pytest-xdist
	touch $@

clean:
	rm -rf .venv .venv-oldest .mypy_cache .ruff_cache .pytest_cache
