// SPDX-License-Identifier: Apache-2.0
// Host side of the scan's tuned gradient, of one pass or of both directions: where it applies, scratch, sums.
#include "scan/backward_tuned.cuh"

#include <algorithm>

#include "core/context_internals.h"
#include "core/device_scratch.h"
#include "cuda_operators.h"
#include "scan/sums.h"

namespace vimcore::cuda {

namespace {

bool is_aligned(const void* p, Index bytes)
{
    return reinterpret_cast<std::uintptr_t>(p) % static_cast<std::uintptr_t>(bytes) == 0;
}

template <class Shape>
constexpr int shared_bytes(int rank)  // of a direction
{
    return back_warps * back_layout<Shape>(rank).floats * 4;
}

template <class Shape_>
void run(Context& ctx, const ScanBackward& a)
{
    using T = typename Shape_::T;
    static_assert(Shape_::channels == device_scratch::back_channels(Shape_::states));
    static_assert(Shape_::tile == device_scratch::back_tile && Shape_::kept == device_scratch::back_kept(Shape_::states));
    static_assert(shared_bytes<Shape_>(1) == device_scratch::back_shared(Shape_::states, 1) &&
                  shared_bytes<Shape_>(16) == device_scratch::back_shared(Shape_::states, 16) &&
                  shared_bytes<Shape_>(100) == device_scratch::back_shared(Shape_::states, 100));
    const Index batch = a.xz.size(0), len = a.xz.size(1), inner = a.xz.size(2) / 2, size = sizeof(T);
    const Index state = Shape_::states, rank = a.passes[0].dt_weight.size(1), row = a.passes[0].q.size(2);
    const auto directions = static_cast<int>(a.passes.size());
    const int bytes = directions * shared_bytes<Shape_>(static_cast<int>(rank));

    Arena::Scope scope(arena_of(ctx));
    const device_scratch::TunedBackward own = device_scratch::tuned_backward(ctx, a);
    TunedBack<T> s{};
    s.groups = static_cast<int>(own.groups);
    s.tokens = static_cast<int>(len);
    s.dim = static_cast<int>(inner);
    s.rank = static_cast<int>(rank);
    s.row = static_cast<int>(row);
    s.pitch = static_cast<int>(own.pitch);
    s.directions = directions;
    s.chunk_tiles = static_cast<int>(own.tiles);
    s.chunks = static_cast<int>(ceil_div(len, a.chunk));
    s.scale = static_cast<float>(a.scale);
    s.z = a.xz.as<T>() + inner;
    s.dz = a.dxz.as<T>() + inner;
    s.dout = a.dout.as<T>();
    s.out = a.out.as<T>();
    s.sum = static_cast<float*>(own.sum.data);
    constexpr Index wide = Shape_::wide, most = 16;
    s.vector = inner % wide == 0 && is_aligned(s.z, std::min(wide * size, most)) && is_aligned(s.sum, most) &&
               device_scratch::aligned(wide, {a.dxz, a.dout, a.out});
    s.wide_q = rank % 4 == 0 && row % 4 == 0;
    s.wide_weight = rank % 4 == 0;
    const Index units = own.units, blocks = units * s.groups;
    s.segment_tiles = static_cast<int>(own.segment / Shape_::tile);
    s.segments = static_cast<int>(own.segments);
    s.starts = static_cast<float*>(own.starts.data);
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
        to.part = static_cast<float*>(own.pass[i].part.data);
        to.parameters = static_cast<float*>(own.pass[i].parameters.data);
        to.lambda = static_cast<float*>(own.pass[i].lambda.data);
        to.steps = static_cast<float*>(own.pass[i].steps.data);
        to.reverse = p.reverse;
        s.vector = s.vector && device_scratch::aligned(wide, {p.u, p.du});
        s.wide_q = s.wide_q && is_aligned(to.q, 4 * size);
        s.wide_weight = s.wide_weight && is_aligned(to.dt_weight, most);
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
        const Index width = rank + 2 * state, zeros = row - width;
        rows[i] = RowSum<T>{from.part, batch, s.groups, len, s.pitch, width, 2 * state, dq + rank, dq, row, row, zeros};
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
}

}  // namespace

bool scan_backward_tuned(Context& ctx, const ScanBackward& args)
{
    if (!device_scratch::is_tuned(args)) return false;
    dispatch(args.xz.dtype, [&](auto type) {
        select<8, 16, 32>(args.passes[0].A_log.size(1),
                          [&](auto N) { run<BackShape<decltype(type), decltype(N)::value>>(ctx, args); });
    });
    return true;
}

}  // namespace vimcore::cuda
