#!/usr/bin/env bash
# Builds the fuzz targets with clang under asan and ubsan and runs each for so many seconds (60), as many at a time as
# there are cores:
#   tests/fuzz/run.sh [SECONDS] [TARGET...]
# A finding fails, and prints the input that reproduces it; build/fuzz/fuzz_TARGET FILE runs it again. The corpus of
# earlier runs is gone on with. Needs clang with libFuzzer's runtime (Debian: clang libclang-rt-dev llvm), headers of
# libjpeg and libpng, cmake and python3; as root on Debian it installs what is missing.
set -euo pipefail
cd "$(dirname "$0")/../.."
seconds=${1:-60}
shift || true
targets=(safetensors image json)
if [ $# -gt 0 ]; then targets=("$@"); fi
build=${VIMCORE_FUZZ_BUILD:-build/fuzz}
cxx=${VIMCORE_FUZZ_CXX:-clang++}

fail() { printf 'tests/fuzz: %s\n' "$1" >&2; exit 1; }
[[ $seconds =~ ^[1-9][0-9]*$ ]] || fail "expected a number of seconds, got '$seconds'"
for target in "${targets[@]}"; do [ -f "tests/fuzz/fuzz_$target.cpp" ] || fail "there is no target '$target'"; done

trial=$(mktemp -d)
trap 'rm -rf "$trial"' EXIT
usable() { # the compiler with its runtime, and the decoders: without them nothing is fuzzed
    printf '%s\n' '#include <cstdint>' '#include <cstdio>' '#include <jpeglib.h>' '#include <png.h>' \
        'extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t*, std::size_t) { return 0; }' >"$trial/trial.cpp"
    "$cxx" -fsanitize=fuzzer,address,undefined "$trial/trial.cpp" -ljpeg -lpng -o "$trial/trial" 2>"$trial/log"
}
packages='clang libclang-rt-dev llvm libjpeg-dev libpng-dev'
if ! usable; then
    cat "$trial/log"
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || fail "$cxx does not build fuzz targets; Debian: apt-get install $packages"
    echo "installing $packages"
    export DEBIAN_FRONTEND=noninteractive
    # shellcheck disable=SC2086
    { apt-get -qq update && apt-get -qq install --yes --no-install-recommends $packages; } >"$trial/log" 2>&1 ||
        { cat "$trial/log"; fail "apt-get cannot install $packages"; }
    usable || { cat "$trial/log"; fail "$cxx does not build fuzz targets"; }
fi

generator=()
if [ ! -f "$build/CMakeCache.txt" ] && command -v ninja >/dev/null; then generator=(-G Ninja); fi
cmake "${generator[@]}" -S tests/fuzz -B "$build" -DCMAKE_CXX_COMPILER="$cxx" >"$trial/log" || { cat "$trial/log"; exit 1; }
cmake --build "$build" -j "$(nproc)" --target "${targets[@]/#/fuzz_}" >"$trial/log" || { cat "$trial/log"; exit 1; }
python3 tests/fuzz/seeds.py "$build/seeds"

# Runs one target; whatever it says is in its log.
fuzz() {
    local work="$build/work/$1" dictionary=()
    rm -rf "$work/findings" && mkdir -p "$work/corpus" "$work/findings"
    if [ -f "tests/fuzz/$1.dict" ]; then dictionary=("-dict=tests/fuzz/$1.dict"); fi
    ASAN_OPTIONS=allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
        "$build/fuzz_$1" -max_total_time="$seconds" -timeout=25 -rss_limit_mb=4096 -max_len=16384 \
        -artifact_prefix="$work/findings/" -print_final_stats=1 "${dictionary[@]}" \
        "$work/corpus" "$build/seeds/$1" >"$work/log" 2>&1
}

status=0
report() { # waits for one target
    local target=$1 work="$build/work/$1"
    if wait "$2"; then
        printf '%-12s %s s, %s inputs run, ' "$target" "$seconds" \
            "$(sed -n 's/^stat::number_of_executed_units: *//p' "$work/log")"
        grep 'cov: ' "$work/log" | tail -1 | sed -E 's/.*cov: ([0-9]+) ft: ([0-9]+) corp: ([0-9]+).*/\1 edges, corpus of \3/'
        return
    fi
    status=1
    tail -60 "$work/log"
    printf 'tests/fuzz: %s found something\n' "$target"
    for file in "$work/findings/"*; do
        [ -f "$file" ] || continue
        echo "reproducer: $file"
        base64 "$file"
    done
}

names=() pids=()
for target in "${targets[@]}"; do
    if [ ${#pids[@]} -ge "$(nproc)" ]; then
        report "${names[0]}" "${pids[0]}"
        names=("${names[@]:1}") pids=("${pids[@]:1}")
    fi
    fuzz "$target" &
    names+=("$target") pids+=($!)
done
for i in "${!pids[@]}"; do report "${names[i]}" "${pids[i]}"; done
exit $status
