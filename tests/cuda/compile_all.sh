#!/usr/bin/env bash
# Builds library and Python extension with CUDA for every architecture, warnings being errors, and fails where a tuned
# kernel spills registers or a scan's inner loop has more instructions than it may (sass_budget.py); compares
# cuda/cublaslt.h with NVIDIA's header; loads the extension, here without a driver.
# Needs python3 with pip, CMake, Ninja, and no GPU. nvcc is the system's, or comes from a package registry.
#   tests/cuda/compile_all.sh [folder]      default: build/cuda; what is fetched for it lies in [folder]-tools
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-build/cuda}
mkdir -p "$folder" "$folder-tools"
folder=$(cd "$folder" && pwd)
tools=$folder-tools
export PYTHONPATH="$tools${PYTHONPATH:+:$PYTHONPATH}"

python=${PYTHON:-python3}
"$python" -c 'import nanobind' 2>/dev/null || "$python" -m pip install --quiet --target "$tools" nanobind
if [ -z "${CUDACXX:-}" ] && ! command -v nvcc >/dev/null && [ ! -x /usr/local/cuda/bin/nvcc ]; then
    "$python" -c 'import nvidia.cu13' 2>/dev/null ||
        "$python" -m pip install --quiet --target "$tools" 'cuda-toolkit[nvcc,cudart,cccl]==13.0.*'
fi

# The header: 444 MB for one file, but there is no smaller package. It comes down while the kernels compile.
header=$tools/nvidia/cu13/include/cublasLt.h
fetch_header() {
    [ -e "$header" ] && return
    "$python" -m pip download --quiet --no-deps --only-binary :all: --dest "$tools/download" 'nvidia-cublas==13.*'
    "$python" - "$tools"/download/nvidia_cublas-*.whl "$tools" <<'END'
import sys, zipfile
wheel = zipfile.ZipFile(sys.argv[1])
for name in wheel.namelist():
    if name.endswith(".h"):
        wheel.extract(name, sys.argv[2])
END
    rm -r "$tools/download"
}
fetch_header &
fetching=$!

cmake --fresh -S . -B "$folder" -G Ninja -DCMAKE_BUILD_TYPE=Release -DVIMCORE_CUDA=ON -DVIMCORE_OPENMP=ON \
    -DSKBUILD=ON -DVIMCORE_TESTS=OFF -DPython_EXECUTABLE="$(command -v "$python")" \
    -Dnanobind_DIR="$("$python" -m nanobind --cmake_dir)" -DCMAKE_CUDA_FLAGS='-Xptxas=-v -Werror=all-warnings' >"$tools/configure.log"
grep 'VIMCORE_CUDA=' "$tools/configure.log"
if ! cmake --build "$folder" --target vimcore _core >"$tools/build.log" 2>&1; then
    grep -v '^ptxas info\|bytes stack frame' "$tools/build.log"
    exit 1
fi
architectures=$(sed -n 's/.*VIMCORE_CUDA=ON: .* for //p' "$tools/configure.log" | tr ';' '\n' | wc -l)
"$python" tests/cuda/registers.py "$tools/build.log" "$architectures"
command -v cuobjdump >/dev/null || "$python" -c 'import triton' 2>/dev/null ||
    "$python" -m pip install --quiet --target "$tools" --no-deps triton # it has cuobjdump
"$python" tests/cuda/sass_budget.py "$folder"/CMakeFiles/vimcore.dir/cuda/scan/{forward,backward}_tuned.cu.o

wait $fetching
nvcc=$(sed -n 's/.*VIMCORE_CUDA=ON: \([^ ]*\) .*/\1/p' "$tools/configure.log")
"$nvcc" -std=c++20 -Icuda -Icpp/include -Icpp/src -I"$(dirname "$header")" -c -o "$tools/check.o" tests/cuda/check_cublaslt.cpp
echo 'cuda/cublaslt.h agrees with cublasLt.h'

# nvcc, which may be a script that starts another one, knows where its headers are.
"$nvcc" -std=c++20 -O1 --cudart none -Itests/shim tests/cuda/check_occupancy.cpp -o "$tools/check_occupancy"
"$tools/check_occupancy"
"$tools/check_occupancy"

rm -rf "$tools/site"
mkdir "$tools/site"
cp -r python/vimcore "$tools/site/vimcore"
cp "$folder"/_core*.so "$tools/site/vimcore/"
PYTHONPATH="$tools/site:$PYTHONPATH" "$python" -c '
import vimcore
assert vimcore.build_info()["cuda"] is not False, vimcore.build_info()
print("the extension with CUDA loads; CUDA is", "available" if vimcore.cuda_is_available() else "not available here")'
