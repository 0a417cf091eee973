// SPDX-License-Identifier: Apache-2.0
// Backward of the read-out: dx[b, t, d] = dout[b, d] / L (mean), dout at the first of equal maxima of x[b, :, d] (max),
// dout or a share of it at the chosen tokens (select), the part of each (join), 0 elsewhere. x, dx (B, L, D), dout (B,
// D) or (B, n D) T. Parallel mapping: mean, select, join: a thread per element. max: a block per image and 32 channels;
// its warps take every eighth token, first to find the maximum, which is joined over the warps, then to write.
#include "core/class_places.h"
#include "cuda_operators.h"
#include "vectors.cuh"

namespace vimcore::cuda {

namespace {

constexpr int warps = 8;

template <class T>
struct ReadoutParams {
    const T *x, *dout;
    T* dx;
    Index count, len, dim;
    ClassPlaces places;
    bool mean, join;
};

template <class T>
__global__ void spread_tokens(ReadoutParams<T> p)
{
    const Index i = device::flat_index(), row = i / p.dim, t = row % p.len;
    if (i >= p.count) return;
    const Index token = p.mean ? 0 : class_token_at(p.places, t), rows = p.join ? p.places.count : 1;
    float value = 0;
    if (token >= 0) {
        value = device::to_float(p.dout[(row / p.len * rows + (p.join ? token : 0)) * p.dim + i % p.dim]);
        value /= static_cast<float>(p.mean ? p.len : p.join ? 1 : p.places.count);
    }
    p.dx[i] = device::from_float<T>(value);
}

template <class T>
__global__ void spread_maximum(ReadoutParams<T> p)
{
    const auto value = device::shared<float>(0, warps * device::warp_size);
    const auto place =
        device::shared<Index>(warps * device::warp_size * static_cast<int>(sizeof(float)), warps * device::warp_size);
    const int lane = static_cast<int>(threadIdx.x) % device::warp_size;
    const int warp = static_cast<int>(threadIdx.x) / device::warp_size;
    const Index b = blockIdx.x, d = static_cast<Index>(blockIdx.y) * device::warp_size + lane;
    const bool inside = d < p.dim;
    const T* x = p.x + b * p.len * p.dim + d;
    float best = 0;
    Index at = -1;
    for (Index t = warp; inside && t < p.len; t += warps) {
        const float candidate = device::to_float(x[t * p.dim]);
        if (at >= 0 && !(candidate > best)) continue;
        best = candidate;
        at = t;
    }
    value[static_cast<int>(threadIdx.x)] = best;
    place[static_cast<int>(threadIdx.x)] = at;
    device::sync_block();
    if (!inside) return;
    best = value[lane];
    at = place[lane];
    for (int w = 1; w < warps; w++) {
        const float candidate = value[w * device::warp_size + lane];
        const Index other = place[w * device::warp_size + lane];
        if (other < 0 || candidate < best || (candidate == best && other > at)) continue;
        best = candidate;
        at = other;
    }
    const T dout = p.dout[b * p.dim + d];
    for (Index t = warp; t < p.len; t += warps)
        p.dx[(b * p.len + t) * p.dim + d] = t == at ? dout : device::from_float<T>(0.0f);
}

template <class T>
void run(Context& ctx, const ReadoutBackward& a)
{
    const Index batch = a.dx.size(0), len = a.dx.size(1), dim = a.dx.size(2);
    if (a.dx.numel() == 0) return;
    const ReadoutParams<T> p{a.x.as<T>(),
                             a.dout.as<T>(),
                             a.dx.as<T>(),
                             a.dx.numel(),
                             len,
                             dim,
                             a.places,
                             a.reduce == Reduce::mean,
                             a.reduce == Reduce::join};
    if (a.reduce != Reduce::max) {
        VIM_LAUNCH((spread_tokens<T>), flat_grid(p.count), flat_block, 0, stream_of(ctx), p);
        return;
    }
    constexpr int block = warps * device::warp_size;
    const dim3 grid(static_cast<unsigned>(batch), static_cast<unsigned>(ceil_div(dim, device::warp_size)));
    VIM_LAUNCH((spread_maximum<T>), grid, block, block * (sizeof(float) + sizeof(Index)), stream_of(ctx), p);
}

}  // namespace

void readout_backward(Context& ctx, const ReadoutBackward& args)
{
    dispatch(args.dx.dtype, [&](auto t) { run<decltype(t)>(ctx, args); });
}

}  // namespace vimcore::cuda
