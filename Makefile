# Every target makes the virtual environment if it is missing, installs, and runs.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 2

.PHONY: demo test quantised lowest newest releases lint docs dev clean

$(VENV)/.%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e ".[$*]"
	touch $@ $(if $(filter dev,$*),$(VENV)/.test $(VENV)/.docs)

# What the demo needs, without what only tests or several devices do; pip shows how far its downloads are.
$(VENV)/.base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e .
	touch $@

demo: $(VENV)/.base
	$(BIN)/trl demo

# Tiny models run fastest on one thread each; files are shared out between two processes, slow ones first.
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# What a release of a neighbour is likeliest to break, with every dependency at its lower bound, and with the newest transformers;
# what bitsandbytes quantises. Each in an environment of its own.
lowest newest quantised: $(VENV)/.test
	$(BIN)/python benchmarks/releases.py $@

# Other releases of transformers and its neighbours: some minutes for each of eight environments.
releases: $(VENV)/.test
	$(BIN)/python benchmarks/releases.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Dead links, unknown anchors and names that the API page cannot find are errors.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "The pages are in site/index.html; '$(BIN)/mkdocs serve' shows them while they are written."

dev: $(VENV)/.dev
	@echo "Ready: source $(BIN)/activate, then 'make test' and 'make lint'. See CONTRIBUTING.md."

clean:
	rm -rf $(VENV) site build dist *.egg-info .pytest_cache .ruff_cache
