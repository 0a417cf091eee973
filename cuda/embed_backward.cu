// SPDX-License-Identifier: Apache-2.0
// Backward of what happens once per image at the front. Activations T, parameters and their gradients float.
//   patches  dimage[b, c, y, x] += sum over the patches that hold the pixel of dcols
//   tokens   g = dout dropout;  dpatches[b, j] = g[b, t(j)];  dpos[t] += sum_b g[b, t];  dclass += sum_b g[b, position]
// Parallel mapping: patches: a thread per pixel gathers, in order of the patches, so that overlapping ones need no
// atomics; tokens: a thread per token and V neighbouring channels walks through the images in order.
#include "core/class_places.h"
#include "cuda_operators.h"
#include "vectors.cuh"

namespace vimcore::cuda {

namespace {

using device::Floats;

template <class T>
struct PatchParams {
    const T* cols;
    T* images;
    Index count, channels, height, width, rows, begin;  // count: pixels of all images; rows: of cols per image
    Index grid_height, grid_width, size;                // size: C P P
    int patch, stride;
};

template <class T>
__global__ void patches_backward_kernel(PatchParams<T> p)
{
    const Index i = device::flat_index();
    if (i >= p.count) return;
    const Index x = i % p.width, line = i / p.width, y = line % p.height, plane = line / p.height;
    const Index c = plane % p.channels, b = plane / p.channels;
    // patches whose first row or column is at most `patch` - 1 before the pixel
    const Index y0 = y < p.patch ? 0 : (y - p.patch) / p.stride + 1,
                x0 = x < p.patch ? 0 : (x - p.patch) / p.stride + 1;
    float sum = 0;
    for (Index gy = y0; gy < p.grid_height && gy * p.stride <= y; gy++)
        for (Index gx = x0; gx < p.grid_width && gx * p.stride <= x; gx++) {
            const Index row = gy * p.grid_width + gx - p.begin;
            if (row < 0 || row >= p.rows) continue;
            const Index at = (c * p.patch + y - gy * p.stride) * p.patch + x - gx * p.stride;
            sum += device::to_float(p.cols[(b * p.rows + row) * p.size + at]);
        }
    p.images[i] = device::from_float<T>(device::to_float(p.images[i]) + sum);
}

template <class T>
void run(Context& ctx, const Patches& a)
{
    if (a.cols.numel() == 0) return;
    const Index height = a.images.size(2), width = a.images.size(3);
    const PatchParams<T> p{a.cols.as<T>(),
                           a.images.as<T>(),
                           a.images.numel(),
                           a.images.size(1),
                           height,
                           width,
                           a.cols.size(1),
                           a.begin,
                           (height - a.patch) / a.stride + 1,
                           (width - a.patch) / a.stride + 1,
                           a.cols.size(2),
                           static_cast<int>(a.patch),
                           static_cast<int>(a.stride)};
    VIM_LAUNCH((patches_backward_kernel<T>), flat_grid(p.count), flat_block, 0, stream_of(ctx), p);
}

template <class T>
struct TokenParams {
    const T* dout;
    const float* dropout;
    T* dpatches;
    float *dclass[2], *dpos;
    ClassPlaces places;
    Index held, batch, len, patch_len, dim;  // held: class tokens of the first of two tensors
};

template <class T, int V>
__global__ void tokens_backward_kernel(TokenParams<T> p)
{
    const Index i = device::flat_index() * V, t = i / p.dim, d = i % p.dim;
    if (t >= p.len) return;
    const Index token = class_token_at(p.places, t), patch = token < 0 ? patch_at(p.places, t) : -1;
    Floats<V> sum = {};
#pragma unroll 4
    for (Index b = 0; b < p.batch; b++) {
        const Index at = (b * p.len + t) * p.dim + d;
        Floats<V> g = device::load_floats<V>(p.dout + at);
        if (p.dropout) {
            const Floats<V> dropout = device::load_floats<V>(p.dropout + at);
#pragma unroll
            for (int j = 0; j < V; j++) g[j] *= dropout[j];
        }
        if (patch >= 0) device::store_floats<V>(p.dpatches + (b * p.patch_len + patch) * p.dim + d, g);
#pragma unroll
        for (int j = 0; j < V; j++) sum[j] += g[j];
    }
    auto add_to = [&](float* out) {
        Floats<V> total = device::load_floats<V>(out);
#pragma unroll
        for (int j = 0; j < V; j++) total[j] += sum[j];
        device::store_floats<V>(out, total);
    };
    if (p.dpos) add_to(p.dpos + i);
    if (token < 0) return;
    if (token >= p.held && p.dclass[1]) add_to(p.dclass[1] + d);
    if (token < p.held && p.dclass[0]) add_to(p.dclass[0] + token * p.dim + d);
}

template <class T>
void run(Context& ctx, const TokensBackward& a)
{
    if (a.dout.numel() == 0) return;
    const TokenParams<T> p{a.dout.as<T>(),
                           a.dropout.as<float>(),
                           a.dpatches.as<T>(),
                           {a.dclass_token[0].as<float>(), a.dclass_token[1].as<float>()},
                           a.dpos_embed.as<float>(),
                           a.places,
                           held_by_first(a.dclass_token),
                           a.dout.size(0),
                           a.dout.size(1),
                           a.dpatches.size(1),
                           a.dout.size(2)};
    constexpr int V = 4;
    const Index count = p.len * p.dim;
    if (p.dim % V == 0 &&
        aligned(V, {a.dout, a.dropout, a.dpatches, a.dclass_token[0], a.dclass_token[1], a.dpos_embed}))
        VIM_LAUNCH((tokens_backward_kernel<T, V>), flat_grid(count / V), flat_block, 0, stream_of(ctx), p);
    else
        VIM_LAUNCH((tokens_backward_kernel<T, 1>), flat_grid(count), flat_block, 0, stream_of(ctx), p);
}

}  // namespace

void patches_backward(Context& ctx, const Patches& args)
{
    dispatch(args.cols.dtype, [&](auto t) { run<decltype(t)>(ctx, args); });
}

void tokens_backward(Context& ctx, const TokensBackward& args)
{
    dispatch(args.dout.dtype, [&](auto t) { run<decltype(t)>(ctx, args); });
}

}  // namespace vimcore::cuda
