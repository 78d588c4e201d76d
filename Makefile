# What a user and CI run. Everything happens in .venv, made at the first call; `make clean` removes it.
#   make demo     trains on real images with torch.nn and with bn_ext, side by side
#   make test     builds and runs the whole test suite
#   make bench    compares with torch.nn on the best device of this machine
#   make lint     ruff, mypy, clang-format
#   make test-cuda-on-cpu  the test suite once more, with the CUDA kernels executed on the CPU
#   make test-cuda-build   builds with CUDA kernels and checks what came of it; needs nvcc and 5.5 GB, no GPU
#   make test-arm64        compiles the CPU kernels for arm64; needs Debian's g++-aarch64-linux-gnu
#   make test-gpu          all that a GPU can tell, into the folder OUT: build, tests, compute-sanitizer, benchmarks
# TORCH=torch==2.13.0 installs that torch, and so do later calls; otherwise one that PYTHON can import is used, else the
# newest.

PYTHON ?= python3
TORCH ?=
VENV ?= .venv
OUT ?= gpu-check
RUN := $(VENV)/bin/python
FORMATTED := $(shell find benchmarks csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-cuda-on-cpu test-cuda-build test-arm64 test-gpu bench lint format build clean

# The environment, and the extension built in it; again where a source has changed.
build:
	@$(PYTHON) scripts/make_env.py --folder $(VENV) --torch "$(TORCH)"

demo: build
	$(RUN) -m examples.digits $(DEMO_OPTIONS)

test: build
	$(RUN) -m pytest $(TEST_OPTIONS)

test-cuda-on-cpu: build
	$(RUN) tests/cuda_on_cpu/run_suite.py $(TEST_OPTIONS)

# Not in .venv: an environment of its own with the oldest torch, kept in the user's cache folder.
test-cuda-build:
	$(PYTHON) scripts/cuda_build_check.py

test-arm64:
	scripts/arm64_check.sh

# With the torch that PYTHON has; installs nothing.
test-gpu:
	PYTHON="$(PYTHON)" scripts/gpu_check.sh "$(OUT)"

bench: build
	$(RUN) -m benchmarks $(BENCH_OPTIONS)

lint: build
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(FORMATTED)

format: build
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(FORMATTED)

clean:
	rm -rf $(VENV) build *.egg-info bn_ext/_build_config.py bn_ext/*.so demo-output gpu-check
