#!/usr/bin/env bash
# All that a machine with a GPU can tell, in under 9 minutes on 16 cores: builds bn_ext for this GPU in a copy of the
# sources, verifies it, runs the tests on the GPU, a short benchmark, and compute-sanitizer on every kernel.
#
#   scripts/gpu_check.sh [folder]        default: gpu-check
#
# The folder gets a log for each step, tests.xml, benchmark.json and summary.json. Nothing is installed: PYTHON (default
# python3) must have torch with CUDA, pytest, and pytest-benchmark for the benchmark; CUDA_HOME or the PATH an nvcc.
# BENCH_BATCH (default 64) is the benchmark's batch size.
# A step that fails does not keep the next ones from running; the exit status is 0 only if none failed.
set -u

sources=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
total=530 # seconds, for all steps together

stop() {
  echo "gpu_check: $1" >&2
  exit 2
}

[ $# -le 1 ] || stop "give at most one folder, got $# arguments"
python=$(command -v "$python") || stop "there is no ${PYTHON:-python3}"
case $python in /*) ;; *) python=$PWD/$python ;; esac
"$python" -c 'import torch' 2>/dev/null || stop "$python cannot import torch; name another Python with PYTHON=, as PYTHON=.venv/bin/python"
"$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' 2>/dev/null ||
  stop "torch sees no GPU on this machine; the tests that need none are run by make test"
if [ -n "${CUDA_HOME:-}" ]; then PATH=$CUDA_HOME/bin:$PATH; fi
command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ] ||
  stop "no nvcc was found; install the CUDA toolkit of torch's version or set CUDA_HOME to it"
"$python" -c 'import pytest' 2>/dev/null || stop "$python cannot import pytest"

mkdir -p "${1:-gpu-check}" || stop "the folder ${1:-gpu-check} cannot be made"
out=$(cd "${1:-gpu-check}" && pwd)
copy=$(mktemp -d) || stop "no temporary folder could be made"
steps=$out/steps.tsv # name, status, exit status, seconds, command
: >"$steps"

# Written also when something ends the script before its time.
finish() {
  "$python" "$sources/scripts/gpu_summary.py" "$steps" "$sources" "$out/summary.json"
  status=$?
  rm -rf "$copy" "$steps"
  exit "$status"
}
trap finish EXIT
trap 'exit 130' INT TERM

# step NAME SECONDS COMMAND...: runs it in the copy, at most so long and not beyond the end of all; its output goes to
# NAME.log.
step() {
  local name=$1 limit=$2 start=$SECONDS code result=passed left=$((total - SECONDS))
  shift 2
  printf '%-12s' "$name"
  if [ "$left" -lt "$limit" ]; then limit=$((left > 1 ? left : 1)); fi
  # INT, upon which pytest still writes what it has.
  (cd "$copy" && exec timeout --signal=INT --kill-after=10 "$limit" "$@") >"$out/$name.log" 2>&1
  code=$?
  if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then
    result="timed out after $limit s"
  elif [ "$code" -ne 0 ] && grep -q 'Device not supported' "$out/$name.log"; then
    result="skipped: compute-sanitizer does not support this device"
  elif [ "$code" -ne 0 ]; then
    result=failed
  fi
  note "$name" "$result" "$code" $((SECONDS - start)) "$*"
  case $result in passed | skipped*) return ;; esac
  tail -n 15 "$out/$name.log" | sed 's/^/    /'
  echo
  return 1
}

# note NAME RESULT STATUS SECONDS COMMAND: what becomes of a step, or why it is left out.
note() {
  printf '%s (%s s)\n' "$2" "$4"
  printf '%s\t%s\t%s\t%s\t%s\n' "$@" >>"$steps"
}

skip() {
  printf '%-12s' "$1"
  note "$1" "skipped: $2" "" 0 ""
}

(cd "$sources" && tar --exclude=.git --exclude=.venv --exclude=./build --exclude=./gpu-check --exclude='*.so' --exclude=_build_config.py \
  --exclude=__pycache__ -cf - .) | tar -xf - -C "$copy" || stop "the sources could not be copied"

# Of the metadata, what setuptools before 77 refuses and this build does not need.
sed -i '/^license/d' "$copy/pyproject.toml"

capabilities='import torch
print(";".join(sorted({"%d.%d" % torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})))'
architectures=$("$python" -c "$capabilities") || stop "torch could not tell the GPU's compute capability"
export BN_EXT_CUDA=1 TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$architectures}"

# Line numbers for compute-sanitizer; they change no machine code.
if step build 150 env NVCC_APPEND_FLAGS=-lineinfo "$python" setup.py build_ext --inplace; then
  step verify 60 "$python" -m bn_ext verify
  for teams in none block cluster; do # where verify fails, which teams it takes to fail
    step "verify-$teams" 30 env BN_EXT_CUDA_TEAMS="$teams" "$python" -m bn_ext verify
  done

  # Not the project's options: they ask for pytest-benchmark, which tests do without.
  step tests 240 "$python" -m pytest -o addopts= -ra --strict-markers --device=cuda --durations=20 -p no:cacheprovider \
    --ignore=tests/cuda_on_cpu --junitxml="$out/tests.xml"

  if "$python" -c 'import pytest_benchmark' 2>/dev/null; then
    step benchmark 110 "$python" -m benchmarks --quick -k "not eval" --batch "${BENCH_BATCH:-64}" --json "$out/benchmark.json"
  else
    skip benchmark "pytest-benchmark is not installed"
  fi

  # Every kernel on small tensors, in a program without torch; first as it is, then under each tool. What the tools see:
  #   memcheck   accesses outside of allocations, global and shared ones, misaligned ones, and CUDA's own errors
  #   racecheck  shared memory that threads of a block use without a barrier between them; not global memory, so not how
  #              the teams of a grid exchange sums
  #   initcheck  reads of global memory that nothing has written; not shared memory
  #   synccheck  barriers and warp operations that some of their threads do not reach, or with a wrong mask
  # None of them sees a missing fence.
  driver=$copy/kernels_driver_program
  if step driver 40 bash -c '"$0" "$1" "$2" && "$1"' tests/kernels_driver/build.sh "$driver" "$copy"/build/temp*/csrc/cuda; then
    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
    for tool in memcheck racecheck initcheck synccheck; do
      of_tool=() of_driver=(--verbose --seconds 24)
      case $tool in
        memcheck) of_tool=(--padding 256 --destroy-on-device-error kernel) ;; # so that the other cases run too
        initcheck) of_driver+=(--unwritten) ;;
      esac
      if [ -n "$sanitizer" ]; then
        step "$tool" 30 "$sanitizer" --tool "$tool" --error-exitcode 9 "${of_tool[@]}" "$driver" "${of_driver[@]}"
      else
        skip "$tool" "compute-sanitizer is not installed"
      fi
    done
  else
    for tool in memcheck racecheck initcheck synccheck; do skip "$tool" "the step driver failed"; done
  fi
else
  for name in verify verify-none verify-block verify-cluster tests benchmark driver memcheck racecheck initcheck synccheck; do
    skip "$name" "the build failed"
  done
fi
