# physrep: `make help` lists the targets. Needs Python 3.11+, git and make; everything else is installed into .venv.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup reproduce data study tune tuned few finetune ablations matters machines resolution regimes across rollout grid box question rates longer attentive long-probe bench scaling peer figures results unpack verify test test-all lint fuzz audit format notebooks readme docs explore app gallery weights models clean

PYTHON ?= python3
VENV ?= .venv
PRESET ?= laptop
DATA ?=
SYSTEM ?=
ROWS ?=
ONLY ?=
SEEDS ?=
CELLS ?=
NOTEBOOKS ?=
PROFILE ?=
GPUS ?=
CONSTRAINTS ?= constraints.txt
CORES ?= $(shell $(PYTHON) -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)' 2>/dev/null || echo 1)

BIN := $(VENV)/bin
# set by targets, not by an environment that happens to have a variable of that name
TARGET :=
FEW :=
STUDY :=
# a preset of your own is the path of a .yaml file, and is called after it
NAME := $(basename $(notdir $(PRESET)))
DRAWN := runs/$(NAME)/figures
# the committed figures are those of the laptop preset
FIGURES := $(if $(filter laptop,$(PRESET)),figures,figures/$(NAME))
READY := $(VENV)/.ready
# what asks encoders something new: after `make unpack`, which has results only, the encoders of the preset's seeds are trained first
ASKS_ENCODERS = across box grid machines regimes resolution rollout
CONFIG = preset=$(PRESET) data="$(DATA)" $(if $(SYSTEM),systems="$(SYSTEM)") $(if $(ROWS),rows="$(ROWS)") $(if $(ONLY),only="$(ONLY)") $(if $(SEEDS),seeds="$(SEEDS)") $(if $(CELLS),cells="$(CELLS)") $(FEW) $(if $(filter $(TARGET),$(ASKS_ENCODERS)),encoders=yes) $(if $(PROFILE),cores=$(CORES)) $(if $(GPUS),gpus=$(GPUS))
# with a profile, jobs run where it says, e.g. on a cluster
SNAKE = $(BIN)/python tools/workflow.py $(NAME) $(TARGET) $(if $(PROFILE),--workflow-profile $(PROFILE),--cores $(CORES)) --nolock --rerun-incomplete --keep-going --quiet rules host --config $(CONFIG)
COMPARE = $(BIN)/python tools/compare_figures.py $(DRAWN) $(FIGURES)
# figures of one system, of some rows or of rows of one's own are not meant to take the place of those that are committed
PART := $(SYSTEM)$(ONLY)$(ROWS)
KEEP = echo "== the committed figures are as they were; $(if $(PART),these are in $(DRAWN)/,make figures$(if $(filter laptop,$(PRESET)),, PRESET=$(PRESET)) copies $(DRAWN)/ to $(FIGURES)/$(if $(filter laptop,$(PRESET)), (those of Table 1 have five seeds: SEEDS=\"1 2 3 4\")))"
CODE := nbs tests tools setup.py
# a variable that a target would ignore is refused, before hours of work
takes_no = $(foreach name,$(1),$(if $($(name)),echo "make $@ takes no $(name)=$($(name)): $(if $(filter SEEDS,$(name)),its seeds are fixed,it runs all rows that it compares). Leave $(name) out."; exit 2;)) true
# these ask encoders of the preset's seeds; `make study SEEDS=...` is for the other experiments
seeds_of_preset = $(if $(STUDY),true,$(call takes_no,SEEDS))
# one torch thread a process: on small grids two are slower than one, and jobs run side by side
export OMP_NUM_THREADS := 1
export MKL_NUM_THREADS := 1
export PYTHONUNBUFFERED := 1
export TQDM_MININTERVAL := 20

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F '\t' '{printf "  make %-10s %s\n", $$1, $$2}'
	@echo
	@echo "  PRESET=smoke|laptop|gpu|paper|native (now: $(PRESET))   DATA=<folder or address of The Well's data>   CORES=$(CORES)"
	@echo "  SYSTEM=<a system, or my_package.module:SYSTEM>   ROWS=<rows.yaml, rows of your own>   ONLY=<rows, e.g. mae-vit,random-vit>   SEEDS=<further ones, e.g. \"1 2\">   CELLS=<all, or cells, for make matters>   NOTEBOOKS=<names, for make notebooks>"
	@echo "  PROFILE=tools/slurm GPUS=1   jobs of a cluster (CORES: of a job that can use several)"

