#!/usr/bin/env bash
# Builds the fuzz targets with clang under asan and ubsan and runs each for so many seconds (60):
#   tests/fuzz/run.sh [SECONDS] [TARGET...]
# A finding fails, and prints the input that reproduces it; build/fuzz/fuzz_TARGET FILE runs it again.
set -euo pipefail
cd "$(dirname "$0")/../.."
seconds=${1:-60}
shift || true
targets=${*:-safetensors image json}
build=${VIMCORE_FUZZ_BUILD:-build/fuzz}

if ! command -v clang++ >/dev/null; then
    apt-get -qq update && apt-get -qq install --yes clang llvm >/dev/null
fi
[ -f "$build/CMakeCache.txt" ] || cmake -S tests/fuzz -B "$build" -DCMAKE_CXX_COMPILER=clang++ >/dev/null
# shellcheck disable=SC2086
cmake --build "$build" -j "$(nproc)" --target $(printf 'fuzz_%s ' $targets)

python3 tests/fuzz/seeds.py "$build/seeds"
for target in $targets; do
    work="$build/work/$target"
    rm -rf "$work" && mkdir -p "$work/corpus" "$work/findings"
    printf '== fuzz_%s, %s s\n' "$target" "$seconds"
    dictionary=()
    [ -f "tests/fuzz/$target.dict" ] && dictionary=("-dict=tests/fuzz/$target.dict")
    if ! ASAN_OPTIONS=allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
        "$build/fuzz_$target" -max_total_time="$seconds" -timeout=25 -rss_limit_mb=4096 -max_len=16384 \
        -artifact_prefix="$work/findings/" -print_final_stats=1 "${dictionary[@]}" \
        "$work/corpus" "$build/seeds/$target" >"$work/log" 2>&1; then
        tail -60 "$work/log"
        for file in "$work/findings/"*; do
            echo "reproducer: $file"
            base64 "$file"
        done
        exit 1
    fi
    grep -E 'number_of_executed_units|cov: ' "$work/log" | tail -2
done
