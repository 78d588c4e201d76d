#!/usr/bin/env bash
# Runs all checks that need a GPU: builds bn_ext for this GPU in a copy of the sources; then, as far as time allows,
# verifies, tests and measures it.
#
#   scripts/gpu_check.sh [folder [step...]]        default: gpu-check, all steps
#
# The steps, in order:
#   build        for this GPU, unless the folder has an earlier build of the same sources; USE_BUILT=1 takes the
#                extension (and the kernels_driver_program) that is built in this checkout
#   verify       bn_ext against float64 on the GPU, with all teams, with smaller ones, and without PDL
#   kernels      every kernel on small tensors: tests/kernels_driver
#   grids        two cooperative grids at the same time, before other steps could hang because of them
#   tests        the test suite on the GPU
#   faults       work that occupies the GPU, launches under stress, many processes, out of memory
#   large        tensors of more than 2^31 elements, and other tests that need the GPU for themselves
#   limits       the limits of the GPU: benchmarks.device_limits
#   benchmark    comparison with all other libraries: benchmarks, for BENCH_SECONDS (default 60)
#   bytes        bytes read from and written to memory, by ncu: benchmarks.dram
#   training     whole models: benchmarks.training, for TRAIN_SECONDS (default 200)
#   convergence  whether training converges as well: benchmarks.convergence
#   sanitize     every kernel on small tensors under each tool of compute-sanitizer
#
# Two names stand for the steps of one call if a GPU is available for 15 minutes in total and 10 minutes per call:
#   first        build verify kernels grids tests; best with USE_BUILT=1, so that the GPU is not idle during the build
#   second       build faults large limits benchmark sanitize, with the same folder, which has the build
#
# The script writes to the folder: a log of each step, results as JSON (....partial.json if a measurement was cut off),
# summary.json, and results.tar.gz with all of these. If the folder has results of an earlier call on the same kind of
# GPU, benchmark and training resume from them. GPU_SECONDS limits the total time (default: 420 for first, 360 for
# second, otherwise 1500): steps that exceed it are cut off, and the summary reports them.
# The script installs nothing: PYTHON (default python3) must have torch with CUDA, pytest, and pytest-benchmark for the
# benchmarks, and nvcc must be in CUDA_HOME or on PATH. If a step fails, the next ones still run. The exit status is 0
# only if no step failed.
set -u

sources=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
all="build verify kernels grids tests faults large limits benchmark bytes training convergence sanitize"
first="build verify kernels grids tests"
second="build faults large limits benchmark sanitize"

stop() {
  echo "gpu_check: $1" >&2
  exit 2
}

folder=${1:-gpu-check}
[ $# -gt 0 ] && shift
seconds=1500
case "$*" in
  first) seconds=420 chosen=" $first " ;;
  second) seconds=360 chosen=" $second " ;;
  *) chosen=" ${*:-$all} " ;;
esac
for name in $chosen; do
  case " $all " in *" $name "*) ;; *) stop "unknown step $name; the steps are: $all; or first, or second" ;; esac
done
total=${GPU_SECONDS:-$seconds}
case $total in *[!0-9]* | "") stop "GPU_SECONDS must be a number of seconds, got $total" ;; esac