# Every Python of the environment starts with this line. A second of each stage went into searches for garbage among all
# that torch has loaded, half of them when the process ends anyway.
FEW_SEARCHES := import atexit, gc; gc.set_threshold(10_000, 10, 10); atexit.register(gc.freeze)

setup: $(READY)  ## virtual environment and installation (done by the other targets, too)

# The stamp is written last: an installation that was interrupted is done again.
$(READY): settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "physrep needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another: make PYTHON=python3.12 ..."; exit 1; }
	@echo "== installing into $(VENV) (once; some minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[dev]'
	@$(BIN)/python -m pip check
	@$(BIN)/python tools/git_hooks.py || true
	@echo '$(FEW_SEARCHES)' > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/physrep_few_searches.pth"
	@touch $@

reproduce: $(READY)  ## simulate, pretrain, probe, draw Table 1 and the main figures, and compare them with the committed ones
	@echo "== preset $(PRESET): simulate -> pretrain -> probe -> figures, $(CORES) jobs at a time; what is done already is kept"
	@$(SNAKE) </dev/null
	@echo "== done: $$(ls $(DRAWN)/*.png | wc -l) figure(s) with their data (png, svg, csv, json) in $(DRAWN)/, executed notebooks in runs/$(NAME)/notebooks/"
	@$(COMPARE)
	@$(KEEP)

data: TARGET = simulated
data: $(READY)  ## simulate the data of PRESET only
	@$(SNAKE) </dev/null

study: $(READY)  ## every experiment, after a list of what it trains and how long that takes; hours
	@$(call takes_no,ROWS ONLY CELLS)
	@$(BIN)/python -m physrep.experiments.study --preset $(PRESET) --cores $(CORES) --systems "$(SYSTEM)" --seeds "$(SEEDS)" --data "$(DATA)"
	@set -e; for experiment in reproduce tuned few finetune resolution regimes across ablations rollout machines grid box question rates longer matters attentive long-probe; do $(MAKE) --no-print-directory STUDY=yes $$experiment; done

tune: TARGET = tuning
tune: $(READY)  ## repeat the tuning of PRESET: the same number of trials for every row, some hours of one core
	@$(call takes_no,ROWS ONLY SEEDS)
	@$(SNAKE) </dev/null
	@$(COMPARE) tuning
	@$(KEEP)

tuned: TARGET = tuned
tuned: $(READY)  ## train the rows of Table 1 with the recipe of the search and with the one by hand, in every system, and compare them; an hour of two cores after `make reproduce`
	@$(call takes_no,ROWS)
	@$(SNAKE) </dev/null
	@test ! -f $(DRAWN)/tuned.csv || $(COMPARE) tuned
	@$(KEEP)

few: TARGET = data_efficiency
few: FEW = few=1
few: $(READY)  ## train supervised encoders on three draws of 8, 16 and 64 labelled flows, and draw the error against the number of labels; three quarters of an hour of two cores after `make reproduce`
	@$(SNAKE) </dev/null
	@$(COMPARE) data_efficiency
	@$(KEEP)

finetune: TARGET = finetune
finetune: $(READY)  ## train the encoders of Table 1 further with labels, and draw the errors; an hour and a half of two cores after `make reproduce`
	@$(call takes_no,ROWS)
	@$(SNAKE) </dev/null
	@$(COMPARE) fine_tuned
	@$(KEEP)

