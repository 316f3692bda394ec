#!/usr/bin/env bash
# One visit to an offline GPU machine, under ten minutes: unpacks the bundles of tools/gpu_bundle.sh, installs the product from
# this checkout, and runs tools/gpu_check.py, what may be wrong first.
#
#   bash tools/gpu_visit.sh build/gpu_bundle/trainer build/gpu_bundle/vllm
#
# Results go to OUT (build/gpu_visit): gpu_check.md, written again as each check ends; logs.tar.gz and machine.txt at the end.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-$PWD/build/gpu_visit} site=${TMPDIR:-/tmp}/gpu_site work=${TMPDIR:-/tmp}/gpu_check
mkdir -p "$OUT" "$site" "$work"
OUT=$(cd "$OUT" && pwd)
for bundle in "$@"; do
    (cd "$bundle" && sha256sum -c --quiet SHA256 && xz -dc -T0 site.tar.xz | tar -x -C "$site")
done
export PYTHONPATH=$site PYTHONUNBUFFERED=1
python3 -m pip install -q --no-deps --no-index --no-build-isolation --upgrade --target "$site" .

leave() { # also when a check has gone wrong: what there is
    tar -C "$work" --exclude='*.safetensors' --exclude='*.pt' --exclude='*.distcp' -czf "$OUT/logs.tar.gz" . || true
    { nvidia-smi; timeout 60 python3 -m megatron_hpt.cli doctor; } >"$OUT/machine.txt" 2>&1 || true
}
trap leave EXIT
ln -sf "$OUT/gpu_check.md" "$work/gpu_check.md" # the models that checks make stay behind
timeout 480 python3 tools/gpu_check.py "$work"
