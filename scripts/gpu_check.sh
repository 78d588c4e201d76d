#!/usr/bin/env bash
# All that a machine with a GPU can tell: builds bn_ext for this GPU in a copy of the sources, and then, as far as the
# time goes, verifies, tests, measures.
#
#   scripts/gpu_check.sh [folder [step...]]        default: gpu-check, all steps
#
# The steps, in their order:
#   build        for this GPU; USE_BUILT=1 takes the extension that is built in this folder
#   limits       what the GPU can do: benchmarks.device_limits
#   verify       bn_ext against float64, with all teams and with the smaller ones
#   sanitize     every kernel on small tensors, alone and under each tool of compute-sanitizer
#   benchmark    against every rival: benchmarks, for BENCH_SECONDS (default 200)
#   tests        the suite on the GPU
#   faults       work that holds the GPU, many processes, no memory
#   large        tensors of more than 2^31 elements
#   bytes        bytes from and to memory, by ncu: benchmarks.dram
#   training     whole models: benchmarks.training, for TRAIN_SECONDS (default 200)
#   convergence  does training end as well: benchmarks.convergence
#
# The folder gets a log for each step, results as JSON, and summary.json. With the folder of an earlier call, benchmark
# and training go on where that ended. GPU_SECONDS (default 1500) is the time for all together: what does not fit is cut
# off, and the summary says so; a few steps are done well within ten minutes on 16 cores.
# Nothing is installed: PYTHON (default python3) must have torch with CUDA, pytest, and pytest-benchmark for the
# benchmarks; CUDA_HOME or the PATH an nvcc. A step that fails does not keep the next ones from running; the exit status
# is 0 only if none failed.
set -u

sources=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
all="build limits verify sanitize benchmark tests faults large bytes training convergence"

stop() {
  echo "gpu_check: $1" >&2
  exit 2
}

folder=${1:-gpu-check}
[ $# -gt 0 ] && shift
chosen=" ${*:-$all} "
for name in $chosen; do
  case " $all " in *" $name "*) ;; *) stop "there is no step $name; there are: $all" ;; esac
done
total=${GPU_SECONDS:-1500}
case $total in *[!0-9]* | "") stop "GPU_SECONDS must be a number of seconds, got $total" ;; esac

