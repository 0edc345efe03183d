#!/usr/bin/env bash
# Writes rendered/: what kustomize makes of the overlays and examples, for those who have no kustomize and for reviews.
set -euo pipefail
cd "$(dirname "$0")"
for folder in overlays/* examples/*; do
  kubectl kustomize "$folder" >"rendered/$(basename "$folder").yaml"
done
