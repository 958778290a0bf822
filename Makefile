# Set-up, the demo, the tests. Everything is installed into .venv, pinned by constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO ?= demo

.PHONY: demo test test-slow runner lint format setup clean

setup: $(VENV)/.ready $(VENV)/tflite-2.14/.ready

# torch first: with the pinned build present nothing below pulls another one
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("gori needs Python 3.10 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt pip setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation --editable '.[executorch,litert,coreml,gguf,sweep,cluster,sign,serve,dev]'
	touch $@

# the last tflite-runtime wants numpy below 2: an environment of its own, driven as a subprocess
$(VENV)/tflite-2.14/.ready: $(VENV)/.ready
	$(BIN)/python -m venv $(VENV)/tflite-2.14
	-$(VENV)/tflite-2.14/bin/pip install --quiet --disable-pip-version-check tflite-runtime==2.14.0 'numpy<2' && touch $@

demo: setup
	$(BIN)/gori demo --out $(DEMO)

# the C++ runner: build/gori-call, build/gori-bench and build/libgori.so; needs CMake and a C++17 compiler
RUNNER := build/runner
runner: setup
	@command -v cmake > /dev/null || { echo 'make runner needs CMake 3.19 or newer: pip install cmake, or your system'"'"'s package' >&2; exit 1; }
	cmake -S runtime/cpp -B $(RUNNER) $(if $(wildcard $(RUNNER)/CMakeCache.txt),,$(if $(shell command -v ninja),-G Ninja)) \
	  -DEXECUTORCH_ROOT=$$($(BIN)/python -c 'import importlib.util as u; print(next(iter(u.find_spec("executorch").submodule_search_locations)))') \
	  -DGORI_VERSION=$$($(BIN)/python -c 'import gori; print(gori.__version__)') > /dev/null
	cmake --build $(RUNNER) --parallel
	ln -sf runner/gori-call runner/gori-bench runner/libgori.so build/

# two processes of one thread each; TESTS_AT_ONCE=0 runs them in one
TESTS_AT_ONCE ?= 2
test: setup
	$(BIN)/python -m pytest --numprocesses $(TESTS_AT_ONCE) --dist loadfile

test-slow: setup
	$(BIN)/python -m pytest -m slow

# pyright reads an installed copy: checkers do not follow the package-dir mapping of an editable install
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/lint && $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --target build/lint .
	$(BIN)/pyright --pythonpath $(BIN)/python --project pyrightconfig.json

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info
