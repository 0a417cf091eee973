// SPDX-License-Identifier: Apache-2.0
// Host side of the scan's tuned gradient, of one pass or of both directions: where it applies, scratch, sums.
#include "scan/backward_tuned.cuh"

#include <algorithm>

#include "core/context_internals.h"
#include "core/device_sizes.h"
#include "cuda_operators.h"
#include "scan/sums.h"

namespace vimcore::cuda {

namespace {

constexpr int most_shared = 99 * 1024;  // bytes of shared memory that every device since sm_80 grants a block
constexpr Index large = Index{1} << 28;

bool is_aligned(const void* p, Index bytes)
{
    return reinterpret_cast<std::uintptr_t>(p) % static_cast<std::uintptr_t>(bytes) == 0;
}

// Two passes that one launch can run: opposite ways, of one size.
bool meet(const ScanBackward& a)
{
    if (a.passes.size() != 2) return false;
    const ScanBackwardPass &p = a.passes[0], &q = a.passes[1];
    return p.reverse != q.reverse && p.A_log.size(1) == q.A_log.size(1) && p.dt_weight.size(1) == q.dt_weight.size(1);
}

float* floats(Context& ctx, const Shape& shape)
{
    return static_cast<float*>(arena_of(ctx).take(shape, DType::f32).data);
}

template <class Shape_>
bool run(Context& ctx, const ScanBackward& a)
{
    using T = typename Shape_::T;
    static_assert(Shape_::channels == device_sizes::back_channels(Shape_::states));
    static_assert(Shape_::tile == device_sizes::back_tile && Shape_::C * Shape_::S == device_sizes::back_kept);
    const Index batch = a.xz.size(0), len = a.xz.size(1), inner = a.xz.size(2) / 2, size = sizeof(T);
    const Index state = Shape_::states, rank = a.passes[0].dt_weight.size(1), row = rank + 2 * state;
    const auto directions = static_cast<int>(a.passes.size());
    if (a.chunk % Shape_::tile != 0 || rank > most_shared) return false;
    const int bytes = directions * Shape_::layout(static_cast<int>(rank)).bytes;
    if (bytes > most_shared) return false;

    // two channels at a time
    bool aligned = inner % 2 == 0;
    for (const Tensor& t : {a.xz, a.out, a.dout, a.dxz}) aligned = aligned && is_aligned(t.data, 2 * size);
    for (const ScanBackwardPass& p : a.passes)
        aligned = aligned && is_aligned(p.u.data, 2 * size) && is_aligned(p.du.data, 2 * size) &&
                  is_aligned(p.checkpoints.data, 8);
    if (!aligned) return false;

    Arena::Scope scope(arena_of(ctx));
    TunedBack<T> s{};
    s.groups = static_cast<int>(ceil_div(inner, Shape_::channels));
    s.tokens = static_cast<int>(len);
    s.dim = static_cast<int>(inner);
    s.rank = static_cast<int>(rank);
    s.pitch = static_cast<int>(round_up(row, 4));
    s.directions = directions;
    s.chunk_tiles = static_cast<int>(a.chunk / Shape_::tile);
    s.chunks = static_cast<int>(ceil_div(len, a.chunk));
    s.scale = static_cast<float>(a.scale);
    s.z = a.xz.as<T>() + inner;
    s.dz = a.dxz.as<T>() + inner;
    s.dout = a.dout.as<T>();
    s.out = a.out.as<T>();
    if (directions == 2) s.sum = size == 4 ? a.out.as<float>() : floats(ctx, a.out.shape);
    s.wide_q = rank % 4 == 0;
    const Index tiles = std::min(a.chunk, round_up(len, Shape_::tile)) / Shape_::tile;
    s.chunk_tiles = static_cast<int>(tiles);  // no more than there are
    const Index segment = device_sizes::back_segment(len, tiles * Shape_::tile), units = batch * ceil_div(len, segment);
    const Index blocks = units * s.groups;
    s.segment_tiles = static_cast<int>(segment / Shape_::tile);
    s.segments = static_cast<int>(ceil_div(len, segment));
    if (tiles > 1) s.starts = floats(ctx, {blocks * directions, tiles - 1, Shape_::C, back_threads * Shape_::S});
    for (int i = 0; i < directions; i++) {
        const ScanBackwardPass& p = a.passes[static_cast<std::size_t>(i)];
        BackPass<T>& to = s.pass[i];
        to.u = p.u.as<T>();
        to.q = p.q.as<T>();
        to.A_log = p.A_log.as<float>();
        to.D = p.D.as<float>();
        to.dt_weight = p.dt_weight.as<float>();
        to.dt_bias = p.dt_bias.as<float>();
        to.checkpoints = p.checkpoints.as<float>();
        to.du = p.du.as<T>();
        to.part = floats(ctx, {batch, s.groups, len, s.pitch});
        to.parameters = floats(ctx, {units, state + rank + 2, inner});
        if (s.segments > 1) {
            to.lambda = floats(ctx, {units, state, inner});
            to.steps = floats(ctx, {units, inner});
        }
        to.reverse = p.reverse;
        s.wide_q = s.wide_q && is_aligned(to.q, 4 * size);
    }
    const dim3 grid(static_cast<unsigned>(blocks));
    const unsigned threads = static_cast<unsigned>(directions * back_threads);
    if (s.segments > 1) VIM_LAUNCH((scan_backward_ahead<Shape_>), grid, threads, bytes, stream_of(ctx), s);
    VIM_LAUNCH((scan_backward_tuned<Shape_>), grid, threads, bytes, stream_of(ctx), s);

    RowSum<T> rows[2];
    PartialSum sums[8];
    for (int i = 0; i < directions; i++) {
        const ScanBackwardPass& p = a.passes[static_cast<std::size_t>(i)];
        const BackPass<T>& from = s.pass[i];
        T* const dq = p.dq.as<T>();
        rows[i] = {from.part, batch, s.groups, len, s.pitch, row, 2 * state, dq + rank, dq, row, row};
        const float *const weight = from.parameters + state * inner, *const bias = weight + rank * inner;
        auto sum_of = [&](const float* part, Index count, const float* A_log, const Tensor& to) {
            return PartialSum{part, units, (state + rank + 2) * inner, count, inner, A_log, to.as<float>(), false};
        };
        sums[4 * i] = sum_of(from.parameters, state, from.A_log, p.dA_log);
        sums[4 * i + 1] = sum_of(weight, rank, nullptr, p.ddt_weight);
        sums[4 * i + 2] = sum_of(bias, 1, nullptr, p.ddt_bias);
        sums[4 * i + 3] = sum_of(bias + inner, 1, nullptr, p.dD);
    }
    sum_rows<T>(ctx, {rows, a.passes.size()});
    add_partials(ctx, {sums, 4 * a.passes.size()});
    return true;
}

}  // namespace

bool scan_backward_tuned(Context& ctx, const ScanBackward& args)
{
    if (std::max({args.xz.size(1), args.xz.size(2), args.chunk}) >= large) return false;
    if (args.passes.size() != 1 && !meet(args)) return false;
    bool done = false;
    dispatch(args.xz.dtype, [&](auto type) {
        select<8, 16, 32>(args.passes[0].A_log.size(1),
                          [&](auto N) { done = run<BackShape<decltype(type), decltype(N)::value>>(ctx, args); });
    });
    return done;
}

}  // namespace vimcore::cuda
