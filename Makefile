# Commands for users and CI. They run in the environment .venv, which the first call makes and `make clean` removes.
#   make demo     trains on real images with torch.nn and with bn_ext, side by side
#   make test     builds and runs the whole test suite
#   make test-quick  runs one case of each short test, for use while editing
#   make bench    compares bn_ext with torch.nn on the best device of this machine
#   make lint     runs ruff, mypy and clang-format
#   make test-cuda-on-cpu  runs the test suite with the CUDA kernels executed on the CPU
#   make test-cuda-build   builds with CUDA kernels and checks the build; needs nvcc and 5.5 GB, no GPU
#   make test-arm64        compiles the CPU kernels for arm64; needs Debian's g++-aarch64-linux-gnu
#   make test-gpu          runs all checks that need a GPU: build, tests, compute-sanitizer, benchmarks; fills OUT
# TORCH=torch==2.13.0 installs that version; later calls keep it. By default make uses a torch that PYTHON can import,
# or else installs the newest (without a GPU, the newest CPU build if pip's index has one). Kernels are built for this
# machine unless BN_EXT_CUDA or TORCH_CUDA_ARCH_LIST is set.

PYTHON ?= python3
TORCH ?=
VENV ?= .venv
# Tests on a GPU measure its memory, so only one may run at a time.
WORKERS ?= $(shell nvidia-smi -L > /dev/null 2>&1 && echo 0 || echo 2)
PYTEST = $(RUN) -m pytest -n $(WORKERS) --dist worksteal
OUT ?= gpu-check
RUN := $(VENV)/bin/python
FORMATTED := $(shell find benchmarks csrc lab tests -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-quick test-cuda-on-cpu test-cuda-build test-arm64 test-gpu bench lint format build clean

# env-A-B: makes the environment with extras A and B, and rebuilds the extension if a source has changed.
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

# Uses its own environment with the oldest supported torch, in the user's cache folder.
test-cuda-build:
	$(PYTHON) scripts/cuda_build_check.py

test-arm64:
	scripts/arm64_check.sh

# Uses PYTHON's torch and installs nothing.
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
