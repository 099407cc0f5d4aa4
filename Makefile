# make demo: install into .venv, run the quickstart, combine models trained apart. make test: install with the test extra, check everything.
# make site: the documents, with a reference of options, as pages in build/site.
# make stub: after a change of options or of what they mean, write what editors see.
# make slow: the tests that `make test` leaves out: every architecture, torchrun, kills, whole processes; half an hour.
# make torture: kills, full disks, failing writes, mutated inputs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt
SOURCES := pyproject.toml constraints.txt $(shell find moemerge merge_configs -name '*.py' -o -name '*.yml' -o -name '*.jinja')

WORLD := runs/quickstart/synthetic
APART := runs/quickstart-apart
MEMBERS := $(addprefix $(APART)/,explain plan story)
TRAIN = $(BIN)/moemerge train --learning-rate 1e-3 --batch-size 32 --max-length 64 --patience none --threads 1 --quiet

# Run a second time as if on another processor, where sums of MKL have other last bits.
NUMERICAL := $(addprefix tests/,models/test_moe.py models/test_routing.py models/test_scoring.py \
	merging/test_averaging.py merging/test_weight_gradients.py fitting/test_learning.py evaluation/test_gold.py \
	training/test_train.py::test_best_weights_are_kept_not_the_last)

.PHONY: demo test slow site stub torture fuzz wheel versions clean

demo: $(VENV)/.installed
	$(BIN)/moemerge run merge_configs/quickstart.yml
	$(MAKE) $(MEMBERS)
	$(BIN)/moemerge combine $(MEMBERS) --base $(APART)/start --pairs $(WORLD)/data/own.jsonl.gz \
		--learning-rate 3e-4 --batch-size 16 --max-length 64 --output $(APART)/best --threads 1

# Models trained apart: each on the pairs of one regime of the quickstart's world, from one start.
$(APART)/start:
	$(TRAIN) --model $(WORLD)/model --pairs $(WORLD)/data/regimes/advise.jsonl.gz --max-steps 60 --output $@

$(MEMBERS): | $(APART)/start
	$(TRAIN) --model $(APART)/start --pairs $(WORLD)/data/regimes/$(@F).jsonl.gz --epochs 3 --output $@

test: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist worksteal
	MKL_CBWR=COMPATIBLE $(BIN)/python -m pytest -n 2 --dist worksteal $(NUMERICAL) \
		-k 'not planted and not convex and not every_option'

slow: $(VENV)/.test-installed
	$(BIN)/python -m pytest -m slow -n 2 --dist worksteal

site: $(VENV)/.installed
	$(PIP) '.[site]'
	$(BIN)/python docs/site.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -f docs/mkdocs.yml

# What editors and type checkers see of `import moemerge`, from the options.
stub: $(VENV)/.test-installed
	PYTHONPATH=. $(BIN)/python tests/support/python_stub.py

# Hundreds of kills, full disks and failing writes against every stage, and mutated inputs: a quarter of an hour.
torture: $(VENV)/.test-installed
	$(BIN)/python tests/promises/torture.py --trials 600
	$(MAKE) fuzz

# 20,000 broken inputs; prints how many were read and refused.
fuzz: $(VENV)/.test-installed
	$(BIN)/python tests/promises/fuzz.py --count 20000

# Builds wheel and sdist, installs each into an empty environment, and makes a first small run there.
wheel: $(VENV)/.test-installed
	$(BIN)/python tests/promises/check_wheel.py

# A selection of tests under the oldest and the newest dependencies that pyproject.toml allows.
versions: $(VENV)/.test-installed
	$(BIN)/python tests/promises/check_versions.py

clean:
	rm -rf $(VENV) build dist runs/quickstart runs/quickstart-apart *.egg-info

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "moemerge needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)

# The dependencies are installed once per change of their list, the package itself once per change of a source file.
$(VENV)/.dependencies: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) .
	touch $@

$(VENV)/.test-dependencies: $(VENV)/.dependencies
	$(PIP) '.[test]'
	touch $@

$(VENV)/.installed: $(SOURCES) $(VENV)/.dependencies
	rm -rf build
	$(PIP) --no-deps --force-reinstall .
	touch $@

$(VENV)/.test-installed: $(VENV)/.test-dependencies $(VENV)/.installed
	touch $@