python=$(command -v "$python") || stop "${PYTHON:-python3} was not found; set PYTHON to a Python that has torch"
case $python in /*) ;; *) python=$PWD/$python ;; esac
if [ -n "${CUDA_HOME:-}" ]; then PATH=$CUDA_HOME/bin:$PATH; fi
command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ] ||
  stop "no nvcc was found; install the CUDA toolkit of torch's version or set CUDA_HOME to it"
answers=$("$python" "$sources/scripts/gpu_probe.py") || exit 2 # it has printed the reason
{ read -r architectures && read -r state && read -r packages && read -r machine; } <<<"$answers"
export BN_EXT_CUDA=1 TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$architectures}"

mkdir -p "$folder" || stop "the folder $folder cannot be created; name another one"
out=$(cd "$folder" && pwd)
copy=$(mktemp -d) || stop "a temporary folder cannot be created; set TMPDIR to a writable folder"
steps=$out/steps.tsv # name, result, exit status, seconds, command
: >"$steps"

# Writes the summary, also if the script ends early.
finish() {
  "$python" "$sources/scripts/gpu_summary.py" "$steps" "$sources" "$out" "$state" "$machine"
  status=$?
  (cd "$out" && tar --exclude='./built-*.tar' --exclude=./results.tar.gz --exclude=./steps.tsv -czf results.tar.gz .)
  rm -rf "$copy" "$steps"
  exit "$status"
}
trap finish EXIT

# On a signal, interrupts the running step, which then still writes its results. The signal may come before the step's
# process exists; $! is set as soon as it does.
running=
interrupted() {
  if [ -n "$running" ] && [ -n "${!:-}" ]; then
    kill -INT $! 2>/dev/null
    wait $!
    note "$current" "cut off by a signal" "" $((SECONDS - start)) "$command"
  fi
  exit 130
}
trap interrupted INT TERM

wanted() { [[ $chosen == *" $1 "* ]]; }
has() { [[ " $packages " == *" $1 "* ]]; }

# step NAME SECONDS COMMAND...: runs the command in the copy, for at most SECONDS and the remaining time. Its output
# goes to NAME.log.
step() {
  local limit=$2 code result=passed remaining=$((total - SECONDS))
  current=$1 start=$SECONDS
  shift 2
  command=$*
  if [ "$remaining" -lt 5 ]; then
    note "$current" "cut off: time budget of $total s (GPU_SECONDS) exhausted" "" 0 "$command"
    return 1
  fi
  if [ "$remaining" -lt "$limit" ]; then limit=$remaining; fi
  # On INT, pytest and the benchmarks still write their results. The command runs in the background, because a shell
  # handles no signal while it waits for a command in the foreground.
  running=1
  (cd "$copy" && exec timeout --signal=INT --kill-after=25 "$limit" "$@") >"$out/$current.log" 2>&1 &
  wait $!
  code=$?
  running=
  if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then
    result="cut off after $limit s"
  elif [ "$code" -eq 3 ] && [ -n "${INCOMPLETE:-}" ]; then
    result="passed: $INCOMPLETE"
  elif [ "$code" -ne 0 ] && grep -q 'Device not supported' "$out/$current.log"; then
    result="skipped: compute-sanitizer does not support this device"
  elif [ "$code" -ne 0 ]; then
    result=failed
  fi
  note "$current" "$result" "$code" $((SECONDS - start)) "$command"
  case $result in passed* | skipped*) return ;; esac
  tail -n 15 "$out/$current.log" | sed 's/^/    /'
  echo
  return 1
}

# note NAME RESULT STATUS SECONDS COMMAND: prints and records the result of a step, or why it is skipped.
note() {
  printf '%-18s %s (%s s)\n' "$1" "$2" "$4"
  printf '%s\t%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" "${5//[$'\t\n']/ }" >>"$steps"
}
skip() { note "$1" "skipped: $2" "" 0 ""; }

# pytest_step NAME SECONDS ARGUMENTS...: runs pytest without the project's options, which need pytest-benchmark.
pytest_step() {
  local name=$1 limit=$2
  shift 2
  rm -f "$out/$name.xml" # from an earlier call
  step "$name" "$limit" "$python" -m pytest -o addopts= -v -ra --strict-markers --device=cuda --durations=20 \
    -p no:cacheprovider --ignore=tests/cuda_on_cpu --junitxml="$out/$name.xml" "$@"
}

# Copies no products of earlier builds, in any folder: they would be mistaken for products of this one.
built=(--exclude='*.so' --exclude=_build_config.py --exclude=./build --exclude=kernels_driver_program)
[ "${USE_BUILT:-0}" = 1 ] && built=()
(cd "$sources" && tar --exclude=.git --exclude=.venv --exclude=./gpu-check --exclude="./${out#"$sources/"}" \
  "${built[@]}" --exclude=__pycache__ -cf - .) | tar -xf - -C "$copy" || stop "the sources cannot be copied to $copy"
# Removes metadata that setuptools before 77 refuses and this build does not need.
sed -i '/^license/d' "$copy/pyproject.toml"

objects() { ls -td "$copy"/build/temp*/csrc/cuda 2>/dev/null | head -n 1; }
told='import bn_ext; info = bn_ext.build_info(); print(info); raise SystemExit(not (info.loaded and info.cuda))'
kept=$out/built-$state.tar
keep_build() {
  (cd "$copy" && tar -cf "$kept" bn_ext/*.so bn_ext/_build_config.py build/temp*/csrc/cuda) 2>/dev/null || rm -f "$kept"
}
if [ "${USE_BUILT:-0}" = 1 ]; then
  step build 60 "$python" -c "$told" && keep_build
elif [ -f "$kept" ] && tar -xf "$kept" -C "$copy"; then
  step build 60 "$python" -c "$told"
