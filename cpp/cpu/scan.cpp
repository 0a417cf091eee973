// SPDX-License-Identifier: Apache-2.0
// The selective scan on the CPU. Parallel over images and blocks of channels; within a task the recurrence is
// sequential in time, and both directions over the same tokens follow each other, so that the sum of directions and
// the gate happen in the first-level cache.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <type_traits>

#include "cpu_backend.h"

namespace vimcore::cpu {

namespace {

constexpr Index forward_channels = 32;   // channels of a forward task
constexpr Index backward_channels = 64;  // channels of a backward task: one partial sum of dB and dC each
constexpr Index reduce_tokens = 64;      // tokens of a task that adds those up
constexpr Index max_passes = 2;

// What all tasks of one pass share; pointers are those of image 0.
template <class T>
struct Pass {
    ScanArgs<T> args{};
    Index tokens = 0, q_row = 0, begin = 0, chunks = 0;
};

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

// B and C in the type of the sums: as they are, or converted once for all channels.
template <class T>
void set_BC(Context& ctx, ScanArgs<T>& s, const T* B, const T* C, Index ld, Index rows)
{
    if constexpr (std::is_same_v<T, Wide<T>>) {
        s.B = B;
        s.C = C;
        s.ldb = ld;
    } else {
        constexpr Index block = 256;
        using W = Wide<T>;
        W* to = scratch<W>(ctx, 2 * rows * s.state).template as<W>();
        s.B = to;
        s.C = to + rows * s.state;
        s.ldb = s.state;
        const Index blocks = ceil_div(rows, block);
        parallel_for(ctx, 2 * blocks, [&](Index task) {
            const Index begin = task / 2 * block, count = std::min(block, rows - begin);
            kernels<T>().widen((task % 2 ? C : B) + begin * ld, ld, count, s.state,
                               to + (task % 2 * rows + begin) * s.state);
        });
    }
}

// What forward and backward share: tokens from `begin` on.
template <class T, class Scan, class Arguments>
Pass<T> make_pass(Context& ctx, const Scan& a, const Arguments& p, Index begin)
{
    const Index inner = a.xz.size(2) / 2, state = p.A_log.size(1), rank = p.dt_weight.size(1);
    Pass<T> pass;
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

// Moves the pointers of a pass to image b and channels [e0, e1).
template <class T>
ScanArgs<T> for_task(const Pass<T>& pass, Index len, Index b, Index e0, Index e1)
{
    ScanArgs<T> s = pass.args;
    s.u += b * pass.tokens * s.ldu;
    s.dt += b * pass.tokens * s.lddt;
    s.B += b * pass.tokens * s.ldb;
    s.C += b * pass.tokens * s.ldb;
    if (s.h) s.h += b * s.state * s.dim;
    s.y += b * len * s.ldy;
    if (s.z) s.z += b * len * s.ldz;
    if (s.checkpoints) s.checkpoints += b * pass.chunks * s.state * s.dim;
    s.e0 = e0;
    s.e1 = e1;
    return s;
}

template <class T>
void forward(Context& ctx, const ScanForward& a)
{
    const Kernels<T>& kernel = kernels<T>();
    const Index batch = a.xz.size(0), len = a.xz.size(1), inner = a.xz.size(2) / 2;
    const Index blocks = ceil_div(inner, forward_channels), passes = static_cast<Index>(a.passes.size());
    Arena::Scope scope(arena_of(ctx));
    Pass<T> pass[max_passes];
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

// Gradients that one task leaves behind for the sums over channel blocks and over images.
template <class T>
struct Partials {
    T* ddelta;           // (B, L, E)
    Wide<T>* dBC;        // (B, blocks, 2, L, N)
    Wide<T>* dA;         // (B, N, E)
    Wide<T>*dD, *dbias;  // (B, E)
};

template <class T>
Partials<T> make_partials(Context& ctx, Index batch, Index len, Index dim, Index state, Index blocks)
{
    const auto sums = [&](Index count) { return scratch<Wide<T>>(ctx, count).template as<Wide<T>>(); };
    return {scratch<T>(ctx, batch * len * dim).template as<T>(), sums(batch * blocks * 2 * len * state),
            sums(batch * state * dim), sums(batch * dim), sums(batch * dim)};
}

template <class T>
ScanBackwardArgs<T> backward_args(const ScanArgs<T>& f, const Partials<T>& part, Index len, Index b, Index block,
                                  Index blocks, Wide<T>* own)
{
    ScanBackwardArgs<T> s{};
    s.f = f;
    s.ddelta = part.ddelta + b * len * f.dim;
    s.ldddelta = f.dim;
    s.dB = part.dBC + (b * blocks + block) * 2 * len * f.state;
    s.dC = s.dB + len * f.state;
    s.dA = part.dA + b * f.state * f.dim;
    s.dD = part.dD + b * f.dim;
    s.dbias = part.dbias + b * f.dim;
    s.scratch = own;
    return s;
}

// dB and dC of image b, tokens [t0, t1): sums over channel blocks in order, into rows of stride ld.
template <class T>
void reduce_BC(const Partials<T>& part, Index len, Index state, Index blocks, Index b, Index t0, Index t1, T* dB, T* dC,
               Index ld)
{
    for (Index which = 0; which < 2; which++)
        for (Index t = t0; t < t1; t++) {
            T* row = (which ? dC : dB) + t * ld;
            Wide<T>* sum = part.dBC + ((b * blocks * 2 + which) * len + t) * state;  // of the first block
            for (Index block = 1; block < blocks; block++) {
                const Wide<T>* in = sum + block * 2 * len * state;
                for (Index n = 0; n < state; n++) sum[n] += in[n];
            }
            for (Index n = 0; n < state; n++) row[n] = T(sum[n]);
        }
}

template <class T>
void add_over_images(const T* part, Index batch, Index count, T* sum)
{
    if (!sum) return;
    for (Index b = 0; b < batch; b++)
        for (Index i = 0; i < count; i++) sum[i] += part[b * count + i];
}

template <class T>
void backward(Context& ctx, const ScanBackward& a)
{
    const Kernels<T>& kernel = kernels<T>();
    const Index batch = a.xz.size(0), len = a.xz.size(1), inner = a.xz.size(2) / 2;
    const Index blocks = ceil_div(inner, backward_channels), passes = static_cast<Index>(a.passes.size());
    Arena::Scope scope(arena_of(ctx));
    Pass<T> pass[max_passes];
    Partials<T> part[max_passes];
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

// ---- textbook arguments --------------------------------------------------------------------------------------------

template <class T, class Scan>
Pass<T> textbook_pass(Context& ctx, const Scan& a)
{
    const Index dim = a.u.size(2), state = a.A.size(1);
    using W = Wide<T>;
    W* A = scratch<W>(ctx, dim * state).template as<W>();
    for (Index e = 0; e < dim && !counts(ctx); e++)
        for (Index n = 0; n < state; n++)  // finite, as the packed one
            A[n * dim + e] = std::max(a.A.template as<W>()[e * state + n] * std::numbers::log2e_v<W>,
                                      std::numeric_limits<W>::lowest());
    Pass<T> pass;
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
void textbook_run(Context& ctx, const Pass<T>& pass, Index batch)
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
    Pass<T> pass = textbook_pass<T>(ctx, a);
    pass.chunks = ceil_div(len, chunk);
    pass.args.chunk = chunk;
    pass.args.checkpoints = scratch<Wide<T>>(ctx, batch * pass.chunks * state * dim).template as<Wide<T>>();
    textbook_run(ctx, pass, batch);
    pass.args.finish = false;
    Partials<T> part = make_partials<T>(ctx, batch, len, dim, state, blocks);
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

void CpuBackend::scan_forward(Context& ctx, const ScanForward& args)
{
    if (args.xz.numel()) dispatch(args.xz.dtype, [&](auto t) { forward<decltype(t)>(ctx, args); });
}

void CpuBackend::scan_backward(Context& ctx, const ScanBackward& args)
{
    if (args.xz.numel()) dispatch(args.xz.dtype, [&](auto t) { backward<decltype(t)>(ctx, args); });
}

void CpuBackend::selective_scan_forward(Context& ctx, const SelectiveScanForward& args)
{
    dispatch(args.u.dtype, [&](auto t) { textbook_forward<decltype(t)>(ctx, args); });
}

void CpuBackend::selective_scan_backward(Context& ctx, const SelectiveScanBackward& args)
{
    dispatch(args.u.dtype, [&](auto t) { textbook_backward<decltype(t)>(ctx, args); });
}

}  // namespace vimcore::cpu
