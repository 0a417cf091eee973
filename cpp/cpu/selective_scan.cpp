// SPDX-License-Identifier: Apache-2.0
// The selective scan with textbook arguments (u, delta, A, B, C) on the CPU: the kernels of scan.cpp.
#include <algorithm>
#include <limits>
#include <numbers>

#include "scan_tasks.h"

namespace vimcore::cpu {

namespace {

template <class T, class Scan>
ScanPass<T> textbook_pass(Context& ctx, const Scan& a)
{
    const Index dim = a.u.size(2), state = a.A.size(1);
    using W = Wide<T>;
    W* A = scratch<W>(ctx, dim * state).template as<W>();
    for (Index e = 0; e < dim && !counts(ctx); e++)
        for (Index n = 0; n < state; n++)  // finite, as the packed one
            A[n * dim + e] = std::max(a.A.template as<W>()[e * state + n] * std::numbers::log2e_v<W>,
                                      std::numeric_limits<W>::lowest());
    ScanPass<T> pass;
    pass.tokens = a.u.size(1);
    ScanArgs<T>& s = pass.args;
    s.reverse = a.reverse;
    s.len = pass.tokens;
    s.dim = dim;
    s.state = state;
    s.rank = 0;
    s.u = a.u.template as<T>();
    s.ldu = dim;
    s.dt = a.delta.template as<T>();
    s.lddt = dim;
    s.dt_bias = a.delta_bias.template as<W>();
    s.softplus = a.delta_softplus;
    s.A = A;
    set_BC<T>(ctx, s, a.Bm.template as<T>(), a.Cm.template as<T>(), state, a.u.size(0) * pass.tokens);
    s.D = a.D.template as<W>();
    s.y = a.out.template as<T>();
    s.ldy = dim;
    s.finish = true;
    s.z = a.z.template as<T>();
    s.ldz = dim;
    s.scale = W(1);
    return pass;
}

template <class T>
void textbook_run(Context& ctx, const ScanPass<T>& pass, Index batch)
{
    const Index dim = pass.args.dim, blocks = ceil_div(dim, forward_channels);
    parallel_for(ctx, batch * blocks, [&](Index task) {
        const Index e0 = task % blocks * forward_channels;
        kernels<T>().scan_forward(for_task(pass, pass.tokens, task / blocks, e0, std::min(dim, e0 + forward_channels)));
    });
}

template <class T>
void textbook_forward(Context& ctx, const SelectiveScanForward& a)
{
    Arena::Scope scope(arena_of(ctx));
    textbook_run(ctx, textbook_pass<T>(ctx, a), a.u.size(0));
}

template <class T>
void textbook_backward(Context& ctx, const SelectiveScanBackward& a)
{
    constexpr Index chunk = 64;
    const Kernels<T>& kernel = kernels<T>();
    const Index batch = a.u.size(0), len = a.u.size(1), dim = a.u.size(2), state = a.A.size(1);
    const Index blocks = ceil_div(dim, backward_channels);
    Arena::Scope scope(arena_of(ctx));
    ScanPass<T> pass = textbook_pass<T>(ctx, a);
    pass.chunks = ceil_div(len, chunk);
    pass.args.chunk = chunk;
    pass.args.checkpoints = scratch<Wide<T>>(ctx, batch * pass.chunks * state * dim).template as<Wide<T>>();
    textbook_run(ctx, pass, batch);
    pass.args.finish = false;
    ScanPartials<T> part = make_partials<T>(ctx, batch, len, dim, state, blocks);
    const Index space = round_up(kernel.scan_backward_scratch(state, chunk, std::min(dim, backward_channels)), 16);
    Wide<T>* memory = scratch<Wide<T>>(ctx, space * batch * blocks).template as<Wide<T>>();
    parallel_for(ctx, batch * blocks, [&](Index task) {
        const Index b = task / blocks, e0 = task % blocks * backward_channels, offset = b * len * dim;
        const Index e1 = std::min(dim, e0 + backward_channels);
        ScanBackwardArgs<T> s =
            backward_args(for_task(pass, len, b, e0, e1), part, len, b, task % blocks, blocks, memory + task * space);
        s.dout = a.dout.as<T>() + offset;
        s.du = a.du.as<T>() + offset;
        s.ddelta = a.ddelta.as<T>() + offset;
        s.lddout = s.lddu = s.ldddelta = dim;
        kernel.scan_backward(s);
        if (a.z)
            kernel.gate_backward({.len = len,
                                  .e0 = e0,
                                  .e1 = e1,
                                  .y = a.out.as<T>() + offset,
                                  .ldy = dim,
                                  .z = a.z.as<T>() + offset,
                                  .ldz = dim,
                                  .dout = s.dout,
                                  .lddout = dim,
                                  .dz = a.dz.as<T>() + offset,
                                  .lddz = dim,
                                  .scale = Wide<T>(1)});
    });
    if (counts(ctx)) return;
    for (Index b = 0; b < batch; b++)
        reduce_BC(part, len, state, blocks, b, 0, len, a.dB.as<T>() + b * len * state, a.dC.as<T>() + b * len * state,
                  state);
    using W = Wide<T>;
    auto overwrite = [&](const W* sums, const Tensor& out) {
        if (!out) return;
        std::fill_n(out.as<W>(), out.numel(), W(0));
        add_over_images(sums, batch, out.numel(), out.as<W>());
    };
    overwrite(part.dD, a.dD);
    overwrite(part.dbias, a.ddelta_bias);
    W* dA = a.dA.as<W>();
    std::fill_n(dA, dim * state, W(0));
    for (Index b = 0; b < batch; b++)
        for (Index e = 0; e < dim; e++)
            for (Index n = 0; n < state; n++) dA[e * state + n] += part.dA[(b * state + n) * dim + e];
}

}  // namespace

void CpuBackend::selective_scan_forward(Context& ctx, const SelectiveScanForward& args)
{
    dispatch(args.u.dtype, [&](auto t) { textbook_forward<decltype(t)>(ctx, args); });
}

void CpuBackend::selective_scan_backward(Context& ctx, const SelectiveScanBackward& args)
{
    dispatch(args.u.dtype, [&](auto t) { textbook_backward<decltype(t)>(ctx, args); });
}

}  // namespace vimcore::cpu
