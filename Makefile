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
.PHONY: help setup train test test-all test-lowest lint style format docs dist release-notes image image-test benchmark gpu-wheels gpu-check models ui clean pins advisories

help:
	@echo "make train   set up, then train DMAML with two workers on sinusoid regression, and show the result"
	@echo "make test    set up, then lint, type check and run the tests;  make test-all  the slow ones, too"
	@echo "make test-lowest   the oldest versions that pyproject.toml allows, in an environment of their own"
	@echo "make benchmark   speed beside other libraries, which it installs; ONLY=\"sinusoid-1 loop\" for a part, PEERS=native"
	@echo "make gpu-check   all that only a GPU can answer, in eight minutes;  make gpu-wheels  what it takes along"
	@echo "make docs    build the documentation as a site, in site/"
	@echo "make dist    build the wheel and the source archive, in dist/;  make release-notes  the newest of CHANGELOG.md"
	@echo "make image   build the container images with docker; ENGINE=podman with another engine"
	@echo "make image-test   the same, then run them as docs/deploy.md says, and see that its promises hold"
	@echo "make models  train the shipped configurations that take minutes, and export them to models/"
	@echo "make ui      open the MLflow UI on the trainings made here"
	@echo "make advisories   whether any pinned package has a known advisory: asks PyPI;  make pins  renews the pins"
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
	@$(call beside_mypy,$(BIN)/python -m pytest -n 3 --dist loadfile)

test-all: style
	@$(call beside_mypy,$(BIN)/python -m pytest -m "not image")

# The package as it is installed, with the oldest versions that pyproject.toml allows. docs/install.md holds the last result.
# Who runs autograd before a fork, as tests of the compiler do, cannot after it in old versions of PyTorch: these come last.
LOWEST := .venv-lowest/bin
LOWEST_TEST := $(LOWEST)/python -m pytest -p no:cacheprovider -W ignore::DeprecationWarning -W ignore::FutureWarning
LOWEST_FILES := engine engine_promises vectorized per_task maml all_algorithms meta_sgd sinusoid tabular image_tasks \
  samplers glyphs rollouts policies trust_region precision backbone merge merge_options dmaml task_parallel checkpoints \
  end_to_end tracker tracker_store tracker_ends outbox sending sync studies study_failures bad_studies search \
  study_results compare mlflow_model shipped_configs
