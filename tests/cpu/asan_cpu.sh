#!/bin/sh
# Builds the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer and runs their tests: no shape may read or
# write out of bounds. Takes some minutes; needs g++ with its sanitizer libraries. Arguments go to pytest.
set -eu

root=$(cd "$(dirname "$0")/../.." && pwd)
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
torch=$(python -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent)')

for source in "$root"/csrc/cpu/*.cpp; do
    g++ -c -O1 -g -fPIC -std=c++20 -fvisibility=hidden -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined \
        -DTORCH_TARGET_VERSION=0x020a000000000000 -I"$root/csrc" -isystem "$torch/include" \
        "$source" -o "$build/$(basename "$source" .cpp).o"
done
g++ -shared -fsanitize=address,undefined "$build"/*.o -L"$torch/lib" -lc10 -ltorch_cpu -ltorch -o "$build/kernels.so"

# Python and torch keep memory until the process ends: leaks are not looked for here.
cd "$root"
FOCALNET_CPU_LIBRARY="$build/kernels.so" \
    LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" \
    ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0 UBSAN_OPTIONS=print_stacktrace=1 \
    pytest -q -p no:cacheprovider tests/cpu/test_cpu_kernels.py tests/cpu/test_cpu_block.py tests/cpu/test_cpu_patch_embed.py \
    tests/cpu/test_cpu_block_bfloat16.py tests/cpu/test_own_threads.py tests/cpu/test_autocast.py \
    tests/cpu/test_trained_layers.py tests/cpu/test_amx.py tests/cpu/test_cache_sizes.py \
    --deselect tests/cpu/test_amx.py::test_the_compiled_loop_is_of_tile_instructions "$@"
