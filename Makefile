# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` install what they need; see tests/setup.sh.

STAMP := .venv/setup.stamp
PYTHON := .venv/bin/python
LISTS := $(wildcard tests/packages.txt tests/vm/packages.txt)

.PHONY: help setup demo test bench torture torture-breaks fuzz chain breaks lint run deb clean

help:
	@echo 'make demo   fork real virtual machines and show what each clone noticed'
	@echo 'make test   all tests: unit, integration, virtual machines'
	@echo 'make torture  kill, starve, flood and fuzz it for 20 minutes; a table of what came of it'
	@echo 'make fuzz   hostile input alone, for FUZZ_SECONDS (3600)'
	@echo 'make chain  one guest restored RESTORES (500) times, each time from its last saved state'
	@echo 'make torture-breaks  vmfork broken on purpose: the torture finds each of it'
	@echo 'make breaks vmfork broken on purpose: the rows of the matrix that must turn red do'
	@echo 'make bench  measure everything and write docs/performance.md; ONLY=edge,calls for some, QUICK=1 for a try'
	@echo 'make lint   the static checks alone'
	@echo 'make run    vmforkd in the foreground on a fake guest in a directory, no root needed'
	@echo 'make deb    Debian packages, into build/deb/'
	@echo 'make setup  install what the others need (they do it themselves)'

setup: $(STAMP)
	@:

$(STAMP): pyproject.toml tests/setup.sh $(LISTS)
	@tests/setup.sh
	@touch $@

demo: $(STAMP)
	@$(PYTHON) tests/vm/demo.py

test: $(STAMP)
	@$(PYTHON) -m pytest

# Coverage-guided where atheris has a wheel for this Python, else by hypothesis.
ATHERIS = $(PYTHON) -c 'import atheris' 2>/dev/null || $(PYTHON) -m pip install -q --root-user-action=ignore atheris || true

# ONLY='kill the reactor' for one class; EVERY=29 for each 29th case, and without what `make test` tries, its tests
# and hostile input; WITHIN for how many seconds it may take.
torture: $(STAMP)
	@$(ATHERIS)
	@PYTHONPATH=agent:tests $(PYTHON) -m torture.run --output artifacts/torture.txt --every $(or $(EVERY),1) \
	    --fuzz-seconds $(or $(FUZZ_SECONDS),240) --within $(or $(WITHIN),1200) $(if $(EVERY),--no-tests) \
	    $(if $(ONLY),"$(ONLY)")

torture-breaks: $(STAMP)
	@PYTHONPATH=agent:tests $(PYTHON) -m torture.breaks

fuzz: $(STAMP)
	@$(ATHERIS)
	@PYTHONPATH=agent:tests $(PYTHON) -m torture.fuzz --keep --output artifacts/fuzz.txt --seconds $(or $(FUZZ_SECONDS),3600)

# The pictures; without matplotlib, as where there is no network to install it from, there are tables only.
PLOTTING = $(PYTHON) -c 'import matplotlib' 2>/dev/null || $(PYTHON) -m pip install -q --disable-pip-version-check \
    --root-user-action=ignore --no-build-isolation -e '.[bench]' || echo 'no pictures: matplotlib is missing' >&2

chain: $(STAMP)
	@$(PLOTTING)
	@$(PYTHON) tests/vm/chain.py --restores $(or $(RESTORES),500)

breaks: $(STAMP)
	@PYTHONPATH=tests $(PYTHON) tests/vm/breaks.py

bench: $(STAMP)
	@$(PLOTTING)
	@PYTHONPATH=tests:tests/vm:agent $(PYTHON) -m bench $(if $(ONLY),--only $(ONLY)) $(if $(QUICK),--quick)

lint: $(STAMP)
	@$(PYTHON) -m pytest -q tests/unit/test_static.py

run: $(STAMP)
	@tests/tryout.sh

deb:
	@debian/build.sh build/deb

clean:
	rm -rf build dist artifacts .mypy_cache .ruff_cache .pytest_cache .hypothesis
