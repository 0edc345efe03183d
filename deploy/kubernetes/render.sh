#!/usr/bin/env bash
# Writes components/monitoring/rules.yaml, which is deploy/prometheus as a resource of the Prometheus operator, and rendered/:
# what kustomize makes of the overlays and examples, for those who have no kustomize and for reviews.
set -euo pipefail
cd "$(dirname "$0")"
{
  cat <<'END'
# Written by render.sh from deploy/prometheus/rules.yaml and alerts.yaml: change those.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: kvern
spec:
  groups:
END
  sed -s '1,/^groups:$/d; s/^./  &/' ../prometheus/rules.yaml ../prometheus/alerts.yaml
} >components/monitoring/rules.yaml
for folder in overlays/* examples/*; do
  kubectl kustomize "$folder" >"rendered/$(basename "$folder").yaml"
done
