# These do everything, environment included: `make reproduce`, `make reproduce-all` and `make test`.
PYTHON ?= python3
PRESET ?= tiny
FROM ?= sft
SEEDS ?=
FORCE ?=
JOBS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# An empty package called opencv-python, so that only opencv-python-headless brings OpenCV (see its pyproject.toml).
# Where an older environment held both, its removal took files of the other with it, which is then installed again.
ONE_OPENCV := ./packaging/opencv-python
HEADLESS := 'opencv-python-headless>=4.14,<5'

.PHONY: help reproduce reproduce-all figures outputs test audit env
.DEFAULT_GOAL := help

help: ## show this text
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16
	@echo
	@echo 'variables   PRESET=tiny|smoke|…  FROM=sft|base  SEEDS="0 1 2"  FORCE=1  PYTHON=python3.12'
	@echo 'examples    make reproduce FROM=base SEEDS="0 1 2"'
	@echo '            make test ARGS="tests/test_core.py -k preset"'

reproduce: $(READY) ## train stages 1 to 3, evaluate, write tables and figures (finished steps are skipped)
	$(BIN)/python -m clear_nb.pipeline --preset $(PRESET) --from $(FROM) $(if $(SEEDS),--seed $(SEEDS)) $(if $(FORCE),--force)

reproduce-all: $(READY) ## every seed, stage and ablation, JOBS seeds side by side; hours, go on at any time
	$(BIN)/python -m clear_nb.pipeline --preset $(PRESET) --from $(FROM) $(if $(SEEDS),--seed $(SEEDS)) $(if $(FORCE),--force) --all --jobs $(JOBS)

figures: export MPLBACKEND = agg
figures: $(READY) ## redraw every table and figure, and the README, from the committed records
	$(BIN)/python -c 'from clear_nb.pipeline import SUMMARY_NOTEBOOKS, run, write_readme; [run(n, "$(PRESET)", None, force=True) for n in sorted(SUMMARY_NOTEBOOKS)]; write_readme()'

outputs: export OMP_NUM_THREADS = 1
outputs: export MPLBACKEND = module://matplotlib_inline.backend_inline
outputs: $(READY) ## run every chapter and keep its pictures and values in the notebook
	find nbs -mindepth 2 -name '*.ipynb' -not -path '*/.*' | sort | xargs -n 1 -P $(JOBS) $(BIN)/jupyter nbconvert --to notebook --execute --inplace --log-level WARN
	$(BIN)/nbdev_clean

test: export OMP_NUM_THREADS = 1
test: export MPLBACKEND = agg
test: $(READY) ## run every notebook and every test
	$(BIN)/python -m pytest -n $(JOBS) --dist load $(ARGS)

audit: $(READY) ## do the packages fit together, and has one of them a known vulnerability (asks PyPI's database)
	$(BIN)/python -m pip check
	$(BIN)/python -m pip install --disable-pip-version-check -q pip-audit
	$(BIN)/pip-audit --skip-editable

env: $(READY) ## only make the environment in .venv

$(READY): pyproject.toml $(ONE_OPENCV)/pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v[:2] < (3, 14) else f"clear-nb needs Python 3.11 to 3.13, $(PYTHON) is {v[0]}.{v[1]}; try: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check $(ONE_OPENCV) -e '.[dev]'
	@$(BIN)/python -c 'import cv2; cv2.imread' 2> /dev/null || $(BIN)/python -m pip install -q --force-reinstall --no-deps $(HEADLESS)
	@touch $@
