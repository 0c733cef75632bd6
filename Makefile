# physrep: `make help` lists the targets. Needs Python 3.11+, git and make; everything else is installed into .venv.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup reproduce study tune experiment figures results unpack verify weights test lint format docs explore app clean

PYTHON ?= python3
VENV ?= .venv
PRESET ?= laptop
DATA ?=
SYSTEM ?=
ROWS ?=
ONLY ?=
SEEDS ?=
LENGTH ?=
NB ?=
ALL ?=
PROFILE ?=
GPUS ?=
PORT ?= 8866
CONSTRAINTS ?= constraints.txt
CORES ?= $(shell $(PYTHON) -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)' 2>/dev/null || echo 1)

BIN := $(VENV)/bin
READY := $(VENV)/.ready
# set by targets, not by an environment that happens to have a variable of that name
TARGET :=
SPACE = $(error $(1)="$($(1))" has a space, and make cannot tell it from two words: rename it, or name a link to it)
$(foreach name,PRESET NB PROFILE VENV,$(if $(word 2,$($(name))),$(call SPACE,$(name))))
# a preset of your own is the path of a .yaml file, and is called after it
NAME := $(basename $(notdir $(PRESET)))
# figures of one system, of some rows or of rows of one's own lie apart and do not take the place of those that are committed
SELECTION := $(SYSTEM)$(ONLY)$(ROWS)
DRAWN := runs/$(NAME)$(if $(LENGTH),/$(LENGTH:%x=%)x)$(if $(SELECTION),/selection)/figures
# the committed figures are those of the laptop preset; those of the study, which trains longer, are in figures/16x
FIGURES := figures$(if $(filter-out laptop,$(PRESET)),/$(NAME))$(if $(LENGTH),/$(LENGTH:%x=%)x)
CONFIG = preset=$(PRESET) target=$(TARGET) data="$(DATA)" systems="$(SYSTEM)" rows="$(ROWS)" only="$(ONLY)" seeds="$(SEEDS)" length="$(LENGTH)" \
  $(if $(PROFILE),cores=$(CORES)) $(if $(GPUS),gpus=$(GPUS))
# with a profile, jobs run where it says, e.g. on a cluster
SNAKE = $(BIN)/python tools/workflow.py $(NAME) $(if $(PROFILE),--workflow-profile $(PROFILE),--cores $(CORES)) \
  --nolock --rerun-incomplete --rerun-triggers mtime --keep-going --quiet rules host --config $(CONFIG) </dev/null
KEEP = echo "== the committed figures are as they were; $(if $(SELECTION),these are in $(DRAWN)/,make figures copies $(DRAWN)/ to $(FIGURES)/)"
CODE := nbs tests tools setup.py
# the code of this folder, also where the environment was copied with another clone or is that of another one
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
# one torch thread a process: on small grids two are slower than one, and jobs run side by side
export OMP_NUM_THREADS := 1
export MKL_NUM_THREADS := 1
export PYTHONUNBUFFERED := 1
export TQDM_MININTERVAL := 20

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F '\t' '{printf "  make %-10s %s\n", $$1, $$2}'
	@echo
	@echo "  PRESET=smoke|laptop|gpu|paper|native|own.yaml (now: $(PRESET))   DATA=<folder or address of The Well's data>   CORES=$(CORES)"
	@echo "  SYSTEM=<a system, or my_package.module:SYSTEM>   ROWS=<rows.yaml, rows of your own>   ONLY=<rows, e.g. mae-vit,random-vit>"
	@echo "  SEEDS=<further ones, \"1 2\">   LENGTH=<of trainings, 16x is 160 TFLOP>   NB=<notebook of an experiment>"
	@echo "  ALL=1 (of test)   PROFILE=tools/slurm GPUS=1 (jobs of a cluster)"

setup: $(READY)  ## virtual environment and installation (done by the other targets, too)

# The stamp is written last: an installation that was interrupted is done again.
$(READY): settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "physrep needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another: make PYTHON=python3.12 ..."; exit 1; }
	@echo "== installing into $(VENV) (once; some minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[dev,well]'
	@$(BIN)/python -m pip check
	@$(BIN)/python tools/git_hooks.py || true
	@touch $@

