# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` install what they need; see tests/setup.sh.

STAMP := .venv/setup.stamp
PYTHON := .venv/bin/python
LISTS := $(wildcard tests/packages.txt tests/vm/packages.txt)

.PHONY: help setup demo test lint run deb clean

help:
	@echo 'make demo   fork real virtual machines and show what each clone noticed'
	@echo 'make test   all tests: unit, integration, virtual machines'
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

lint: $(STAMP)
	@$(PYTHON) -m pytest -q tests/unit/test_static.py

run: $(STAMP)
	@tests/tryout.sh

deb:
	@debian/build.sh build/deb

clean:
	rm -rf build dist artifacts .mypy_cache .ruff_cache .pytest_cache .hypothesis
