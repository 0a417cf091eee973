#!/usr/bin/env bash
# Builds and runs programs as strangers would: against the installed static and shared library by find_package and by
# pkg-config, with the source tree inside a project, from C and from Python's ctypes; trains with the C++ example and
# compares with Python. Needs cmake, pkg-config, a C and a C++20 compiler, headers of zlib, libjpeg and libpng (as root
# on Debian it installs what is missing of these) and a Python with vimcore and torch, the first on PATH or $PYTHON.
#   tests/package/run.sh [build tree, default build/dev] [folder to work in, default build/package]
set -euo pipefail
cd "$(dirname "$0")/../.."
static_tree=${1:-build/dev} work=${2:-build/package} python=${PYTHON:-python3}
mkdir -p "$work"
work=$(cd "$work" && pwd)
here=tests/package root=$PWD
generator=()
if command -v ninja >/dev/null; then generator=(-G Ninja); fi
cxx=${CXX:-c++} cc=${CC:-cc}

step() { printf -- '-- %s\n' "$1"; }
fail() { printf 'tests/package: %s\n' "$1" >&2; exit 1; }
fresh() { rm -rf "$1" && mkdir -p "$1"; }
configure() { cmake "${generator[@]}" "$@" >"$work/configure.log" || { cat "$work/configure.log"; return 1; }; }
build() { cmake --build "$1" -j "$(nproc)" "${@:2}" >"$work/build.log" || { cat "$work/build.log"; return 1; }; }

tools_missing() {
    for tool in cmake pkg-config readelf nm "$cc" "$cxx"; do
        command -v "$tool" >/dev/null || { echo "$tool is missing"; return 0; }
    done
    ! printf '#include <cstdio>\n#include <%s>\n' zlib.h jpeglib.h png.h | "$cxx" -fsyntax-only -x c++ - 2>&1
}
packages='cmake pkg-config binutils gcc g++ zlib1g-dev libjpeg-dev libpng-dev'
if tools_missing; then
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || fail "something is missing; Debian: apt-get install $packages"
    step "installing $packages"
    # shellcheck disable=SC2086
    { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends $packages; } \
        >"$work/install.log" 2>&1 || { cat "$work/install.log"; fail "apt-get cannot install $packages"; }
    tools_missing && fail 'something is still missing'
fi
"$python" -c 'import torch, vimcore' || fail "$python has no vimcore with torch (name another one in \$PYTHON)"

step 'install: static and shared'
[ -f "$static_tree/CMakeCache.txt" ] || configure --preset dev -B "$static_tree"
needed=(vimcore vim-infer example_embed example_infer example_retrieval example_segment example_train)
build "$static_tree" --target "${needed[@]}"
configure -S . -B "$work-shared" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DVIMCORE_EXAMPLES=ON -DVIMCORE_CUDA=OFF
build "$work-shared" --target "${needed[@]}"
for kind in static shared; do
    if [ $kind = static ]; then tree=$static_tree; else tree=$work-shared; fi
    rm -rf "$work/$kind-root" "$work/before"
    cmake --install "$tree" --prefix "$work/before" >/dev/null
    mv "$work/before" "$work/$kind-root" # an installed tree may be moved
done
static=$work/static-root shared=$work/shared-root
libdir=$(cd "$shared" && find * -name libvimcore.so -printf '%h')
library=$shared/$libdir/libvimcore.so

step 'the shared library: its name, and nothing but vimcore:: and vimcore_ in its interface'
version=$(sed -n 's/^#define VIMCORE_VERSION "\(.*\)"/\1/p' cpp/include/vimcore/version.h)
readelf -d "$library" | grep "SONAME.*\[libvimcore.so.${version%.*}\]" >/dev/null || fail 'SONAME'
[ "$(readlink -f "$library")" = "$(readlink -f "$shared/$libdir/libvimcore.so.$version")" ] || fail 'version of the file'
nm -DC --defined-only "$library" | cut -d' ' -f3- >"$work/symbols"
grep -Ev '^((vtable|typeinfo|typeinfo name) for )?vimcore(::|_)' "$work/symbols" && fail 'foreign symbols'
grep -E 'vimcore::((json|cpu|cuda)::|\(anonymous)' "$work/symbols" && fail 'internal symbols'
for name in $(grep -oE '\bvimcore_[a-z_]+\(' "$shared/include/vimcore/c_api.h" | tr -d '(' | sort -u); do
    grep -qx "$name" "$work/symbols" || fail "$name is not exported"
