# Two commands do everything on a fresh machine: make demo, make test. Neither needs a GPU, nvcc or a model hub.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/installed
# Extra arguments: make demo ARGS="--max-new-tokens 64", make test ARGS="-k caches"
ARGS   ?=
# OpenMP threads that wait by spinning for long starve whatever else runs on the same few cores, each other too.
export GOMP_SPINCOUNT ?= 1000

CUDA_SOURCES = $(shell find csrc tests/cuda_emulator -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.h')
# The package in the shape that an install gives it, made of links, for what must work without an install.
PACKAGE := build/package/hf_fastpath

.DEFAULT_GOAL := help
.PHONY: help demo test gpu-test check mypy format info clean package

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): constraints.txt pyproject.toml $(wildcard setup.py) tools/setup_venv.py
	@$(PYTHON) tools/setup_venv.py --venv $(VENV)
	@touch $@

demo: $(STAMP) ## install, then stock against patched on a real model (some minutes on 2 cores)
	@$(BIN)/hf-fastpath demo $(ARGS)

test: $(STAMP) ## install, then every test that needs no GPU
	$(BIN)/python -m pytest -m "not gpu" $(ARGS)

package:
	@rm -rf $(PACKAGE)
	@mkdir -p $(PACKAGE)
	@ln -s $(CURDIR)/hf_fastpath/* $(CURDIR)/patches $(CURDIR)/eval $(CURDIR)/csrc $(PACKAGE)/

# For a machine without network that has torch, transformers, pytest and nvcc: installs nothing. -P keeps the checkout's
# own hf_fastpath, which lacks the folders that an install maps into the package, out of sys.path.
gpu-test: package ## the tests that need a GPU, with $(PYTHON) as it is
	HF_FASTPATH_REQUIRE=gpu PYTHONPATH=$(CURDIR)/build/package $(PYTHON) -P -m pytest -m gpu tests $(ARGS)

check: $(STAMP) mypy ## linters, formatters and types, without changing a file
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CUDA_SOURCES)

mypy: $(STAMP) package
	cd build/package && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml -p hf_fastpath
	$(BIN)/mypy tools

format: $(STAMP) ## rewrite the files as `make check` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CUDA_SOURCES)

info: $(STAMP) ## what was found on this machine, and what runs where
	@$(BIN)/hf-fastpath info

clean: ## remove what the other targets made
	rm -rf build $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
