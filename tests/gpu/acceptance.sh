#!/usr/bin/env bash
# Acceptance on a GPU: builds for the GPU of this machine, runs all tests of the CUDA backend on it, measures.
#
#   tests/gpu/acceptance.sh [build|test|bench|stability]...     without arguments all four, in this order, each under 8 minutes
#
# Needs an NVIDIA GPU with driver, nvcc, CMake and a python3 with torch (CUDA), numpy, nanobind, pytest, safetensors.
# Nothing is downloaded. Environment:
#   PYTHON         interpreter (python3)
#   BUILD          where to build (build/gpu)
#   RESULTS        where benchmark and stability write JSON and pictures (tests/bench/results)
#   MAX_JOBS       parallel compilations (all cores)
#   MAMBA_SDIST    folder with mamba_ssm-2.*.tar.gz and causal_conv1d-1.*.tar.gz from PyPI, the peers' kernels:
#                    MAMBA_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE pip download --no-deps \
#                        --no-binary :all: --no-build-isolation mamba-ssm causal-conv1d -d FOLDER
#                  without it the benchmark goes on without these peers
#   GPU_ARCH       compute capability to build for, like 90 (that of the first GPU)
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
build=${BUILD:-build/gpu}
results=${RESULTS:-tests/bench/results}
jobs=${MAX_JOBS:-$(nproc)}
mkdir -p "$build/logs"
build=$(cd "$build" && pwd)
logs=$build/logs
failed=()
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo} # without a network, too

say() { printf '%s  %s\n' "$(date +%T)" "$*"; }

# step NAME SECONDS COMMAND...: runs it with a time limit, all output in logs/NAME.log; its end where it fails.
step() {
    local name=$1 limit=$2 begin=$SECONDS status=0 left=$((part_end - SECONDS))
    shift 2
    [ "$limit" -le "$left" ] || limit=$left
    [ "$limit" -gt 0 ] || { say "FAILED  $name: no time left"; return 1; }
    timeout -k 5 "$limit" "$@" </dev/null >"$logs/$name.log" 2>&1 || status=$?
    if [ $status -eq 0 ]; then
        say "ok      $name ($((SECONDS - begin)) s)"
    elif [ $status -eq 124 ] && [ -n "${may_be_cut:-}" ] && ! grep -Eq "$findings" "$logs/$name.log"; then
        say "CUT     $name: not done after $limit s, nothing found until then"
        status=0
    elif [ $status -eq 124 ]; then
        say "FAILED  $name: not done after $limit s, see $logs/$name.log"
    else
        say "FAILED  $name: status $status"
        tail -n 40 "$logs/$name.log" | sed 's/^/        | /'
    fi
    return $status
}
findings='^=========.*(Invalid|Misaligned|Uninitialized|Race reported|hazard)' # of compute-sanitizer

# The steps that `start` queued run side by side; `finish` waits for them and counts those that failed.
pids=() names=()
start() {
    step "$@" &
    pids+=($!) names+=("$1")
}
finish() {
    local i
    for i in "${!pids[@]}"; do
        wait "${pids[$i]}" || failed+=("${names[$i]}")
    done
    pids=() names=()
}

part_build() {
    local nvcc arch generator=() keep_going=(-- -k)
    nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
    [ -x "$nvcc" ] || { say "FAILED  no nvcc in PATH or /usr/local/cuda/bin"; failed+=(nvcc); return; }
    arch=${GPU_ARCH:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d .)}
    [ -n "$arch" ] || { say 'FAILED  no GPU (nvidia-smi); GPU_ARCH=90 builds for one all the same'; failed+=(gpu); return; }
    say "for compute capability $arch with $("$nvcc" --version | sed -n 's/.*release \([0-9.]*\).*/nvcc \1/p'), $jobs jobs"

    start rates 120 "$nvcc" -std=c++17 -O3 -arch="sm_$arch" tests/gpu/rates.cu -o "$build/rates"
    # The smallest program that uses the GPU, to see whether a tool works here.
    cat >"$build/probe.cu" <<'EOF'
__global__ void one(int* p) { *p = 1; }
int main()
{
    int *p, host = 0;
    if (cudaMalloc(&p, sizeof *p)) return 1;
    one<<<1, 1>>>(p);
    return cudaMemcpy(&host, p, sizeof host, cudaMemcpyDeviceToHost) || host != 1;
}
EOF
    start probe 120 "$nvcc" -arch="sm_$arch" "$build/probe.cu" -o "$build/probe"
    if [ -d "${MAMBA_SDIST:-}" ]; then
        export MAX_JOBS=$jobs TORCH_CUDA_ARCH_LIST="${arch%?}.${arch: -1}"
        start peers 460 "$python" tests/gpu/peers.py --source "$MAMBA_SDIST" --build "$build/peers"
    else
        say "MAMBA_SDIST names no folder: without the peers' kernels"
    fi
    command -v ninja >/dev/null && generator=(-G Ninja) keep_going=(-- -k 0)
    # One build tree for the library, the tests and the Python extension, which is put beside a copy of the package.
    step configure 120 cmake -S . -B "$build/cmake" ${generator[@]+"${generator[@]}"} -DCMAKE_BUILD_TYPE=Release \
        -DVIMCORE_CUDA=ON -DCMAKE_CUDA_COMPILER="$nvcc" -DCMAKE_CUDA_ARCHITECTURES="$arch-real" \
        -DSKBUILD=ON -DVIMCORE_OPENMP=ON -DVIMCORE_TESTS=ON -DVIMCORE_TOOLS=OFF -DVIMCORE_EXAMPLES=OFF \
        -DPython_EXECUTABLE="$(command -v "$python")" -Dnanobind_DIR="$("$python" -m nanobind --cmake_dir)" ||
        failed+=(configure)
    if step extension 460 cmake --build "$build/cmake" --parallel "$jobs" --target _core; then
        rm -rf "$build/site"
        mkdir -p "$build/site"
        cp -r python/vimcore "$build/site/" && cp "$build"/cmake/_core*.so "$build/site/vimcore/" || failed+=(site)
    else
        failed+=(extension)
    fi
    step tests 460 cmake --build "$build/cmake" --parallel "$jobs" --target vimcore_gpu_tests \
        "${keep_going[@]}" || failed+=(tests)
    finish
}

