// SPDX-License-Identifier: Apache-2.0
// Scratch memory of the CUDA operators, and the choices between kernels that it depends on. Needs no CUDA: the launches
// take their memory here, and so does who only counts it (counting_device.cpp).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <span>

#include "core/context_internals.h"
#include "vimcore/ops.h"

namespace vimcore::device_scratch {

using Index = std::int64_t;
constexpr Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }
constexpr Index round_up(Index a, Index b) { return ceil_div(a, b) * b; }

// Whether every tensor (or none) may be accessed `count` elements at a time, in vectors of 16 bytes at most.
inline bool aligned(int count, std::initializer_list<Tensor> tensors)
{
    return std::all_of(tensors.begin(), tensors.end(), [&](const Tensor& t) {
        const std::size_t bytes = static_cast<std::size_t>(count) * size_of(t.dtype);
        return reinterpret_cast<std::uintptr_t>(t.data) % std::min<std::size_t>(bytes, 16) == 0;
    });
}

inline constexpr Index undivided_tile = Index{1} << 40;  // tokens of an operator's call: whole sequences

inline Tensor floats(Context& ctx, const Shape& shape) { return arena_of(ctx).take(shape, DType::f32); }

// ---- rows of q -----------------------------------------------------------------------------------------------------

// Elements from row to row of a projection's output with `columns` columns: in 16-bit types on a device whole pieces of
// 16 bytes, as copies and products of matrices want them. What lies behind the columns is zero.
constexpr Index padded_columns(Index columns, DType dtype, Device::Type device)
{
    return device == Device::Type::cuda && size_of(dtype) == 2 ? round_up(columns, 8) : columns;
}

// ---- products by cuBLASLt ------------------------------------------------------------------------------------------

inline constexpr std::int64_t blas_workspace = std::int64_t{32} << 20;  // bytes of a product, at most
inline constexpr std::int64_t blas_alignment = 256;

inline Tensor blas_memory(Context& ctx, std::size_t bytes)
{
    return arena_of(ctx).take({static_cast<Index>(bytes) + blas_alignment}, DType::u8);
}

// ---- sums over rows: out (columns) += the rows of x (rows, columns) ------------------------------------------------

struct ColumnSum {
    Tensor x, out;
};
inline constexpr std::size_t most_sums = 4;  // of a launch
inline constexpr Index chunk_rows = 256;     // of a partial sum

// launch(sums of one size, partial sums or none): adds to `out`, or fills the partial sums, which are rows again.
template <class F>
void sum_columns(Context& ctx, std::span<const ColumnSum> sums, F&& launch)
{
    ColumnSum wanted[most_sums], rest[most_sums];
    std::size_t count = 0;
    for (const ColumnSum& sum : sums)
        if (sum.out && sum.x.size(0) > 0) wanted[count++] = sum;
    if (count == 0) return;
    Arena::Scope scope(arena_of(ctx));
    const Index chunks = ceil_div(wanted[0].x.size(0), chunk_rows);
    for (std::size_t i = 0; i < count; i++) {
        const Shape parts{chunks, wanted[i].x.size(1)};
        rest[i] = {chunks > 1 ? floats(ctx, parts) : Tensor{}, wanted[i].out};
    }
    launch(std::span<const ColumnSum>(wanted, count), std::span<const ColumnSum>(rest, count), chunks);
    if (chunks > 1) sum_columns(ctx, std::span<const ColumnSum>(rest, count), launch);
}

// ---- norm ----------------------------------------------------------------------------------------------------------

inline constexpr Index norm_rows = 4;  // that a block works on side by side
struct NormSums {
    Index part, parts;      // rows of a part
    bool registers;         // rows are short enough for one kernel
    Tensor dweight, dbias;  // (parts, D)
    Tensor statistics;      // (rows, 2)
};
inline NormSums norm_sums(Context& ctx, const NormBackward& a)
{
    constexpr Index most_parts = 1024, lanes = 32, floats_of_lane = 32;
    const Index rows = a.x.size(0) * a.x.size(1), dim = a.x.size(2);
    const int vector = 16 / static_cast<int>(size_of(a.dout.dtype));
    NormSums s{};
    s.part = round_up(ceil_div(rows, most_parts), norm_rows);
    s.parts = ceil_div(rows, s.part);
    s.registers = dim % vector == 0 && ceil_div(dim, lanes * vector) * vector <= floats_of_lane &&
                  (a.kind == Norm::layer || !a.dbias) &&
                  aligned(vector, {a.x, a.weight, a.dresidual_out, a.dout, a.dresidual, a.dh});
    if (a.dweight) s.dweight = floats(ctx, {s.parts, dim});
    if (a.dbias) s.dbias = floats(ctx, {s.parts, dim});
    if (!s.registers && (a.dweight || a.dbias)) s.statistics = floats(ctx, {rows, 2});
    return s;
}

