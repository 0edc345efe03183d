#!/usr/bin/env bash
# Builds the fuzzers with clang and runs each for a while. A crash leaves its input in build/fuzz/crashes and fails.
#
# usage: tools/fuzz.sh SECONDS
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:?usage: tools/fuzz.sh SECONDS}
build=build/fuzz
mkdir -p build
cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++ \
  $(command -v ccache >/dev/null && echo -DCMAKE_CXX_COMPILER_LAUNCHER=ccache) \
  -DKVERN_CUDA=OFF -DKVERN_TESTS=OFF -DKVERN_FUZZ=ON -DKVERN_SANITIZE=address,undefined >"$build.log" 2>&1 || {
  cat "$build.log"
  exit 1
}
ninja -C "$build" kvern_fuzzers
seeds=$build/seeds
mkdir -p "$build/crashes" "$seeds"
cp tests/golden/container_*.bin "$seeds"
count=0
for fuzzer in "$build"/tests/fuzz/*_fuzz; do
  [[ -x $fuzzer && -f $fuzzer ]] || continue
  name=$(basename "$fuzzer")
  corpus=$build/corpus/$name
  mkdir -p "$corpus"
  log=$build/$name.log
  if ! "$fuzzer" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -artifact_prefix="$build/crashes/$name-" \
    -print_final_stats=1 "$corpus" "$seeds" >"$log" 2>&1; then
    tail -n 40 "$log"
    echo "fuzz: $name failed; input in $build/crashes, log in $log" >&2
    exit 1
  fi
  echo "fuzz: $name: $(grep -o 'stat::number_of_executed_units: *[0-9]*' "$log" | grep -o '[0-9]*$') inputs in $seconds s, no crash"
  count=$((count + 1))
done
((count > 0)) || { echo "fuzz: no fuzzers were built" >&2; exit 1; }
