# make demo, make check and make test do everything on a fresh machine; each target does what it needs of the ones before it.
.PHONY: install demo check test bench lint clean
PYTHON ?= python3
# PINS=newest: the same with the newest torch that the library is held to, in an environment of its own.
PINS ?=
VENV := .venv$(PINS:%=-%)
CONSTRAINTS := constraints$(PINS:%=-%).txt
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
PARALLEL := --numprocesses auto --dist worksteal
# A native extension that does not build is an error here; a plain pip install goes on without it.
export SER_FAST_REQUIRE_NATIVE := 1

install: .venv/installed

# The native extensions are built against the torch installed here, so without build isolation, and torch comes first;
# with ninja their sources compile in parallel.
.venv/installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/*.h csrc/*/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt ninja setuptools wheel torch
	$(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt -e '.[test]'
	touch $@

demo: install
	$(BIN)/ser-fast demo

# The loop of a day; CI runs `make test`.
check: lint
	$(PYTEST) tests -m 'not slow' $(PARALLEL)

test: lint
	$(PYTEST) tests $(PARALLEL) --cov --cov-report=term

bench: install
	$(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt -e '.[bench]'
	$(PYTEST) benchmarks --benchmark-only
	$(BIN)/python benchmarks/scaling.py

# mypy reads the package as it is installed, where kernels/ is ser_fast.kernels.
lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typed && mkdir -p build/typed/ser_fast
	ln -s $(CURDIR)/ser_fast/* $(CURDIR)/kernels build/typed/ser_fast
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache
	tools/lint_cpp.sh $(BIN)/clang-format

clean:
	rm -rf .venv build dist *.egg-info