# The cuBLASLt that torch uses, for programs that do not run inside Python.
cublaslt() {
    "$python" -c '
import re, torch
maps = open("/proc/self/maps").read()
found = re.search(r"\S*/libcublasLt\.so\S*", maps)
print(found.group() if found else "none")'
}

part_test() {
    local list=$build/cmake/tests/cuda/gpu_tests.txt lt line name tool
    [ -s "$list" ] || { say 'FAILED  nothing is built: run the part "build" first'; failed+=(tests); return; }
    lt=$(cublaslt)
    say "cuBLASLt: $lt"
    while read -r -a line; do
        name=${line[0]}
        VIMCORE_CUBLASLT=$lt step "$name" 120 "$build/cmake/tests/cuda/$name" "${line[@]:1}" || failed+=("$name")
        case $name in
        *linear* | *network* | *backward* | *training*) # and with the built-in matrix product
            VIMCORE_CUBLASLT=none step "$name-built-in" 120 "$build/cmake/tests/cuda/$name" "${line[@]:1}" ||
                failed+=("$name-built-in")
            ;;
        esac
    done <"$list"
    PYTHONPATH=$build/site step pytest 200 "$python" -m pytest -q -p no:cacheprovider tests/gpu/test_cuda.py ||
        failed+=(pytest)
    say "        $(tail -n 1 "$logs/pytest.log")"

    # From images to weights, as a user does it.
    if "$python" -c 'import timm, torchvision' 2>/dev/null; then
        local precision
        for precision in bfloat16 float16; do
            PYTHONPATH=$build/site step "train-$precision" 120 "$python" -m vimcore train --preset digits --device cuda \
                --precision $precision --epochs 8 --out "$build/run-$precision" || failed+=("train-$precision")
        done
    else
        say 'SKIPPED vimcore train: no timm and torchvision here'
    fi

    # The tools run a program many times slower, so each has its time; the matrix products are the built-in ones.
    local sanitizer
    sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
    if ! [ -x "$sanitizer" ]; then
        say 'SKIPPED memcheck, racecheck, initcheck: no compute-sanitizer here'
        return
    fi
    if ! step sanitizer-probe 60 "$sanitizer" --error-exitcode 3 "$build/probe"; then
        say 'SKIPPED memcheck, racecheck, initcheck: compute-sanitizer does not work here'
        return
    fi
    while read -r -a line; do
        name=${line[0]}
        for tool in memcheck racecheck initcheck; do
            local options=(--tool "$tool" --error-exitcode 3)
            # calls that fail are part of the tests
            [ "$tool" != memcheck ] || options+=(--report-api-errors no)
            VIMCORE_STABILITY_STEPS=1 VIMCORE_CUBLASLT=none may_be_cut=1 start "$tool-$name" 240 "$sanitizer" "${options[@]}" \
                "$build/cmake/tests/cuda/$name" "${line[@]:1}"
        done
    done <"$list"
    finish
}

part_bench() {
    [ -x "$build/rates" ] || { say 'FAILED  nothing is built: run the part "build" first'; failed+=(bench); return; }
    PYTHONPATH=$build/site timeout 470 "$python" -u tests/gpu/bench.py --rates "$build/rates" --peers "$build/peers" \
        --results "$results" --seconds 420 2>&1 | tee "$logs/bench.log" || failed+=(bench)
}

# Training in 16 bits beside float32, for hundreds of steps.
part_stability() {
    PYTHONPATH=$build/site timeout 470 "$python" -u tests/gpu/stability.py --results "$results" --seconds 420 2>&1 |
        tee "$logs/stability.log" || failed+=(stability)
}

[ $# -gt 0 ] || set -- build test bench stability
for part in "$@"; do
    case $part in
    build | test | bench | stability) ;;
    *) echo "usage: $0 [build|test|bench|stability]..." >&2 && exit 2 ;;
    esac
done
for part in "$@"; do
    say "== $part"
    part_end=$((SECONDS + 470))
    "part_$part"
done
if [ ${#failed[@]} -gt 0 ]; then
    say "FAILED: ${failed[*]}"
    exit 1
fi
say 'all passed'
