// SPDX-License-Identifier: Apache-2.0
// Arguments of ops.h as those of the generic scan, for forward and backward; its launch.
#pragma once

#include "core/context_internals.h"
#include "cuda_operators.h"
#include "scan/generic.cuh"

namespace vimcore::cuda {

template <class T>
void run_generic(Context& ctx, GenericScan<T> a)
{
    Arena::Scope scope(arena_of(ctx));
    a.groups = ceil_div(a.dim, generic_threads);
    const Index blocks = a.batch * a.groups;
    if (blocks == 0 || a.tokens == 0) return;
    const dim3 grid(static_cast<unsigned>(blocks));
    if (a.state <= generic_states) {
        VIM_LAUNCH((scan_generic<T, generic_states>), grid, generic_threads, 0, stream_of(ctx), a);
        return;
    }
    a.memory = a.state_inout ? a.state_inout
                             : static_cast<float*>(device_scratch::generic_memory(ctx, a.batch, a.state, a.dim).data);
    VIM_LAUNCH((scan_generic<T, 0>), grid, generic_threads, 0, stream_of(ctx), a);
}

// What forward and backward share of a pass: tokens from `begin` on.
template <class T, class Scan, class Pass>
GenericScan<T> generic_pass(const Scan& a, const Pass& p, Index begin)
{
    const Index len = a.xz.size(1), inner = a.xz.size(2) / 2, state = p.A_log.size(1), rank = p.dt_weight.size(1);
    const Index tokens = p.u.size(1), row = p.q.size(2);
    const T* q = p.q.template as<T>();
    GenericScan<T> s{};
    s.batch = a.xz.size(0);
    s.tokens = tokens;
    s.dim = inner;
    s.state = state;
    s.rank = rank;
    s.reverse = p.reverse;
    s.softplus = true;
    s.log_A = true;
    s.u = {p.u.template as<T>(), tokens * inner, inner};
    s.dt = {q, tokens * row, row};
    s.B = {q + rank, tokens * row, row};
    s.C = {q + rank + state, tokens * row, row};
    s.z = {a.xz.template as<T>() + begin * 2 * inner + inner, len * 2 * inner, 2 * inner};
    s.out = {a.out.template as<T>() + begin * inner, len * inner, inner};
    s.dt_weight = p.dt_weight.template as<float>();
    s.dt_bias = p.dt_bias.template as<float>();
    s.A = p.A_log.template as<float>();
    s.D = p.D.template as<float>();
    s.checkpoints = p.checkpoints.template as<float>();
    s.chunk = a.chunk;
    if (p.checkpoints) s.chunks = p.checkpoints.size(1);
    s.begin = begin;
    s.scale = static_cast<float>(a.scale);
    return s;
}

template <class T, class Scan>
GenericScan<T> textbook_pass(const Scan& a)
{
    const Index len = a.u.size(1), dim = a.u.size(2), state = a.A.size(1);
    GenericScan<T> s{};
    s.batch = a.u.size(0);
    s.tokens = len;
    s.dim = dim;
    s.state = state;
    s.reverse = a.reverse;
    s.softplus = a.delta_softplus;
    s.finish = true;
    s.u = {a.u.template as<T>(), len * dim, dim};
    s.dt = {a.delta.template as<T>(), len * dim, dim};
    s.B = {a.Bm.template as<T>(), len * state, state};
    s.C = {a.Cm.template as<T>(), len * state, state};
    s.z = {a.z.template as<T>(), len * dim, dim};
    s.out = {a.out.template as<T>(), len * dim, dim};
    s.dt_bias = a.delta_bias.template as<float>();
    s.A = a.A.template as<float>();
    s.D = a.D.template as<float>();
    s.scale = 1.0f;
    return s;
}

}  // namespace vimcore::cuda
