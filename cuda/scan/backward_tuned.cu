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

template <class Shape>
constexpr int shared_bytes(int rank)  // of a direction
{
    return back_warps * BackLayout<Shape>(rank).floats * 4;
}

// Whether every thread may read and write all neighbours that it has at once: channels, and four ranks or columns.
template <class Shape>
bool is_wide(const ScanBackward& a)
{
    constexpr int wide = Shape::wide;
    const Index inner = a.xz.size(2) / 2, rank = a.passes[0].dt_weight.size(1), row = a.passes[0].q.size(2);
    return inner % wide == 0 && rank % 4 == 0 && row % 4 == 0 &&
           device_scratch::aligned(wide, {a.xz, a.dxz, a.dout, a.out}) &&
           std::all_of(a.passes.begin(), a.passes.end(), [](const ScanBackwardPass& p) {
               return device_scratch::aligned(wide, {p.u, p.du}) && device_scratch::aligned(4, {p.q, p.dt_weight});
           });
}

template <class Shape_>
void run(Context& ctx, const ScanBackward& a)
{
    using T = typename Shape_::T;
    static_assert(Shape_::channels == device_scratch::back_channels(Shape_::states));
    static_assert(Shape_::tile == device_scratch::back_tile &&
                  Shape_::kept == device_scratch::back_kept(Shape_::states));
    static_assert(shared_bytes<Shape_>(1) == device_scratch::back_shared(Shape_::states, 1) &&
                  shared_bytes<Shape_>(16) == device_scratch::back_shared(Shape_::states, 16) &&
                  shared_bytes<Shape_>(100) == device_scratch::back_shared(Shape_::states, 100));
    const Index batch = a.xz.size(0), len = a.xz.size(1), inner = a.xz.size(2) / 2;
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
        select<8, 16, 32>(args.passes[0].A_log.size(1), [&](auto N) {
            using Wide = BackShape<decltype(type), decltype(N)::value, true>;
            if (is_wide<Wide>(args))
                run<Wide>(ctx, args);
            else
                run<BackShape<decltype(type), decltype(N)::value, false>>(ctx, args);
        });
    });
    return true;
}

}  // namespace vimcore::cuda
