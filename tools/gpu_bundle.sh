#!/usr/bin/env bash
# Makes what an offline GPU machine lacks, on a machine with a network and no GPU, for tools/gpu_visit.sh:
#
#   tools/gpu_bundle.sh build/gpu_bundle                    # build/gpu_bundle/trainer and build/gpu_bundle/vllm
#   tools/gpu_bundle.sh build/gpu_bundle trainer            # one of them
#   ARCHITECTURE=100 tools/gpu_bundle.sh build/gpu_b200     # for another GPU than an H100 or H200
#
# Needs python3.12 (PYTHON), xz, strip, and for Transformer Engine's extension g++, CUDA 13 (CUDA_HOME), 6 GB of disk and 12 to 25
# minutes of two cores, once. Each folder is one archive with its checksum, of at most 60 MiB. That machine has Python 3.12 and
# torch 2.11.0+cu130 with its usual companions (transformers, pyarrow, …); requirements/gpu_*.txt list what comes in addition.
set -euo pipefail
PYTHON=${PYTHON:-python3.12} ARCHITECTURE=${ARCHITECTURE:-90} TORCH=2.11.0 MOST_MIB=60
tree=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

download() { # download LIST FOLDER: the wheels of a list, for that machine's Python
    local any=() glibc
    for glibc in 39 35 34 31 28 27 24 17; do any+=(--platform "manylinux_2_${glibc}_x86_64"); done # pip takes each to the letter
    any+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
    rm -rf "$2" # wheels of other pins
    "$PYTHON" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${any[@]}" -r "$1" -d "$2"
}

unpack() { # unpack FOLDER WHEEL…: as an importable folder
    rm -rf "$1"
    "$PYTHON" -m pip install -q --no-deps --no-compile --target "$1" "${@:2}"
}

prune() { # prune LIBRARY…: one architecture's machine code, no symbols
    local library
    for library in "$@"; do
        "$PYTHON" "$tree/tools/fat_binary.py" "$library" "$library.pruned" --keep "$ARCHITECTURE"
        strip --strip-unneeded "$library.pruned"
        mv "$library.pruned" "$library"
    done
}

archive() { # archive FOLDER BUNDLE: the same bytes for the same files
    rm -rf "$2" && mkdir -p "$2"
    tar -C "$1" --exclude=__pycache__ --exclude='*/tests' --sort=name --mtime=@0 --owner=0 --group=0 -c . |
        xz -9 -T2 >"$2/site.tar.xz"
    (cd "$2" && sha256sum site.tar.xz >SHA256)
    local bytes
    bytes=$(stat -c %s "$2/site.tar.xz")
    echo "$2: $((bytes / 2 ** 20)) MiB"
    ((bytes <= MOST_MIB * 2 ** 20)) || { echo "$2 is larger than $MOST_MIB MiB" >&2 && return 1; }
}

extension() { # extension FOLDER VERSION: transformer-engine-torch, which comes as C++ only, against that machine's torch
    compgen -G "$1/transformer_engine_torch-$2-*.whl" >/dev/null && return
    local environment=$1/environment packages
    [ -d "$environment" ] || "$PYTHON" -m venv "$environment"
    "$environment/bin/pip" install -q "torch==$TORCH" numpy pybind11 ninja setuptools wheel packaging
    packages=$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    # ninja is in that environment; cuBLAS, cuDNN and NCCL have their headers in the wheels that torch depends on.
    env PATH="$(cd "$environment" && pwd)/bin:$PATH" CUDA_HOME="${CUDA_HOME:-/usr/local/cuda}" NVTE_FRAMEWORK=pytorch \
        NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_CUDA_ARCHS="$ARCHITECTURE" MAX_JOBS="$(nproc)" LIBRARY_PATH="$packages/nvidia/cu13/lib" \
        CPATH="$packages/nvidia/cu13/include:$packages/nvidia/cudnn/include:$packages/nvidia/nccl/include" \
        "$environment/bin/pip" wheel -q --no-build-isolation --no-deps --no-binary :all: -w "$1" "transformer-engine-torch==$2"
}

trainer() { # trainer FOLDER
    local work=$1/work version
    version=$(sed -n 's/^transformer-engine==//p' "$tree/requirements/gpu_trainer.txt")
    download "$tree/requirements/gpu_trainer.txt" "$work/trainer"
    extension "$work/extension" "$version"
    unpack "$work/trainer_site" "$work"/trainer/*.whl "$work"/extension/*.whl
    prune "$work/trainer_site/transformer_engine/wheel_lib/libtransformer_engine.so"
    archive "$work/trainer_site" "$1/trainer"
}

vllm() { # vllm FOLDER: without what one H100 never runs: FlashAttention 2 (sm_80), Blackwell's, a front end, headers
    local work=$1/work large
    download "$tree/requirements/gpu_vllm.txt" "$work/vllm"
    unpack "$work/vllm_site" "$work"/vllm/*.whl
    (
        cd "$work/vllm_site/vllm"
        rm -rf vllm-rs vllm_flash_attn/_vllm_fa2_C* _qutlass_C* third_party/*/cutlass third_party/deep_gemm/include
    )
    mapfile -t large < <(find "$work/vllm_site/vllm" -name '*.so' -size +1M)
    prune "${large[@]}"
    archive "$work/vllm_site" "$1/vllm"
}

main() {
    local folder=${1:?usage: tools/gpu_bundle.sh FOLDER [trainer] [vllm]} part
    shift
    mkdir -p "$folder/work/extension"
    [ $# -gt 0 ] || set -- trainer vllm
    for part in "$@"; do
        case $part in
            trainer | vllm) "$part" "$folder" ;;
            *) echo "$part: allowed are trainer and vllm" >&2 && return 1 ;;
        esac
    done
}

[ "${BASH_SOURCE[0]}" != "$0" ] || { main "$@"; exit; } # read to its end before it begins
