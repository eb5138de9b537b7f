# Everything a person or a machine runs starts here. Each target installs what it needs: the packages of a run, and the
# extras of settings.ini that it uses. A file in `.venv` marks each; a change of the lock starts a new environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CLIENTS := .venv-clients
EXTRAS := dev docs lint load
# cpu, auto or a CUDA version such as cu128: which build of torch a Linux machine without a local one gets (see README).
TORCH_BACKEND ?= auto
export HF_HUB_OFFLINE ?= 1
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: install run lint nb outputs test test-notebooks test-slow test-faults test-fuzz test-tables test-load test-clients serve docs docs-serve lab export clean-notebooks readme lock dist image check-tag push-image release clean help
.DEFAULT_GOAL := help

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 20

.NOTPARALLEL:  # two installations into one environment

install: $(EXTRAS:%=$(STAMP)-%) ## make .venv with every package of the lock; the targets below install only what they need

$(STAMP): requirements.lock settings.ini setup.py tools/install.py
	@$(PYTHON) tools/install.py $(VENV) --torch-backend $(TORCH_BACKEND)
	@touch $@

$(STAMP)-%: $(STAMP)
	@$(PYTHON) tools/install.py $(VENV) --extra $*
	@touch $@

run: $(STAMP) ## the main job: validate, train, evaluate, predict, register, report
	@$(BIN)/madewithml run

lint: $(STAMP)-dev $(STAMP)-lint ## style, types and spelling of the code, notebooks in sync with the modules and clean
	@$(BIN)/ruff check --quiet
	@$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python --baseline tools/types.json
	@$(BIN)/codespell
	@$(BIN)/shellcheck madewithml/scripts/*.sh findings/*.sh
	@$(BIN)/python tools/check.py

nb: $(STAMP)-dev ## the tests of one notebook: make nb NB=24_train
	@$(BIN)/python tools/check.py --notebook "$(NB)"

outputs: $(STAMP)-dev ## execute the fast notebooks and name outputs that are no longer of the committed kind; OPTIONS=--write stores them
	@$(BIN)/python tools/outputs.py $(OPTIONS) $(NB:%=nbs/%.ipynb)

test: lint $(STAMP)-docs ## everything that must hold: lint, the notebooks' tests, pytest
	@$(BIN)/python tools/check.py --run
	@$(BIN)/python -m pytest -m "not slow and not fault and not load and not fuzz and not tables and not clients"

test-slow: $(STAMP)-dev $(STAMP)-docs $(STAMP)-lint ## what takes minutes: a killed run, the wheel, a cluster, cells marked slow
	@$(BIN)/python tools/check.py --slow
	@$(BIN)/python -m pytest -m slow

test-faults: $(STAMP)-dev ## kill workers, nodes and drivers of a cluster at many points; half an hour
	@$(BIN)/python -m pytest -m fault tests/system/test_faults.py

test-fuzz: $(STAMP)-dev $(STAMP)-load ## random tables in several formats: each is read as it was written; a quarter of an hour
	@$(BIN)/python -m pytest -m fuzz

test-tables: $(STAMP)-dev ## tables of every kind, trained, evaluated and predicted in every format; an hour
	@$(BIN)/python -m pytest -m tables

test-load: $(STAMP)-dev $(STAMP)-load ## the service under load, killed and overloaded; an hour and a quarter, on a machine that does nothing else
	@$(BIN)/python -m pytest -s -m load

$(CLIENTS)/.installed: tests/clients/requirements.txt
	@echo "Installing the clients into $(CLIENTS) (once; about a minute)."
	@$(PYTHON) -m venv --clear $(CLIENTS)
	@$(CLIENTS)/bin/python -m pip install -qq --disable-pip-version-check -r $<
	@touch $@

test-clients: $(STAMP)-dev $(CLIENTS)/.installed ## the service asked by clients that others wrote; five minutes
	@MADEWITHML_CLIENTS=$(CLIENTS) $(BIN)/python -m pytest -m clients

serve: $(STAMP) ## serve the champion on port 8000 until Ctrl-C (after `make run` and `madewithml promote`)
	@$(BIN)/madewithml serve

docs: $(STAMP)-docs ## build the site into _docs/
	@$(BIN)/python tools/docs.py

docs-serve: docs ## build the site and show it on a free port of this machine until Ctrl-C
	@$(BIN)/python -m http.server --bind 127.0.0.1 --directory _docs 0

lab: export JUPYTER_CONFIG_PATH := $(CURDIR)/tools/lab
lab: export JUPYTERLAB_WORKSPACES_DIR := $(CURDIR)/$(VENV)/lab-workspaces
lab: $(STAMP)-dev ## open JupyterLab in nbs/, the first time with the table of contents and index.ipynb
	@test -d $(VENV)/lab-workspaces || $(BIN)/jupyter lab workspaces import tools/lab/workspace.json >/dev/null
	@cd nbs && ../$(BIN)/jupyter lab $(LAB_OPTIONS)

export: $(STAMP)-dev ## write madewithml/ from the notebooks, clean them, and make README.md
	@$(BIN)/python tools/check.py --fix

lock: ## renew requirements.lock from settings.ini
	@$(PYTHON) tools/install.py --lock

dist: $(STAMP)-dev ## build the wheel into dist/
	@$(BIN)/python -m build --wheel --no-isolation

# What a tag starts (.github/workflows/release.yaml). The tag must be the version's.
VERSION := $(shell sed -n 's/^version = //p' settings.ini)
TAG ?= v$(VERSION)
IMAGE ?= madewithml
NAME = $(shell printf %s "$(IMAGE)" | tr A-Z a-z):$(VERSION)
check-tag:
	@test "$(TAG)" = "v$(VERSION)" || { echo "Tag $(TAG) is not that of version $(VERSION) in settings.ini." >&2; exit 2; }

image: check-tag ## build the image of deploy/Dockerfile
	@docker build -f deploy/Dockerfile -t "$(NAME)" .

push-image: check-tag
	@printf %s "$$GITHUB_TOKEN" | docker login ghcr.io --username "$$GITHUB_ACTOR" --password-stdin
	@docker push "$(NAME)"

release: check-tag
	@gh release create "$(TAG)" dist/*.whl --verify-tag --generate-notes

clean: ## remove what was built and run, but not .venv
	rm -rf build dist storage results *.egg-info .pytest_cache .ruff_cache _docs _proc
