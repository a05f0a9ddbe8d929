# qlab: every target works alone on a fresh clone that has Python 3.11 to 3.13, git and make, and is quick when repeated.
#
#   make lab PYTHON=python3.12        choose the interpreter of the virtual environment
#   make lab LAB_ARGS=--no-browser    pass options on to JupyterLab
#   make test PYTEST_ARGS="-k adaste" pass options on to pytest

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TOUR := notebooks/00_tour.ipynb
REPORT := report

# Recursive on purpose: the search runs only where the environment is made.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
  if "$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; then echo "$$p"; break; fi; done)
LAB_ARGS ?=
PYTEST_ARGS ?=
# Two workers with one thread each beat one worker with two threads: the suite is many small tensors.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# JupyterLab refuses to run as root unless told; in a container root is often the only user. It listens on 127.0.0.1 only.
ALLOW_ROOT = $(shell [ "$$(id -u)" = 0 ] && echo --allow-root)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Widgets and notebooks talk to Jupyter through platformdirs; this silences a deprecation notice of jupyter_core.
export JUPYTER_PLATFORM_DIRS := 1

.PHONY: help install lab test test-all test-browser gpu notebooks lint format types widgets demo constraints clean distclean
.DEFAULT_GOAL := help

help: ## list the targets
	@echo "qlab: make TARGET"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' Makefile

install: $(STAMP) ## make .venv with the pinned packages of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then \
	  echo "qlab needs Python 3.11, 3.12 or 3.13, and none was found."; \
	  echo "Install one and name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12"; exit 1; fi
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; ok = (3, 11) <= v[:2] <= (3, 13); \
	  ok or sys.exit("qlab needs Python 3.11 to 3.13, but %s is %d.%d" % (sys.executable, v[0], v[1]))'
	@if [ -x $(BIN)/python ] && ! $(BIN)/python -c '' 2>/dev/null; then \
	  echo "== $(VENV) points to a Python that is gone: making it anew"; rm -rf $(VENV); fi
	@if [ ! -x $(BIN)/python ]; then echo "== making $(VENV) with $$($(PYTHON) --version)"; "$(PYTHON)" -m venv $(VENV) || { \
	  rm -rf $(VENV); echo "On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }; fi
	@echo "== installing torch, the pinned version (once; some hundred MB or more)"
	@$(BIN)/python -m pip install --quiet -c constraints.txt torch
	@echo "== installing qlab and everything else that constraints.txt pins (once; one to three minutes)"
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[lab,test,dev]'
	@touch $(STAMP)

lab: $(STAMP) ## open JupyterLab on the tour
	@echo "== JupyterLab on $(TOUR), at 127.0.0.1 only; stop it with Ctrl-C"
	$(BIN)/jupyter lab --ServerApp.root_dir="$(CURDIR)" --LabApp.default_url=/lab/tree/$(TOUR) \
	  --ServerApp.ip=127.0.0.1 --LabApp.news_url=None $(ALLOW_ROOT) $(LAB_ARGS)

test: $(STAMP) ## the fast tests, and every notebook at small size
	@echo "== fast tests ($(WORKERS) workers)"
	@$(PYTEST) -m "not slow and not browser and not gpu" $(PYTEST_ARGS)
	@$(MAKE) --no-print-directory notebooks

notebooks: $(STAMP) ## run every notebook at small size
	@echo "== notebooks, at small size (QLAB_FAST=1)"
	@QLAB_FAST=1 $(PYTEST) --nbmake --nbmake-timeout=300 notebooks

test-all: $(STAMP) ## every test but those in a browser: the slow ones too, and the gpu ones where there is a GPU
	@echo "== all tests but those in a browser ($(WORKERS) workers)"
	@$(PYTEST) -m "not browser" $(PYTEST_ARGS)
	@$(MAKE) --no-print-directory notebooks

test-browser: $(STAMP) ## the tour and the widgets in a real JupyterLab, in headless Chromium
	@echo "== browser tests: a real JupyterLab in headless Chromium; screenshots go to artifacts/"
	@$(BIN)/python -m pytest -m browser tests $(PYTEST_ARGS)

gpu: $(STAMP) ## on a machine with an NVIDIA GPU: its tests, then its benchmarks into benchmarks/results/gpu-NAME.json
	@$(BIN)/python -c "import sys, torch; torch.cuda.is_available() or sys.exit('make gpu: torch sees no GPU here, so there is nothing to test')"
	@echo "== tests on the GPU"
	@$(BIN)/python -m pytest -m gpu tests $(PYTEST_ARGS)
	@echo "== benchmarks on the GPU"
	@$(BIN)/qlab bench gpu --json benchmarks/results/gpu-{device}.json

lint: $(STAMP) ## ruff: rules and layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## ruff: repair what can be repaired
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP) ## mypy
	$(BIN)/mypy qlab benchmarks

widgets: ## build the widgets' JavaScript bundle anew (needs npm; the bundle is committed)
	@echo "== building widgets/static from widgets/src"
	@cd widgets && npm ci --silent --no-audit --no-fund && npm run --silent build

demo: $(STAMP) ## run the tour without a browser and write it as an HTML report with its figures
	@echo "== running the tour (a few minutes)"
	@rm -rf $(REPORT) && mkdir -p $(REPORT)
	@OMP_NUM_THREADS=1 $(BIN)/jupyter nbconvert --log-level=WARN --execute --ExecutePreprocessor.store_widget_state=False --to notebook --output-dir $(REPORT) --output tour.ipynb $(TOUR)
	@$(BIN)/jupyter nbconvert --log-level=WARN --to html --output-dir $(REPORT) --output tour.html $(REPORT)/tour.ipynb
	@echo "== writing its figures as files"
	@$(BIN)/jupyter nbconvert --log-level=WARN --to markdown --output-dir $(REPORT) --output tour.md \
	  --NbConvertApp.output_files_dir=figures $(REPORT)/tour.ipynb
	@echo "report:  $(CURDIR)/$(REPORT)/tour.html"
	@echo "figures: $(CURDIR)/$(REPORT)/figures"

constraints: $(STAMP) ## write what is installed in .venv to constraints.txt
	@{ sed -n '/^#/p' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable --exclude qlab \
	  | grep -v '^#' | sed -E 's/^(torch==[0-9.]+)\+.*/\1/'; } > constraints.new && mv constraints.new constraints.txt
	@echo "constraints.txt: $$(grep -c == constraints.txt) packages"

clean: ## remove what tests, runs and reports left behind
	rm -rf $(REPORT) artifacts runs lightning_logs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv
	rm -rf $(VENV) *.egg-info
