# The two commands of the README, and what a contributor needs besides. `make help` lists them.

# Accelerator of this machine: gpu where NVIDIA's driver lists one, tpu on a TPU VM, else none (CPU). Override with
# ACCELERATOR=gpu, tpu or none.
ACCELERATOR ?= $(shell if nvidia-smi -L 2>/dev/null | grep -q GPU; then echo gpu; \
	elif [ -e /dev/accel0 ] || [ -e /dev/vfio/0 ]; then echo tpu; else echo none; fi)
EXTRAS = test$(if $(filter-out none,$(ACCELERATOR)),$(comma)$(ACCELERATOR))
comma := ,

# The first Python of a supported version that can make virtual environments. Override with PYTHON=/path/to/python.
SUITABLE = import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c "$(SUITABLE)" >/dev/null 2>&1 && echo $$python && break; done)

WORKDIR ?= runs/digits
ARGS ?=
VENV = .venv/bin/python

.PHONY: help train test slow faults check docs lock clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */make \1\t/'

train: .venv/installed  ## trains the digits network (WORKDIR=runs/digits, ARGS="--config.FIELD=VALUE ...")
	$(VENV) -m experiments.train --config=configs/s4nd/digits.py --workdir=$(WORKDIR) $(ARGS)

test: .venv/installed  ## the tests, but for the long ones
	$(VENV) -m pytest -n auto --dist worksteal -m "not slow and not faults" $(ARGS)

slow: .venv/installed  ## the long tests, and others once more in the tree mode that Flax NNX is moving to
	$(VENV) -m pytest -n auto --dist worksteal -m slow $(ARGS)
	NNX_GRAPH_MODE=false NNX_GRAPH_UPDATES=false $(VENV) -m pytest -n auto --dist worksteal -m "not slow" \
		tests/layers tests/models tests/training tests/experiments $(ARGS)

faults: .venv/installed  ## breaks runs in every way there is, and prints what came of them
	$(VENV) -m pytest -n 2 --dist loadfile -m faults tests/faults $(ARGS)

check: .venv/installed  ## lint and types
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .
	$(VENV) -m pyright --pythonpath $(VENV)

docs: .venv/installed  ## the pages and the docstrings as a site, build/docs/index.html
	JAX_PLATFORMS=cpu $(VENV) -m sphinx -W --keep-going -q -c docs . build/docs

lock: .venv/installed  ## writes constraints.txt: exact versions of everything in pyproject.toml, for all Pythons
	$(VENV) -m pip install -q uv
	.venv/bin/uv pip compile -q --upgrade --universal --all-extras --no-annotate --no-header pyproject.toml \
		-o constraints.txt
	sed -i.bak '1i # Written by `make lock` from pyproject.toml. Used by `make`, not by pip install of the package.' \
		constraints.txt && rm constraints.txt.bak

clean:  ## removes the virtual environment and caches; runs/ stays
	rm -rf .venv .ruff_cache .hypothesis .jax_cache build
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/installed: pyproject.toml constraints.txt
	@test -x $(VENV) || test -n "$(PYTHON)" || { echo "error: no Python 3.11, 3.12 or 3.13 with the venv module found; install one or \
	give PYTHON=/path/to/python" >&2; exit 1; }
	test -x $(VENV) || $(PYTHON) -m venv .venv
	@echo "installing into .venv, a few minutes the first time"
	$(VENV) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@
