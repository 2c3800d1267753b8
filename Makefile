# make demo: set up and answer one prompt.  make test: set up and run all tests.  Both are safe to repeat.
PYTHON ?= python3
CXX ?= g++
# That run the tests: two take two thirds of the time of one, and up to 16 GB.
PROCESSES ?= $(shell [ $$(nproc) -gt 1 ] && awk '/^MemTotal/ { exit $$2 < 20e6 }' /proc/meminfo && echo 2 || echo 0)
VENV := .venv
TOOLS := build/tools
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
NATIVE := $(wildcard native/*.cpp native/*.h)
WARNINGS := $(if $(CI),-C cmake.define.MILLIS_WERROR=ON)
SOURCES := pyproject.toml CMakeLists.txt $(shell find native src -type f ! -name '*.pyc' ! -name '*.so' ! -name '*~')

.PHONY: demo test test-arm lint types fmt bench docs fuzz clean

demo: $(VENV)/.built
	@$(BIN)/millis run "Give me three tips for a good night's sleep." --max-tokens 120

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n $(PROCESSES) --dist loadfile tests

# Needs a cross compiler and qemu, and says how to get them; unpacks arm64 packages under build/arm, installs nothing.
test-arm: $(TOOLS)/.locked
	$(TOOLS)/bin/python tools/arm.py

lint: $(VENV)/.dev
	$(BIN)/ruff check src tests tools
	$(BIN)/ruff format --check src tests tools
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)

types: $(VENV)/.dev
	$(BIN)/mypy

fmt: $(VENV)/.dev
	$(BIN)/ruff check --fix src tests tools
	$(BIN)/ruff format src tests tools
	$(BIN)/clang-format -i $(NATIVE)

bench: $(VENV)/.dev
	$(BIN)/millis bench engine --peers transformers

fuzz: $(VENV)/.dev
	$(BIN)/python tests/fuzz/fuzz_readers.py --seconds 600

docs: $(VENV)/.dev
	$(BIN)/python tools/terminal_picture.py
	$(BIN)/python tools/page_pictures.py

clean:
	rm -rf $(VENV) build dist

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "Millis needs Python 3.10 or newer as $(PYTHON); install it, or give it: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "cannot make a virtual environment; on Debian or Ubuntu: apt install python3-venv"; exit 1; }

$(VENV)/.locked: requirements.lock | $(VENV)/bin/python
	@echo "installing what Millis needs into $(VENV)"
	@$(PIP) install --no-deps -r requirements.lock
	@touch $@

$(TOOLS)/.locked: requirements-build.lock | $(VENV)/bin/python
	@echo "installing what builds it into $(TOOLS)"
	@$(PYTHON) -m venv $(TOOLS)
	@$(TOOLS)/bin/python -m pip --disable-pip-version-check -q install --no-deps -r requirements-build.lock
	@touch $@

# The wheel is built and installed as a user's would be. The build folder keeps what did not change.
$(VENV)/.built: $(VENV)/.locked $(TOOLS)/.locked $(SOURCES)
	@command -v $(CXX) >/dev/null || \
	  { echo "no C++ compiler ($(CXX)); install g++ 11 or newer, on Debian or Ubuntu: apt install g++"; exit 1; }
	@echo 'int main() {}' | $(CXX) -std=c++20 -fsyntax-only -x c++ - 2>/dev/null || \
	  { echo "$(CXX) does not know C++20; install g++ 11 or newer, or give another: make CXX=g++-12"; exit 1; }
	@echo "building Millis"
	@rm -rf dist
	@CXX=$(CXX) PATH="$(CURDIR)/$(TOOLS)/bin:$$PATH" $(TOOLS)/bin/python -m pip --disable-pip-version-check -q \
	  wheel --no-deps --no-build-isolation $(WARNINGS) -w dist .
	@$(PIP) install --no-deps --force-reinstall dist/*.whl
	@touch $@

$(VENV)/.dev: $(VENV)/.built requirements-dev.lock
	@echo "installing what the tests need (PyTorch among it)"
	@$(PIP) install --no-deps -r requirements-dev.lock
	@touch $@
