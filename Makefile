# Every target but `help` sets up first; set-up does nothing when it is done already.
PYTHON ?= python3
BUDGET ?= smoke

OLDEST := $(shell sed -n 's/^min_python *= *//p' settings.ini)
BIN := .venv/bin
READY := .venv/.ready
# In a container one is often root, which Jupyter wants to be told.
AS_ROOT := $(shell [ "$$(id -u)" != 0 ] || echo --allow-root)

.PHONY: help setup course lab app test bench table weights round stamp clean-notebooks

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-16s %s\n", $$1, $$2}' Makefile

setup: $(READY)  ## the environment in .venv, with everything the course needs
	@echo '.venv is ready.'

# The file is made last, so a set-up that was interrupted does not look finished.
# ensurepip is asked for too: Debian's Python has venv without it.
$(READY): settings.ini setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < tuple(map(int, "$(OLDEST)".split("."))))' || { \
	  echo "The course needs Python $(OLDEST) or newer, and $(PYTHON) is not (it may not be there at all)."; \
	  echo "Name another one: make setup PYTHON=python$(OLDEST)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || { \
	  echo "$(PYTHON) cannot make environments. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@rm -f $@
	@echo "Setting up .venv: with PyTorch this is a few GB the first time."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]'
	@touch $@

course: $(READY)  ## run every lesson, write the results and a gallery to _course/ (BUDGET=lesson for more)
	@$(BIN)/python tools/course.py --budget $(BUDGET)

lab: $(READY)  ## open the course in JupyterLab
	@$(BIN)/jupyter lab $(AS_ROOT) --config=app/jupyter_lab.json nbs/index.ipynb

app: HOST = 127.0.0.1
app: PORT = 8866
app: TOKEN =
app: $(READY)  ## serve the app in the browser (PORT=9000; for others HOST=0.0.0.0 TOKEN=a-password)
	@$(BIN)/python tools/app.py --host '$(HOST)' --port '$(PORT)' --token '$(TOKEN)'

test: $(READY)  ## every test; the lessons are run by `make course`
	@echo '== ruff: style and common mistakes'
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@echo '== how much there is to read'
	@$(BIN)/python tools/table.py
	@echo '== nbdev: the tests in the toolbox and the applications (`make course` runs the lessons)'
	@ENHANCE_BUDGET=smoke OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers 2 --timing --file-re '^[a-z]' --skip-file-re '^(index|glossary)'
	@echo '== pytest: the promises of the project, and what lessons are the wrong place for'
	@ENHANCE_BUDGET=smoke OMP_NUM_THREADS=1 $(BIN)/pytest -q -rsx -n 2 tests

weights: BUDGET = full
weights: WORKERS = 0
weights: $(READY)  ## train the published weights again: make weights PHOTOS='folder another' MODELS=srcnn-x2
	@$(BIN)/python tools/weights.py --budget $(BUDGET) --models $(MODELS) --photos $(PHOTOS) --workers $(WORKERS)

round: MODEL = restore-x1
round: MINUTES = 90
round: $(READY)  ## train a restorer for one more round: make round MODEL=restore-x1 MINUTES=90 PHOTOS='folder another'
	@$(BIN)/python tools/rounds.py $(MODEL) --minutes $(MINUTES) --photos $(PHOTOS)

bench: $(READY)  ## measure speed and quality side by side
	@$(BIN)/python tools/bench.py

table: $(READY)  ## how much there is to read in each notebook, and what is over the limits
	@$(BIN)/python tools/table.py

stamp: $(READY)  ## badges, install cells, README.md and data/README.md from settings.ini and nbs/
	@$(BIN)/python tools/stamp.py

clean-notebooks: $(READY)  ## write enhance_lib/ from the notebooks, and clean them for a commit
	@$(BIN)/nbdev-export
	@$(BIN)/nbdev-clean
