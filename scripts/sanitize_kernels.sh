#!/bin/sh
# Check the kernels under the address and undefined-behaviour sanitizers, for every instruction set of this machine.
#
#     scripts/sanitize_kernels.sh                     # everything
#     scripts/sanitize_kernels.sh convolutions rows 1 # some parts ("layers" is the third) for one instruction set (1: AVX2)
set -eu
here=$(cd "$(dirname "$0")" && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
# -O1 shortens the build.
"${CXX:-c++}" -std=c++17 -O1 -g -fopenmp -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all \
    -fno-omit-frame-pointer -Wno-uninitialized -Wno-maybe-uninitialized -Wno-psabi "$here/sanitize_kernels.cpp" -o "$folder/check"
ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=3 "$folder/check" "$@"