reproduce: TARGET = reproduce
reproduce: $(READY)  ## simulate, pretrain, probe, draw the main tables and figures, and compare them with the committed ones
	@echo "== preset $(PRESET): simulate -> pretrain -> probe -> figures, $(CORES) jobs at a time; what is done already is kept"
	@$(SNAKE)
	@echo "== done: figures with their data (png, svg, csv, json) in $(DRAWN)/, executed notebooks in $(dir $(DRAWN))notebooks/"
	@$(BIN)/python tools/compare_figures.py $(DRAWN) $(FIGURES)
	@$(KEEP)

study: TARGET = study
study: $(READY)  ## every experiment, after a list of what is missing; hours
	@$(BIN)/python -m physrep.experiments.plan study --preset $(PRESET) --systems "$(SYSTEM)" --only "$(ONLY)" --rows "$(ROWS)" --seeds "$(SEEDS)" --length "$(LENGTH)" --data_dir "$(DATA)"
	@$(SNAKE)
	@$(KEEP)

tune:  ## compare the candidates for recipes in nbs/candidates.yaml (13_tuning): 70 hours of one core; ONLY=mae-vit
	@$(MAKE) --no-print-directory experiment NB=13_tuning

experiment: TARGET = $(NB)
experiment: $(READY)  ## one experiment of nbs/experiments.yaml, with all that it needs: NB=08_what_matters
	@test -n "$(NB)" || { echo "name one: make experiment NB=..., with one of"; sed -n '/^[0-9]/{N;s/:\n *help: /  /p}' nbs/experiments.yaml; exit 2; }
	@$(SNAKE)
	@$(KEEP)

figures:  ## copy the figures that PRESET's runs have drawn over the committed ones
	@test -z "$(SELECTION)" || { echo "figures of SYSTEM=, ONLY= or ROWS= stay in $(DRAWN)/: the committed ones show every row"; exit 2; }
	@ls $(DRAWN)/*.png >/dev/null 2>&1 || { echo "no figures in $(DRAWN)/; make reproduce draws them"; exit 1; }
	@mkdir -p $(FIGURES) && cp $(DRAWN)/* $(FIGURES)/
	@echo "$$(ls $(DRAWN)/*.png | wc -l) figure(s) with their data copied to $(FIGURES)/"

results: $(READY)  ## put what PRESET's runs have measured into figures/results/, without encoders: 0.1 MB a run
	@$(BIN)/python -m physrep.results.archive pack --preset $(PRESET)

unpack: $(READY)  ## take the results in figures/results/ into runs/: rows of your own, or more SEEDS, then need no training of the others
	@$(BIN)/python -m physrep.results.archive unpack --preset $(PRESET)

verify: $(READY)  ## say which committed figures are stale, and why
	@failed=0; for folder in figures figures/16x; do $(BIN)/python -m physrep.results.verify $$folder || failed=1; done; exit $$failed

weights: $(READY)  ## take the encoders and probes that come with the package from the runs of the laptop preset
	@$(BIN)/python tools/weights.py $(LENGTH)

test: $(READY)  ## export in sync, ruff, mypy, notebooks, tests; ends with `N passed, N failed`; ALL=1 adds the long ones
	@$(BIN)/python tools/run_tests.py $(if $(ALL),--all)

lint: $(READY)  ## ruff and mypy
	@$(BIN)/ruff check physrep $(CODE)
	@$(BIN)/ruff format --check --quiet $(CODE)
	@$(BIN)/python -m mypy physrep

format: $(READY)  ## ruff on notebooks, tests and tools: sort imports, fix, format; then export
	@$(BIN)/ruff check --fix $(CODE) || true
	@$(BIN)/ruff format $(CODE)
	@$(BIN)/nbdev_clean
	@$(BIN)/nbdev_export

docs: $(READY)  ## the book in _docs/html: every notebook, guides, API, figures; nothing is executed or fetched
	@$(BIN)/python tools/docs/build.py

explore: $(READY)  ## open the notebook of sliders, films and live answers in JupyterLab; nothing has to be simulated or trained before
	@$(BIN)/jupyter lab nbs/09_explore.ipynb

app: $(READY)  ## serve it as a page, on this machine only (PORT=8866)
	@$(BIN)/python tools/app.py --port $(PORT)

clean:  ## delete what was made (simulated data, runs, .venv), after showing what and how much; downloads are kept
	@$(PYTHON) tools/clean.py
