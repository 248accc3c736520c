# Every target sets up what it needs: a virtual environment in .venv with pinned tools and PyTorch, and the build.
#
#   PYTHON=python3.12   the Python to use
#   JOBS=4              compilers and test processes at a time; MAX_JOBS, if set, else as many as processors
SHELL := bash
.SHELLFLAGS := -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
JOBS ?= $(or $(MAX_JOBS),$(shell nproc))
CMAKE_BUILD := build/cmake
SANITIZE_BUILD := build/cmake-sanitize

BIN := $(CURDIR)/.venv/bin
export PATH := $(BIN):$(PATH)
export MAX_JOBS := $(JOBS)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# A file, or a folder whose list of files changed, makes the installed package out of date.
SOURCES := setup.py pyproject.toml python/zexpert/_version.py $(shell find csrc -not -name '*.orig')
CXX_FILES := $(shell find csrc tests/cpp examples -name "*.h" -o -name "*.cpp" -o -name "*.cu" -o -name "*.cuh")
TOOLS := .venv/tools.stamp
DOCS_TOOLS := .venv/docs.stamp
CUDA_TOOLS := .venv-cuda/tools.stamp
OLDEST_TOOLS := .venv-oldest/tools.stamp
VLLM_TOOLS := .venv-vllm/tools.stamp
SGLANG_TOOLS := .venv-sglang/tools.stamp
INSTALLED := .venv/installed.stamp
NVCC := $(firstword $(CUDA_HOME:%=%/bin/nvcc) $(wildcard /usr/local/cuda/bin/nvcc) nvcc)

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-17s %s\n", $$1, $$2}' Makefile

.PHONY: demo
demo: $(INSTALLED) ## train a small model and show where it spends its compute (TEXT=file, DEMO_ARGS="--steps 100")
	zexpert demo $(if $(TEXT),--text "$(TEXT)") $(DEMO_ARGS)

.PHONY: test
test: test-python test-cpp ## test the package and the C++ libraries

.PHONY: test-all
test-all: test test-wheels docs ## also build and test wheels under three PyTorches, compile the CUDA code, build the docs

# A file is tested by one process, with one thread: the processes share the processors.
.PHONY: test-python
test-python: $(INSTALLED) ## run the Python tests (PYTEST_ARGS="-k router")
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python -m pytest --numprocesses $(JOBS) --dist loadfile $(PYTEST_ARGS)

.PHONY: test-cpp
test-cpp: $(INSTALLED) ## build with CMake, warnings as errors, and run the C++ tests
	@tests/requirements/check_system.sh python googletest
	cmake -S . -B $(CMAKE_BUILD) -G Ninja -DZEXPERT_TORCH=ON -DZEXPERT_CUDA=OFF \
	  -DCMAKE_PREFIX_PATH="$$(python -c 'import torch; print(torch.utils.cmake_prefix_path)')"
	cmake --build $(CMAKE_BUILD) --parallel $(JOBS)
	ctest --test-dir $(CMAKE_BUILD) --output-on-failure

# Needs no GPU. The environments of the other PyTorches take some gigabytes each.
.PHONY: test-wheels
test-wheels: $(TOOLS) $(CUDA_TOOLS) $(OLDEST_TOOLS) sdist ## build the wheels, install each under the oldest and newest PyTorch
	rm -rf dist/cpu
	@echo "building the wheel from the sdist (log: build/wheel.log)"
	@mkdir -p build
	@ZEXPERT_CUDA=off python -m pip wheel --verbose dist/*.tar.gz --no-build-isolation --no-deps --wheel-dir dist/cpu \
	  > build/wheel.log 2>&1 || { tail -n 60 build/wheel.log; exit 1; }
	@if $(NVCC) --version > /dev/null 2>&1; then \
	  $(MAKE) --no-print-directory cuda-wheel; \
	else \
	  rm -rf dist/cuda; \
	  echo "test-wheels: no nvcc ($(NVCC)), the wheel with CUDA is SKIPPED: the CUDA code was not compiled"; \
	fi
	python tests/wheels/check_wheels.py dist/c*/*.whl \
	  --torch .venv/bin/python --torch .venv-cuda/bin/python --oldest-torch .venv-oldest/bin/python

