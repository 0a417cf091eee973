#!/usr/bin/env bash
# Builds vim-infer for Windows by MinGW-w64, without libjpeg and libpng, and uses it under Wine: the same bytes as here.
# Installs both where they are missing (Debian, as root). Needs a Python with vimcore in $PYTHON.
#   tests/package/windows.sh [vim-infer of this machine, default build/dev's] [folder to work in, default build/windows]
set -euo pipefail
cd "$(dirname "$0")/../.."
native=$(readlink -m "${1:-build/dev/cpp/tools/vim-infer}") work=${2:-build/windows} python=${PYTHON:-python3}
fail() { printf 'tests/package/windows: %s\n' "$1" >&2; exit 1; }
trap 'fail "line $LINENO ended with $?"' ERR
[ -x "$native" ] || fail 'there is no vim-infer to compare with; name one'
if ! command -v x86_64-w64-mingw32-g++-posix >/dev/null || ! command -v wine >/dev/null; then
    apt-get -qq update && apt-get -qq install --yes --no-install-recommends \
        g++-mingw-w64-x86-64-posix wine wine64 ninja-build >/dev/null
fi
cmake -S . -B "$work" -G Ninja -DCMAKE_TOOLCHAIN_FILE=tests/package/mingw.cmake -DCMAKE_BUILD_TYPE=Release \
    -DVIMCORE_STATIC=ON -DVIMCORE_IMAGES=OFF -DVIMCORE_CUDA=OFF >/dev/null
cmake --build "$work" --target vim-infer >"$work/log" 2>&1 || { cat "$work/log"; fail 'it does not compile'; }
work=$(cd "$work" && pwd)
program=$work/cpp/tools/vim-infer.exe

rm -rf "$work/used"
mkdir -p "$work/used/pictures/deep"
cd "$work/used"
(cd / && "$python" - "$work/used") <<'EOF'
import sys

import numpy as np
import vimcore
from vimcore import _core
from vimcore.weights.metadata import pack

folder = sys.argv[1]
random = np.random.default_rng(0)
config = vimcore.Config(img_size=28, patch_size=7, embed_dim=16, depth=2, num_classes=3)
tensors = {n: random.standard_normal(shape).astype("f") / 4 for n, shape in config.param_shapes().items()}
_core.write_safetensors(f"{folder}/made.safetensors", tensors, pack(config, ["a", "b\n", "c"], None))
for name in ("one.ppm", "deep/two.ppm"):
    pixels = random.integers(0, 256, (40, 50, 3), np.uint8)
    with open(f"{folder}/pictures/{name}", "wb") as file:
        file.write(b"P6\n50 40\n255\n" + pixels.tobytes())
EOF
printf 'no picture\n' >pictures/bad.ppm
printf 'pictures/one.ppm\r\npictures/deep\n' >list
prefix=$(mktemp -d) # a new one: servers of an earlier run may still be at another
trap '/usr/lib/wine/wineserver -w || true; rm -rf "$prefix"' EXIT
export WINEDEBUG=-all WINEPREFIX=$prefix VIMCORE_ISA=baseline
windows() { timeout 300 wine "$program" "$@"; }
windows --version >/dev/null # sets Wine up

same() { # NAME ARGUMENTS...: what both print, and their status
    local name=$1 here=0 there=0
    shift
    "$native" "$@" >"$name.here" 2>/dev/null <pictures/one.ppm || here=$?
    windows "$@" >"$name.there" 2>/dev/null <pictures/one.ppm || there=$?
    cmp "$name.here" "$name.there" || fail "$name: another output"
    [ $here = $there ] || fail "$name: status $there, here $here"
}
same folder predict --weights made.safetensors --json --logits pictures
same list predict --weights made.safetensors --json @list
same stdin predict --weights made.safetensors --json -
same table predict --weights made.safetensors pictures/one.ppm
windows info made.safetensors >/dev/null
same usage predict --wieghts
for suffix in npz npy csv safetensors; do
    for program_of in "$native" windows; do
        out=$([ "$program_of" = windows ] && echo there || echo here).$suffix
        "$program_of" features --weights made.safetensors --out "$out" @list >/dev/null
        "$program_of" features --weights made.safetensors --out "$out" @list >/dev/null # replaces it
    done
    cmp "here.$suffix" "there.$suffix" || fail "$suffix: another file"
done
[ "$(find . -name '*.tmp' | wc -l)" = 0 ] || fail 'temporary files are left'
echo 'tests/package/windows: all well'
