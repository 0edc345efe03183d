#!/usr/bin/env bash
# Runs every benchmark that needs a GPU, one after the other: gpu.sh PROGRAMS LIBRARY RESULTS [MODEL]
#   PROGRAMS  folder of gpu_bench, gpu_transfer_bench, gpu_interference_bench and kvernd
#   LIBRARY   libkvern_gpu_attend.so
#   RESULTS   folder for the JSON files, which bench/gpu_report.py reads
#   MODEL     folder of SmolLM2-135M; without it the same configuration with random weights
# $PYTHON (python3) needs torch with CUDA and transformers, the report matplotlib. Nothing else should use the GPU.
set -euo pipefail
[[ $# -ge 3 ]] || { sed -n '2,7s/^# //p' "$0" >&2; exit 2; }
programs=$1 library=$2 results=$3 model=${4:-}
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
mkdir -p "$results"

"$programs/gpu_bench" --json "$results/kernels.json"
"$programs/gpu_transfer_bench" --rounds 9 --json "$results/transfer.json"
"$programs/gpu_interference_bench" --json "$results/interference.json"

# Two processes run kernels at the same time under MPS only. One of our own, which others do not see.
if command -v nvidia-cuda-mps-control >/dev/null; then
  pipes=$(mktemp -d)
  export CUDA_MPS_PIPE_DIRECTORY=$pipes CUDA_MPS_LOG_DIRECTORY=$pipes
  nvidia-cuda-mps-control -d
  trap 'echo quit | nvidia-cuda-mps-control >/dev/null; rm -rf "$pipes"' EXIT
  for limit in 0 2; do
    echo "under MPS, device_multiprocessors = $limit"
    "$programs/gpu_interference_bench" --limits $limit --daemon-flag=--pipeline.device_multiprocessors=$limit \
      --json "$results/interference-mps-$limit.json"
  done
  echo quit | nvidia-cuda-mps-control >/dev/null
  trap - EXIT
  rm -rf "$pipes"
  unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
fi

"$python" "$here/gpu_attention.py" --library "$library" --json "$results/attention.json"
"$python" "$here/gpu_model.py" --library "$library" ${model:+--model "$model"} --json "$results/model.json"
