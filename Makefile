# Everything happens in .venv, which is made on first use; stamp files in it say what is already there.
# A machine needs python3 (3.10 or later, with venv), pip and make; g++ for the compiled extension.

PYTHON ?= python3
VENV   ?= .venv

BIN  := $(abspath $(VENV))/bin
# The environment's programs (ninja among them) before the system's, as if it were activated.
export PATH := $(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Twice quiet: errors only. What a build has to say is in `focalnet info`.
PIP := $(BIN)/python -m pip -qq

TORCH        := $(shell sed -n 's/^torch==//p' requirements.txt)
TRANSFORMERS := $(shell sed -n 's/^transformers==//p' requirements.txt)
COMMON_TESTS := $(VENV)/share/transformers-tests
EXTENSION    := setup.py pyproject.toml focalnet/_version.py $(wildcard csrc/*.* csrc/*/*.*)

# Processes that tests run in. A file's tests run in one, which builds what they share once.
WORKERS  ?= 2
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# What `make check` runs: of these, the tests that are not marked slow.
QUICK    := tests/operators tests/cpu tests/models/test_parity.py tests/models/test_golden.py tests/patching

.DEFAULT_GOAL := help
.PHONY: help install demo check test lint types bench report pictures docs clean common-tests

help:
	@echo "make demo      digits and a photograph through transformers' FocalNet and this one, side by side"
	@echo "make check     ruff, types and the tests that matter while editing, in about a minute"
	@echo "make test      ruff and every test (ARGS='tests/cli -k name' goes to pytest, which then runs in one process)"
	@echo "make lint      ruff alone"
	@echo "make types     mypy alone"
	@echo "make bench     FocalNet on this CPU against every runtime that can be installed (ARGS go to bench/models.py)"
	@echo "make report    the tables of docs/performance.md and the plots, from the rows in bench/results/"
	@echo "make pictures  the pictures of docs/explain.md, with a browser for the one of the page"
	@echo "make docs      the documentation site, in build/site; a warning or a broken link is an error"
	@echo "make install   .venv with the tested versions, the extension compiled and focalnet installed (editable)"
	@echo "make clean     remove .venv and everything that was built"

install: $(VENV)/.installed

demo: install
	@$(BIN)/python examples/demo.py

check: lint types install
	@$(BIN)/pytest $(PARALLEL) --durations=5 -m "not slow" $(QUICK)

ifdef ARGS
test: lint install common-tests
	@$(BIN)/pytest --durations=20 $(ARGS)
else
test: lint install common-tests
	@$(BIN)/pytest $(PARALLEL) --durations=20
	@echo "the Triton kernels, in processes of their own"
	@$(BIN)/pytest $(PARALLEL) --durations=5 tests/triton tests/interpreted
endif

lint: $(VENV)/.requirements
	@echo "ruff check"
	@$(BIN)/ruff check --quiet .

# Some 40 s the first time, for PyTorch and transformers are read too; seconds afterwards.
types: $(VENV)/.requirements
	@echo "mypy"
	@$(BIN)/mypy --no-error-summary

bench: install $(VENV)/.peers
	@$(BIN)/python bench/models.py $(ARGS)

report: install
	@$(BIN)/python bench/report.py

pictures: install
	@$(BIN)/python bench/pictures.py

# Reads the sources and imports nothing, so it needs no installed package.
docs: $(VENV)/.requirements
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "build/site/index.html"

# timm wants torchvision, which has no CPU build to install beside torch's; focalnet.benchmark does without.
$(VENV)/.peers: $(VENV)/.requirements
	@echo "installing what to compare with: ONNX Runtime, OpenVINO, timm ... (minutes, once)"
	@$(PIP) install onnx onnxruntime onnxscript openvino pyyaml
	@$(PIP) install --no-deps timm
	@touch $@

$(BIN)/python:
	@echo "making $(VENV) ..."
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# pip would compile 20,000 modules in one process. Templates among them are no Python, which compileall says by its code.
# grad-cam wants torchvision, which has no CPU build to install beside torch's; its tests do without.
# While pip unpacks the rest, the extension is compiled; what goes wrong there is said when focalnet is installed.
$(VENV)/.requirements: requirements.txt | $(BIN)/python
	@echo "installing torch $(TORCH), transformers $(TRANSFORMERS) and what else requirements.txt names ... (minutes, once)"
	@$(PIP) install --no-compile torch==$(TORCH) numpy ninja pybind11 setuptools wheel
	@$(BIN)/python setup.py --quiet build_ext --inplace >/dev/null 2>&1 & \
	    $(PIP) install --no-compile -r requirements.txt && \
	    $(PIP) install --no-compile --no-deps grad-cam; \
	    code=$$?; wait; exit $$code
	@$(BIN)/python -m compileall -qq -j $(WORKERS) $(VENV)/lib || true
	@touch $@

# Never with build isolation, which would hide torch; never with dependencies, which requirements.txt has settled.
$(VENV)/.installed: $(VENV)/.requirements $(EXTENSION)
	@echo "building and installing focalnet ... (about a minute)"
	@$(PIP) install --no-build-isolation --no-deps --editable .
	@$(BIN)/python -c "from focalnet.backends import extension as e; print('focalnet installed;', e.missing() or 'extension loaded')"
	@touch $@

# transformers' own model tests are in its source distribution only. Without network the tests that use them say so.
common-tests: $(VENV)/.requirements
	@test -e $(COMMON_TESTS)/$(TRANSFORMERS).stamp || { \
	    echo "fetching the common model tests of transformers $(TRANSFORMERS) ..."; \
	    rm -rf $(COMMON_TESTS) && mkdir -p $(COMMON_TESTS) && \
	    $(PIP) download --no-deps --no-binary :all: --no-build-isolation \
	        --dest $(COMMON_TESTS) transformers==$(TRANSFORMERS) && \
	    tar -xzf $(COMMON_TESTS)/transformers-*.tar.gz -C $(COMMON_TESTS) --strip-components=1 \
	        transformers-$(TRANSFORMERS)/tests && \
	    rm $(COMMON_TESTS)/transformers-*.tar.gz && \
	    touch $(COMMON_TESTS)/$(TRANSFORMERS).stamp || \
	    echo "could not fetch the source distribution of transformers $(TRANSFORMERS) (no network?):" \
	        "the common model tests will not run; the next make test tries again"; }

clean:
	rm -rf $(VENV) build dist *.egg-info focalnet/_C.*.so focalnet/_build_info.json .pytest_cache .ruff_cache .mypy_cache .benchmarks