ablations: TARGET = ablations
ablations: $(READY)  ## rows of Table 1 with one thing changed (what is asked, hidden or shared, noise, width, backbone), forty minutes of two cores after `make reproduce`
	@$(call takes_no,ROWS ONLY)
	@$(SNAKE) </dev/null
	@test ! -f $(DRAWN)/ablations.csv || $(COMPARE) ablations
	@$(KEEP)

matters: TARGET = matters
matters: $(READY)  ## task x target x encoder, each cell at its best learning rate: what the paper's comparison rests on; some hours of two cores
	@$(call takes_no,ROWS ONLY)
	@$(SNAKE) </dev/null
	@$(COMPARE) $$(cd $(DRAWN) && ls matters*.csv | sed 's/.csv$$//')
	@$(KEEP)

resolution: TARGET = resolution
resolution: $(READY)  ## simulate flows of `test` at twice the resolution and read them; ten minutes after `make reproduce`
	@$(call takes_no,ROWS)
	@$(call seeds_of_preset)
	@$(SNAKE) </dev/null
	@test ! -f $(DRAWN)/resolution.csv || $(COMPARE) resolution
	@$(KEEP)

regimes: TARGET = regimes
regimes: $(READY)  ## ask the encoders for the state of the flow; ten minutes after `make reproduce`
	@$(call takes_no,ROWS)
	@$(call seeds_of_preset)
	@$(SNAKE) </dev/null
	@test ! -f $(DRAWN)/regimes.csv || $(COMPARE) regimes
	@$(KEEP)

across: TARGET = across
across: $(READY)  ## one JEPA for all systems, and encoders that read another system, with the recipes by hand; ten minutes after `make tuned`
	@$(call takes_no,ROWS)
	@$(call seeds_of_preset)
	@$(SNAKE) </dev/null
	@test ! -f $(DRAWN)/across.csv || $(COMPARE) across
	@$(KEEP)

machines: TARGET = machines
machines: $(READY)  ## one row again with other threads and instructions: how far numbers move from machine to machine; some minutes after `make tuned`
	@$(call takes_no,ROWS ONLY)
	@$(SNAKE) </dev/null
	@$(COMPARE) machines
	@$(KEEP)

rollout: TARGET = rollout
rollout: $(READY)  ## predict the flows of `test` frame by frame with the rows that can, and train those that are missing; half an hour after `make tuned`
	@$(call takes_no,ROWS ONLY)
	@$(call seeds_of_preset)
	@$(SNAKE) </dev/null
	@$(COMPARE) rollout rollout_spectra rollout_drift rollout_frames rollout_probes
	@$(KEEP)

grid: TARGET = grid
grid: $(READY)  ## fit and score the probes of Table 1 on a grid of labels, as sets of The Well have; simulates such a set, half an hour after `make reproduce`
	@$(call takes_no,ROWS)
	@$(call seeds_of_preset)
	@$(SNAKE) </dev/null
	@test ! -f $(DRAWN)/grid.csv || $(COMPARE) grid
	@$(KEEP)

box: TARGET = box
box: $(READY)  ## read flows in a box twice as long with the encoders and probes of Table 1; ten minutes after `make reproduce`
	@$(call takes_no,ROWS)
	@$(call seeds_of_preset)
	@$(SNAKE) </dev/null
	@test ! -f $(DRAWN)/box.csv || $(COMPARE) box
	@$(KEEP)

question: TARGET = question
question: $(READY)  ## ask what else answers the question of JEPA from its features, and train it with a faster predictor; an hour of two cores after `make tuned`
	@$(call takes_no,ROWS)
	@$(call seeds_of_preset)
	@$(SNAKE) </dev/null
	@test ! -f $(DRAWN)/own_question.csv || $(COMPARE) own_question own_question_probes
	@$(KEEP)

