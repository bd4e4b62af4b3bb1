# Needs only Python, make and a network. The environment lives in .venv and is made once.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: example test test-grid lint bench gpu docs docs-serve docs-test check-install constraints dist clean

example: .venv/examples.done  ## train and evaluate HSADML on synthetic slices (phantoms)
	$(BIN)/python -m examples.brain_tumor demo

# As collected, for the files with the fewest tests take the longest and must not come last.
test: lint  ## lint, type-check and test, on all cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-grid: .venv/dev.done  ## every loss with every schedule compiled in every way; hours
	WHOLE_GRID=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests/losses/test_compiled_steps.py

lint: .venv/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/dev.done  ## accuracy, time and memory, compared with other libraries
	$(BIN)/python -m benchmarks.accuracy
	$(BIN)/python -m benchmarks.engine
	$(BIN)/python -m benchmarks.sharded_costs

gpu: .venv/dev.done  ## on a GPU: correctness, speed and a profile; six minutes
	$(BIN)/python -m benchmarks.gpu

docs: .venv/dev.done  ## the site, in docs/_build/html; nothing is fetched
	$(BIN)/python -m sphinx -n -W --keep-going -q -b html docs docs/_build/html

docs-serve: docs  ## the same, at http://localhost:8000
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory docs/_build/html 8000

docs-test: docs  ## the site in a real browser; needs Chromium and Node.js
	$(BIN)/python -m tests.docs.site

check-install:  ## whether pip resolves every extra on each Python and platform; needs a network
	$(PYTHON) -m tests.check_install

constraints: .venv/bin/python  ## pin what tests and docs need, but not what torch pins itself
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --extra dev --no-build \
		--no-annotate --custom-compile-command "make constraints" -o constraints.txt pyproject.toml
	grep -Ev '^(cuda|nvidia|setuptools|sympy|triton)' constraints.txt > constraints.new
	mv constraints.new constraints.txt

dist: .venv/bin/python  ## wheel and source distribution, in dist
	$(BIN)/python -m pip install --quiet --disable-pip-version-check build twine
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

clean:
	rm -rf .venv dist docs/_build

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/%.done: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e ".[$*]"
	touch $@
