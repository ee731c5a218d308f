# SPDX-License-Identifier: Apache-2.0
# Everything runs in the virtual environment .venv, which the first command that needs it makes.

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/ready

.DEFAULT_GOAL := help
.PHONY: help demo test test-vllm seams lint setup clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

demo: $(READY) ## Serve the shipped pair with and without speculation and compare the two
	@$(VENV)/bin/python -m examples.demo

# Tests that share engines are in a group, which one process runs; all others go one at a time to whichever is free.
test: $(READY) ## Run the tests; ARGS="tests/unit -k walk" picks some
	$(VENV)/bin/python -m pytest -n 2 --dist loadgroup $(ARGS)

# A release of vLLM without a CPU build: its Python over the libraries of the build that is installed.
VLLM ?= $(shell $(PYTHON) -c 'exec(open("vllm_longspec/compat/supported.py").read()); print(TESTED[-1])')
VLLM_TESTS := $(patsubst %,tests/unit/test_%.py,seams plugin arguments support scheduler grammar interpreted_sampling bench) \
	$(patsubst %,tests/integration/test_%.py,lossless features magicdec mixed_batches scheduling requests) \
	$(patsubst %,tests/integration/test_%.py,kv_connectors nixl sleep_mode) tests/e2e/test_serve.py

test-vllm: $(READY) ## Run with the newest vLLM the tests of what may differ there; VLLM=0.33.1 names another
	overlay=$$($(VENV)/bin/python .ci/overlay_vllm.py $(VLLM)) && PYTHONPATH="$$overlay" \
		$(VENV)/bin/python -m pytest -n 2 --dist loadgroup $(VLLM_TESTS) $(ARGS)

# Imports come first: as long as one is not there, the modules that the other walks look into cannot be loaded.
seams: $(READY) ## Show what a release of vLLM has moved of all that this package uses, VLLM=0.34.0
	overlay=$$($(VENV)/bin/python .ci/overlay_vllm.py --ignore-requirements $(VLLM)) && export PYTHONPATH="$$overlay" && \
		TRITON_INTERPRET=1 $(VENV)/bin/python -m tests.seams && $(VENV)/bin/python -m pytest tests/unit/test_seams.py

lint: $(READY) ## Check style, formatting and types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

setup: $(READY) ## Make the virtual environment; ENGINE=cpu or cuda overrides what nvidia-smi says

clean: ## Remove the virtual environment, logs and caches
	rm -rf $(VENV) .vllm .demo build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): setup.py vllm_longspec/compat/supported.py .ci/setup_environment.sh
	PYTHON='$(PYTHON)' .ci/setup_environment.sh $(VENV)
	@touch $@
