# `make demo` and `make test` need nothing but python3 (3.11 or newer) and what pip can install.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
ONLY ?=
INSTALLED := $(VENV)/.installed
VENV_PROTO := .venv-proto
# The oldest grpcio-tools whose code the supported range of protobuf and grpcio runs.
GRPCIO_TOOLS := grpcio-tools==1.71.2
PROTO_INSTALLED := $(VENV_PROTO)/.installed-1.71.2

.PHONY: help venv demo test test-extended sim sim-scale chaos fuzz bench bench-peers gpu-check check proto proto-check clean

help:
	@echo "make demo    train on four local nodes, break them, compare every byte"
	@echo "make test    the tests; what else takes long: make test-extended"
	@echo "make sim     the protocol under SEEDS=100000 from SEED_START=0, in JOBS=2 processes"
	@echo "make sim-scale   one node's work in jobs of NODES=64,1024,8192 nodes, in virtual time"
	@echo "make chaos [ONLY=part]   kill every process role at every fault point, compare every byte"
	@echo "make chaos MINUTES=60 [SEED=n]   a job trains while everything around it fails"
	@echo "make fuzz MINUTES=60   hostile input, from new seeds; what fails joins the corpus"
	@echo "make bench [ONLY=part]   what it costs, as ratios to limits of this machine; JSON in bench.json"
	@echo "make gpu-check   tests and costs of state on a CUDA device, where there is one"
	@echo "make check   formatting, lint, types, import rules, generated code"
	@echo "make proto   generate snapshotd/wire/v1 from proto/"
	@echo "make clean   remove the virtual environments and caches"

venv: $(INSTALLED)

# torch first and on its own: its version decides what everything else must fit.
$(INSTALLED): pyproject.toml tools/python_version.py
	$(PYTHON) tools/python_version.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: venv
	$(BIN)/snapshotd demo

# Mostly waiting for other processes: two files at a time, each in one process.
test: venv
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not extended"

test-extended: venv
	$(BIN)/python -m pytest -n 2 --dist loadfile -m extended

SEEDS ?= 100000
SEED_START ?= 0
JOBS ?= 2
# Totals go there too; `python -m tests.sim --add A.json B.json` adds those of several ranges.
SIM_SUMMARY ?= $(VENV)/sim-$(SEED_START)-$(SEEDS).json

sim: venv
	$(BIN)/python -m tests.sim --seeds $(SEEDS) --start $(SEED_START) --jobs $(JOBS) --summary $(SIM_SUMMARY)

NODES ?= 64,1024,8192

sim-scale: venv
	$(BIN)/python -m tests.sim.scale --nodes $(NODES) --json sim-scale.json

# With MINUTES: the soak. Without: every crash point.
chaos: venv
ifdef MINUTES
	$(BIN)/python -m tests.integration.soak --minutes $(MINUTES) --json chaos.json \
	    $(if $(SEED),--seed $(SEED))
else
	$(BIN)/python -m tests.integration.crash --only '$(ONLY)' --json crash-points.json
endif

fuzz: venv
	$(BIN)/python -m tests.fuzz $(or $(MINUTES),60)

bench: venv
	$(BIN)/python -m tests.bench --only '$(ONLY)' --json bench.json

# On a machine with a CUDA device. GPU_PYTHON: an interpreter that has all it takes, where .venv is
# not to be made.
GPU_PYTHON ?= $(BIN)/python
gpu-check: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),venv)
	$(GPU_PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("no CUDA device is here")'
	PYTHONPATH=.:client $(GPU_PYTHON) -m pytest -m gpu tests
	PYTHONPATH=.:client $(GPU_PYTHON) -m tests.bench --only gpu --json bench-gpu.json

# PEERBENCH: the directory of that harness; ARGS: its own, such as --peers snapshotd,dcp
PEERBENCH ?= ../shared/peerbench
bench-peers: venv
	$(BIN)/python -m tests.bench.peers $(PEERBENCH) --json bench-peers.json $(ARGS)

check: venv proto-check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(PROTO_INSTALLED): tools/python_version.py
	$(PYTHON) tools/python_version.py
	$(PYTHON) -m venv $(VENV_PROTO)
	$(VENV_PROTO)/bin/python -m pip install --quiet $(GRPCIO_TOOLS)
	touch $@

proto: $(PROTO_INSTALLED)
	$(VENV_PROTO)/bin/python tools/wire_code.py write

proto-check: $(PROTO_INSTALLED)
	$(VENV_PROTO)/bin/python tools/wire_code.py check

clean:
	rm -rf $(VENV) $(VENV_PROTO) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