rates: TARGET = rates
rates: $(READY)  ## train MAE (or another row, ONLY=forecast-vit) at a half and a quarter of its learning rate, with three seeds; forty minutes of two cores after `make tuned`
	@$(call takes_no,ROWS)
	@$(SNAKE) </dev/null
	@$(COMPARE) rates rates_losses
	@$(KEEP)

longer: TARGET = longer
longer: $(READY)  ## train MAE and forecasts (or other rows, ONLY=jepa_ema-vit) with twice the updates, two seeds in each system; two hours of two cores after `make tuned`
	@$(call takes_no,ROWS)
	@$(SNAKE) </dev/null
	@$(COMPARE) longer_shear_flow longer_rayleigh_benard longer_active_matter
	@$(KEEP)

attentive: TARGET = attentive
attentive: $(READY)  ## read the encoders of the paper's comparison in every system, and all cells of systems with learning rates of their own, with attentive probes that are trained up to eight times as long; an hour of two cores after `make matters`, or a minute after `make unpack`
	@$(call takes_no,ROWS ONLY)
	@$(SNAKE) </dev/null
	@$(COMPARE) probe_length $$(cd $(DRAWN) && ls probe_length_cells*.csv 2>/dev/null | sed 's/.csv$$//')
	@$(KEEP)

long-probe: TARGET = long_probe
long-probe: $(READY)  ## read the encoders of Table 1 with an attentive probe that is trained eight times as long; two hours of two cores where they have to be trained first, or a minute after `make unpack`
	@$(call takes_no,ROWS)
	@$(SNAKE) </dev/null
	@$(COMPARE) long_probe long_probe_curves paper_order
	@$(KEEP)

bench: $(READY)  ## time the pieces of a training update of every objective, by batch size; some minutes, on a machine that does nothing else
	@mkdir -p runs/$(NAME)/notebooks
	@$(BIN)/python -m papermill nbs/10_benchmarks.ipynb runs/$(NAME)/notebooks/benchmarks.ipynb --no-progress-bar -p preset $(PRESET) \
	  $(if $(SYSTEM),-p system $(SYSTEM)) $(if $(ONLY),-p objectives "$(ONLY)") $(if $(DATA),-p data_dir "$(DATA)") < /dev/null
	@$(BIN)/python -m physrep.experiments.benchmarks $(DRAWN)/benchmarks.csv

scaling: $(READY)  ## time reading, solvers, and updates by grid, frames, batch and width; some minutes, on a machine that does nothing else
	@mkdir -p runs/$(NAME)/notebooks
	@env -u OMP_NUM_THREADS -u MKL_NUM_THREADS $(BIN)/python -m papermill nbs/10a_scaling.ipynb runs/$(NAME)/notebooks/scaling.ipynb --no-progress-bar -p preset $(PRESET) \
	  $(if $(SYSTEM),-p system $(SYSTEM)) $(if $(ONLY),-p rows "$(ONLY)") < /dev/null

peer: $(READY)  ## time the shear flow solver beside Dedalus, if that is installed; some minutes, on a machine that does nothing else
	@mkdir -p runs/$(NAME)/notebooks
	@$(BIN)/python -m papermill nbs/10b_peer_solver.ipynb runs/$(NAME)/notebooks/peer_solver.ipynb --no-progress-bar -p preset $(PRESET) < /dev/null

