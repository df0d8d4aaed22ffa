# Commands for a checkout. Each first installs what it needs into .venv; see .ci/venv.
# PYTHON=python3.12 chooses the Python of .venv; the default is that of an existing .venv, else python3.
# PART='--minutes=10 --rotate=3' runs a part of the slow tests or of the fault suite; see `pytest --help`.
PYTHON ?=
PART ?=
VENV := .venv/bin
ENVIRONMENT := PYTHON='$(PYTHON)' sh .ci/venv

.PHONY: help pretrain test slow faults lint docs wheel newest run-environment dev-environment docs-environment
.NOTPARALLEL:

help:  ## List these commands.
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 18

pretrain: run-environment  ## Train the embedded default.
	$(VENV)/python -m experiments.pretrain --workdir=runs/tiny

test: dev-environment  ## Run the tests.
	$(VENV)/python -m pytest -n 2 --dist worksteal

slow: dev-environment  ## Run the slow tests: further configurations of the same properties.
	$(VENV)/python -m pytest -n 2 --dist worksteal -m slow $(PART)

faults: dev-environment  ## Run the fault suite: kills, full disks, damaged files and hangs in real runs.
	$(VENV)/python -m pytest -n 2 --dist worksteal --faults tests/faults $(PART)

lint: dev-environment  ## Check style, formatting, the import contracts, and types.
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/lint-imports
	$(VENV)/mypy

docs: docs-environment  ## Build the documentation site into site/.
	NO_MKDOCS_2_WARNING=1 $(VENV)/mkdocs build --strict

wheel: dev-environment  ## Build the package into dist/.
	$(VENV)/python -m build --wheel --no-isolation

newest:  ## Run a quick subset of the tests with the newest JAX, where a Python 3.12 or later is found.
	@sh .ci/newest

run-environment:
	@$(ENVIRONMENT) requirements.txt

dev-environment:
	@$(ENVIRONMENT) requirements-dev.txt

docs-environment:
	@$(ENVIRONMENT) requirements-docs.txt
