# What a person does with this checkout, one word each. Every target prepares its own virtual environment first.
#   make demo       train a small natively multimodal model on real pictures and text, and write a report
#   make test       the default test suite
#   make test-all   the default suite, then more meshes, then the comparison with torch and transformers
#   make lint       ruff, check and format
#   make bench      speed and memory beside transformers; how both grow with experts, depth and length
#   make bench-kernels   what TPU kernels for few-bit weights should take, by the TPU compiler's schedule; needs no TPU
# `make test PYTHON=python3.12` uses another interpreter, in a virtual environment of its own.

PYTHON ?= python3.11
VENV := $(if $(filter python3.11,$(notdir $(PYTHON))),.venv,.venv-$(notdir $(PYTHON)))
PARITY_VENV := .venv-parity
RUN := $(VENV)/bin/python
RUN_PARITY := $(PARITY_VENV)/bin/python
# Compiling uses one core: a process for each, up to four of some GB; a file's tests stay together.
WORKERS := -n logical --maxprocesses=4 --dist=loadfile --no-loadscope-reorder
PIP_INSTALL := -m pip install -qq --disable-pip-version-check --no-input

# Compiled programs outlive the process: the second run of anything starts in seconds.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.2
export TF_CPP_MIN_LOG_LEVEL ?= 3
# Where there is neither TPU nor GPU nobody need look for one: libtpu, which the planner compiles with, complains aloud.
ifeq ($(wildcard /dev/accel* /dev/vfio/[0-9]* /dev/nvidia*),)
export JAX_PLATFORMS ?= cpu
endif

.PHONY: help demo test test-all lint bench bench-kernels venv parity-venv clean
.DEFAULT_GOAL := help

help:
	@sed -n '2,7s/^# *//p' Makefile

# Large pages for what is allocated anew in each step: a seventh less time on Linux.
demo: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
demo: venv
	$(RUN) -m experiments.pretrain_nano $(FLAGS)

test: venv
	$(RUN) -m pytest $(WORKERS) $(FLAGS)

# torch is compared with programs as users compile them; tests/conftest.py otherwise asks XLA for quick compiling.
test-all: test parity-venv
	$(RUN) -m pytest $(WORKERS) -m "thorough and not multidevice and not parity" $(FLAGS)
	XLA_FLAGS= $(RUN_PARITY) -m pytest $(WORKERS) -m parity $(FLAGS)
	$(RUN_PARITY) tests/parity/make_goldens.py --check

lint: venv
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: venv parity-venv
	$(RUN_PARITY) -m benchmarks.hf_side_by_side $(FLAGS)
	$(RUN) -m benchmarks.few_rows
	$(RUN) -m benchmarks.low_bit_cpu
	$(RUN) -m benchmarks.moe_cpu
	$(RUN) -m benchmarks.compile_time
	$(RUN) -m benchmarks.long_context

bench-kernels: venv
	$(RUN) -m benchmarks.kernels $(FLAGS)

clean:
	rm -rf .venv .venv-* .cache build dist *.egg-info

venv: $(VENV)/.installed
parity-venv: $(PARITY_VENV)/.installed

# A stamp newer than the dependency list means the environment is up to date. pip prints errors only.
$(VENV)/.installed: setup.cfg pyproject.toml
	$(call make_venv,$(VENV),$(PYTHON))
	@echo "installing the project into $(VENV); the first time takes a few minutes"
	@$(RUN) $(PIP_INSTALL) --editable '.[test]'
	@touch $@

# torch comes first, at the exact version whose plain wheel is the CPU build for Python 3.11: left to itself pip would
# fetch a CUDA build of several gigabytes.
$(PARITY_VENV)/.installed: setup.cfg pyproject.toml
	$(call make_venv,$(PARITY_VENV),python3.11)
	@echo "installing the project, torch and transformers into $(PARITY_VENV); the first time takes a few minutes"
	@$(RUN_PARITY) $(PIP_INSTALL) torch==2.13.0
	@$(RUN_PARITY) $(PIP_INSTALL) --editable '.[test,parity]'
	@touch $@

# Folder, interpreter. A pyenv shim of a version that is not switched on exists but does not run, hence the second look.
define make_venv
@if ! $(1)/bin/python -c '' 2>/dev/null; then \
	interpreter='$(2)'; \
	if ! "$$interpreter" -c '' 2>/dev/null; then \
		interpreter=$$(ls -d "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/*/bin/'$(2)' 2>/dev/null | tail -n 1); \
	fi; \
	if [ -z "$$interpreter" ]; then \
		echo "no working '$(2)' found; install it or name one that works: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; \
		exit 1; \
	fi; \
	"$$interpreter" -m venv --clear '$(1)'; \
fi
endef
