// SPDX-License-Identifier: Apache-2.0
// Speed of the matrix, norm and convolution kernels on one thread, float32. Matrix products as a share of the
// multiply-add peak of the same instruction set, measured just before each of them; the others as bytes moved per
// second. Usage: bench_kernels [isa]
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "isa.h"

using namespace vimcore::cpu;

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Seconds of one call: the fastest of many short windows, so that a busy neighbour matters little.
template <class F>
double seconds(F&& call)
{
    call();
    double fastest = 1e9;
    for (int window = 0; window < 100; window++) {
        const double begin = now();
        double end = begin;
        int calls = 0;
        for (; end - begin < 5e-4; end = now(), calls++) call();
        fastest = std::min(fastest, (end - begin) / calls);
    }
    return fastest;
}

float* aligned(std::vector<float>& memory, Index size)
{
    memory.assign(static_cast<std::size_t>(size) + 16, 0.0f);
    auto address = reinterpret_cast<std::uintptr_t>(memory.data());
    float* data = memory.data() + (64 - address % 64) % 64 / 4;
    for (Index i = 0; i < size; i++) data[i] = static_cast<float>(i * 7919 % 1000) / 1000 - 0.5f;
    return data;
}

volatile float sink;

double peak(const Kernels<float>& kernels)
{
    return 1000.0 * kernels.fma_per_round / seconds([&] { sink = kernels.fma_peak(1000); }) / 1e9;
}

void print(const char* name, Index k, Index n, Index m, double rate, double limit)
{
    std::printf("%-8s %4lld -> %-4lld M %5lld  %7.1f GF/s  %5.1f %% of %.0f\n", name, k, n, m, rate, 100 * rate / limit,
                limit);
}

void bench_gemm(const Kernels<float>& kernels, Index k, Index n, Index m)
{
    std::vector<float> mx, mw, mp, my;
    float *x = aligned(mx, m * k), *w = aligned(mw, n * k), *y = aligned(my, m * n);
    const Index panels = (n + kernels.nr - 1) / kernels.nr;
    float* packed = aligned(mp, panels * kernels.nr * k);
    kernels.pack({w, k, n, k, false, packed});
    const double limit = peak(kernels);
    const double time = seconds([&] { kernels.gemm({x, k, packed, nullptr, y, n, m, n, k, 0, panels, false}); });
    print("gemm", k, n, m, 2.0 * m * n * k / time / 1e9, limit);
}

void bench_gemm_tn(const Kernels<float>& kernels, Index k, Index n, Index m)
{
    std::vector<float> mx, my, mw, ms;
    float *x = aligned(mx, m * k), *dy = aligned(my, m * n), *dw = aligned(mw, n * k);
    float* scratch = aligned(ms, kernels.gemm_tn_scratch(m, k));
    const double limit = peak(kernels);
    const double time = seconds([&] { kernels.gemm_tn({dy, n, x, k, dw, k, m, k, 0, n, scratch}); });
    print("gemm_tn", k, n, m, 2.0 * m * n * k / time / 1e9, limit);
}

void bench_norm(const Kernels<float>& kernels, Index len, Index dim, bool layer)
{
    std::vector<float> memory[6];
    float* data[6];
    for (int i = 0; i < 6; i++) data[i] = aligned(memory[i], len * dim);
    NormForwardArgs<float> args = {};
    args.h = data[0];
    args.residual = args.residual_out = data[1];
    args.weight = data[2];
    args.out = data[3];
    args.eps = 1e-5f;
    args.layer = layer;
    args.len = len;
    args.dim = dim;
    const double forward = seconds([&] { kernels.norm_forward(args); });
    NormBackwardArgs<float> back = {};
    back.x = data[1];
    back.weight = data[2];
    back.eps = args.eps;
    back.layer = layer;
    back.len = len;
    back.dim = dim;
    back.dout = data[0];
    back.dresidual_out = back.dresidual = data[3];
    back.dh = data[4];
    back.dweight = data[5];
    const double backward = seconds([&] { kernels.norm_backward(back); });
    const double row = 4e-9 * len * dim;
    std::printf("%-8s (%lld, %lld)  forward %6.1f GB/s  backward %6.1f GB/s\n", layer ? "layer" : "rms", len, dim,
                4 * row / forward, 5 * row / backward);
}

void bench_conv(const Kernels<float>& kernels, Index len, Index dim, Index width, bool reverse)
{
    std::vector<float> memory[6];
    float *x = aligned(memory[0], len * 2 * dim), *u = aligned(memory[1], len * dim),
          *dx = aligned(memory[2], len * 2 * dim);
    float *weight = aligned(memory[3], width * dim), *bias = aligned(memory[4], dim),
          *dw = aligned(memory[5], width * dim + dim);
    const Conv<float> conv = {.x = x,
                              .ldx = 2 * dim,
                              .weight = weight,
                              .bias = bias,
                              .total = len,
                              .dim = dim,
                              .e0 = 0,
                              .e1 = dim,
                              .width = width,
                              .reverse = reverse,
                              .silu = true};
    const double forward =
        seconds([&] { kernels.conv_forward({.f = conv, .u = u, .ldu = dim, .begin = 0, .len = len}); });
    const double backward = seconds([&] {
        kernels.conv_backward({.f = conv,
                               .du = u,
                               .lddu = dim,
                               .dx = dx,
                               .lddx = 2 * dim,
                               .add_dx = false,
                               .dweight = dw,
                               .dbias = dw + width * dim});
    });
    const double row = 4e-9 * len * dim;
    std::printf(
        "conv     (%lld, %lld) width %lld%s  forward %6.1f GB/s, %.2f ns/vector  backward %6.1f GB/s, %.2f ns/vector\n",
        len, dim, width, reverse ? " reverse" : "", 2 * row / forward, 1e9 * forward * kernels.lanes / len / dim,
        3 * row / backward, 1e9 * backward * kernels.lanes / len / dim);
}

}  // namespace

int main(int argc, char** argv)
{
    const Kernels<float>& table = argc > 1 ? kernels<float>(argv[1]) : kernels<float>();
    std::printf("%s, tile %lld x %lld, peak %.1f GF/s\n", table.isa, table.mr, table.nr, peak(table));
    const Index shapes[][2] = {{192, 768}, {384, 44}, {384, 192}, {768, 192}, {12, 384}, {384, 12}};
    for (const auto& shape : shapes)
        for (Index m : {197, 394, 1576}) bench_gemm(table, shape[0], shape[1], m);
    const Index transposed[][2] = {{192, 768}, {384, 192}, {384, 44}, {12, 384}};
    for (const auto& shape : transposed)
        for (Index m : {400, 1600}) bench_gemm_tn(table, shape[0], shape[1], m);
    for (bool layer : {false, true}) bench_norm(table, 197, 192, layer);
    for (bool reverse : {false, true}) bench_conv(table, 197, 384, 4, reverse);
    bench_conv(table, 197, 384, 3, false);
}
