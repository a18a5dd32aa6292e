# Everything runs in .venv, which these targets make from nothing but Python 3.11 (or later) and pip.
#
#   make demo                            classify real photographs with the bundled weights
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu   the same, with the CPU-only build of torch
#   make demo CIFAR10=FOLDER             the same, and the accuracy on this copy of JPEG CIFAR-10 (see lamzoo/data)
#   make test                            the default test suite
#   make test LOCK=                      the same, with current versions in place of those of requirements/dev.lock
#
# All targets but demo install the versions of requirements/dev.lock and check the hash of every file; with TORCH_INDEX,
# whose builds have other hashes, they don't. A second run finds the environment ready. `make clean` removes it, and is
# needed to change PYTHON or TORCH_INDEX.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
TORCH_INDEX ?=
LOCK ?= $(if $(TORCH_INDEX),,requirements/dev.lock)
JOBS ?= 2
CIFAR10 ?= $(wildcard ../shared/data/cifar10)
DEMO_OUT ?= .demo
SHARED ?= ../shared/data
TABLES_OUT ?= .tables
TINY := lam_vit_tiny_patch8_64.tinyimagenet100 vit_tiny_patch8_64.tinyimagenet100
SEQUENCES := lam_clip4clip_micro lam_single_clip4clip_micro lam_qd_detr_micro lam_moment_detr_micro lam_describer_micro

BIN := $(VENV)/bin
export PYTHON VENV TORCH_INDEX

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-gpu test-browser lint format typecheck docs wheel wheel-test tables lock clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.ready-demo  ## predictions, cost and masks on real photographs, with the bundled weights
	$(BIN)/lamzoo demo --out $(DEMO_OUT) $(if $(CIFAR10),--cifar10 $(CIFAR10))

test: $(VENV)/.ready-dev  ## the default tests (neither slow, gpu nor browser)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS)

test-slow: $(VENV)/.ready-dev  ## the slow tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) -m "slow and not gpu and not browser"

test-gpu: $(VENV)/.ready-dev  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -q -m gpu

test-browser: $(VENV)/.ready-dev  ## the pages in headless Chromium (apt: chromium, chromium-driver)
	$(BIN)/python -m pytest -q -m browser

lint: $(VENV)/.ready-dev  ## ruff: rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(VENV)/.ready-dev  ## ruff: mend what can be mended
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

typecheck: $(VENV)/.ready-dev  ## mypy on the package
	$(BIN)/mypy

docs: $(VENV)/.ready-dev  ## the documentation, into .site/; warnings and broken links are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

wheel: $(VENV)/.ready-dev  ## source distribution and wheel, into dist/
	$(BIN)/python -m hatchling build -d dist

wheel-test: $(VENV)/.ready-dev  ## the wheel, installed into an empty environment, away from this checkout
	$(BIN)/python tests/wheel/check_wheel.py

tables: $(VENV)/.ready-dev  ## measure the zoo again, train what is missing in benchmarks/results, rewrite the tables of README and docs
	$(BIN)/lamzoo bench "*.cifar10" --data npz:$(SHARED)/cifar10 --split test --fuse --force --out benchmarks/results/zoo.csv
	$(BIN)/lamzoo bench "*.tinyimagenet100" --data npz:$(SHARED)/tinyimagenet100 --split val --fuse --force --out benchmarks/results/zoo.csv
	$(BIN)/lamzoo bench lam_vit_tiny lam_vit_small lam_vit_base --max-batch 16 --fuse --force --out benchmarks/results/cost.csv
	$(BIN)/lamzoo bench $(SEQUENCES) --force --out benchmarks/results/sequences.csv
	$(BIN)/python -m benchmarks.ablation.run --jobs $(JOBS)
	$(BIN)/python -m benchmarks.ablation.run --ablation benchmarks/ablation/micro.toml --jobs $(JOBS)
	$(BIN)/python -m benchmarks.ablation.run --ablation benchmarks/ablation/positions.toml --jobs $(JOBS)
	$(BIN)/python -m benchmarks.ablation.run --ablation benchmarks/ablation/grid.toml --jobs $(JOBS)
	$(BIN)/python -m benchmarks.ablation.run --ablation benchmarks/ablation/flickr8k.toml --jobs $(JOBS)
	$(BIN)/python -m benchmarks.ablation.run --ablation benchmarks/ablation/captions.toml --jobs $(JOBS)
	$(BIN)/python -m benchmarks.ablation.run --ablation benchmarks/ablation/flickr8k_captions.toml --jobs $(JOBS)
	$(BIN)/python -m benchmarks.ablation.run --ablation benchmarks/ablation/moments.toml --jobs $(JOBS)
	$(BIN)/python -m benchmarks.finetuning lam_vit_micro.cifar10_mul vit_micro.cifar10_mul --data npz:$(SHARED)/clothing10
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.speed --modes compile --batches 1 --variants "zoo default" \
	  "mask, drop to 0.59 of the GMACs" "redundancy, nearest to 0.59 of the GMACs"
	$(BIN)/python -m benchmarks.fused
	$(BIN)/python -m benchmarks.breakdown
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.kernels --lengths 2049 4097 --ranks 1 9 17
	$(BIN)/python -m benchmarks.exported $(TINY) --data npz:$(SHARED)/tinyimagenet100 --split val
	$(BIN)/python -m benchmarks.reduction --data npz:$(SHARED)/
	$(BIN)/python -m benchmarks.reduction --times
	$(BIN)/python -m benchmarks.reduction --figure docs/images/reduction.svg
	$(BIN)/python -m benchmarks.features --data npz:$(SHARED)/clothing10 \
	  --weights $(SHARED)/vit_s14/vit_small_patch14_dinov2.focus.safetensors
	$(BIN)/python -m benchmarks.video_merging lam_clip4clip_micro.grid clip4clip_micro.grid --data grid:$(SHARED)/grid_s1:motion
	$(BIN)/python -m benchmarks.video_merging lam_describer_micro.grid describer_micro.grid \
	  --data grid:$(SHARED)/grid_s1:mouth+audio
	$(BIN)/python -m benchmarks.video_merging lam_clip4clip clip4clip --time
	$(BIN)/python -m benchmarks.search_index 10000 100000 1000000
	$(BIN)/python -m benchmarks.hosts
	$(BIN)/python -m benchmarks.tables
	$(BIN)/lamzoo compare benchmarks/results/zoo.csv --timm $(SHARED)/timm_results --out $(TABLES_OUT)

lock:  ## renew requirements/dev.lock: the current version of every dependency, with hashes, for all platforms
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet uv
	$(VENV)-lock/bin/uv pip compile --quiet --upgrade --universal --generate-hashes --no-annotate --python-version 3.11 \
	  --custom-compile-command "make lock" --extra dev --output-file requirements/dev.lock pyproject.toml
	rm -rf $(VENV)-lock

clean:  ## remove the environment and everything that was made here
	rm -rf $(VENV) $(DEMO_OUT) $(TABLES_OUT) .site dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.ready-demo: pyproject.toml
	LOCK= sh .ci/install --editable '.[demo]'
	@touch $@

$(VENV)/.ready-dev: pyproject.toml $(LOCK)
	LOCK=$(LOCK) sh .ci/install --editable '.[dev]'
	@touch $@
