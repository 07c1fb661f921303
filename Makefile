# The environment, the demo and the checks. `make demo ARGS="--help"` passes options on; so do the tests and bench.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The oldest versions that setup.py claims, in an environment of their own.
LOWEST := .venv-lowest
ARGS ?=

# Left alone, `accelerate launch` gives every process one thread; plain Python uses all.
THREADS ?= $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
# Everything that `accelerate launch` would otherwise ask about or warn of. One process takes one GPU where there are any:
# without --gpu_ids, a Trainer that sees several splits each batch over them.
LAUNCH := $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no \
	--dynamo_backend no --num_cpu_threads_per_process $(THREADS) \
	$(if $(filter undefined,$(origin CUDA_VISIBLE_DEVICES)),--gpu_ids 0)

# A process per core, each with one thread: more would wait for each other. A file's tests share what they set up.
# `nproc` takes OMP_NUM_THREADS for the number of cores.
CORES ?= $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(CORES) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help .venv demo docs test test-slow test-all test-serve test-browser test-lowest coverage lint format bench dist \
	clean

help:  ## list the targets
	@sed -n 's/^\([a-z.-]*\):.*## /\1: /p' $(MAKEFILE_LIST)

.venv: $(STAMP)  ## the environment, from pinned constraints

# An environment: $(call install,FOLDER,CONSTRAINTS,EXTRA). torch comes first and alone, so that a build of it which is
# there already (for the CPU, say) is the one that stays.
define install
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "Got $$($(PYTHON) --version 2>&1), expected Python 3.11 or later. Try: make .venv PYTHON=python3.11"; exit 1; }
$(PYTHON) -m venv $(1)
$(1)/bin/python -m pip install --quiet -c $(2) "$$(grep '^torch==' $(2))"
$(1)/bin/python -m pip install --quiet -c $(2) -e ".[8bit,$(3)]"
@touch $@
endef

$(STAMP): setup.py constraints.txt
	$(call install,$(VENV),constraints.txt,dev)

$(LOWEST)/.installed: setup.py constraints-lowest.txt
	$(call install,$(LOWEST),constraints-lowest.txt,test)

demo: $(STAMP)  ## train, serve, unlearn and audit a small Llama, start to end
	$(LAUNCH) recipes/llama_alpaca.py $(ARGS)

docs: $(STAMP)  ## the site of the documentation, in site/; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

test: $(STAMP)  ## the unit suite, within ten minutes on two cores
	$(PYTEST) -m "not slow and not gpu" $(ARGS)

test-slow: $(STAMP)  ## the slow tests but for the long ones, within ten
	$(PYTEST) -m "slow and not long and not gpu" $(ARGS)

test-all: $(STAMP)  ## every test, within thirty
	$(PYTEST) $(ARGS)

# The demo's own code makes the system.
test-serve: $(STAMP)  ## a server under load for ten minutes, while its system forgets and grows; draws docs/figures/serving.png
	PYTHONPATH=recipes $(BIN)/python benchmarks/load_serving.py $(ARGS)

test-lowest: $(LOWEST)/.installed  ## the unit suite with the oldest versions that setup.py claims
	$(subst $(BIN),$(LOWEST)/bin,$(PYTEST)) -m "not slow and not gpu" $(ARGS)

# Playwright without a browser of its own: it drives Debian's, or the one that HF_S3T_CHROMIUM names.
test-browser: $(STAMP)  ## the page of `hf-s3t serve` in a real browser; installs playwright, and Chromium where apt can
	$(BIN)/python -m pip install --quiet "playwright>=1.65"
	@test -n "$$HF_S3T_CHROMIUM" || command -v chromium || { test "$$(id -u)" = 0 && command -v apt-get && \
		apt-get update -q && apt-get install -y -q --no-install-recommends chromium; } >/dev/null || { \
		echo "There is no Chromium here. Install it (apt install chromium), or name one by HF_S3T_CHROMIUM."; exit 1; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/server/test_page.py $(ARGS)

coverage: $(STAMP)  ## the unit suite, and that it runs as much of the package as before
	$(PYTEST) -m "not slow and not gpu" --cov --cov-report term:skip-covered $(ARGS)

lint: $(STAMP)  ## style, docstrings, the order of the rooms, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: $(STAMP)  ## mend what the linter can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## every benchmark
	@set -e; for bench in benchmarks/bench_*.py; do echo "== $$bench"; $(BIN)/python $$bench $(ARGS); done

dist: $(STAMP)  ## sdist and wheel, made from the tree and checked
	rm -rf build dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

clean:  ## caches and builds; the environments and trained systems stay
	rm -rf build dist site *.egg-info .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -path ./$(LOWEST) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
