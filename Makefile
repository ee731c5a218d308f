# SPDX-License-Identifier: Apache-2.0
# Everything runs in the virtual environment .venv, which the first command that needs it makes.

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/ready

.DEFAULT_GOAL := help
.PHONY: help demo test lint setup clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

demo: $(READY) ## Serve the shipped pair with and without speculation and compare the two
	@$(VENV)/bin/python -m examples.demo

# Tests that share engines are in a group, which one process runs; all others go one at a time to whichever is free.
test: $(READY) ## Run the tests; ARGS="tests/unit -k walk" picks some
	$(VENV)/bin/python -m pytest -n 2 --dist loadgroup $(ARGS)

lint: $(READY) ## Check style, formatting and types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

setup: $(READY) ## Make the virtual environment; ENGINE=cpu or cuda overrides what nvidia-smi says

clean: ## Remove the virtual environment, logs and caches
	rm -rf $(VENV) .demo build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): setup.py vllm_longspec/compat/supported.py .ci/setup_environment.sh
	PYTHON='$(PYTHON)' .ci/setup_environment.sh $(VENV)
	@touch $@
