#!/usr/bin/env bash
# Builds everything that tests/gpu/call.py takes to a GPU, on a machine without one: extension, test programs, rates.
#
#   bash tests/gpu/prepare.sh [FOLDER]      default: .gpu; makes FOLDER/carried.tar.xz, a few MB
#
# Needs nvcc 13, a C++20 compiler, and a Python of at least 3.12 with its headers: pyenv's (tried: 3.12.1) or Ubuntu 24.04's
# 3.12 (python3.12-dev), Debian 13's 3.13 (python3-dev). The extension uses the stable ABI of 3.12, so it loads in all later
# ones. CMake, Ninja and nanobind come from PyPI into an environment of the build folder.
#   PYTHON         that Python (the first of python3.12, python3.13, python3.14, python3 that will do)
#   BUILD          where to build (build/gpu-carried)
#   GPU_ARCH       compute capability (90)
#   MAMBA_SDIST    folder with mamba_ssm-2.*.tar.gz and causal_conv1d-1.*.tar.gz, to be carried and built there;
#                  see tests/gpu/acceptance.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
mkdir -p "${1:-.gpu}" "${BUILD:-build/gpu-carried}"
target=$(cd "${1:-.gpu}" && pwd)
build=$(cd "${BUILD:-build/gpu-carried}" && pwd)
arch=${GPU_ARCH:-90}

will_do() { "$1" -c 'import os, sys, sysconfig
sys.exit(sys.version_info < (3, 12) or not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' 2>/dev/null; }
python=
for candidate in ${PYTHON:-python3.12 python3.13 python3.14 python3 "$HOME"/.pyenv/versions/3.12*/bin/python3}; do
    if will_do "$candidate"; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || { echo 'prepare: no Python of at least 3.12 with Python.h; name one in PYTHON' >&2; exit 1; }
nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
[ -x "$nvcc" ] || { echo 'prepare: no nvcc in PATH or /usr/local/cuda/bin' >&2; exit 1; }
toolkit=$(dirname "$(dirname "$(readlink -f "$nvcc")")")

venv=$build/venv
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet 'cmake>=3.26' ninja nanobind
export PATH="$venv/bin:$PATH"
# Without images: libjpeg has another name on other distributions.
cmake -S . -B "$build/cmake" -G Ninja -DCMAKE_BUILD_TYPE=Release -DVIMCORE_CUDA=ON -DCMAKE_CUDA_COMPILER="$nvcc" \
    -DCMAKE_CUDA_ARCHITECTURES="$arch-real" -DSKBUILD=ON -DVIMCORE_OPENMP=ON -DVIMCORE_IMAGES=OFF -DVIMCORE_TESTS=ON \
    -DVIMCORE_TOOLS=OFF -DVIMCORE_EXAMPLES=OFF -DPython_EXECUTABLE="$venv/bin/python" \
    -Dnanobind_DIR="$("$venv/bin/python" -m nanobind --cmake_dir)" >"$build/configure.log" ||
    { cat "$build/configure.log"; exit 1; }
cmake --build "$build/cmake" --target _core vimcore_gpu_tests
"$nvcc" -std=c++17 -O3 -arch="sm_$arch" tests/gpu/rates.cu -o "$build/rates"
cat >"$build/probe.cu" <<'END'
__global__ void one(int* p) { *p = 1; }
int main()
{
    int *p, host = 0;
    if (cudaMalloc(&p, sizeof *p)) return 1;
    one<<<1, 1>>>(p);
    return cudaMemcpy(&host, p, sizeof host, cudaMemcpyDeviceToHost) || host != 1;
}
END
"$nvcc" -arch="sm_$arch" "$build/probe.cu" -o "$build/probe"

pack=$build/pack
rm -rf "$pack"
mkdir -p "$pack/bin" "$pack/site" "$pack/lib" "$pack/nanobind" "$pack/sdist"
cp "$build"/cmake/tests/cuda/*_gpu "$build/rates" "$build/probe" "$pack/bin/"
cp -r python/vimcore "$pack/site/"
find "$pack/site" \( -name '*.so' -o -name __pycache__ \) -prune -exec rm -rf {} +
cp "$build"/cmake/_core*.so "$pack/site/vimcore/"
strip -s "$pack"/bin/*
cp -L "$(${CC:-gcc} -print-file-name=libgomp.so.1)" "$pack/lib/"
cp -r "$("$venv/bin/python" -c 'import nanobind, os; print(os.path.dirname(nanobind.__file__))')" "$pack/nanobind/"
if [ -d "${MAMBA_SDIST:-}" ]; then cp "$MAMBA_SDIST"/*.tar.gz "$pack/sdist/"; fi
"$venv/bin/python" - "$pack"/site/vimcore/_core*.so <<'END'
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_core", sys.argv[1])
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
print("the extension loads in Python", sys.version.split()[0], core.build_info()["compiler"], "CUDA:", core.build_info()["cuda"])
END
# Programs differ in little: a dictionary as long as all of them.
tar -C "$pack" -cf - . | xz -6 --lzma2=dict=96MiB >"$target/carried.part"
mv "$target/carried.part" "$target/carried.tar.xz"
unwanted=$(ldd "$pack"/site/vimcore/_core*.so "$pack"/bin/test_scan_cuda_gpu | grep -E 'libjpeg|libpng|not found' || true)
[ -z "$unwanted" ] || { echo "prepare: other machines may not have $unwanted" >&2; exit 1; }
du -h "$target/carried.tar.xz"
