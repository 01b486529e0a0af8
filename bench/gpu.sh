#!/usr/bin/env bash
# Everything that needs a GPU, in one command; bench/gpu/run.py says what, in which order and with how much time.
#
#     bench/gpu.sh            under ten minutes, by construction
#     bench/gpu.sh --quick    under four
#     bench/gpu.sh --dry-run  without a GPU: the Python of every part, up to its first CUDA call
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu/run.py" "$@"
