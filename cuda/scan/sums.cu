// SPDX-License-Identifier: Apache-2.0
// The sums of scan/sums.h, each element by one thread, in the order of images, groups of channels or tokens.
#include "scan/sums.h"

#include <algorithm>

#include "core/context_internals.h"
#include "core/device_scratch.h"
#include "vectors.cuh"

namespace vimcore::cuda {

namespace {

constexpr std::size_t most_partials = 8, most_rows = 2;

struct PartialTable {
    PartialSum sum[most_partials];
};

__global__ void add_partials_kernel(PartialTable table)
{
    const PartialSum& s = table.sum[blockIdx.y];
    const Index i = device::flat_index();
    if (i >= s.rows * s.dim) return;
    const Index row = i / s.dim, e = i % s.dim, at = e * s.rows + row;
    float sum = 0;
#pragma unroll 8
    for (Index k = 0; k < s.count; k++) sum += s.part[k * s.stride + i];
    if (s.A_log) sum *= -expf(s.A_log[at]);
    s.to[at] = s.overwrite ? sum : s.to[at] + sum;
}

template <class T>
struct RowTable {
    RowSum<T> sum[most_rows];
};

template <class T>
__global__ void sum_rows_kernel(RowTable<T> table)
{
    const RowSum<T>& s = table.sum[blockIdx.y];
    // 32 bits where they do: divisions of 64 bits take ten times as long.
    const auto columns = static_cast<std::uint32_t>(s.width + s.zeros);
    const Index i = device::flat_index(), tokens = s.batch * s.tokens;
    if (i >= tokens * columns) return;
    const bool small = tokens * columns < Index{1} << 32;
    const Index token = small ? static_cast<std::uint32_t>(i) / columns : i / columns, column = i - token * columns;
    if (column >= s.width) {
        s.first[token * s.ld_first + s.split + column - s.width] = device::from_float<T>(0.0f);
        return;
    }
    const Index b = small ? static_cast<std::uint32_t>(token) / static_cast<std::uint32_t>(s.tokens) : token / s.tokens;
    const Index image = s.tokens * s.pitch;
    const float* part = s.part + b * s.groups * image + (token - b * s.tokens) * s.pitch + column;
    float sum = 0;
#pragma unroll 4
    for (Index g = 0; g < s.groups; g++) sum += part[g * image];
    T* const to =
        column < s.split ? s.first + token * s.ld_first + column : s.second + token * s.ld_second + column - s.split;
    *to = device::from_float<T>(sum);
}

template <class T>
__global__ void dt_inputs(DtBackward<T> a)
{
    const Index i = device::flat_index();
    if (i >= a.tokens * a.rank) return;
    const Index t = i / a.rank, r = i % a.rank;
    float sum = 0;
    for (Index e = 0; e < a.dim; e++) sum = fmaf(a.draw[t * a.dim + e], a.weight[e * a.rank + r], sum);
    a.dq[t * a.row + r] = device::from_float<T>(sum);
}

template <class T>
__global__ void dt_weights(DtBackward<T> a, float* part, Index length)  // part (parts, R, E)
{
    const Index i = device::flat_index(), begin = static_cast<Index>(blockIdx.y) * length;
    if (i >= a.rank * a.dim) return;
    const Index r = i / a.dim, e = i % a.dim, end = begin + length < a.tokens ? begin + length : a.tokens;
    float sum = 0;
    for (Index t = begin; t < end; t++) sum = fmaf(a.draw[t * a.dim + e], device::to_float(a.q[t * a.row + r]), sum);
    part[static_cast<Index>(blockIdx.y) * a.rank * a.dim + i] = sum;
}

}  // namespace

void add_partials(Context& ctx, std::span<const PartialSum> sums)
{
    PartialTable table{};
    unsigned count = 0;
    Index most = 0;
    for (const PartialSum& s : sums) {
        if (!s.to || s.rows * s.dim == 0) continue;
        table.sum[count++] = s;
        most = std::max(most, s.rows * s.dim);
    }
    if (count == 0) return;
    VIM_LAUNCH(add_partials_kernel, dim3(flat_grid(most).x, count), flat_block, 0, stream_of(ctx), table);
}

template <class T>
void sum_rows(Context& ctx, std::span<const RowSum<T>> sums)
{
    RowTable<T> table{};
    std::copy(sums.begin(), sums.end(), table.sum);
    const Index count = sums[0].batch * sums[0].tokens * (sums[0].width + sums[0].zeros);
    if (count == 0) return;
    const dim3 grid(flat_grid(count).x, static_cast<unsigned>(sums.size()));
    VIM_LAUNCH((sum_rows_kernel<T>), grid, flat_block, 0, stream_of(ctx), table);
}

template <class T>
void dt_backward(Context& ctx, const DtBackward<T>& a)
{
    if (a.tokens * a.rank == 0) return;
    VIM_LAUNCH((dt_inputs<T>), flat_grid(a.tokens * a.rank), flat_block, 0, stream_of(ctx), a);
    if (!a.dweight || a.dim == 0) return;
    Arena::Scope scope(arena_of(ctx));
    const auto [length, parts, memory] = device_scratch::dt_parts(ctx, a.tokens, a.rank, a.dim);
    const Index size = a.rank * a.dim;
    float* const part = static_cast<float*>(memory.data);
    const dim3 grid(flat_grid(size).x, static_cast<unsigned>(parts));
    VIM_LAUNCH((dt_weights<T>), grid, flat_block, 0, stream_of(ctx), a, part, length);
    const PartialSum sum{part, parts, size, a.rank, a.dim, nullptr, a.dweight, false};
    add_partials(ctx, {&sum, 1});
}

#define VIM_SUMS(T)                                                  \
    template void sum_rows<T>(Context&, std::span<const RowSum<T>>); \
    template void dt_backward<T>(Context&, const DtBackward<T>&);
VIM_SUMS(float)
VIM_SUMS(__half)
VIM_SUMS(__nv_bfloat16)
#undef VIM_SUMS

}  // namespace vimcore::cuda
