# What a user and CI run. Everything happens in .venv, made at the first call; `make clean` removes it.
#   make demo     trains on real images with torch.nn and with bn_ext, side by side
#   make test     builds and runs the whole test suite
#   make test-quick  one case of each test that does not take long: for the edit loop
#   make bench    compares with torch.nn on the best device of this machine
#   make lint     ruff, mypy, clang-format
#   make test-cuda-on-cpu  the test suite once more, with the CUDA kernels executed on the CPU
#   make test-cuda-build   builds with CUDA kernels and checks what came of it; needs nvcc and 5.5 GB, no GPU
#   make test-arm64        compiles the CPU kernels for arm64; needs Debian's g++-aarch64-linux-gnu
#   make test-gpu          all that a GPU can tell, into the folder OUT: build, tests, compute-sanitizer, benchmarks
# TORCH=torch==2.13.0 installs that torch, and so do later calls; otherwise one that PYTHON can import is used, else the
# newest: on a machine without a GPU the newest CPU build, if pip's index has one. Kernels are built for this machine,
# unless BN_EXT_CUDA or TORCH_CUDA_ARCH_LIST say otherwise.

PYTHON ?= python3
TORCH ?=
VENV ?= .venv
# Tests on a GPU measure its memory, so they run one at a time.
WORKERS ?= $(shell nvidia-smi -L > /dev/null 2>&1 && echo 0 || echo 2)
PYTEST = $(RUN) -m pytest -n $(WORKERS) --dist worksteal
OUT ?= gpu-check
RUN := $(VENV)/bin/python
FORMATTED := $(shell find benchmarks csrc lab tests -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-quick test-cuda-on-cpu test-cuda-build test-arm64 test-gpu bench lint format build clean

# env-A-B: makes the environment with the extras A and B, and rebuilds the extension if a source has changed.
.NOTPARALLEL:
env-%:
	@$(PYTHON) scripts/make_env.py --folder $(VENV) --torch "$(TORCH)" --extras $(subst -, ,$*)

build: env-test-demo-lint

demo: env-demo
	$(RUN) -m examples.digits $(DEMO_OPTIONS)

test: env-test-demo
	$(PYTEST) $(TEST_OPTIONS)

test-quick: env-test-demo
	$(PYTEST) -m quick $(TEST_OPTIONS)

test-cuda-on-cpu: env-test-demo
	$(RUN) tests/cuda_on_cpu/run_suite.py -n $(WORKERS) --dist worksteal $(TEST_OPTIONS)

# Not in .venv: an environment of its own with the oldest torch, kept in the user's cache folder.
test-cuda-build:
	$(PYTHON) scripts/cuda_build_check.py

test-arm64:
	scripts/arm64_check.sh

# With the torch that PYTHON has; installs nothing.
test-gpu:
	PYTHON="$(PYTHON)" scripts/gpu_check.sh "$(OUT)"

bench: env-test
	$(RUN) -m benchmarks $(BENCH_OPTIONS)

lint: env-test-demo-lint
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(FORMATTED)

format: env-test-demo-lint
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(FORMATTED)

clean:
	@if ls $(VENV)/made_by_make $(VENV)/made_for.* 2> /dev/null | grep -q .; then rm -rf $(VENV); fi
	rm -rf build *.egg-info bn_ext/_build_config.py bn_ext/*.so demo-output gpu-check