// ---- conv1d --------------------------------------------------------------------------------------------------------

using ConvPasses = std::span<const ConvBackwardPass>;

struct ConvParts {
    Index items, parts;           // units of a part
    Tensor dweight[2], dbias[2];  // (parts, E K), (parts, E) of each pass
};
inline ConvParts conv_parts(Context& ctx, ConvPasses passes, Index units)
{
    constexpr Index most_parts = 512;  // threads that share channels
    ConvParts p{};
    p.items = ceil_div(units, most_parts);
    p.parts = ceil_div(units, p.items);
    for (std::size_t i = 0; i < passes.size(); i++) {
        const ConvBackwardPass& pass = passes[i];
        if (pass.dweight) p.dweight[i] = floats(ctx, {p.parts, pass.weight.numel()});
        if (pass.dbias) p.dbias[i] = floats(ctx, {p.parts, pass.du.size(2)});
    }
    return p;
}

// Tokens of a chunk: long ones compute fewer values twice, short ones make more threads of a small batch.
inline Index conv_chunk(const Conv1dBackward& a)
{
    const Index batch = a.x.size(0), len = a.x.size(1), dim = a.passes[0].du.size(2);
    return ceil_div(len, ceil_div(len, batch * len * dim < (1 << 22) ? 16 : 64));
}

// Whether the kernel that keeps a window of tokens in registers, two channels of a thread, runs all passes.
inline constexpr int window_channels = 2;
inline bool conv_has_window(const Conv1dBackward& a)
{
    constexpr int channels = window_channels;
    const ConvPasses passes = a.passes;
    const ConvBackwardPass& first = passes[0];
    const Index dim = first.du.size(2), width = first.weight.numel() / dim;
    if (passes.size() > 2 || width < 2 || width > 4 || dim % channels != 0 || a.x.size(2) % channels != 0) return false;
    if (passes.size() == 2 && (first.reverse || !passes[1].reverse || first.du.shape != passes[1].du.shape ||
                               first.weight.numel() != passes[1].weight.numel()))
        return false;
    return aligned(channels, {a.x, a.dx}) && std::all_of(passes.begin(), passes.end(), [](const ConvBackwardPass& p) {
               return aligned(channels, {p.weight, p.bias, p.du});
           });
}

// The gradient before the activation, for the kernels without a window.
inline Tensor conv_gradient(Context& ctx, const Conv1dBackward& a, const ConvBackwardPass& pass)
{
    return floats(ctx, {a.x.size(0) * a.x.size(1), pass.du.size(2)});
}

// ---- read-out, positions -------------------------------------------------------------------------------------------

inline constexpr Index pooled_tokens = 256;  // of a partial result

// Partial results (B, chunks, D), or none.
inline Tensor pool_parts(Context& ctx, const ReadoutForward& a)
{
    const Index chunks = ceil_div(a.x.size(1), pooled_tokens);
    return chunks > 1 ? floats(ctx, {a.x.size(0), chunks, a.x.size(2)}) : Tensor{};
}

inline Tensor positions_along_rows(Context& ctx, const PositionsBackward& a)
{
    return arena_of(ctx).take({a.resize.to.rows, a.resize.from.columns, a.dout.size(2)}, DType::f64);
}

// ---- scan ----------------------------------------------------------------------------------------------------------

inline constexpr Index most_shared = 99 * 1024;  // bytes of shared memory that every device since sm_80 grants a block
// The generic kernels: states of a launch, channels of a block, tokens of a tile of the gradient.
inline constexpr Index generic_states = 16, generic_channels = 64, generic_tile = 8;
inline constexpr Index textbook_chunk = 64;  // tokens between the states that selective_scan_backward keeps

// Two passes that one launch can run: opposite ways over the same tokens, the second on top of the first.
inline bool meet(const ScanForward& a)
{
    if (a.passes.size() != 2) return false;
    const ScanForwardPass &p = a.passes[0], &q = a.passes[1];
    return p.reverse != q.reverse && p.begin == q.begin && p.u.size(1) == q.u.size(1) && !p.add && !p.finish && q.add &&
           p.A_log.size(1) == q.A_log.size(1) && p.dt_weight.size(1) == q.dt_weight.size(1) &&
           p.q.size(2) == q.q.size(2);
}
inline bool meet(const ScanBackward& a)
{
    if (a.passes.size() != 2) return false;
    const ScanBackwardPass &p = a.passes[0], &q = a.passes[1];
    return p.reverse != q.reverse && p.A_log.size(1) == q.A_log.size(1) && p.dt_weight.size(1) == q.dt_weight.size(1) &&
           p.q.size(2) == q.q.size(2);
}

// The tuned forward in its widest shape, and in that which keeps 16 states of 64 channels in a warp: channels of a
// block, tokens of a tile, bytes of shared memory of a direction.
inline constexpr Index wide_tile = 16, whole_tile = 8, whole_channels = 64;
constexpr bool forward_has_states(Index n) { return n == 8 || n == 16 || n == 32 || n == 64; }
constexpr Index wide_channels(Index states) { return states == 8 ? 64 : 1024 / states; }
constexpr Index forward_shared(Index tile, Index channels, Index size, Index states, Index rank, Index row)
{
    const Index steps = channels * (8 * tile + 16), BC = 8 * tile * states, u = 2 * tile * (channels * size + 16),
                z = tile * channels * size, sum = 4 * tile * channels, q = tile * row * size,
                weights = size == 2 ? (rank / 16 + 1) * channels * 96
                                    : 4 * rank * (tile + 4) + 4 * rank * channels + 4 * channels;
    return steps + BC + u + z + sum + weights + 4 * channels + q;
}
constexpr Index wide_shared(Index size, Index states, Index rank, Index row)  // row: elements of a row of q
{
    return forward_shared(wide_tile, wide_channels(states), size, states, rank, row);
}
constexpr Index whole_shared(Index size, Index rank, Index row)
{
    return forward_shared(whole_tile, whole_channels, size, 16, rank, row);
}
inline bool is_tuned(const ScanForward& a)
{
    if (a.passes.empty()) return false;
    constexpr Index large = Index{1} << 30;
    const ScanForwardPass& first = a.passes[0];
    const Index states = first.A_log.size(1), rank = first.dt_weight.size(1), row = first.q.size(2);
    const auto size = static_cast<Index>(size_of(a.xz.dtype));
    return std::max(a.xz.size(1), a.chunk) < large && a.xz.size(2) <= (1 << 23) &&
           std::isnormal(1 / static_cast<float>(a.scale)) && (a.passes.size() == 1 || meet(a)) &&
           forward_has_states(states) && rank <= most_shared &&
           2 * wide_shared(size, states, rank, row) <= most_shared &&
           std::all_of(
               a.passes.begin(), a.passes.end(),
               [&](const ScanForwardPass& p) {
                   return !p.checkpoints || (a.chunk % wide_tile == 0 && p.begin % wide_tile == 0);
               });
}

// Where two directions of a tuned launch are summed, in float; none for one.
inline Tensor direction_sum(Context& ctx, const ScanForward& a)
{
    const Tensor& u = a.passes[0].u;
    if (a.passes.size() < 2) return {};
    return a.out.dtype == DType::f32 && u.size(1) == a.xz.size(1) ? a.out : floats(ctx, u.shape);
}

// States of the generic kernel that registers do not hold; none where they do.
inline Tensor generic_memory(Context& ctx, Index batch, Index states, Index dim)
{
    return states > generic_states ? floats(ctx, {batch, states, dim}) : Tensor{};
}

// The tuned gradient: tokens of a tile, threads of a direction, channels of a thread and elements that it keeps,
// channels of a block, bytes of shared memory of a direction.
inline constexpr Index back_tile = 16, back_threads = 64;
constexpr bool backward_has_states(Index n) { return n == 8 || n == 16 || n == 32; }
constexpr Index back_thread_channels(Index states) { return states == 32 ? 2 : 4; }
constexpr Index back_kept(Index states) { return back_thread_channels(states) * states / 4; }
// ... and that it leaves of a tile for the way back: states before every fourth token, delta of 4 per channel.
constexpr Index back_kept_tile(Index states) { return 4 * back_kept(states) + 4 * back_thread_channels(states); }
constexpr Index back_channels(Index states) { return back_threads / 4 * back_thread_channels(states); }
constexpr Index back_shared(Index states, Index rank)
{
    const Index warp = 32, channels = 8 * back_thread_channels(states), pitch = channels + 4, array = back_tile * pitch;
    const Index padded = round_up(rank, 16);
    const Index floats = 4 * array + back_tile * 2 * states + 3 * warp * back_kept(states) + warp * channels / 4 +
                         2 * channels + padded * channels + (padded * back_tile > 3 * array ? padded * back_tile : 0);
    return back_threads / warp * floats * 4;
}

// Tokens of a segment: all, up to some length; then, whatever the batch is, so that its images give the same bits. A
// multiple of the chunk.
constexpr Index back_segment(Index len, Index chunk)
{
    constexpr Index undivided = 2048, least = 256, most_segments = 64;
    const Index wanted = len < undivided ? len : std::max(least, ceil_div(len, most_segments));
    return round_up(wanted, chunk);
}

inline bool is_tuned(const ScanBackward& a)
{
    if (a.passes.empty()) return false;
    constexpr Index large = Index{1} << 28;
    const Index states = a.passes[0].A_log.size(1), rank = a.passes[0].dt_weight.size(1);
    const auto directions = static_cast<Index>(a.passes.size());
    return std::max({a.xz.size(1), a.xz.size(2), a.chunk}) < large && (directions == 1 || meet(a)) &&
           backward_has_states(states) && a.chunk % back_tile == 0 && rank <= most_shared &&
           directions * back_shared(states, rank) <= most_shared && a.xz.size(2) / 2 % 2 == 0 &&
           aligned(2, {a.xz, a.out, a.dout, a.dxz}) &&  // two channels at a time
           std::all_of(
               a.passes.begin(), a.passes.end(),
               [](const ScanBackwardPass& p) { return aligned(2, {p.u, p.du, p.checkpoints}); });
}

struct TunedBackward {
    Index tiles, segment, segments, units, groups, pitch;  // units: segments of all images; groups: of channels
    Tensor sum;                                            // (B, L, E) of both directions
    Tensor starts;                                         // what is kept of a chunk, for every block and direction
    struct {
        Tensor part;           // (B, groups, L, pitch)
        Tensor parameters;     // (units, N + R + 2, E)
        Tensor lambda, steps;  // (units, N, E), (units, E): of several segments
    } pass[2];
};
inline TunedBackward tuned_backward(Context& ctx, const ScanBackward& a)
{
    const Index batch = a.xz.size(0), len = a.xz.size(1), inner = a.xz.size(2) / 2;
    const Index states = a.passes[0].A_log.size(1), rank = a.passes[0].dt_weight.size(1);
    const auto directions = static_cast<Index>(a.passes.size());
    TunedBackward s{};
    s.tiles = std::min(a.chunk, round_up(len, back_tile)) / back_tile;  // of a chunk, no more than there are
    s.segment = back_segment(len, s.tiles * back_tile);
    s.segments = ceil_div(len, s.segment);
    s.units = batch * s.segments;
    s.groups = ceil_div(inner, back_channels(states));
    s.pitch = round_up(rank + 2 * states, 4);
    if (directions == 2) s.sum = a.out.dtype == DType::f32 ? a.out : floats(ctx, a.out.shape);
    s.starts = floats(ctx, {s.units * s.groups * directions, s.tiles, back_threads * back_kept_tile(states)});
    for (Index i = 0; i < directions; i++) {
        s.pass[i].part = floats(ctx, {batch, s.groups, len, s.pitch});
        s.pass[i].parameters = floats(ctx, {s.units, states + rank + 2, inner});
        if (s.segments == 1) continue;
        s.pass[i].lambda = floats(ctx, {s.units, states, inner});
        s.pass[i].steps = floats(ctx, {s.units, inner});
    }
    return s;
}

// The generic gradient. y of launches so far, never rounded to 16 bits; none for one launch.
inline Tensor launches_sum(Context& ctx, const ScanBackward& a)
{
    bool several = a.passes.size() > 1;
    for (const ScanBackwardPass& p : a.passes) several = several || p.A_log.size(1) > generic_states;
    if (!several) return {};
    return a.out.dtype == DType::f32 ? a.out : floats(ctx, a.out.shape);
}
struct GenericPartials {
    Index groups;
    Tensor part;        // (B, groups, L, 2N)
    Tensor parameters;  // (B, N + 2, E)
};
inline GenericPartials generic_partials(Context& ctx, Index batch, Index tokens, Index states, Index dim)
{
    const Index groups = ceil_div(dim, generic_channels);
    return {groups, floats(ctx, {batch, groups, tokens, 2 * states}), floats(ctx, {batch, states + 2, dim})};
}
struct GenericStates {
    Tensor starts;              // (blocks, tiles of a chunk, 16, 64)
    Tensor lambda_B, lambda_A;  // (B, L, E): of several launches
};
inline GenericStates generic_backward_states(Context& ctx, Index batch, Index tokens, Index states, Index dim,
                                             Index chunk)
{
    const Index blocks = batch * ceil_div(dim, generic_channels);
    GenericStates s;
    s.starts = floats(ctx, {blocks, ceil_div(chunk, generic_tile), generic_states, generic_channels});
    if (states <= generic_states) return s;
    s.lambda_B = floats(ctx, {batch, tokens, dim});
    s.lambda_A = floats(ctx, {batch, tokens, dim});
    return s;
}
struct DtParts {
    Index length, parts;  // tokens of a part
    Tensor memory;        // (parts, R, E)
};
inline DtParts dt_parts(Context& ctx, Index tokens, Index rank, Index dim)
{
    constexpr Index most_parts = 64;  // sums over tokens that add up to dweight
    const Index length = ceil_div(tokens, most_parts), parts = ceil_div(tokens, length);
    return {length, parts, floats(ctx, {parts, rank, dim})};
}

}  // namespace vimcore::device_scratch