.PHONY: sdist
sdist: $(TOOLS) ## pack the sources into dist
	rm -f dist/*.tar.gz
	@python -c 'import setuptools.build_meta as backend; backend.build_sdist("dist")' > /dev/null
	@ls -l dist/*.tar.gz

.PHONY: cuda-wheel
cuda-wheel: $(CUDA_TOOLS) ## build the wheel with CUDA into dist/cuda, with a PyTorch of its own in .venv-cuda
	rm -rf dist/cuda
	@echo "compiling the CUDA code (log: build/cuda-wheel.log)"
	@mkdir -p build
	@PATH="$(CURDIR)/.venv-cuda/bin:$$PATH" ZEXPERT_CUDA=on NVCC_APPEND_FLAGS="-Werror all-warnings" \
	  .venv-cuda/bin/python -m pip wheel --verbose . --no-build-isolation --no-deps --wheel-dir dist/cuda \
	  > build/cuda-wheel.log 2>&1 || { grep -E "error|warning" build/cuda-wheel.log | head -n 40; exit 1; }
	@ls -l dist/cuda

# vLLM's routers, layers and engine on a CPU. Its models' image and sound libraries load only with a PyTorch with CUDA.
.PHONY: test-vllm
test-vllm: $(VLLM_TOOLS) wheel ## test the vLLM plugin against vLLM itself, in an environment of its own
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet --no-deps --force-reinstall dist/*.whl
	.venv-vllm/bin/python -m pytest $(PYTEST_ARGS) tests/vllm

.PHONY: test-sglang
test-sglang: $(SGLANG_TOOLS) wheel ## test the SGLang plugin against SGLang itself, in an environment of its own
	.venv-sglang/bin/python -m pip install --quiet --no-deps --force-reinstall dist/*.whl
	.venv-sglang/bin/python -m pytest $(PYTEST_ARGS) tests/sglang

.PHONY: test-sanitize
test-sanitize: $(TOOLS) ## run the C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer
	@tests/requirements/check_system.sh python googletest
	cmake -S . -B $(SANITIZE_BUILD) -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	  -DZEXPERT_SANITIZE=address,undefined -DZEXPERT_TORCH=OFF -DZEXPERT_CUDA=OFF
	cmake --build $(SANITIZE_BUILD) --parallel $(JOBS)
	UBSAN_OPTIONS=print_stacktrace=1 ctest --test-dir $(SANITIZE_BUILD) --output-on-failure

.PHONY: lint
lint: $(TOOLS) ## check format, style and types (ruff, mypy --strict, clang-format)
	ruff check .
	ruff format --check .
	mypy
	@echo clang-format --dry-run -Werror "($(words $(CXX_FILES)) files)"
	@clang-format --dry-run -Werror $(CXX_FILES)

.PHONY: format
format: $(TOOLS) ## format the code as lint wants it
	ruff check --fix-only .
	ruff format .
	@clang-format -i $(CXX_FILES)

.PHONY: docs
docs: $(DOCS_TOOLS) ## build the documentation site into site, every link checked
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

.PHONY: bench
bench: $(INSTALLED) ## compare with plain PyTorch and transformers on this CPU
	@mkdir -p benchmarks/results
	python benchmarks/cpu_routing.py --json benchmarks/results/cpu_routing.json $(BENCH_ARGS)
	python benchmarks/cpu_layer.py --json benchmarks/results/cpu_layer.json $(BENCH_ARGS)
	python benchmarks/cpu_training.py --json benchmarks/results/cpu_training.json
	python benchmarks/host_time.py --device cpu --json benchmarks/results/host_time.json
	python benchmarks/transformers_model.py --device cpu --json benchmarks/results/transformers_model.json

.PHONY: bench-gpu
bench-gpu: $(INSTALLED) ## compare with PyTorch, and with what else is installed, on a GPU
	@mkdir -p benchmarks/results
	for name in routing epilogue experts layer fp8; do \
	  python benchmarks/gpu_$$name.py --json benchmarks/results/gpu_$$name.json $(BENCH_ARGS) || exit; \
	done
	python benchmarks/host_time.py --device cuda --json benchmarks/results/host_time_cuda.json
	python benchmarks/transformers_model.py --device cuda --json benchmarks/results/transformers_model_cuda.json

.PHONY: wheel
wheel: $(TOOLS) ## build the wheel into dist (with CUDA if .venv's PyTorch has it, or as ZEXPERT_CUDA says)
	python -m pip wheel . --no-build-isolation --no-deps --wheel-dir dist

.PHONY: release-check
release-check: $(TOOLS) ## check that this commit can be released: version, changelog, tag, lint, all tests, archives
	python tests/release/check_release.py
	$(MAKE) --no-print-directory lint test-all
	python tests/release/check_release.py --built

.PHONY: install
install: $(INSTALLED) ## build zexpert and install it into .venv

.PHONY: clean
clean: ## remove what was built, but for the environments
	rm -rf build dist site python/*.egg-info python/zexpert/lib python/zexpert/_C.*.so $(INSTALLED)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean ## remove the environments as well
	rm -rf .venv .venv-cuda .venv-oldest .venv-vllm .venv-sglang

$(TOOLS): tests/requirements/dev.txt
	@tests/requirements/check_system.sh $(PYTHON)
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@echo "installing PyTorch and the tools of $< into .venv: about 1 minute, more on a slow network"
	@.venv/bin/python -m pip install --quiet -r $<
	@touch $@

$(DOCS_TOOLS): .venv/%.stamp: tests/requirements/%.txt $(TOOLS)
	python -m pip install --quiet -r $<
	@touch $@

$(CUDA_TOOLS) $(OLDEST_TOOLS) $(VLLM_TOOLS) $(SGLANG_TOOLS): .venv-%/tools.stamp: tests/requirements/%.txt
	@tests/requirements/check_system.sh $(PYTHON)
	@test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	@echo "installing what $< lists into .venv-$*"
	.venv-$*/bin/python -m pip install --quiet -r $<
	@touch $@

# The library is in the source tree, where another environment's build may have put or removed it.
$(INSTALLED): $(TOOLS) $(SOURCES) $(if $(wildcard python/zexpert/lib/libzexpert.so),,rebuild)
	@mkdir -p build
	@echo "building zexpert's C++ libraries, $(JOBS) compilers at a time: about 2 minutes on 2 cores (log: build/install.log)"
	@python -m pip install --verbose --no-build-isolation --no-deps -e . 2>&1 | tee build/install.log \
	  | sed -unE -e '/zexpert build/,/^ *$$/p' -e 's#.*(\[[0-9]+/[0-9]+\]).* -c [^ ]*(csrc/[^ ]+).*#  \1 \2#p' \
	  || { tail -n 60 build/install.log; exit 1; }
	@touch $@

.PHONY: rebuild
rebuild:
