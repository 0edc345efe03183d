#!/usr/bin/env bash
# Formatting, include arrows and clang-tidy over the C++ sources. A file that clang-tidy has passed is looked at again
# only when it, a header of ours, or the configuration has changed.
#
# usage: tools/lint.sh [--quick | --recent]   --quick: no clang-tidy. --recent: only over what the last commits changed.
# KVERN_LINT_COMMITS: how many commits that is (10).   KVERN_LINT_FILES: how many files at most (12).
# KVERN_LINT_BUILD: folder of compile_commands.json (build/lint)
set -euo pipefail
cd "$(dirname "$0")/.."
build=${KVERN_LINT_BUILD:-build/lint}
mkdir -p build
folders=(base kernels transport store plan service connector python_shim kvernctl tests bench)

# In an unpacked archive there is no git to ask.
list() { git ls-files --cached --others --exclude-standard -- "${folders[@]}" 2>/dev/null || find "${folders[@]}" -type f; }
mapfile -t sources < <(list | grep -E '\.(h|cc|cu|cuh)$')
echo "lint: formatting of ${#sources[@]} files"
clang-format --dry-run -Werror "${sources[@]}"
echo "lint: include arrows"
python3 cmake/check_layers.py .
[[ ${1:-} == --quick ]] && exit 0

looked_at() { printf '%s\n' "${sources[@]}" | grep '\.cc$'; }
if [[ ${1:-} == --recent ]]; then
  # What is not committed yet, then the last commits, newest first: the whole tree takes most of an hour.
  changed() {
    git diff --name-only HEAD -- "${folders[@]}" && git log -"${KVERN_LINT_COMMITS:-10}" --format= --name-only -- "${folders[@]}"
  }
  mapfile -t recent < <(changed 2>/dev/null | grep '\.cc$' | awk '!seen[$0]++' |
    while read -r file; do [[ -f $file ]] && echo "$file"; done)
  echo "lint: ${#recent[@]} files changed recently; clang-tidy looks at the ${KVERN_LINT_FILES:-12} latest"
  looked_at() { printf '%s\n' "${recent[@]:0:${KVERN_LINT_FILES:-12}}" | grep . || true; }
fi
echo "lint: clang-tidy of $(looked_at | wc -l) files"
cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Debug -DKVERN_CUDA=OFF >"$build.log" 2>&1 || {
  cat "$build.log"
  exit 1
}
ninja -C "$build" kvern_wire >/dev/null # generated headers
stamps=$build/lint-stamps
mkdir -p "$stamps"
headers=$(printf '%s\n' "${sources[@]}" | grep -E '\.(h|cuh)$' | xargs cat .clang-tidy | sha256sum | cut -d' ' -f1)
tidy() {
  local source=$1 stamp
  stamp=$stamps/$(echo "$source" | tr / _)
  local want
  want="$headers $(sha256sum <"$source")"
  [[ $(cat "$stamp" 2>/dev/null) == "$want" ]] && return 0
  clang-tidy-14 -p "$build" --quiet --extra-arg=-Wno-unknown-warning-option "$source" 2>/dev/null && echo "$want" >"$stamp"
}
export -f tidy
export build stamps headers
compiled=$(python3 -c 'import json, os, sys
for entry in json.load(open(sys.argv[1])): print(os.path.relpath(entry["file"]))' "$build/compile_commands.json")
{ looked_at | grep -F -x -f <(echo "$compiled") || true; } |
  xargs -P "$(nproc)" -I{} bash -c 'tidy {}'
echo "lint: clean"