python=$(command -v "$python") || stop "there is no ${PYTHON:-python3}"
case $python in /*) ;; *) python=$PWD/$python ;; esac
"$python" -c 'import torch' 2>/dev/null ||
  stop "$python cannot import torch; name another Python with PYTHON=, as PYTHON=.venv/bin/python"
"$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' 2>/dev/null ||
  stop "torch sees no GPU on this machine; the tests that need none are run by make test"
if [ -n "${CUDA_HOME:-}" ]; then PATH=$CUDA_HOME/bin:$PATH; fi
command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ] ||
  stop "no nvcc was found; install the CUDA toolkit of torch's version or set CUDA_HOME to it"
"$python" -c 'import pytest' 2>/dev/null || stop "$python cannot import pytest"
capabilities='import torch
print(";".join(sorted({"%d.%d" % torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})))'
architectures=$("$python" -c "$capabilities") || stop "torch could not tell the GPU's compute capability"
export BN_EXT_CUDA=1 TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$architectures}"

mkdir -p "$folder" || stop "the folder $folder cannot be made"
out=$(cd "$folder" && pwd)
copy=$(mktemp -d) || stop "no temporary folder could be made"
steps=$out/steps.tsv # name, result, exit status, seconds, command
: >"$steps"

# Written also when something ends the script before its time.
finish() {
  "$python" "$sources/scripts/gpu_summary.py" "$steps" "$sources" "$out"
  status=$?
  rm -rf "$copy" "$steps"
  exit "$status"
}
trap finish EXIT
trap 'exit 130' INT TERM

wanted() { [[ $chosen == *" $1 "* ]]; }
has() { "$python" -c "import $1" 2>/dev/null; }

# step NAME SECONDS COMMAND...: runs it in the copy, at most so long and not beyond the end of all; its output goes to
# NAME.log.
step() {
  local name=$1 limit=$2 start=$SECONDS code result=passed left=$((total - SECONDS))
  shift 2
  if [ "$left" -lt 5 ]; then
    note "$name" "cut off: the $total s of GPU_SECONDS are over" "" 0 "$*"
    return 1
  fi
  if [ "$left" -lt "$limit" ]; then limit=$left; fi
  # INT, upon which pytest and the benchmarks still write what they have.
  (cd "$copy" && exec timeout --signal=INT --kill-after=10 "$limit" "$@") >"$out/$name.log" 2>&1
  code=$?
  if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then
    result="cut off after $limit s"
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
  printf '%-18s %s (%s s)\n' "$1" "$2" "$4"
  printf '%s\t%s\t%s\t%s\t%s\n' "$@" >>"$steps"
}
skip() { note "$1" "skipped: $2" "" 0 ""; }

# pytest_step NAME SECONDS ARGUMENTS...: not with the project's options, which ask for pytest-benchmark.
pytest_step() {
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" "$python" -m pytest -o addopts= -ra --strict-markers --device=cuda --durations=20 \
    -p no:cacheprovider --ignore=tests/cuda_on_cpu --junitxml="$out/$name.xml" "$@"
}

built=(--exclude='*.so' --exclude=_build_config.py)
[ "${USE_BUILT:-0}" = 1 ] && built=()
(cd "$sources" && tar --exclude=.git --exclude=.venv --exclude=./gpu-check "${built[@]}" \
  --exclude=__pycache__ -cf - .) | tar -xf - -C "$copy" || stop "the sources could not be copied"
[ "${USE_BUILT:-0}" = 1 ] || rm -rf "$copy/build"
# Of the metadata, what setuptools before 77 refuses and this build does not need.
sed -i '/^license/d' "$copy/pyproject.toml"

told='import bn_ext
info = bn_ext.build_info()
print(info)
raise SystemExit(not (info.loaded and info.cuda))'
if [ "${USE_BUILT:-0}" = 1 ]; then
  step build 30 "$python" -c "$told"
else
  # Line numbers for compute-sanitizer; they change no machine code.
  step build 200 env NVCC_APPEND_FLAGS=-lineinfo "$python" setup.py build_ext --inplace
fi || stop "without a build there is nothing to check"

if wanted limits; then
  step limits 70 "$python" -m benchmarks.device_limits --budget 60 --json "$out/device_limits.json"
fi

if wanted verify; then
  step verify 60 "$python" -m bn_ext verify
  for teams in none block cluster; do # where verify fails, which teams it takes to fail
    step "verify-$teams" 30 env BN_EXT_CUDA_TEAMS="$teams" "$python" -m bn_ext verify
  done
fi

# What the tools see:
#   memcheck   accesses outside of allocations, global and shared ones, misaligned ones, and CUDA's own errors
#   racecheck  shared memory that threads of a block use without a barrier between them; not global memory, so not how
#              the teams of a grid exchange sums
#   initcheck  reads of global memory that nothing has written; not shared memory
#   synccheck  barriers and warp operations that some of their threads do not reach, or with a wrong mask
# None of them sees a missing fence.
if wanted sanitize; then
  driver=$copy/kernels_driver_program
  objects=$(ls -d "$copy"/build/temp*/csrc/cuda 2>/dev/null) # without which the kernels are compiled once more
  if step driver 150 bash -c '"$0" "$@" && "$1"' tests/kernels_driver/build.sh "$driver" ${objects:+"$objects"}; then
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
  fi
fi

if wanted benchmark; then
  if has pytest_benchmark; then
    step benchmark $((${BENCH_SECONDS:-200} + 60)) "$python" -m benchmarks --resume --budget "${BENCH_SECONDS:-200}" \
      --json "$out/batch_norm.json"
  else
    skip benchmark "pytest-benchmark is not installed"
  fi
fi

if wanted tests; then
  workers=()
  if has xdist; then workers=(-n 6 --dist worksteal); fi
  apart=(--ignore=tests/test_cuda_faults.py --ignore=tests/test_cuda_out_of_memory.py)
  pytest_step tests 300 "${workers[@]}" -m "not large_memory" "${apart[@]}"
fi
if wanted faults; then pytest_step faults 150 tests/test_cuda_faults.py tests/test_cuda_out_of_memory.py; fi
if wanted large; then pytest_step large 120 -m large_memory; fi
if wanted bytes; then step bytes 120 "$python" -m benchmarks.dram --budget 60 --json "$out/dram.json"; fi
if wanted training; then
  step training $((${TRAIN_SECONDS:-200} + 60)) "$python" -m benchmarks.training --resume \
    --budget "${TRAIN_SECONDS:-200}" --json "$out/training.json"
fi
if wanted convergence; then
  step convergence 60 "$python" -m benchmarks.convergence --budget 30 --json "$out/convergence.json"
fi
echo end >>"$steps"
