// SPDX-License-Identifier: Apache-2.0
// Copies of many weights in one launch: to[i] = from[i], rounded to the nearest, ties to even, for every tensor of a
// table. from float; to float, __half or __nv_bfloat16; tensors of any size and alignment of their elements.
// The table lies in device memory, so that a launch takes two numbers, and a graph finds it again: pieces of up to
// `cast_piece` neighbouring elements, a large tensor being many of them, so that all blocks have as much to do.
// Parallel mapping: a block per piece. A thread takes 8 neighbouring elements at a time, in vectors of 16 bytes, all of
// a full piece at once; single elements where a piece ends, or where an address allows no vectors.
#include <algorithm>
#include <stdexcept>

#include "cuda_operators.h"
#include "vectors.cuh"

namespace vimcore::cuda {

namespace {

using device::Floats;

constexpr int V = 8, cast_block = 256, cast_piece = 2 * V * cast_block;

template <class T>
__device__ __forceinline__ void cast(const float* __restrict__ from, T* __restrict__ to, int count, bool vectors)
{
    constexpr int step = V * cast_block;
    const int thread = static_cast<int>(threadIdx.x);
    device::assume_global(from);
    device::assume_global(to);
    if (vectors && count == cast_piece) {
        Floats<V> part[cast_piece / step];
#pragma unroll
        for (int i = 0; i < cast_piece / step; i++) part[i] = device::load_floats<V>(from + i * step + thread * V);
#pragma unroll
        for (int i = 0; i < cast_piece / step; i++) device::store_floats<V>(to + i * step + thread * V, part[i]);
        return;
    }
    const int whole = vectors ? count / V * V : 0;
    for (int i = thread * V; i < whole; i += step) device::store_floats<V>(to + i, device::load_floats<V>(from + i));
    for (int i = whole + thread; i < count; i += cast_block) to[i] = device::from_float<T>(from[i]);
}

__global__ void __launch_bounds__(cast_block) cast_kernel(const CastPiece* table)
{
    const CastPiece p = table[blockIdx.x];
    if (p.dtype == DType::bf16)
        cast(p.from, static_cast<__nv_bfloat16*>(p.to), p.count, p.vectors);
    else if (p.dtype == DType::f16)
        cast(p.from, static_cast<__half*>(p.to), p.count, p.vectors);
    else
        cast(p.from, static_cast<float*>(p.to), p.count, p.vectors);
}

}  // namespace

std::vector<CastPiece> cast_pieces(std::span<const Copy> copies)
{
    std::vector<CastPiece> pieces;
    for (const Copy& c : copies) {
        if (c.from.dtype != DType::f32 || c.to.dtype == DType::f64 || c.to.dtype > DType::bf16 ||
            c.from.numel() != c.to.numel())
            throw std::invalid_argument("[casts] expected float32 and as many floats, got " + describe(c.from) +
                                        " and " + describe(c.to));
        const auto size = static_cast<Index>(size_of(c.to.dtype)), count = c.from.numel();
        for (Index i = 0; i < count; i += cast_piece)
            pieces.push_back({c.from.as<float>() + i, static_cast<char*>(c.to.data) + i * size,
                              static_cast<int>(std::min<Index>(cast_piece, count - i)), c.to.dtype,
                              aligned(V, {c.from, c.to})});
    }
    return pieces;
}

void cast_all(Context& ctx, const CastPiece* table, Index pieces)
{
    if (pieces > 0) VIM_LAUNCH(cast_kernel, dim3(static_cast<unsigned>(pieces)), cast_block, 0, stream_of(ctx), table);
}

}  // namespace vimcore::cuda