figures:  ## copy the figures that PRESET's runs have drawn over the committed ones
	@ls $(DRAWN)/*.png >/dev/null 2>&1 || { echo "no figures in $(DRAWN)/; make reproduce$(if $(filter laptop,$(PRESET)),, PRESET=$(PRESET)) draws them"; exit 1; }
	@mkdir -p $(FIGURES) && cp $(DRAWN)/* $(FIGURES)/
	@echo "$$(ls $(DRAWN)/*.png | wc -l) figure(s) with their data copied to $(FIGURES)/"

results: $(READY)  ## put what PRESET's runs have measured into figures/results/, without encoders: 0.1 MB a run
	@$(BIN)/python -m physrep.results.archive pack --preset $(PRESET)
	@$(BIN)/python -m physrep.experiments.long_probe pack --preset $(PRESET)

unpack: $(READY)  ## take the results in figures/results/ into runs/: rows of your own, or more SEEDS, then need no training of the others
	@$(BIN)/python -m physrep.results.archive unpack --preset $(PRESET)
	@$(BIN)/python -m physrep.experiments.long_probe unpack --preset $(PRESET)

verify: $(READY)  ## recompute the digests of every committed figure and say which are stale, and why
	@$(BIN)/python -m physrep.results.verify figures

weights: $(READY)  ## take the encoders and probes that come with the package from the runs of the laptop preset
	@$(BIN)/python tools/weights.py

# the name that it had
models: weights

explore: $(READY)  ## open the notebook of sliders, films and live answers in JupyterLab; nothing has to be simulated or trained before
	@$(BIN)/jupyter lab nbs/09_explore.ipynb

PORT ?= 8866
app: $(READY)  ## serve it as a page, on this machine only (PORT=8866)
	@$(BIN)/python tools/app.py --port $(PORT)

gallery: $(READY)  ## write figures/gallery/index.html, a page of saved answers for those who have nothing installed
	@$(BIN)/python tools/gallery.py

test: $(READY)  ## export in sync, ruff, mypy, notebooks, tests; ends with `N passed, N failed`
	@$(BIN)/python tools/run_tests.py

test-all: $(READY)  ## the same with the long tests, e.g. the whole smoke preset twice, equal to the byte
	@$(BIN)/python tools/run_tests.py --all

lint: $(READY)  ## ruff and mypy
	@$(BIN)/ruff check physrep $(CODE)
	@$(BIN)/ruff format --check --quiet $(CODE)
	@$(BIN)/python -m mypy physrep

SECONDS ?= 60
fuzz: $(READY)  ## break sound files at random and read them, SECONDS=60
	@$(BIN)/python tests/fuzz.py --seconds $(SECONDS) --seed $$(date +%s)

audit: $(READY)  ## the installed packages in build/sbom.cdx.json (CycloneDX), and their known holes (needs a network)
	@mkdir -p build && $(PYTHON) -m venv build/audit && build/audit/bin/python -m pip install --quiet --disable-pip-version-check cyclonedx-bom pip-audit
	@build/audit/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-file build/sbom.cdx.json $(BIN)/python 2>/dev/null
	@echo "== $$(grep -c '"bom-ref"' build/sbom.cdx.json) packages in build/sbom.cdx.json"
	@build/audit/bin/pip-audit --path "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" --progress-spinner off \
	  || { echo "pip-audit could not reach its list, or it found something (above); build/sbom.cdx.json can be checked elsewhere"; exit 1; }

format: $(READY)  ## ruff on notebooks, tests and tools: sort imports, fix, format; then export
	@$(BIN)/ruff check --fix $(CODE) || true
	@$(BIN)/ruff format $(CODE)
	@$(BIN)/nbdev_clean
	@$(BIN)/nbdev_export

notebooks: $(READY)  ## execute notebooks in place (library) or take them from the runs of PRESET (stages), clean, export; all, or NOTEBOOKS
	@$(BIN)/python tools/notebooks.py --preset $(NAME) $(NOTEBOOKS)

readme: $(READY)  ## README.md from nbs/index.ipynb
	@$(BIN)/python tools/notebooks.py --readme

docs: $(READY)  ## the book in _docs/html: every notebook, guides, API, figures; nothing is executed or fetched
	@$(BIN)/python tools/docs/build.py

clean:  ## delete what was made (simulated data, runs, .venv), after showing what and how much; downloads are kept
	@$(PYTHON) tools/clean.py
