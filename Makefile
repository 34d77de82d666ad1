# Every command of the house; `make` alone lists them. Paths are relative, so that a checkout may
# lie in a folder whose name has spaces.

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
HOSTS := export/runtimes
# files in their order: by the number of their tests, the longest would come last, and alone
WORKERS ?= --numprocesses=2 --dist=loadfile --no-loadscope-reorder
RACES ?= gemv wkv7 native ops training vision big_pictures cifar10 text_inference exported generations

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-all test-web web-tools lint bench

help: ## list the targets
	@echo "usage: make TARGET [PYTHON=python3.12] [ARGS='arguments of the command']"
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  \1|\2/p' Makefile | awk -F'|' '{ printf "%-12s %s\n", $$1, $$2 }'

demo: $(VENV)/.demo $(VENV)/.native ## install, then train, export, verify and generate on real text
	$(BIN)/rwkv demo $(ARGS)

test: $(VENV)/.dev $(VENV)/.native ## install, then run the tests
	$(BIN)/python -m pytest $(WORKERS) $(ARGS)

test-all: $(VENV)/.dev $(VENV)/.native ## the same with the slow tests
	$(BIN)/python -m pytest -m "" $(ARGS)

test-web: web-tools $(VENV)/.dev $(HOSTS)/test/node_modules/.done $(HOSTS)/node/node_modules/.done ## the hosts in Node and the browser: npm, Chromium
	$(BIN)/python -m pytest -m "" tests/test_export_hosts.py $(ARGS)

web-tools:
	@command -v npm >/dev/null || { \
		echo "test-web needs Node.js 20.19 or newer with its npm: nodejs.org" >&2; exit 1; }
	@if command -v chromium >/dev/null; then :; \
	elif [ "`id -u`" = 0 ] && command -v apt-get >/dev/null; then \
		echo "Installing Debian's chromium"; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
			apt-get install -qq --no-install-recommends chromium >/dev/null; \
	else \
		echo "test-web needs the program chromium; as root: apt-get install chromium" >&2; exit 1; \
	fi

lint: $(VENV)/.dev ## ruff, mypy and codespell
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/codespell

bench: $(VENV)/.dev $(VENV)/.native ## race every peer that is installed (ARGS=--quick: minutes)
	@failed=; for race in $(RACES); do \
		echo "== benchmarks/$$race.py"; \
		$(BIN)/python benchmarks/$$race.py $(ARGS) || failed="$$failed $$race"; \
	done; [ -z "$$failed" ] || { echo "failed:$$failed" >&2; exit 1; }

# What is installed is recorded in a stamp, so that it happens once and again only when
# pyproject.toml changes. The set `dev` contains the set `demo`.
$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(call install,dev)
	@touch $@ $(VENV)/.demo

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(call install,demo)
	@touch $@

# npm's packages at the exact versions of the lock file
$(HOSTS)/%/node_modules/.done: $(HOSTS)/%/package-lock.json $(HOSTS)/%/.npmrc
	cd $(HOSTS)/$* && npm ci
	@touch $@

# The native ops are compiled where there is a compiler; nothing depends on that.
$(VENV)/.native: $(wildcard rwkv_core/ops/native/src/*) rwkv_core/ops/native/build.py pyproject.toml
	@$(BIN)/rwkv build-native --if-possible || true
	@touch $@

define install
@echo "Installing rwkv-toolkit[$(1)] into $(VENV); the first time takes minutes and about 5 GB"
$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(1)]'
endef

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "Python 3.10 or newer is needed, but $(PYTHON) says: `$(PYTHON) --version 2>&1`" >&2; \
		echo "Name another one: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
