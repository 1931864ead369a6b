# Needed: make, python3 (3.10 or newer) and a package index. Everything else goes into virtual environments beside this file.
#
# A stamp file in an environment says which extra it holds; it is older than pyproject.toml when that has changed.

PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
PIP    := -m pip install --quiet --quiet --disable-pip-version-check --no-warn-script-location

# Of the suite on the oldest and the newest interpreter of this machine: all but what is slow, about faults, or the same on each.
OTHERS_PYTEST ?= -q -m "not slow and not torture" --ignore=tests/test_bench.py --ignore=tests/test_check_trust.py
PYTEST_ARGS   ?=
# As many tests at a time as there are cores, four at the most: many of them start processes of their own. One: make test XDIST=
XDIST         ?= -n logical --maxprocesses 4 --dist worksteal
comma         := ,

# The tests start hundreds of interpreters, each of which would compile all of chest if it may not keep what comes of it.
export PYTHONDONTWRITEBYTECODE =

.PHONY: help demo test lint test-others test-one torture bench clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.stamp-demo  ## the library on real data: 336,776 flights through 20 MB of memory, in about a minute
	@$(PY) examples/flights.py $(DEMO_ARGS)

test: lint  ## lint, types, and the tests on the default, the oldest and the newest interpreter
	$(PY) -m pytest -q $(XDIST) $(PYTEST_ARGS)
	@$(MAKE) --no-print-directory test-others

lint: $(VENV)/.stamp-test  ## ruff and mypy
	$(PY) -m ruff format --check --quiet . || { $(PY) -m ruff format --diff --quiet . ; exit 1 ; }
	$(PY) -m ruff check --quiet .
	$(PY) -m mypy

# The first of them does without the compiled part.
test-others:
	@$(PYTHON) scripts/interpreters.py | { pure=1 ; while read -r version interpreter ; do \
		CHEST_PURE=$$pure $(MAKE) --no-print-directory test-one VERSION=$$version INTERPRETER=$$interpreter < /dev/null || exit 1 ; \
		pure= ; \
	done ; }

test-one: .venv-$(VERSION)/.stamp-test
	@echo "Python $(VERSION)$(if $(CHEST_PURE),$(comma) without the compiled part):"
	.venv-$(VERSION)/bin/python -m pytest $(OTHERS_PYTEST) $(XDIST) $(PYTEST_ARGS)

torture: $(VENV)/.stamp-test $(VENV)/.stamp-fuzz  ## every crash, fault and larger-than-memory test in full (an hour or so; as root it does more)
	@rm -f build/counts.jsonl ; mkdir -p build
	CHEST_TORTURE=1 CHEST_COUNTS=$(CURDIR)/build/counts.jsonl $(PY) -m pytest -m "torture or slow" --durations=20 $(PYTEST_ARGS)
	$(PY) scripts/reliability.py build/counts.jsonl docs/reliability.md

bench: $(VENV)/.stamp-bench  ## side by side with other libraries: half an hour, or minutes with BENCH_ARGS=--quick; draws docs/performance.md
	@$(PY) bench/run.py --get-peers || echo "without chest 0.2.3, which could not be fetched"
	$(PY) bench/run.py $(BENCH_ARGS)
	$(PY) bench/serializers.py
	$(PY) bench/compression.py
	$(PY) bench/check.py

clean:  ## remove environments, caches and results
	rm -rf .venv .venv-* build dist src/*.egg-info src/chest/_native.* bench/results .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"chest needs Python 3.10 or newer, this is {sys.version.split()[0]}: make PYTHON=...")'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.stamp-%: pyproject.toml $(wildcard src/native/*) | $(PY)
	@echo "installing chest[$*] into $(VENV)"
	@$(PY) $(PIP) -e '.[$*]'
	@touch $@

# Not every package of the test extra has wheels for the newest Python. The tests that need them are skipped then, and say so.
.venv-%/.stamp-test: pyproject.toml $(wildcard src/native/*)
	@[ -x .venv-$*/bin/python ] || $(INTERPRETER) -m venv .venv-$*
	@echo "installing chest[test] into .venv-$*"
	@.venv-$*/bin/python $(PIP) --only-binary :all: -e '.[test]' || { \
		echo "not every package of the test extra is there for Python $*: testing with pytest and hypothesis alone" ; \
		.venv-$*/bin/python $(PIP) -e . pytest pytest-xdist hypothesis ; }
	@touch $@
