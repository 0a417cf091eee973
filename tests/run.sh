#!/usr/bin/env bash
# Sets up a virtual environment (.venv, or $VIMCORE_VENV) with vimcore and everything the tests need, then runs all
# tests: C++ by CTest, Python by pytest. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VIMCORE_VENV:-.venv}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
python="$(cd "$venv/bin" && pwd)/python"
"$python" -m pip install --quiet --upgrade pip
PATH="$(dirname "$python"):$PATH"
install=("$python" -m pip install --quiet --no-compile --constraint tests/constraints.txt)
"${install[@]}" cmake nanobind ninja scikit-build-core
build() { cmake --preset release -G Ninja -DPython_EXECUTABLE="$python" && cmake --build --preset release; }
mkdir -p build
build >build/release.log 2>&1 & # compiles while packages come down
"${install[@]}" -r tests/constraints.txt
wait $! || { cat build/release.log; exit 1; }
"${install[@]}" --no-build-isolation '.[test,bench]'

ctest --preset release -j "$(nproc)"
# From another folder, so that the installed package is tested and not the source tree.
root=$PWD
workers=$(nproc)
parallel=(-n $((workers < 8 ? workers : 8)) --dist loadfile --no-loadscope-reorder)
export OMP_WAIT_POLICY=passive # else the workers' threads spin in each other's way
cd "$root/tests" && exec python -m pytest --rootdir "$root/tests" "${parallel[@]}" python "$@"
