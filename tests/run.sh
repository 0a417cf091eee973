#!/usr/bin/env bash
usage="tests/run.sh [full|quick] [ARGUMENTS OF PYTEST...]

full   the default: sets up a virtual environment (.venv, or \$VIMCORE_VENV) with vimcore and everything the tests need,
       builds build/dev, runs all tests: C++ by CTest, Python by pytest.
quick  one to two minutes, after 'full' or after 'cmake --preset dev && cmake --build --preset dev' and
       'pip install .[test]': brings build/dev and the installed vimcore up to date with the sources, runs the C++
       tests labelled quick and the Python tests that are not marked slow. Nothing is downloaded. The Python is the one
       of the environment above, else the first on PATH."
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
lane=full
if [ $# -gt 0 ] && [[ $1 != -* ]]; then
    lane=$1
    shift
elif [[ ${1:-} = -h || ${1:-} = --help ]]; then
    echo "$usage"
    exit
fi
[[ $lane = full || $lane = quick ]] || { printf "tests/run.sh: there is no lane '%s'\n\n%s\n" "$lane" "$usage" >&2; exit 2; }
stop() { echo "tests/run.sh quick: $1" >&2; exit 1; }
venv=${VIMCORE_VENV:-.venv}
build() { cmake --preset dev -G Ninja -DPython_EXECUTABLE="$python" && cmake --build --preset dev; }

if [ $lane = full ]; then
    [ -x "$venv/bin/python" ] || python3 -m venv "$venv"
    python="$(cd "$venv/bin" && pwd)/python"
    "$python" -m pip install --quiet --upgrade pip
    PATH="$(dirname "$python"):$PATH"
    install=("$python" -m pip install --quiet --no-compile --constraint tests/constraints.txt)
    "${install[@]}" cmake nanobind ninja scikit-build-core
    mkdir -p build
    build >build/dev.log 2>&1 & # compiles while packages come down
    "${install[@]}" -r tests/constraints.txt
    wait $! || { cat build/dev.log; exit 1; }
    "${install[@]}" --no-build-isolation '.[test,bench]'
else
    if [ -x "$venv/bin/python" ]; then PATH="$(cd "$venv/bin" && pwd):$PATH"; fi
    python=$(command -v python || command -v python3)
    [ -f build/dev/CMakeCache.txt ] || stop 'nothing is built; bash tests/run.sh, or see --help'
    cmake --build --preset dev >build/dev.log 2>&1 || { cat build/dev.log; exit 1; }
    # What is installed must be what is tested: this tree as it is now.
    installed=$(cd tests && "$python" -c 'import pytest, vimcore._core; print(vimcore._core.__file__)') ||
        stop "$python has no vimcore with pytest; bash tests/run.sh, or see --help"
    installed=$(readlink -f "$installed")
    newer() { find "$@" -newer "$installed" -not -name '__pycache__' -not -name '*.pyc' -print -quit; }
    if [[ $installed = "$root"/* && $installed != */site-packages/* ]]; then # Python runs from the tree
        changed=$(newer python/src cpp/include cpp/src cpp/cpu -type f)
        [ -z "$changed" ] || stop "$installed is older than $changed"
    elif [ -n "$(newer python cpp cuda CMakeLists.txt pyproject.toml)" ]; then
        isolation=()
        "$python" -c 'import nanobind, scikit_build_core' 2>/dev/null && isolation=(--no-build-isolation)
        "$python" -m pip install --quiet --no-compile --no-deps --force-reinstall "${isolation[@]}" .
    fi
fi

unset PYTHONDONTWRITEBYTECODE # else every process compiles torch's modules anew, for seconds
labels=() marks=()
if [ $lane = quick ]; then labels=(-L quick) marks=(-m 'not slow'); fi
ctest --preset dev -j "$(nproc)" "${labels[@]}"
workers=$(nproc)
parallel=(-n $((workers < 8 ? workers : 8)) --dist loadfile --no-loadscope-reorder)
export OMP_WAIT_POLICY=passive # else the workers' threads spin in each other's way
# From another folder, so that the installed package is tested and not the source tree.
cd tests && exec "$python" -m pytest --rootdir "$root/tests" "${parallel[@]}" "${marks[@]}" python "$@"
