#!/usr/bin/env bash
# Everything that needs a GPU, in one command: build, tests on the device, measurements, a short table last.
#
#     bench/gpu.sh            meant for ten minutes; not run on a GPU yet
#     bench/gpu.sh --quick    meant for four
#
# Needs torch >= 2.10 with CUDA, triton, nvcc, transformers, pytest and ninja in the environment, and no network; timm is
# measured where it is installed. A part that fails or runs out of its time is reported, and the next one runs. The rows
# go to bench/results/<device>/, what every part printed to $OUT (default: a new folder), the summary of both to
# bench/results/<device>.json.
set -uo pipefail
cd "$(dirname "$0")/.."

QUICK=no
[ "${1:-}" = --quick ] && QUICK=yes
OUT=${OUT:-$(mktemp -d)}
mkdir -p "$OUT"
PYTHON=${PYTHON:-python3}
PARTS="$OUT/parts.tsv"
: > "$PARTS"

# part NAME SECONDS COMMAND...: runs the command for at most so long, keeps its output and notes how it ended.
part() {
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    echo "== $name"
    timeout "$limit" "$@" > "$OUT/$name.log" 2>&1
    status=$?
    printf '%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - start))" >> "$PARTS"
    tail -n 4 "$OUT/$name.log"
    if [ $status -eq 124 ]; then echo "   $name: stopped after $limit s"; elif [ $status -ne 0 ]; then echo "   $name: failed with $status"; fi
}

choose() { if [ $QUICK = yes ]; then echo "$1"; else echo "$2"; fi; }

GPU_ARCH=$($PYTHON -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || {
    echo "bench/gpu.sh: torch finds no CUDA device here; see focalnet info" >&2
    exit 2
}
export TORCH_CUDA_ARCH_LIST="$GPU_ARCH"

part build 240 env FOCALNET_BUILD=cuda "$PYTHON" -m pip install -q --no-build-isolation --no-deps -e .
part info 60 "$PYTHON" -m focalnet.cli info
part tests-triton "$(choose 60 120)" "$PYTHON" -m pytest -q --import-mode=importlib -p no:cacheprovider tests/triton_kernels.py
part tests-cuda "$(choose 60 120)" "$PYTHON" -m pytest -q --import-mode=importlib -p no:cacheprovider -m gpu tests/test_cuda_device.py
part tests-backends "$(choose 45 60)" "$PYTHON" -m pytest -q --import-mode=importlib -p no:cacheprovider tests/test_backends.py
if [ $QUICK = no ] && command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
        part "sanitizer-$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 1 \
            "$PYTHON" -m pytest -q --import-mode=importlib -p no:cacheprovider -m gpu -x tests/test_cuda_device.py -k "obey and 1x1"
    done
fi
part kernels "$(choose 50 150)" "$PYTHON" bench/gpu_kernels.py --variant tiny_lrf --dtype bfloat16 --rounds "$(choose 5 11)"
part models "$(choose 60 120)" "$PYTHON" bench/models.py --device cuda --dtype bfloat16 --batch 128 --rounds "$(choose 5 11)"
part training "$(choose 60 120)" "$PYTHON" bench/models.py --device cuda --dtype bfloat16 --batch 128 --train --rounds "$(choose 5 11)"
if [ $QUICK = no ]; then
    part scaling 60 "$PYTHON" bench/scaling.py --device cuda --dtype bfloat16
fi

"$PYTHON" bench/gpu_summary.py "$PARTS"
