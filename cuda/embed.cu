// SPDX-License-Identifier: Apache-2.0
// What happens once per image at the front: patches, class tokens and positions, RoPE. Activations T, tables float.
//   patches  cols[b, gy gw + gx] = image[b, :, gy stride : +P, gx stride : +P], flattened (C, P, P)
//   tokens   out[b, t] = (patch or class token + pos[t]) dropout[b, t]
//   rope     (x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin), pairs of neighbours, in place; inverse: sin negated
// Parallel mapping: a thread per vector of V elements (16 bytes, or one where sizes and addresses do not allow it),
// consecutive threads along a row; patches: a block per row of cols, so that both sides are read and written in runs.
#include <algorithm>

#include "core/class_places.h"
#include "cuda_operators.h"
#include "vectors.cuh"

namespace vimcore::cuda {

namespace {

using device::Floats;

template <class T>
struct PatchParams {
    const T* images;
    T* cols;
    Index channels, height, width, rows, begin;  // rows: of cols per image
    int patch, stride, grid, size;               // grid: patches per image row; size: C P P
};

template <class T, int V>
__global__ void patches_kernel(PatchParams<T> p)
{
    const Index b = blockIdx.x / static_cast<unsigned>(p.rows), row = blockIdx.x % static_cast<unsigned>(p.rows);
    const Index j = p.begin + row, top = j / p.grid * p.stride, left = j % p.grid * p.stride;
    T* cols = p.cols + (b * p.rows + row) * p.size;
    for (int i = static_cast<int>(threadIdx.x) * V; i < p.size; i += static_cast<int>(blockDim.x) * V) {
        const int x = i % p.patch, line = i / p.patch, y = line % p.patch, c = line / p.patch;
        const T* from = p.images + ((b * p.channels + c) * p.height + top + y) * p.width + left + x;
        device::store<V>(cols + i, device::load<V>(from));
    }
}

template <class T>
void run(Context& ctx, const Patches& a)
{
    const Index batch = a.images.size(0), size = a.cols.size(2);
    if (a.cols.numel() == 0) return;
    const PatchParams<T> p{a.images.as<T>(),
                           a.cols.as<T>(),
                           a.images.size(1),
                           a.images.size(2),
                           a.images.size(3),
                           a.cols.size(1),
                           a.begin,
                           static_cast<int>(a.patch),
                           static_cast<int>(a.stride),
                           static_cast<int>((a.images.size(3) - a.patch) / a.stride + 1),
                           static_cast<int>(size)};
    constexpr int V = full_vector<T>;
    const bool vectors = a.patch % V == 0 && a.stride % V == 0 && p.width % V == 0 && aligned(V, {a.images, a.cols});
    const Index threads = std::min<Index>(256, round_up(ceil_div(size, vectors ? V : 1), device::warp_size));
    const dim3 grid(static_cast<unsigned>(batch * p.rows)), block(static_cast<unsigned>(threads));
    if (vectors)
        VIM_LAUNCH((patches_kernel<T, V>), grid, block, 0, stream_of(ctx), p);
    else
        VIM_LAUNCH((patches_kernel<T, 1>), grid, block, 0, stream_of(ctx), p);
}

template <class T>
struct TokenParams {
    const T* patches;
    const float *class_token[2], *pos, *dropout;
    T* out;
    ClassPlaces places;
    Index held, batch, len, patch_len, dim;  // held: class tokens of the first of two tensors
};

template <class T, int V>
__global__ void tokens_kernel(TokenParams<T> p)
{
    const Index i = device::flat_index() * V, row = i / p.dim, d = i % p.dim, b = row / p.len, t = row % p.len;
    if (b >= p.batch) return;
    Floats<V> x;
    const Index token = class_token_at(p.places, t);
    if (token < 0)
        x = device::load_floats<V>(p.patches + (b * p.patch_len + patch_at(p.places, t)) * p.dim + d);
    else if (token < p.held)
        x = device::load_floats<V>(p.class_token[0] + token * p.dim + d);
    else
        x = device::load_floats<V>(p.class_token[1] + d);
    if (p.pos) {
        const Floats<V> pos = device::load_floats<V>(p.pos + t * p.dim + d);
#pragma unroll
        for (int j = 0; j < V; j++) x[j] += pos[j];
    }
    if (p.dropout) {
        const Floats<V> dropout = device::load_floats<V>(p.dropout + i);
#pragma unroll
        for (int j = 0; j < V; j++) x[j] *= dropout[j];
    }
    device::store_floats<V>(p.out + i, x);
}

template <class T>
void run(Context& ctx, const TokensForward& a)
{
    if (a.out.numel() == 0) return;
    const TokenParams<T> p{a.patches.as<T>(),
                           {a.class_token[0].as<float>(), a.class_token[1].as<float>()},
                           a.pos_embed.as<float>(),
                           a.dropout.as<float>(),
                           a.out.as<T>(),
                           a.places,
                           held_by_first(a.class_token),
                           a.out.size(0),
                           a.out.size(1),
                           a.patches.size(1),
                           a.out.size(2)};
    constexpr int V = full_vector<T>;
    const bool vectors =
        p.dim % V == 0 && aligned(V, {a.patches, a.class_token[0], a.class_token[1], a.pos_embed, a.dropout, a.out});
    if (vectors)
        VIM_LAUNCH((tokens_kernel<T, V>), flat_grid(a.out.numel() / V), flat_block, 0, stream_of(ctx), p);
    else
        VIM_LAUNCH((tokens_kernel<T, 1>), flat_grid(a.out.numel()), flat_block, 0, stream_of(ctx), p);
}

template <class T>
struct RopeParams {
    T* x;
    const float *cos, *sin;
    Index batch, len, dim, skip, pairs;  // pairs: elements of a row that are rotated
    float sign;
};

template <class T, int V>
__global__ void rope_kernel(RopeParams<T> p)
{
    const Index i = device::flat_index() * V, row = i / p.pairs, d = i % p.pairs;
    const Index turned = p.len - p.skip, b = row / turned, t = row % turned;
    if (b >= p.batch) return;
    T* at = p.x + (b * p.len + p.skip + t) * p.dim + d;
    Floats<V> x = device::load_floats<V>(at);
    const Floats<V> cos = device::load_floats<V>(p.cos + t * p.dim + d);
    const Floats<V> sin = device::load_floats<V>(p.sin + t * p.dim + d);
#pragma unroll
    for (int j = 0; j < V; j += 2) {
        const float x0 = x[j], x1 = x[j + 1];
        x[j] = fmaf(x0, cos[j], -p.sign * x1 * sin[j]);
        x[j + 1] = fmaf(x1, cos[j + 1], p.sign * x0 * sin[j + 1]);
    }
    device::store_floats<V>(at, x);
}

// Pairs of a row whose address is odd: element by element.
template <class T>
__global__ void rope_elements(RopeParams<T> p)
{
    const Index i = device::flat_index() * 2, row = i / p.pairs, d = i % p.pairs;
    const Index turned = p.len - p.skip, b = row / turned, t = row % turned;
    if (b >= p.batch) return;
    T* at = p.x + (b * p.len + p.skip + t) * p.dim + d;
    const float x0 = device::to_float(at[0]), x1 = device::to_float(at[1]);
    const float *cos = p.cos + t * p.dim + d, *sin = p.sin + t * p.dim + d;
    at[0] = device::from_float<T>(fmaf(x0, cos[0], -p.sign * x1 * sin[0]));
    at[1] = device::from_float<T>(fmaf(x1, cos[1], p.sign * x0 * sin[1]));
}

template <class T>
void run(Context& ctx, const Rope& a)
{
    const Index dim = a.x.size(2), pairs = dim / 2 * 2;
    const RopeParams<T> p{
        a.x.as<T>(), a.cos.as<float>(),       a.sin.as<float>(), a.x.size(0), a.x.size(1), dim, a.skip,
        pairs,       a.inverse ? -1.0f : 1.0f};
    const Index elements = p.batch * (p.len - p.skip) * pairs;
    if (elements == 0) return;
    constexpr int V = full_vector<T>;
    if (dim % V == 0 && aligned(V, {a.x, a.cos, a.sin}))
        VIM_LAUNCH((rope_kernel<T, V>), flat_grid(elements / V), flat_block, 0, stream_of(ctx), p);
    else
        VIM_LAUNCH((rope_elements<T>), flat_grid(elements / 2), flat_block, 0, stream_of(ctx), p);
}

}  // namespace

void patches_forward(Context& ctx, const Patches& args)
{
    dispatch(args.cols.dtype, [&](auto t) { run<decltype(t)>(ctx, args); });
}

void tokens_forward(Context& ctx, const TokensForward& args)
{
    dispatch(args.out.dtype, [&](auto t) { run<decltype(t)>(ctx, args); });
}

void rope(Context& ctx, const Rope& args)
{
    dispatch(args.x.dtype, [&](auto t) { run<decltype(t)>(ctx, args); });
}

}  // namespace vimcore::cuda
