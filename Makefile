# make demo    adapt a real encoder to real tweets with every method, and compare them
# make test    linters, types, tests
# make test-slow    what takes seconds each, which `make test` leaves out
# make test-oldest    tests of the core with the oldest torch and transformers that are promised, in an environment of their own
# make test-cluster    what starts a Ray cluster on this machine
# make test-all PART=1/4    the first quarter of the whole matrix of methods and hosts; without PART all of it
# make quantization-matrix    try every method on every packed base, and write docs/quantization.md
# make bench   how fast it is, side by side with peft; writes docs/performance.md
# make version VERSION=0.2.0    give all ten packages another version
# make changelog VERSION=0.2.0    put the fragments of changelog.d/ into CHANGELOG.md; without VERSION show what it would say
# make release-check    build the ten packages into dist/ and check them; nothing is uploaded
# make docs    the documentation, into site/; a broken link or reference fails
# make docs-check    run the notebooks, and look at the site in headless Chromium, which the machine must have
# make evidence    write into the plugins' packages with whose numbers their tests compare
# make held-defaults    say which defaults of methods no test holds
# make histories SEED= MINUTES=    random histories of models, fleets, calls of peft, routes, tied tables, guidance and threads, many more than `make test` draws
# make fuzz    load many more damaged files than `make test` does
# make faults SECONDS= SEED=    operations of the core with a fault at every point; EVERY=10 tries a tenth of them, NAMES="merge load" some operations, METHODS=1 those of each method's life
# make kills KILLS= SEED=    commands and trainings that are killed at a write or a step, and resumed; KILLS points for each
# Both create .venv when it is missing and install into it again when the requirements have changed.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
REQUIREMENTS := requirements-dev.txt requirements-demo.txt pyproject.toml $(wildcard plugins/*/pyproject.toml)

# Models and data come from packages; nothing is fetched while the project runs.
export HF_HUB_OFFLINE := 1

.PHONY: demo test test-slow test-oldest test-cluster test-all style lint docs docs-check evidence held-defaults quantization-matrix bench histories fuzz faults kills version changelog release-check clean
.DEFAULT_GOAL := test

demo: $(INSTALLED)
	$(BIN)/peftcore compare --demo

# Methods whose files differ from origin/main (from the last commit, where there is none) run on all hosts, and with the checks that take seconds;
# of many, `make test-all` is for.
CHANGED = $(shell git diff --name-only `git rev-parse -q --verify origin/main || echo HEAD` -- plugins 2>/dev/null \
	| sed -n -e '/\/interop\//d' -e '/\/backends\//d' -e 's,^plugins/[^/]*/peftcore_[a-z]*/\([a-z0-9][a-z0-9_]*\)\.py$$,\1,p' \
		-e 's,^plugins/[^/]*/peftcore_[a-z]*/\([a-z0-9][a-z0-9_]*\)/.*\.py$$,\1,p' | sort -u)

# Tests write some ten thousand small files, each of which waits for milliseconds on a disk: where there are two gigabytes
# of memory for files, from which libraries can be loaded too, they go there. They are removed at the end, wherever they are.
IN_MEMORY = [ "`df -k --output=avail /dev/shm 2>/dev/null | tail -n 1`" -gt 2000000 ] 2>/dev/null && \
	! grep -q '/dev/shm .*noexec' /proc/mounts && in=/dev/shm || in="$${TMPDIR:-/tmp}"; \
	TMPDIR=`mktemp -d "$$in/peftcore-test.XXXXXX"` || exit 1; export TMPDIR; trap 'rm -rf "$$TMPDIR"' EXIT;

# Two workers with one thread each are faster on two cores than one worker with two. Types are checked meanwhile.
WHICH := -m "not slow"
test: export PEFTCORE_TEST_CHANGED = $(if $(word 7,$(CHANGED)),,$(CHANGED))
test test-slow test-cluster: export OMP_NUM_THREADS := 1
test test-slow test-cluster: export MKL_NUM_THREADS := 1
test: style
	$(IN_MEMORY) $(BIN)/mypy & types=$$!; $(BIN)/python -m pytest -n 2 $(WHICH); tests=$$?; wait $$types || { echo "mypy failed: its lines stand among those above"; exit 1; }; exit $$tests

# What takes seconds each: the examples, a package that is installed, several processes, compilers, training, the site.
test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -m "slow and not cluster"

# The lower bounds in pyproject.toml. Older ones fail: torch 2.6 gives other gradients in checkpoints, and with transformers 5.14 tests of prompts
# and of attention fail.
OLDEST := torch==2.8.* transformers==5.24.* pluggy==1.5.* pydantic==2.7.*
WITH_OLDEST := tests/contract tests/registry tests/layers tests/utils tests/training tests/surgery \
	--deselect tests/contract/test_compositions.py::test_it_compiles
test-oldest:
	$(PYTHON) -m venv --clear build/oldest
	build/oldest/bin/python -m pip install --quiet $(foreach each,$(OLDEST),"$(each)") diffusers "peft>=0.21" hypothesis jsonschema \
		pytest-timeout pytest-xdist \
		-e ".[cli,interop,test]" $(foreach plugin,$(wildcard plugins/*),-e $(plugin))
	build/oldest/bin/python -m pytest -n 2 -m "not slow" $(WITH_OLDEST)

# In one process by itself: Ray's servers and threads stay in a process that has begun a cluster, and take both cores.
test-cluster: $(INSTALLED)
	$(BIN)/python -m pytest -m cluster

# The whole matrix of methods and hosts, of which `make test` runs a covering part, and what is slow; a quarter of it with PART=1/4, each test in exactly one.
test-all: export PEFTCORE_TEST_ALL := 1
test-all: export PEFTCORE_TEST_PART = $(PART)
test-all: WHICH := -m "not cluster"
test-all: test test-cluster

evidence: $(INSTALLED)
	$(BIN)/python -m pytest --evidence -n 2 -m against

# Each default of each method's options is changed once, and the method's own tests run without the kit, the plugin's
# tables of defaults among them; what passes all the same is listed.
held-defaults: $(INSTALLED)
	$(BIN)/python tests/running/held_defaults.py

quantization-matrix: $(INSTALLED)
	$(BIN)/python docs/generate/quantization_matrix.py

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.everyday
	$(BIN)/python -m benchmarks --threads 1 --page
	$(BIN)/python -m benchmarks.many --page

# Random histories of adapted models, each step compared with a fresh model: make histories SEED=3 MINUTES=10
histories: export PEFTCORE_HISTORIES_SEED = $(SEED)
histories: export PEFTCORE_HISTORIES_MINUTES = $(or $(MINUTES),10)
histories: export OMP_NUM_THREADS := 1
histories: $(INSTALLED)
	$(BIN)/python -m pytest --timeout=0 --capture=sys tests/histories -k more

# Another seed tries other files: make fuzz PEFTCORE_FUZZ_SEED=1
fuzz: export PEFTCORE_FUZZ ?= 200000
fuzz: export PEFTCORE_FUZZ_SEED ?= 0
fuzz: export OMP_NUM_THREADS := 1
fuzz: $(INSTALLED)
	$(BIN)/python -m pytest --timeout=0 --capture=sys tests/fuzz/test_hostile.py -k whatever

# Each operation, broken at each tensor operation, call for files and line of Python: make faults SECONDS=600 SEED=3
faults: export OMP_NUM_THREADS := 1
faults: $(INSTALLED)
	$(IN_MEMORY) $(BIN)/python tests/running/every_fault.py $(NAMES) $(if $(METHODS),--methods) --seed $(or $(SEED),0) --every $(or $(EVERY),1) \
		$(if $(SECONDS),--seconds $(SECONDS))

# Another seed kills at other points: make kills SEED=3 KILLS=100
kills: export PEFTCORE_KILLS = $(or $(KILLS),40)
kills: export PEFTCORE_SEED = $(or $(SEED),0)
kills: export OMP_NUM_THREADS := 1
kills: $(INSTALLED)
	$(IN_MEMORY) $(BIN)/python -m pytest -n 2 --timeout=0 `find tests plugins/lab/tests -name "test_*_killed.py"`

version: $(INSTALLED)
	$(BIN)/python release/version.py $(VERSION)

# Without a version nothing is written, and the section is shown.
changelog: $(INSTALLED)
	$(BIN)/towncrier build $(if $(VERSION),--yes --version $(VERSION),--draft --version next)

release-check: $(INSTALLED)
	rm -rf dist
	$(BIN)/python release/check.py $(if $(TAG),--tag $(TAG))

# What takes long, planning every method in large models, is kept in build/docs-kept for as long as the sources are the same.
docs: export NO_MKDOCS_2_WARNING := 1
docs: export DISABLE_MKDOCS_2_WARNING := true
docs: export TRANSFORMERS_VERBOSITY := error
docs: $(INSTALLED)
	$(BIN)/mkdocs build --strict --clean

docs-check: docs
	$(BIN)/python docs/check/check_notebooks.py
	$(BIN)/python docs/check/site.py

style: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint: style
	$(BIN)/mypy

$(INSTALLED): $(REQUIREMENTS)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing into $(VENV); the first time takes a minute or more and about 2 GB."
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-demo.txt
	@touch $@

clean:
	rm -rf $(VENV) build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
