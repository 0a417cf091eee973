#!/usr/bin/env bash
# Cross-compiles the library for aarch64 and runs the network tests under qemu.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! command -v aarch64-linux-gnu-g++ >/dev/null || ! command -v qemu-aarch64 >/dev/null; then
    sudo=$([ "$(id -u)" = 0 ] || echo sudo)
    $sudo apt-get -qq update
    $sudo apt-get -qq install --yes --no-install-recommends g++-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user >/dev/null
fi
cmake -S . -B build/aarch64 -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS_RELEASE=-O1 -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DVIMCORE_IMAGES=OFF -DVIMCORE_TESTS=ON \
    -DCMAKE_CROSSCOMPILING_EMULATOR="$(command -v qemu-aarch64);-L;/usr/aarch64-linux-gnu" >/dev/null
cmake --build build/aarch64 --target vim-infer test_bf16_kernels test_bf16 test_checksum test_golden test_network test_scan
ctest --test-dir build/aarch64 --output-on-failure -j "$(nproc)" -R '^test_(bf16_kernels|bf16|checksum|golden|network|scan)$'
