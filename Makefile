# Two commands do everything: `make train` and `make test`. Both set up `.venv` first, once.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
UV_VERSION := 0.13.9

# What builds and runs images, and what runs compose files: ENGINE=podman, or any command line.
ENGINE ?= docker
COMPOSE ?= $(ENGINE) compose
BASE_IMAGE ?= python:3.11-slim
POSTGRES_IMAGE ?= postgres:17
BUILD = $(ENGINE) build --build-arg BASE_IMAGE=$(BASE_IMAGE) --build-arg UV_VERSION=$(UV_VERSION) $(BUILD_FLAGS)

.DEFAULT_GOAL := help
.PHONY: help setup train test test-all lint style format docs image image-test benchmark ui clean pins

help:
	@echo "make train   set up, then train DMAML with two workers on sinusoid regression, and show the result"
	@echo "make test    set up, then lint, type check and run the tests;  make test-all  the slow ones, too"
	@echo "make benchmark   speed beside other libraries, which it installs; ONLY=\"sinusoid-1 loop\" for a part"
	@echo "make docs    build the documentation as a site, in site/"
	@echo "make image   build the container images with docker; ENGINE=podman with another engine"
	@echo "make image-test   the same, then run them as docs/deploy.md says, and see that its promises hold"
	@echo "make ui      open the MLflow UI on the trainings made here"
	@echo "make lint    ruff and mypy alone;  make format  ruff's formatter"
	@echo "make clean   remove .venv and caches (not mlruns)"

setup: $(READY)

$(READY): pyproject.toml requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, and $(PYTHON) is not: make PYTHON=python3.12 ..."; exit 1; }
	@echo "Setting up .venv (once; about 6 GB, mostly PyTorch) ..."
	@rm -rf .venv
	@$(PYTHON) -m venv .venv || \
	  { echo "Python's venv module is missing: install it (Debian, Ubuntu: apt install python3-venv)."; exit 1; }
	@$(BIN)/python -m pip install -qq --disable-pip-version-check uv==$(UV_VERSION)
	@if $(BIN)/python -c '$(CAN_BUILD)'; then cat requirements.txt; else grep -v '^learn2learn=' requirements.txt; \
	  echo "No C compiler, or no Python.h (Debian, Ubuntu: apt install gcc python3-dev). learn2learn is left out, which" \
	    "model.engine and data.sampler name as the reference; with a compiler: make clean setup." >&2; \
	fi > $(BIN)/requirements.txt
	@$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r $(BIN)/requirements.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $(READY)

# learn2learn is C that is compiled here.
CAN_BUILD = import os, shutil, sys, sysconfig as s; \
  c = os.environ.get("CC") or s.get_config_var("CC") or "cc"; \
  sys.exit(not (shutil.which(c.split()[0]) and os.path.isfile(s.get_path("include") + "/Python.h")))

train: $(READY)
	@$(BIN)/python -m dmaml_pl fit --config configs/sinusoid.yaml

test: style
	@$(call beside_mypy,$(BIN)/python -m pytest -n 2 --dist loadfile)

test-all: style
	@$(call beside_mypy,$(BIN)/python -m pytest -m "not image")

# mypy takes the core that the tests leave idle, a minute long where it has no cache yet; what it says comes last.
define beside_mypy
said=$$(mktemp); $(BIN)/mypy > $$said 2>&1 & mypy=$$!; trap "kill $$mypy" INT TERM; \
  $(1); tests=$$?; wait $$mypy; mypy=$$?; cat $$said; rm -f $$said; exit $$((tests + mypy))
endef

lint: style
	@$(BIN)/mypy

style: $(READY)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/hadolint Dockerfile
	@$(BIN)/check-jsonschema --quiet --builtin-schema vendor.compose-spec compose.yaml

format: $(READY)
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

# The other libraries are for comparison only, so they are installed when they are asked for.
benchmark: $(READY)
	@$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements-benchmark.txt
	@$(BIN)/python -m benchmarks.speed $(if $(ONLY),--only $(ONLY)) $(if $(OMNIGLOT),--omniglot $(OMNIGLOT))

# Material for MkDocs announces its successor at each call.
docs: $(READY)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "Documentation: site/index.html"

image:
	@$(BUILD) --target mlflow --tag dmaml-mlflow:latest .
	@$(BUILD) --build-arg GIT_COMMIT="$$(git describe --always --abbrev=40 --exclude '*' --dirty)" --tag dmaml:latest .

image-test: $(READY) image
	@ENGINE="$(ENGINE)" COMPOSE="$(COMPOSE)" BASE_IMAGE="$(BASE_IMAGE)" POSTGRES_IMAGE="$(POSTGRES_IMAGE)" \
	  $(BIN)/python -m pytest -vv --no-header -m image tests/test_image.py tests/test_compose.py
	@$(ENGINE) images

ui: $(READY)
	@$(BIN)/python -m dmaml_pl ui

# Renews the pinned versions; the file carries names and versions only, no addresses.
pins: $(READY)
	@$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --extra dev --no-header --no-annotate \
	  pyproject.toml --output-file requirements.txt

clean:
	@rm -rf .venv site .mypy_cache .ruff_cache .pytest_cache
