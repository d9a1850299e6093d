#!/usr/bin/env bash
# Times steps of every configuration of the table in RESULTS.md on one GPU, in ten minutes: bf16, channels-last, eager
# and compiled.
#
#   bash tools/benchmarks/gpu.sh                     appends to tools/benchmarks/results.jsonl and prints the table
#   OUT=/elsewhere/results.jsonl bash tools/benchmarks/gpu.sh
#   bash tools/benchmarks/gpu.sh --tiny --device=cpu --minutes=3       tries it out where there is no GPU
#
# Uses the machine's own torch and changes nothing there. Beside torch it imports absl, braceexpand, diffusers, einops,
# gin-config, mlxtend, rich, safetensors, tensorboard, torchvision and webdataset; where some are missing:
#   python3 -m pip install --no-deps --target=site gin-config webdataset braceexpand diffusers mlxtend einops
# and PYTHONPATH=site bash tools/benchmarks/gpu.sh. A missing package fails the measurements that need it, and no others.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${OUT:-tools/benchmarks/results.jsonl}
export PYTHONPATH="lib${PYTHONPATH:+:$PYTHONPATH}"
# Whatever happens to the rest, the GPU and its torch are on record.
python3 -c "import torch; print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU')"
python3 tools/bench.py gpu --minutes=9.5 --out="$out" "$@"
python3 tools/bench.py table --out="$out"