test-lowest: $(READY)
	@rm -rf .venv-lowest dist/lowest && $(PYTHON) -m venv .venv-lowest
	@$(BIN)/uv build --quiet --wheel --out-dir dist/lowest
	@$(BIN)/uv pip install --quiet --python $(LOWEST)/python --resolution lowest-direct -r pyproject.toml --extra learn2learn
	@$(BIN)/uv pip install --quiet --python $(LOWEST)/python --no-deps dist/lowest/*.whl
	@$(BIN)/uv pip install --quiet --python $(LOWEST)/python hypothesis pytest pytest-timeout pytest-xdist
	@if $(LOWEST)/python -c '$(CAN_BUILD)'; then \
	  $(BIN)/uv pip install --quiet --python $(LOWEST)/python --no-deps learn2learn==0.2.0; fi
	@cd .venv-lowest && bin/dmaml fit --config sinusoid
	@$(LOWEST_TEST) -n 2 --dist loadfile $(LOWEST_FILES:%=tests/test_%.py)
	@$(LOWEST_TEST) tests/test_compiled.py tests/test_trial.py
	@$(BIN)/uv pip list --python $(LOWEST)/python | grep -E "^(torch|torchvision|pytorch-lightning|mlflow|numpy|optuna|pandas) "

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
	@$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@$(BIN)/check-jsonschema --quiet --builtin-schema vendor.citation-file-format CITATION.cff

format: $(READY)
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

# The other libraries are for comparison only, so they are installed when they are asked for.
benchmark: $(READY)
	@$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements-benchmark.txt
	@$(BIN)/python -m benchmarks.speed $(if $(ONLY),--only $(ONLY)) $(if $(PEERS),--peers $(PEERS)) $(if $(OMNIGLOT),--omniglot $(OMNIGLOT))

# docs/performance.md says how both are used: here, and on a machine that reaches no network.
gpu-check: $(READY)
	@$(BIN)/python -m benchmarks.gpu_check $(if $(OMNIGLOT),--omniglot $(OMNIGLOT))

# For Python 3.12, where PyTorch, Lightning, torchvision and what they need are there already; learn2learn is C.
GPU_PYTHON ?= 3.12
GPU_WHEELS_MIB := 32
gpu-wheels: $(READY)
	@rm -rf .gpu-wheels .venv-wheels
	@UV_PYTHON_DOWNLOADS=never $(BIN)/uv venv --quiet --seed --python $(GPU_PYTHON) .venv-wheels || \
	  { echo "Python 3.12 is needed, with its headers: make gpu-wheels GPU_PYTHON=/where/it/is/python3.12"; exit 1; }
	@.venv-wheels/bin/python -m pip wheel -qq --disable-pip-version-check --no-deps --wheel-dir .gpu-wheels \
	  --config-settings=--build-option=build_ext --requirement requirements-gpu.txt
	@rm -rf .venv-wheels
	@size=$$(du -sm .gpu-wheels | cut -f1); echo "$$(ls .gpu-wheels | wc -l) wheels of $$size MiB in .gpu-wheels"; \
	  test $$size -le $(GPU_WHEELS_MIB) || { echo "That is more than $(GPU_WHEELS_MIB) MiB: too much to travel."; exit 1; }

# Material for MkDocs announces its successor at each call. REPO_URL=https://... gives each page a link to edit it there.
docs: $(READY)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "Documentation: site/index.html"

# A version is a tag `vX.Y.Z`: CONTRIBUTING.md says what precedes it.
dist: $(READY)
	@rm -rf dist && mkdir -p dist/source && git ls-files -z | xargs -0 cp --parents -t dist/source
	@test -z "$(IMAGES)" || sed -i 's|](docs/images/|]($(IMAGES)/docs/images/|' dist/source/README.md
	@$(BIN)/uv build --quiet --out-dir dist dist/source && rm -r dist/source
	@ls dist/dmaml_pl-*

release-notes:
	@awk '/^## /{part++} part==1' CHANGELOG.md

image:
	@$(BUILD) --target mlflow --tag dmaml-mlflow:latest .
	@$(BUILD) --build-arg GIT_COMMIT="$$(git describe --always --abbrev=40 --exclude '*' --dirty)" --tag dmaml:latest .

image-test: $(READY) image
	@ENGINE="$(ENGINE)" COMPOSE="$(COMPOSE)" BASE_IMAGE="$(BASE_IMAGE)" POSTGRES_IMAGE="$(POSTGRES_IMAGE)" \
	  $(BIN)/python -m pytest -vv --no-header -m image tests/test_image.py tests/test_compose.py
	@$(ENGINE) images

# Trained networks of the shipped configurations that take minutes, in models/, to begin with.
MODELS ?= sinusoid glyphs navigation2d
models: $(READY)
	@for name in $(MODELS); do \
	  $(BIN)/python -m dmaml_pl fit --config configs/$$name.yaml --checkpoint.dirpath models/.$$name/checkpoints \
	    --report.folder models/.$$name && \
	  $(BIN)/python -m dmaml_pl export models/.$$name/checkpoints/best.ckpt models/$$name || exit 1; done

ui: $(READY)
	@$(BIN)/python -m dmaml_pl ui

# Renews the pinned versions; the file carries names and versions only, no addresses.
pins: $(READY)
	@$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --extra dev --no-header --no-annotate \
	  pyproject.toml --output-file requirements.txt

# Strict: a package that PyPI's service cannot tell of is no package without advisories. A table is printed for those found.
AUDIT = .venv-advisories/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r requirements.txt
advisories:
	@$(PYTHON) -m venv .venv-advisories
	@.venv-advisories/bin/python -m pip install -qq --disable-pip-version-check pip-audit
	@said=$$(mktemp); trap "rm -f $$said" EXIT; found=$$($(AUDIT) 2> $$said) && \
	  { echo "No pinned package has a known advisory."; exit; }; \
	  if [ -n "$$found" ]; then echo "$$found"; else \
	  echo "PyPI's advisories cannot be had: $$(tail -n 1 $$said)" >&2; fi; exit 1

clean:
	@rm -rf .venv .venv-lowest .venv-advisories site .mypy_cache .ruff_cache .pytest_cache
