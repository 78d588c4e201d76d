#!/usr/bin/env bash
# Compiles for arm64 the files of the CPU back-end that need no torch: the kernels and the system queries. Runs nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
compiler="${ARM64_CXX:-aarch64-linux-gnu-g++}"
if ! command -v "$compiler" > /dev/null; then
  echo "arm64_check: $compiler was not found; on Debian, 'apt-get install g++-aarch64-linux-gnu' installs it" >&2
  exit 2
fi
out="$(mktemp -d)"
trap 'rm -rf "$out"' EXIT
for source in csrc/cpu/isa/*.cpp csrc/cpu/{instruction_set,cache,pages}.cpp; do
  "$compiler" -O0 -Wall -Werror -c "$source" -o "$out/$(basename "$source").o"
done
echo "arm64_check: the CPU kernels compile with $("$compiler" --version | head -n 1)"
