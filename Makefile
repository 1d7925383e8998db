# `make` alone lists the targets. Needs Python >= 3.10, git and make; the rest installs itself.

PYTHON ?= python3
VENV ?= .venv
# More options for pip, for example a mirror or another build of torch.
PIP_FLAGS ?=
# More options for the programme that a target runs, for example
# `make train ARGS="--trainer.max_steps 50"`, `make test ARGS="-x -k merge"`, or
# `make bench ARGS=--resume` after an interruption.
ARGS ?=

RUN := $(VENV)/bin/python
# Python compiles what it imports by itself, once; all of it at once takes a minute. Where containers
# forbid to keep what was compiled, every process would need ten seconds for PyTorch alone.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL := $(RUN) -m pip install --quiet --quiet --disable-pip-version-check --no-input --no-compile
CONFIG ?= configs/text/quickstart.yaml
RESULTS := benchmarks/results
# One thread a worker, so results depend neither on the number of cores nor on the load.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 8 --dist worksteal

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup train vision slides image-text captioning audio multimodal finetune long-range test test-fast lint format bench docs clean FORCE

help: ## List the targets
	@echo "Usage: make TARGET [PYTHON=python3.12] [VENV=.venv] [ARGS=...]"
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' Makefile | expand -t 14

setup: $(VENV)/.ready ## Set up the virtual environment; every other target does so by itself

train: $(VENV)/.ready ## Train longnet_lm_tiny on the standard library and write a report
	$(RUN) -m recipes.text_lm fit --config $(CONFIG) $(ARGS)

vision: $(VENV)/.ready ## Train a small LongViT on handwritten digits, pixel by pixel
	$(RUN) -m recipes.image_classification fit --config configs/vision/digits_quickstart.yaml $(ARGS)

slides: $(VENV)/.ready ## Train a slide encoder on a real slide region, with two baselines beside it
	$(RUN) -m recipes.slide_classification fit --config configs/slides/quickstart.yaml $(ARGS)

image-text: $(VENV)/.ready ## Train two towers on icons and their names, and search held-out icons by sentence
	$(RUN) -m recipes.image_text fit --config configs/image_text/quickstart.yaml $(ARGS)

captioning: $(VENV)/.ready ## Train a multiway model to write captions of icons
	$(RUN) -m recipes.captioning fit --config configs/captioning/quickstart.yaml $(ARGS)

audio: $(VENV)/.ready ## Train a small audio model on recordings of instruments
	$(RUN) -m recipes.audio_classification fit --config configs/audio/quickstart.yaml $(ARGS)

multimodal: $(VENV)/.ready ## Train one model on pictures, sounds and a question, any of which may be missing
	$(RUN) -m recipes.multimodal fit --config configs/multimodal/quickstart.yaml $(ARGS)

finetune: $(VENV)/.ready ## Train a small Llama on code, then LoRA adapters of it on prose, with dilated attention
	test -f runs/finetune_base/model/model.safetensors || $(RUN) -m recipes.finetune_lora_quickstart
	$(RUN) -m recipes.finetune_lora fit --config configs/finetune/quickstart.yaml $(ARGS)

long-range: $(VENV)/.ready ## Compare dilated with dense attention at long-range tasks (2 hours)
	$(RUN) -m recipes.long_range_sweep $(ARGS)

test: lint ## Run every check: ruff, mypy, all tests
	$(PYTEST) $(ARGS)

test-fast: $(VENV)/.ready ## Run the tests that are neither slow nor distributed
	$(PYTEST) -m "not slow and not distributed" $(ARGS)

lint: $(VENV)/.ready ## Check style and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy --num-workers 2

format: $(VENV)/.ready ## Mend style where it can be done automatically
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

bench: $(VENV)/.ready ## Run the benchmarks on the CPU and write docs/performance.md (35 minutes)
	$(RUN) -m benchmarks.kernels --device cpu --output $(RESULTS)/kernels-cpu.json $(ARGS)
	$(RUN) -m benchmarks.length --device cpu --output $(RESULTS)/length-cpu.json $(ARGS)
	$(RUN) -m benchmarks.models --device cpu --num-layers 2 --rounds 3 \
	    --output $(RESULTS)/models-cpu.json $(ARGS)
	$(RUN) -m benchmarks.memory --output $(RESULTS)/memory-cpu.json
	$(RUN) -m benchmarks.slide_encoder --output $(RESULTS)/slide-cpu.json
	$(RUN) -m benchmarks.branches --device cpu --seq-lens 4096 8192 --rounds 3 \
	    --output $(RESULTS)/branches-cpu.json $(ARGS)
	$(RUN) -m longnet_zoo.cli bench --device cpu --output $(RESULTS)/bench-cpu $(filter --resume,$(ARGS))
	$(RUN) -m benchmarks.streaming --device cpu --output $(RESULTS)/streaming-cpu.json $(ARGS)
	$(RUN) -m benchmarks.performance

docs: $(VENV)/.ready ## Build the documentation into site/ (Python 3.11 or newer)
	$(RUN) -m docs.generate
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

clean: ## Remove the virtual environment and caches; runs/ stays
	rm -rf $(VENV) build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are written last, so an interrupted set-up starts that step again.
$(VENV)/.ready: pyproject.toml constraints.txt $(VENV)/.python
	@rm -f $@
	@echo "set-up 2/2: packages into $(VENV) (2 to 10 minutes; torch alone is over 2 GB with CUDA)"
	@$(PIP_INSTALL) $(PIP_FLAGS) \
	    --editable ".[train,slides,audio,image-text,hf,docs,dev]" --constraint constraints.txt \
	    || { echo "error: pip could not install the packages; its message is above. Cure it and repeat." >&2; exit 1; }
	@# The original that tests compare with; its dependencies pin versions of years ago.
	@$(PIP_INSTALL) $(PIP_FLAGS) \
	    --no-deps torchscale fairscale --constraint constraints.txt \
	    || echo "note: without torchscale, the tests that compare with it are skipped" >&2
	@$(RUN) -c "import lightning, longnet_zoo" # what every command imports
	@touch $@
	@echo "set-up done: it is repeated only when pyproject.toml, constraints.txt or the Python change"

# Looked at each time, rewritten only when $(PYTHON) has another version than $(VENV).
$(VENV)/.python: FORCE
	@command -v "$(PYTHON)" >/dev/null || { echo "error: $(PYTHON) not found." \
	    "Install Python 3.10 or newer, or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error:" \
	    "Python 3.10 or newer is needed, $(PYTHON) is $$("$(PYTHON)" -V 2>&1)." \
	    "Name another: make PYTHON=python3.12" >&2; exit 1; }
	@version=$$("$(PYTHON)" -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	if [ "$$version" != "$$(cat $@ 2>/dev/null)" ] || ! $(RUN) -c '' 2>/dev/null; then \
	    "$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) cannot" \
	        "make virtual environments (no ensurepip). On Debian or Ubuntu:" \
	        "apt install python$$version-venv" >&2; exit 1; }; \
	    echo "set-up 1/2: virtual environment $(VENV) with Python $$version (10 seconds)"; \
	    rm -f $@ $(VENV)/.ready; \
	    "$(PYTHON)" -m venv --clear "$(VENV)" && echo "$$version" > $@; \
	fi

FORCE:
