#!/usr/bin/env bash
# Packages of AOTInductor without Python: builds cpp/torch against an installed vimcore and torch's own libraries, makes
# a package of a small network and compares what the program prints with the network in Python. Needs cmake, a C++20
# compiler and a Python with vimcore and torch, the first on PATH or in $PYTHON.
#   tests/package/torch.sh [tree of the preset dev, default build/dev] [folder to work in, default build/torch]
set -euo pipefail
cd "$(dirname "$0")/../.."
tree=${1:-build/dev} work=${2:-build/torch} python=${PYTHON:-python3}
mkdir -p "$work"
work=$(cd "$work" && pwd)
step() { printf -- '-- %s\n' "$1"; }
fail() { printf 'tests/package/torch: %s\n' "$1" >&2; exit 1; }
quietly() { "$@" >"$work/log" 2>&1 || { cat "$work/log"; fail "$*"; }; }

step 'vimcore, and the operator for libtorch'
[ -f "$tree/CMakeCache.txt" ] || quietly cmake --preset dev -B "$tree"
quietly cmake --build "$tree" --target vimcore vim-infer -j "$(nproc)"
rm -rf "$work/root"
quietly cmake --install "$tree" --prefix "$work/root"
torch=$("$python" -c 'import torch; print(torch.__path__[0])')
quietly cmake -S cpp/torch -B "$work/tree" -DCMAKE_BUILD_TYPE=Release -DCMAKE_PREFIX_PATH="$work/root" -DTORCH="$torch"
quietly cmake --build "$work/tree" -j "$(nproc)"

step 'a package'
"$python" - "$work" <<'EOF'
import sys

import numpy as np
import torch
import vimcore

work = sys.argv[1]
torch.manual_seed(0)
model = vimcore.VisionMamba(img_size=(32, 48), patch_size=8, embed_dim=32, depth=3, num_classes=5).eval()
images = torch.randn(3, 3, 32, 48)
images.numpy().tofile(f"{work}/images.f32")
np.savetxt(f"{work}/wanted", model(images).detach().numpy(), fmt="%.9g")
with torch.no_grad():
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: batch},))
    torch._inductor.aoti_compile_and_package(program, package_path=f"{work}/model.pt2")
EOF

step 'run by a program that knows no Python'
env -u PYTHONPATH "$work/tree/run_package" "$work/model.pt2" "$work/images.f32" 32 48 >"$work/found"
"$python" - "$work" <<'EOF'
import sys

import numpy as np

found, wanted = (np.loadtxt(f"{sys.argv[1]}/{name}") for name in ("found", "wanted"))
assert found.shape == wanted.shape == (3, 5), found.shape
assert np.abs(found - wanted).max() < 1e-6, np.abs(found - wanted).max()
EOF
readelf -d "$work/tree/run_package" "$work/tree/libvimcore_torch.so" | grep NEEDED | grep python && fail 'Python is needed'
"$work/tree/run_package" "$work/images.f32" "$work/images.f32" 32 48 2>/dev/null && fail 'a file that is no package passes'
echo 'tests/package/torch: all well'
