#!/usr/bin/env bash
# Builds the driver with nvcc, without torch:
#
#   tests/kernels_driver/build.sh PROGRAM [FOLDER]
#
# FOLDER has the kernels' objects, as a build of the extension leaves them in build/temp*/csrc/cuda; without it they are
# compiled here, for the GPU of this machine or ARCH (sm_90), with line numbers for compute-sanitizer.
# CUDA_HOME or the PATH has nvcc.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
cuda=$(cd "$here/../../csrc/cuda" && pwd)
kernels=$(cd "$cuda" && echo *.cu instantiations/*.cu machine.cpp plan.cpp plan_teams.cpp)

stop() {
  echo "build.sh: $1" >&2
  exit 2
}

[ $# = 1 ] || [ $# = 2 ] || stop "give the program to make, and the folder of the kernels' objects if there is one"
nvcc=${CUDA_HOME:+$CUDA_HOME/bin/}nvcc
command -v "$nvcc" >/dev/null || nvcc=/usr/local/cuda/bin/nvcc
command -v "$nvcc" >/dev/null || stop "no nvcc was found; set CUDA_HOME to a CUDA toolkit"
linked=()
for source in $kernels; do
  object=${source%.*}.o
  [ $# = 1 ] || [ -f "$2/$object" ] || stop "$2 has no $object; give the folder of a build with CUDA, or none"
  [ $# = 1 ] || linked+=("$2/$object")
done
objects=$(mktemp -d)
trap 'rm -rf "$objects"' EXIT

# compile SOURCE OPTION..., as many at a time as there are cores. An object that is not made is missed by the linker's line.
compile() {
  while [ "$(jobs -rp | wc -l)" -ge "$(nproc)" ]; do wait -n || true; done
  local name=${1##*/}
  "$nvcc" -O3 -c -o "$objects/$name.o" "$@" &
  linked+=("$objects/$name.o")
}

for source in "$here"/*.cpp; do compile "$source"; done
if [ $# = 1 ]; then
  for source in $kernels; do compile "$cuda/$source" "-arch=${ARCH:-native}" -lineinfo --expt-relaxed-constexpr; done
fi
wait
for object in "${linked[@]}"; do [ -f "$object" ] || stop "a source was not compiled, see above"; done
"$nvcc" -o "$1" "${linked[@]}"
