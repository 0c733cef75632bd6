# physrep: `make help` lists the targets. Needs Python 3.11+, git and make; everything else is installed into .venv.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup reproduce data tune ablations machines verify test lint notebooks readme models clean

PYTHON ?= python3
VENV ?= .venv
PRESET ?= laptop
DATA ?=
CONSTRAINTS ?= constraints.txt
CORES ?= $(shell $(PYTHON) -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)' 2>/dev/null || echo 1)

BIN := $(VENV)/bin
# the committed figures are those of the laptop preset
FIGURES := $(if $(filter laptop,$(PRESET)),figures,figures/$(PRESET))
READY := $(VENV)/.ready
SNAKE = $(BIN)/python -m snakemake $(TARGET) --cores $(CORES) --nolock --rerun-incomplete --keep-going --quiet rules host --config preset=$(PRESET) data="$(DATA)"
# one torch thread a process: on small grids two are slower than one, and jobs run side by side
export OMP_NUM_THREADS := 1
export MKL_NUM_THREADS := 1
# glibc would give large buffers back to the kernel after every step and fault them in again: a sixth of the time of a ViT's step
export MALLOC_MMAP_THRESHOLD_ := 4294967296
export MALLOC_TRIM_THRESHOLD_ := 17179869184
export PYTHONUNBUFFERED := 1
export TQDM_MININTERVAL := 20

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F '\t' '{printf "  make %-10s %s\n", $$1, $$2}'
	@echo
	@echo "  PRESET=smoke|laptop|gpu|paper|native (now: $(PRESET))   DATA=<folder of The Well's data>   CORES=$(CORES)"

setup: $(READY)  ## virtual environment and installation (done by the other targets, too)

# The stamp is written last: an installation that was interrupted is done again.
$(READY): settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "physrep needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another: make PYTHON=python3.12 ..."; exit 1; }
	@echo "== installing into $(VENV) (once; some minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[dev]'
	@$(BIN)/python -m pip check
	@touch $@

reproduce: $(READY)  ## simulate, pretrain, probe, and draw every table and figure
	@echo "== preset $(PRESET): simulate -> pretrain -> probe -> figures, $(CORES) jobs at a time; what is done already is kept"
	@$(SNAKE) </dev/null
	@mkdir -p $(FIGURES) && cp runs/$(PRESET)/figures/* $(FIGURES)/
	@echo "== done: $$(ls $(FIGURES)/*.png | wc -l) figure(s) with their data (png, svg, csv, json) in $(FIGURES)/, runs and executed notebooks in runs/$(PRESET)/"

data: TARGET = simulated
data: $(READY)  ## simulate the data of PRESET only
	@$(SNAKE) </dev/null

tune: TARGET = tuning
tune: $(READY)  ## repeat the tuning of PRESET: the same number of trials for every row, about half an hour of one core
	@$(SNAKE) </dev/null
	@mkdir -p $(FIGURES) && cp runs/$(PRESET)/figures/tuning.* $(FIGURES)/

ablations: TARGET = ablations
ablations: $(READY)  ## variants of rows of Table 1 (equal compute, circular padding), some minutes after `make reproduce`
	@$(SNAKE) </dev/null
	@mkdir -p $(FIGURES) && cp runs/$(PRESET)/figures/ablations.* $(FIGURES)/

machines: TARGET = machines
machines: $(READY)  ## one row again with other threads and instructions: how far numbers move from machine to machine; some minutes after `make reproduce`
	@$(SNAKE) </dev/null
	@mkdir -p $(FIGURES) && cp runs/$(PRESET)/figures/machines.* $(FIGURES)/

verify: $(READY)  ## recompute the digests of every committed figure and say which are stale, and why
	@$(BIN)/python -m physrep.verify figures

models: $(READY)  ## take the encoders and probes that come with the package from the runs of the laptop preset
	@$(BIN)/python tests/models.py

test: $(READY)  ## export in sync, lint, notebooks, tests; ends with `N passed, N failed`
	@$(BIN)/python tests/run.py

lint: $(READY)  ## ruff on the package and the tests
	@$(BIN)/ruff check physrep tests

notebooks: $(READY)  ## execute all notebooks in place (library) or from the runs of PRESET (stages), clean, export
	@$(BIN)/python tests/notebooks.py $(PRESET)

readme: $(READY)  ## README.md from nbs/index.ipynb
	@$(BIN)/python tests/notebooks.py --readme

clean:  ## delete what was made (data, runs, .venv), after showing what and how much
	@$(PYTHON) tests/clean.py