else
  # -lineinfo adds line numbers for compute-sanitizer and changes no machine code.
  step build "$total" env NVCC_APPEND_FLAGS=-lineinfo "$python" setup.py build_ext --inplace && keep_build
fi || stop "bn_ext is not built, so nothing can be checked; see $out/build.log"

if wanted verify; then
  verify=("$python" -m bn_ext verify --device cuda)
  step verify 60 "${verify[@]}"
  for teams in none block cluster; do # which teams, or PDL, does a failure of verify take?
    step "verify-$teams" 30 env BN_EXT_CUDA_TEAMS="$teams" "${verify[@]}"
  done
  step verify-no-pdl 30 env BN_EXT_CUDA_PDL=0 "${verify[@]}"
fi

# make_driver: builds the program that runs every kernel, unless it exists; tries only once.
driver=$copy/kernels_driver_program attempted=
make_driver() {
  local found
  found=$(objects) # without them the kernels are compiled again
  if [ -z "$attempted" ] && [ ! -x "$driver" ]; then
    step driver 200 tests/kernels_driver/build.sh "$driver" ${found:+"$found"}
  fi
  attempted=1
  [ -x "$driver" ]
}
if wanted kernels && make_driver; then step kernels 60 "$driver"; fi

grids=tests/test_cuda_two_grids.py
faults=(tests/test_cuda_faults.py tests/test_cuda_launches.py tests/test_cuda_out_of_memory.py)
if wanted grids; then pytest_step grids 120 -x "$grids"; fi
if wanted tests; then
  workers=()
  if has xdist; then workers=(-n 6 --dist worksteal); fi
  apart=("--ignore=$grids" "${faults[@]/#/--ignore=}")
  pytest_step tests 300 "${workers[@]}" -m "not large_memory and not alone" "${apart[@]}"
fi
if wanted faults; then pytest_step faults 150 "${faults[@]}"; fi
if wanted large; then pytest_step large 90 -m "large_memory or alone"; fi

if wanted limits; then
  step limits 70 "$python" -m benchmarks.device_limits --budget 60 --json "$out/device_limits.json"
fi
if wanted benchmark; then
  if has pytest_benchmark; then
    step benchmark $((${BENCH_SECONDS:-60} + 60)) "$python" -m benchmarks --resume --budget "${BENCH_SECONDS:-60}" \
      --json "$out/batch_norm.json"
  else
    skip benchmark "pytest-benchmark is not installed"
  fi
fi
if wanted bytes; then step bytes 130 "$python" -m benchmarks.dram --budget 60 --json "$out/dram.json"; fi
if wanted training; then
  step training $((${TRAIN_SECONDS:-200} + 60)) "$python" -m benchmarks.training --resume \
    --budget "${TRAIN_SECONDS:-200}" --json "$out/training.json"
fi
if wanted convergence; then
  step convergence 60 "$python" -m benchmarks.convergence --budget 30 --json "$out/convergence.json"
fi

# The tools detect:
#   memcheck   accesses outside allocations in global and shared memory, misaligned accesses, and CUDA errors
#   racecheck  accesses to shared memory by threads of a block without a barrier between them; not global memory, so
#              not how the teams of a grid exchange sums. NVIDIA does not document that racecheck treats barrier.cluster
#              as a barrier between the threads of a block. A hazard is therefore expected to be a false positive if
#              both accesses are to sums_ or coefficients_ (exchange.cuh), the case (printed before it) has teams of
#              clusters, and a cluster barrier lies between the two lines. Any other hazard is real
#   initcheck  reads of uninitialised global memory; not shared memory
#   synccheck  barriers and warp operations that some of their threads do not reach, or that have a wrong mask
# None of them detects a missing fence.
if wanted sanitize && make_driver; then
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
  for tool in memcheck racecheck initcheck synccheck; do
    of_tool=() of_driver=(--verbose --seconds 24)
    case $tool in
      memcheck) of_tool=(--padding 256 --destroy-on-device-error kernel) ;; # so that the other cases run too
      initcheck) of_driver+=(--unwritten) ;;
    esac
    if [ -n "$sanitizer" ]; then
      INCOMPLETE="not all cases, see the end of $tool.log" step "$tool" 50 \
        "$sanitizer" --tool "$tool" --error-exitcode 9 "${of_tool[@]}" "$driver" "${of_driver[@]}"
    else
      skip "$tool" "compute-sanitizer is not installed"
    fi
  done
fi
echo end >>"$steps"
