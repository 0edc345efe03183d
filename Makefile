# The front door. `make help` lists what there is.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

JOBS ?= $(shell nproc)
VENV := $(if $(KVERN_VENV),$(KVERN_VENV),.venv)
PYTHON := $(VENV)/bin/python
RELEASE := build/release
REPORTS := build/reports
LAUNCHER := $(if $(shell command -v ccache),-DCMAKE_CXX_COMPILER_LAUNCHER=ccache -DCMAKE_CUDA_COMPILER_LAUNCHER=ccache)
CMAKE_ARGS ?=
# Another clone of the same sources finds what this one compiled.
export CCACHE_BASEDIR := $(CURDIR)
export CCACHE_NOHASHDIR := 1
# Golden vectors: the whole set where it lies beside the sources, else those that are kept in tests/golden.
export KVERN_GOLDEN ?= $(patsubst %/manifest.json,%,$(abspath $(wildcard ../shared/golden/manifest.json)))
# Each fuzzer runs so long in `make test` and `make fuzz`.
FUZZ_SECONDS ?= 30
# Modules of end-to-end tests that run at once: each has an engine or two, of one thread, and about 4 GiB.
E2E_JOBS ?= 2
PYTEST := PYTHONPATH=$(CURDIR)/$(RELEASE)/python $(abspath $(PYTHON)) -m pytest

.PHONY: help
help: ## Say what there is
	@awk -F ':.*## ' '/^[a-z -]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## Install system packages and the Python environment (skips what is there)
	@tools/setup.sh

.PHONY: build
build: setup ## Build everything: kvernd, kvernctl, libkvern, the Python package, the tests
	@echo "build: release, into $(RELEASE)"
	@mkdir -p build
	@cmake --preset release $(LAUNCHER) -DKVERN_PYTHON=ON -DPython_EXECUTABLE=$(abspath $(PYTHON)) $(CMAKE_ARGS) >$(RELEASE).configure.log 2>&1 || \
	  { cat $(RELEASE).configure.log; exit 1; }
	@ninja -C $(RELEASE) -j $(JOBS)

.PHONY: demo
demo: build ## Show it: a real model's KV cache stored, restored in the same and in a new engine
	@PYTHONPATH=$(CURDIR)/$(RELEASE)/python $(PYTHON) tools/demo.py $(DEMO_ARGS)

.PHONY: test
test: build lint-recent test-cpp fuzz test-python check-deploy test-e2e ## All tests but the long matrix (under 40 minutes on 2 cores)

.PHONY: test-full
test-full: build fuzz ## All tests, with the long matrix of engines; writes docs/test-full.md
	@rm -rf $(REPORTS) && mkdir -p $(REPORTS)
	@KVERN_CRASH_ROUNDS=300 ctest --test-dir $(RELEASE) --output-on-failure -j $(JOBS) --output-junit $(abspath $(REPORTS))/ctest.xml
	@$(PYTEST) tests/python --junitxml $(REPORTS)/python.xml
	@$(PYTEST) tests/deploy --run-full --junitxml $(REPORTS)/deploy.xml
	@$(PYTEST) tests/e2e -n $(E2E_JOBS) --dist loadfile --run-full --junitxml $(REPORTS)/e2e.xml
	@$(PYTHON) tools/test_summary.py $(REPORTS)/*.xml >$(REPORTS)/test-full.md && cp $(REPORTS)/test-full.md docs/

.PHONY: test-cpp
test-cpp: build
	@ctest --test-dir $(RELEASE) --output-on-failure -j $(JOBS)

.PHONY: test-python
test-python: build
	@$(PYTEST) tests/python

.PHONY: test-e2e
test-e2e: build
	@$(PYTEST) tests/e2e -n $(E2E_JOBS) --dist loadfile

.PHONY: check-deploy
check-deploy: build ## Dashboards, rules and alerts against a real Prometheus; the image and the manifests
	@$(PYTEST) tests/deploy

.PHONY: pictures
pictures: build ## Draw the dashboards for docs/dashboards.md: a kvernd under load for four minutes
	@PYTHONPATH=$(CURDIR)/$(RELEASE)/python $(PYTHON) tests/deploy/record_dashboards.py

.PHONY: bench
bench: ## Measure against memcpy and rivals; writes build/bench/results.json
	@$(MAKE) build CMAKE_ARGS="-DKVERN_BENCH=ON $(CMAKE_ARGS)"
	@PYTHONPATH=$(CURDIR)/$(RELEASE)/python $(PYTHON) bench/run.py

.PHONY: bench-gpu
bench-gpu: ## On a GPU: codecs, data path, interference, attention; writes docs/gpu.md (PYTHON_GPU: a Python with torch for CUDA, transformers and matplotlib)
	@$(MAKE) build CMAKE_ARGS="-DKVERN_BENCH=ON -DKVERN_CUDA=ON $(CMAKE_ARGS)"
	@PYTHON=$(or $(PYTHON_GPU),python3) bench/gpu.sh $(RELEASE)/bin $(RELEASE)/lib/libkvern_gpu_attend.so build/bench/gpu $(GPU_MODEL)
	@$(or $(PYTHON_GPU),python3) bench/gpu_report.py build/bench/gpu

.PHONY: quality
quality: ## Measure what each method costs in attention output; writes docs/quality.md
	@$(MAKE) build CMAKE_ARGS="-DKVERN_BENCH=ON $(CMAKE_ARGS)"
	@$(PYTHON) bench/quality/quality.py

.PHONY: quality-engine
quality-engine: build ## Measure next tokens and retrieval over compact caches in vLLM; writes docs/quality.md (an hour)
	@PYTHONPATH=$(CURDIR)/$(RELEASE)/python $(PYTHON) bench/quality/engine_quality.py

.PHONY: lint
lint: setup ## Formatting, clang-tidy, include arrows
	@tools/lint.sh

.PHONY: lint-quick
lint-quick: setup ## Formatting and include arrows only
	@tools/lint.sh --quick

.PHONY: lint-recent
lint-recent: setup ## Formatting, include arrows, and clang-tidy over what the last commits changed
	@tools/lint.sh --recent

.PHONY: asan tsan
asan tsan: setup ## Build with sanitizers and run the unit and integration tests
	@cmake --preset $@ $(LAUNCHER) $(CMAKE_ARGS) >/dev/null
	@ninja -C build/$@ -j $(JOBS)
	@ctest --preset $@ -j $(JOBS)

.PHONY: fuzz
fuzz: setup ## Run each fuzzer for FUZZ_SECONDS (30)
	@tools/fuzz.sh $(FUZZ_SECONDS)

.PHONY: clean
clean: ## Remove what was built (not the models, not the virtual environment)
	@find build -mindepth 1 -maxdepth 1 ! -name models -exec rm -rf {} + 2>/dev/null || true
