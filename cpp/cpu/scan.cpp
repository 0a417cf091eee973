// SPDX-License-Identifier: Apache-2.0
// The scan of a block on the CPU, with gate and dt projection. Parallel over images and blocks of channels; within a
// task the recurrence is sequential in time, and both directions over the same tokens follow each other, so that the
// sum of directions and the gate happen in the first-level cache.
#include <algorithm>
#include <numbers>
#include <type_traits>

#include "scan_tasks.h"

namespace vimcore::cpu {

namespace {

constexpr Index reduce_tokens = 64;  // tokens of a task that adds partial sums of dB and dC up
constexpr Index max_passes = 2;

template <class T>
const Wide<T>* packed_A(Context& ctx, const Tensor& A_log)
{
    using W = Wide<T>;
    const Index dim = A_log.size(0), state = A_log.size(1);
    return packed<W>(ctx, A_log, WeightForm::decay, dim * state,
                     [&](W* out) { kernels<W>().prepare_A(A_log.as<W>(), dim, state, out); });
}

template <class T>
const T* packed_dt(Context& ctx, const Tensor& weight)
{
    const Index dim = weight.size(0), rank = weight.size(1);
    if constexpr (std::is_same_v<T, Wide<T>>)
        return packed_transpose<T>(ctx, weight, dim, rank);
    else
        return packed<T>(ctx, weight, WeightForm::transposed, round_up(rank, 2) * dim, [&](T* out) {
            const Wide<T>* in = weight.as<Wide<T>>();
            for (Index e = 0; e < dim; e++)
                for (Index r = 0; r < round_up(rank, 2); r++)
                    out[(r / 2 * dim + e) * 2 + r % 2] = T(r < rank ? in[e * rank + r] : Wide<T>(0));
        });
}

// What forward and backward share: tokens from `begin` on.
template <class T, class Scan, class Arguments>
ScanPass<T> make_pass(Context& ctx, const Scan& a, const Arguments& p, Index begin)
{
    const Index inner = a.xz.size(2) / 2, state = p.A_log.size(1), rank = p.dt_weight.size(1);
    ScanPass<T> pass;
    pass.tokens = p.u.size(1);
    pass.begin = begin;
    pass.q_row = rank + 2 * state;
    ScanArgs<T>& s = pass.args;
    s.reverse = p.reverse;
    s.len = pass.tokens;
    s.dim = inner;
    s.state = state;
    s.rank = rank;
    s.u = p.u.template as<T>();
    s.ldu = inner;
    s.dt = p.q.template as<T>();
    s.lddt = pass.q_row;
    s.dt_weight = packed_dt<T>(ctx, p.dt_weight);
    s.dt_bias = p.dt_bias.template as<Wide<T>>();
    s.softplus = true;
    s.A = packed_A<T>(ctx, p.A_log);
    const T* B = p.q.template as<T>() + rank;
    set_BC<T>(ctx, s, B, B + state, pass.q_row, p.q.size(0) * pass.tokens);
    s.D = p.D.template as<Wide<T>>();
    s.y = a.out.template as<T>() + begin * inner;
    s.ldy = inner;
    s.z = a.xz.template as<T>() + begin * 2 * inner + inner;
    s.ldz = 2 * inner;
    s.scale = static_cast<Wide<T>>(a.scale);
    s.checkpoints = p.checkpoints.template as<Wide<T>>();
    s.chunk = a.chunk;
    s.begin = begin;
    if (p.checkpoints) pass.chunks = p.checkpoints.size(1);
    return pass;
}

template <class T>
void forward(Context& ctx, const ScanForward& a)
{
    const Kernels<T>& kernel = kernels<T>();
    const Index batch = a.xz.size(0), len = a.xz.size(1), inner = a.xz.size(2) / 2;
    const Index blocks = ceil_div(inner, forward_channels), passes = static_cast<Index>(a.passes.size());
    Arena::Scope scope(arena_of(ctx));
    ScanPass<T> pass[max_passes];
    for (Index p = 0; p < passes; p++) {
        const ScanForwardPass& own = a.passes[static_cast<std::size_t>(p)];
        pass[p] = make_pass<T>(ctx, a, own, own.begin);
        pass[p].args.h = own.state.as<Wide<T>>();
        pass[p].args.add = own.add;
        pass[p].args.finish = own.finish;
    }
    // Passes that share tokens run one after the other in one task; passes over different tokens are independent.
    const bool together =
        passes == 2 && pass[0].begin < pass[1].begin + pass[1].tokens && pass[1].begin < pass[0].begin + pass[0].tokens;
    const Index groups = together ? 1 : passes;
    parallel_for(ctx, batch * blocks * groups, [&](Index task) {
        const Index b = task / groups / blocks, e0 = task / groups % blocks * forward_channels;
        const Index e1 = std::min(inner, e0 + forward_channels);
        for (Index p = together ? 0 : task % groups; p < (together ? passes : task % groups + 1); p++)
            kernel.scan_forward(for_task(pass[p], len, b, e0, e1));
    });
}

template <class T>
void backward(Context& ctx, const ScanBackward& a)
{
    const Kernels<T>& kernel = kernels<T>();
    const Index batch = a.xz.size(0), len = a.xz.size(1), inner = a.xz.size(2) / 2;
    const Index blocks = ceil_div(inner, backward_channels), passes = static_cast<Index>(a.passes.size());
    Arena::Scope scope(arena_of(ctx));
    ScanPass<T> pass[max_passes];
    ScanPartials<T> part[max_passes];
    Index space = 0;
    for (Index p = 0; p < passes; p++) {
        pass[p] = make_pass<T>(ctx, a, a.passes[static_cast<std::size_t>(p)], 0);
        pass[p].args.add = p > 0;
        part[p] = make_partials<T>(ctx, batch, len, inner, pass[p].args.state, blocks);
        space = std::max(space, round_up(kernel.scan_backward_scratch(pass[p].args.state, a.chunk,
                                                                      std::min(inner, backward_channels)),
                                         16));
    }
    Wide<T>* memory = scratch<Wide<T>>(ctx, space * batch * blocks).template as<Wide<T>>();
    parallel_for(ctx, batch * blocks, [&](Index task) {
        const Index b = task / blocks, e0 = task % blocks * backward_channels;
        const Index e1 = std::min(inner, e0 + backward_channels);
        const T* dout = a.dout.as<T>() + b * len * inner;
        for (Index p = 0; p < passes; p++) {
            ScanBackwardArgs<T> s = backward_args(for_task(pass[p], len, b, e0, e1), part[p], len, b, task % blocks,
                                                  blocks, memory + task * space);
            s.dout = dout;
            s.lddout = inner;
            s.du = a.passes[static_cast<std::size_t>(p)].du.template as<T>() + b * len * inner;
            s.lddu = inner;
            kernel.scan_backward(s);
        }
        kernel.gate_backward({.len = len,
                              .e0 = e0,
                              .e1 = e1,
                              .y = a.out.as<T>() + b * len * inner,
                              .ldy = inner,
                              .z = a.xz.as<T>() + b * len * 2 * inner + inner,
                              .ldz = 2 * inner,
                              .dout = dout,
                              .lddout = inner,
                              .dz = a.dxz.as<T>() + b * len * 2 * inner + inner,
                              .lddz = 2 * inner,
                              .scale = static_cast<Wide<T>>(a.scale)});
    });

    const Index token_blocks = ceil_div(len, reduce_tokens);
    parallel_for(ctx, passes * batch * token_blocks, [&](Index task) {
        const Index p = task % passes, b = task / passes % batch, t0 = task / passes / batch * reduce_tokens;
        const ScanArgs<T>& f = pass[p].args;
        const Index row = pass[p].q_row;
        T* dq = a.passes[static_cast<std::size_t>(p)].dq.template as<T>() + b * len * row;
        reduce_BC(part[p], len, f.state, blocks, b, t0, std::min(len, t0 + reduce_tokens), dq + f.rank,
                  dq + f.rank + f.state, row);
    });

    // The dt projection: dq[:, :R] = ddelta dt_weight, ddt_weight += ddelta^T q[:, :R].
    Gemm<T> inputs[max_passes];
    GemmTn<T> weights[max_passes];
    Index weight_count = 0;
    for (Index p = 0; p < passes; p++) {
        const ScanBackwardPass& sp = a.passes[static_cast<std::size_t>(p)];
        const Index rank = pass[p].args.rank, row = pass[p].q_row, state = pass[p].args.state;
        inputs[p] = {.x = part[p].ddelta,
                     .ldx = inner,
                     .packed = packed_linear<T>(ctx, sp.dt_weight, rank, inner, true),
                     .bias = nullptr,
                     .y = sp.dq.as<T>(),
                     .ldy = row,
                     .m = batch * len,
                     .n = rank,
                     .k = inner,
                     .add = false};
        if (sp.ddt_weight)
            weights[weight_count++] = {.dy = part[p].ddelta,
                                       .lddy = inner,
                                       .x = sp.q.as<T>(),
                                       .ldx = row,
                                       .dw = sp.ddt_weight.as<Wide<T>>(),
                                       .lddw = rank,
                                       .m = batch * len,
                                       .n = inner,
                                       .k = rank};
        if (counts(ctx)) continue;
        add_over_images(part[p].dD, batch, inner, sp.dD.as<Wide<T>>());
        add_over_images(part[p].dbias, batch, inner, sp.ddt_bias.as<Wide<T>>());
        if (!sp.dA_log) continue;
        for (Index b = 0; b < batch; b++)  // dA_log = dA A, and the packed A is A log2(e)
            for (Index e = 0; e < inner; e++)
                for (Index n = 0; n < state; n++)
                    sp.dA_log.as<Wide<T>>()[e * state + n] +=
                        part[p].dA[(b * state + n) * inner + e] *
                        (pass[p].args.A[n * inner + e] * std::numbers::ln2_v<Wide<T>>);
    }
    run_gemms<T>(ctx, std::span<const Gemm<T>>(inputs, static_cast<std::size_t>(passes)));
    run_gemms_tn<T>(ctx, std::span<const GemmTn<T>>(weights, static_cast<std::size_t>(weight_count)));
}

}  // namespace

void CpuBackend::scan_forward(Context& ctx, const ScanForward& args)
{
    if (args.xz.numel()) dispatch(args.xz.dtype, [&](auto t) { forward<decltype(t)>(ctx, args); });
}

void CpuBackend::scan_backward(Context& ctx, const ScanBackward& args)
{
    if (args.xz.numel()) dispatch(args.xz.dtype, [&](auto t) { backward<decltype(t)>(ctx, args); });
}

}  // namespace vimcore::cpu