done
grep -l '^namespace vimcore {' cpp/include/vimcore/*.h && fail 'public headers say [[gnu::visibility("default")]]'

step 'every installed header compiles alone, as C++20 and, the C one, as C99'
strict=(-Wall -Wextra -Wpedantic -Werror -fsyntax-only)
for header in "$shared"/include/vimcore/*.h; do
    echo "#include <vimcore/$(basename "$header")>" | "$cxx" -std=c++20 "${strict[@]}" -I"$shared/include" -x c++ -
done
for standard in c99 c17; do
    echo '#include <vimcore/c_api.h>' | "$cc" -std=$standard "${strict[@]}" -I"$shared/include" -x c -
done
diff -r cpp/include/vimcore "$static/include/vimcore"

step 'training in C++, then Python'
digits=python/vimcore/data/digits.npz
"$static_tree/cpp/examples/example_train" $digits "$work/digits.safetensors" 3 "$work/held_out.safetensors" \
    >"$work/train.log" 2>/dev/null || { cat "$work/train.log"; fail 'example_train'; }
cat "$work/train.log"
awk '/mean loss/ { if (seen && $NF >= last) exit 1; last = $NF; seen++ } END { exit seen != 3 }' "$work/train.log" ||
    fail 'the loss does not decrease'
"$work-shared/cpp/examples/example_train" $digits "$work/again.safetensors" 3 >/dev/null 2>&1
cmp "$work/digits.safetensors" "$work/again.safetensors"
weights=$work/digits.safetensors picture=$work/digit.png
(cd "$work" && "$python" "$root/$here/check_trained.py" "$weights" "$work/held_out.safetensors" "$picture") >"$work/logits"

step 'vim-infer of both trees'
for root_of in "$static" "$shared"; do
    "$root_of/bin/vim-infer" predict --weights "$weights" --json --logits "$picture" |
        "$python" -c 'import json, sys; print(*(f"{x:.9g}" for x in json.load(sys.stdin)["logits"]), sep="\n")' |
        diff "$work/logits" -
done
ldd "$static/bin/vim-infer" | grep vimcore && fail 'vim-infer of the static tree looks for libvimcore.so'
ldd "$shared/bin/vim-infer" | grep "$shared/.*libvimcore" >/dev/null || fail 'vim-infer found another library'
readelf -S "$static/bin/vim-infer" | grep -E '\.(symtab|debug)' && fail 'vim-infer is not stripped'
[ "$(stat -c %s "$static/bin/vim-infer")" -lt 5000000 ] || fail 'vim-infer is larger than 5 MB'
status=0
"$shared/bin/vim-infer" predict --weights "$weights" --device cuda "$picture" >"$work/cuda.log" 2>&1 || status=$?
[ "$status $(grep -c 'no CUDA backend' "$work/cuda.log")" = '1 1' ] || { cat "$work/cuda.log"; fail '--device cuda'; }

step 'find_package'
for kind in static shared; do
    fresh "$work/find-$kind"
    configure -S $here/find_package -B "$work/find-$kind" -DCMAKE_PREFIX_PATH="$work/$kind-root"
    build "$work/find-$kind"
    "$work/find-$kind/consumer" "$work/made.safetensors"
    "$work/find-$kind/consumer_c" "$weights" "$picture" | diff "$work/logits" -
done
fresh "$work/find-c"
configure -S $here/c_only -B "$work/find-c" -DCMAKE_PREFIX_PATH="$shared"
build "$work/find-c"
"$work/find-c/consumer_c" "$weights" "$picture" | diff "$work/logits" -
fresh "$work/find-newer"
sed 's/vimcore 0\.2/vimcore 0.3/' $here/c_only/CMakeLists.txt >"$work/find-newer/CMakeLists.txt"
cmake -S "$work/find-newer" -B "$work/find-newer/tree" -DCMAKE_PREFIX_PATH="$shared" >"$work/configure.log" 2>&1 &&
    fail 'version 0.2 passes for 0.3'
grep -q "version: $version" "$work/configure.log" || { cat "$work/configure.log"; fail 'another fault than the version'; }

step 'pkg-config and a plain command line'
flags() { PKG_CONFIG_PATH=$work/$1-root/$libdir/pkgconfig pkg-config "${@:2}" vimcore; }
[ "$(flags shared --modversion)" = "$version" ] || fail 'version in vimcore.pc'
[ -z "$(flags shared --libs | tr ' ' '\n' | grep -E 'jpeg|png|pthread|stdc')" ] || fail 'a shared library needs no more'
read -ra static_flags < <(flags static --static --cflags --libs)
read -ra shared_flags < <(flags shared --cflags --libs)
shared_flags+=(-Wl,-rpath,"$shared/$libdir")
read -ra plain_flags < <(flags static --cflags --libs) # only the static library is there: the same without --static
"$cxx" -std=c++20 $here/consumer.cpp "${plain_flags[@]}" -o "$work/plain-only"
"$cc" -std=c99 $here/consumer.c "${plain_flags[@]}" -o "$work/plain-c-only"
"$cxx" -std=c++20 $here/consumer.cpp "${static_flags[@]}" -o "$work/plain-static"
"$cxx" -std=c++20 $here/consumer.cpp "${shared_flags[@]}" -o "$work/plain-shared"
"$cc" -std=c99 $here/consumer.c "${static_flags[@]}" -o "$work/plain-c-static"
"$cc" -std=c99 $here/consumer.c "${shared_flags[@]}" -o "$work/plain-c-shared"
for kind in static shared only; do
    "$work/plain-$kind" "$work/made.safetensors"
    "$work/plain-c-$kind" "$weights" "$picture" | diff "$work/logits" -
done
ldd "$work/plain-static" | grep vimcore && fail 'the static program looks for libvimcore.so'
ldd "$work/plain-shared" | grep "$shared/.*libvimcore.so.${version%.*}" >/dev/null || fail 'the shared program found another library'

step 'add_subdirectory, and a build without image libraries'
configure -S $here/subdirectory -B "$work/subdirectory"
build "$work/subdirectory"
"$work/subdirectory/consumer" "$work/made.safetensors"
ldd "$work/subdirectory/consumer" | grep -E 'jpeg|png' && fail 'VIMCORE_IMAGES=OFF links image libraries'

step "Python's ctypes"
"$python" $here/check_ctypes.py "$library" "$weights" "$picture" | diff "$work/logits" -

step 'the other examples'
for tree in "$static_tree" "$work-shared"; do
    [ "$("$tree/cpp/examples/example_infer" "$weights" "$picture" | cut -d' ' -f2-3)" = \
        "$(awk 'NR == 1 || $1 > best { best = $1; class = NR - 1 } END { print class, class }' "$work/logits")" ] ||
        fail 'example_infer'
    [ "$("$tree/cpp/examples/example_infer" "$weights" "$picture" | cut -d' ' -f3)" = \
        "$("$tree/cpp/examples/example_embed" "$weights" "$picture")" ] || fail 'example_embed'
done
fresh "$work/pictures"
cp "$picture" "$work/pictures/same.png"
printf 'P5 2 2 255 abcd' >"$work/pictures/other.pgm"
"$static_tree/cpp/examples/example_retrieval" "$weights" "$work/pictures" "$picture" 2>/dev/null >"$work/table"
cat "$work/table"
grep -qE '^ +1 +1\.000 .*/same\.png$' "$work/table" || fail 'example_retrieval'
grep -qE '^ +2 .*/other\.pgm$' "$work/table" || fail 'example_retrieval'
echo broken >"$work/pictures/broken.png"
"$static_tree/cpp/examples/example_retrieval" "$weights" "$work/pictures" "$picture" >/dev/null 2>&1 &&
    fail 'a picture that cannot be read must show in the exit status'
for example in embed infer retrieval segment train; do
    status=0
    "$static_tree/cpp/examples/example_$example" >/dev/null 2>&1 || status=$?
    [ $status = 2 ] || fail "example_$example without arguments: exit status $status"
done
echo 'tests/package: all well'
