#!/usr/bin/env bash
# Runs compute-sanitizer's memcheck, racecheck and initcheck over a small case of every family of kernels. One line per
# tool and family; fails when anything is found, a test fails or a run takes too long. Logs are in BUILD/sanitize.
#
# usage: tools/gpu_sanitize.sh [BUILD [SECONDS PER RUN [RUNS AT ONCE]]]       (default: build/release 40 13)
set -euo pipefail
cd "$(dirname "$0")/.."
build=${1:-build/release}
export SECONDS_PER_RUN=${2:-40}
at_once=${3:-13}

# Family and the tests of test_kernels_cuda that run it.
FAMILIES="
observe         CudaSmall.Observe
scores          CudaSmall.Scores
windows         CudaSmall.Windows
key_scores      CudaSmall.KeyScores
select          CudaSmall.Select
gather          CudaSmall.Gather
merge           CudaSmall.MergeAndRestore
cluster         CudaSmall.Cluster
rope            CudaSmall.Rope
int8            CudaSmall.Int8
quantise        CudaSmall.Quantise
pages           Layouts/CudaPageCoderTest.*/SmallPages-*.MakesTheContainersOfTheCpu/*
attend_rows     CudaSmall.AttendRows
attend_sections CudaSmall.AttendSections
"

SANITIZER=$(command -v compute-sanitizer || true)
for folder in "${CUDA_HOME:-/usr/local/cuda}"/{bin,compute-sanitizer}; do
  [[ -z $SANITIZER && -x $folder/compute-sanitizer ]] && SANITIZER=$folder/compute-sanitizer
done
if [[ -z $SANITIZER ]]; then
  echo "gpu_sanitize: skipped, there is no compute-sanitizer (it comes with the CUDA toolkit)"
  exit 0
fi
if ! nvidia-smi -L >/dev/null 2>&1; then
  echo "gpu_sanitize: skipped, there is no CUDA device"
  exit 0
fi
export SANITIZER TESTS=$build/tests/kernels/test_kernels_cuda LOGS=$build/sanitize
mkdir -p "$LOGS"

# TOOL FAMILY TESTS: prints how it went.
run() {
  local tool=$1 family=$2 filter=$3 result=0 found log
  log=$LOGS/$tool.$family.log
  # Arrays of the tests are left as they are for initcheck, or nothing would ever be uninitialised.
  [[ $tool == initcheck ]] && export KVERN_UNFILLED=1
  timeout --kill-after=5 "$SECONDS_PER_RUN" "$SANITIZER" --tool "$tool" --print-limit 20 \
    "$TESTS" --gtest_filter="$filter" >"$log" 2>&1 || result=$?
  # "ERROR SUMMARY: 2 errors", "RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)".
  found=$(grep -oE 'SUMMARY: [0-9]+ (error|hazard)' "$log" | grep -oE '[0-9]+' || echo "no summary")
  local verdict="$found found, exit status $result: $log"
  if ((result == 124 || result == 137)); then
    verdict="timed out after $SECONDS_PER_RUN s"
  elif grep -q '^\[  SKIPPED \]' "$log" || ! grep -qE '^\[  (PASSED|FAILED)  \] [1-9]' "$log"; then
    verdict="no test ran: $log"
  elif [[ $found == 0 && $result == 0 ]]; then
    verdict=clean
  fi
  printf '%-9s %-15s %s\n' "$tool" "$family" "$verdict"
  [[ $verdict == clean ]]
}
export -f run

# The slowest tool first. xargs fails where any run does.
for tool in racecheck initcheck memcheck; do
  while read -r family filter; do
    [[ -n $family ]] && printf '%s\0%s\0%s\0' "$tool" "$family" "$filter"
  done <<<"$FAMILIES"
done | xargs -0 -n 3 -P "$at_once" bash -c 'run "$@"' run
