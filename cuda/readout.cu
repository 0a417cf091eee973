// SPDX-License-Identifier: Apache-2.0
// Pools the tokens of an image to one row: out[b, d] = mean or maximum over t of x[b, t, d], or the mean of chosen
// tokens; or these one after the other. x (B, L, D), out (B, D) or (B, n D) T; sums float. A NaN among the tokens makes
// the maximum NaN.
// Parallel mapping: a block per image, channel tile and chunk of tokens; its warps take every eighth token, a lane V
// channels. The partial results are joined in order of the warps, those of several chunks by a second launch. Nothing
// depends on the batch.
#include <limits>

#include "core/context_internals.h"
#include "cuda_operators.h"
#include "vectors.cuh"

namespace vimcore::cuda {

namespace {

using device::Floats;

constexpr int warps = 8;
constexpr Index chunk_tokens = device_scratch::pooled_tokens;
constexpr float lowest = -std::numeric_limits<float>::infinity();

template <class From, class To>
struct PoolParams {
    const From* x;  // (B, len, dim)
    To* out;        // (B, chunks, dim)
    Index len, dim, chunks;
    float divisor;  // of the sum
    bool max;
};

__device__ __forceinline__ float join(float a, float b, bool max) { return max ? (b > a || b != b ? b : a) : a + b; }

template <class From, class To, int V>
__global__ void pool(PoolParams<From, To> p)
{
    constexpr int tile = device::warp_size * V;
    const auto parts = device::shared<float>(0, warps * tile);
    const Index b = blockIdx.x / static_cast<unsigned>(p.chunks), chunk = blockIdx.x % static_cast<unsigned>(p.chunks);
    const int warp = static_cast<int>(threadIdx.x) / device::warp_size;
    const int column = static_cast<int>(threadIdx.x) % device::warp_size * V;
    const Index d = static_cast<Index>(blockIdx.y) * tile + column;
    const Index end = chunk == p.chunks - 1 ? p.len : (chunk + 1) * chunk_tokens;
    Floats<V> sum;
#pragma unroll
    for (int j = 0; j < V; j++) sum[j] = p.max ? lowest : 0.0f;
    if (d < p.dim) {
#pragma unroll 4
        for (Index t = chunk * chunk_tokens + warp; t < end; t += warps) {
            const Floats<V> x = device::load_floats<V>(p.x + (b * p.len + t) * p.dim + d);
#pragma unroll
            for (int j = 0; j < V; j++) sum[j] = join(sum[j], x[j], p.max);
        }
    }
#pragma unroll
    for (int j = 0; j < V; j++) parts[warp * tile + column + j] = sum[j];
    device::sync_block();
    if (warp > 0 || d >= p.dim) return;
#pragma unroll
    for (int j = 0; j < V; j++) {
        for (int w = 1; w < warps; w++) sum[j] = join(sum[j], parts[w * tile + column + j], p.max);
        sum[j] /= p.divisor;
    }
    device::store_floats<V>(p.out + (b * p.chunks + chunk) * p.dim + d, sum);
}

template <class From, class To>
void run_pool(Context& ctx, const Tensor& x, const Tensor& out, Index chunks, float divisor, bool max)
{
    const PoolParams<From, To> p{x.as<From>(), out.as<To>(), x.size(1), x.size(2), chunks, divisor, max};
    constexpr int V = full_vector<From>;
    const bool vectors = p.dim % V == 0 && aligned(V, {x, out});
    const Index tile = device::warp_size * (vectors ? V : 1);
    const dim3 grid(static_cast<unsigned>(x.size(0) * chunks), static_cast<unsigned>(ceil_div(p.dim, tile)));
    const dim3 block(warps * device::warp_size);
    const std::size_t bytes = static_cast<std::size_t>(warps * tile) * sizeof(float);
    if (vectors)
        VIM_LAUNCH((pool<From, To, V>), grid, block, bytes, stream_of(ctx), p);
    else
        VIM_LAUNCH((pool<From, To, 1>), grid, block, bytes, stream_of(ctx), p);
}

template <class T>
struct SelectParams {
    const T* x;
    T* out;
    Index len, dim, count;  // count: of elements of out
    ClassPlaces places;
    Index rows, joint;  // of an image in out; tokens of a row
};

template <class T>
__global__ void select_tokens(SelectParams<T> p)
{
    const Index i = device::flat_index(), row = i / p.dim, d = i % p.dim, b = row / p.rows;
    if (i >= p.count) return;
    float sum = 0;
    for (Index k = row % p.rows * p.joint, end = k + p.joint; k < end; k++)
        sum += device::to_float(p.x[(b * p.len + p.places.first + k * p.places.step) * p.dim + d]);
    p.out[i] = device::from_float<T>(sum / static_cast<float>(p.joint));
}

template <class T>
void run(Context& ctx, const ReadoutForward& a)
{
    const Index len = a.x.size(1), dim = a.x.size(2);
    if (a.out.numel() == 0) return;
    if (a.reduce == Reduce::select || a.reduce == Reduce::join) {
        const Index rows = a.reduce == Reduce::join ? a.places.count : 1;
        const SelectParams<T> p{a.x.as<T>(),   a.out.as<T>(), len,  dim,
                                a.out.numel(), a.places,      rows, a.places.count / rows};
        VIM_LAUNCH((select_tokens<T>), flat_grid(p.count), flat_block, 0, stream_of(ctx), p);
        return;
    }
    const bool max = a.reduce == Reduce::max;
    const float divisor = max ? 1.0f : static_cast<float>(len);
    const Index chunks = ceil_div(len, chunk_tokens);
    if (chunks == 1) return run_pool<T, T>(ctx, a.x, a.out, 1, divisor, max);
    Arena::Scope scope(arena_of(ctx));
    const Tensor parts = device_scratch::pool_parts(ctx, a);
    run_pool<T, float>(ctx, a.x, parts, chunks, 1.0f, max);
    run_pool<float, T>(ctx, parts, a.out, 1, divisor, max);
}

}  // namespace

void readout_forward(Context& ctx, const ReadoutForward& args)
{
    dispatch(args.x.dtype, [&](auto t) { run<decltype(t)>(ctx, args); });
}

}  // namespace vimcore::cuda
