# The two commands of the README. Both make .venv first if it is not there.
PYTHON ?= python3
VENV := .venv/bin

.PHONY: pretrain test slow faults lint

pretrain: .venv/run  ## Install, and train the embedded default.
	$(VENV)/python -m experiments.pretrain --workdir=runs/tiny

test: .venv/dev  ## Install what the tests need, and run them.
	$(VENV)/python -m pytest -n 2 --dist worksteal

slow: .venv/dev  ## What the tests show, in further settings.
	$(VENV)/python -m pytest -n 2 --dist worksteal -m slow

faults: .venv/dev  ## Kill, starve and damage real runs, and see what is left of them.
	$(VENV)/python -m pytest -n 2 --dist worksteal --faults tests/faults

lint: .venv/dev  ## Lint and check the formatting.
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .

.venv/run: requirements.txt
	@echo "installing $< into .venv: about 1.2 GB, a minute or more"
	$(PYTHON) -m venv .venv
	$(VENV)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt requirements.txt
	@echo "installing $< into .venv: about 1.2 GB, a minute or more"
	$(PYTHON) -m venv .venv
	$(VENV)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
