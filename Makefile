# make demo and make test do everything on a fresh machine; each target does what it needs of the ones before it.
.PHONY: install demo test bench lint clean
PYTHON ?= python3
BIN := .venv/bin

install: .venv/installed

# The native extension is built against the torch installed here, so without build isolation, and torch comes first.
.venv/installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h csrc/*/*.inc)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools wheel torch
	$(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt -e '.[test]'
	touch $@

demo: install
	$(BIN)/ser-fast demo

test: lint
	$(BIN)/python -m pytest tests --numprocesses auto --cov --cov-report=term

bench: install
	$(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt -e '.[bench]'
	$(BIN)/python -m pytest benchmarks --benchmark-only
	$(BIN)/python benchmarks/scaling.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info
