// SPDX-License-Identifier: Apache-2.0
// The scan of ops.h: the tuned kernels where they apply, else the generic one, a launch per pass.
#include <atomic>
#include <stdexcept>

#include "arena.h"
#include "ops.h"
#include "scan_choice.h"
#include "scan_generic.cuh"

namespace vimcore::cuda {

namespace {

std::atomic<ScanKernel> forced = ScanKernel::automatic;

template <class T>
void run_generic(Context& ctx, GenericScan<T> a)
{
    Arena::Scope scope(ctx.arena());
    a.groups = ceil_div(a.dim, generic_threads);
    const Index blocks = a.batch * a.groups;
    if (blocks == 0 || a.tokens == 0) return;
    const dim3 grid(static_cast<unsigned>(blocks));
    if (a.state <= generic_states) {
        VIM_LAUNCH((scan_generic<T, generic_states>), grid, generic_threads, 0, stream_of(ctx), a);
        return;
    }
    const Shape shape{a.batch, a.state, a.dim};
    const Tensor memory = a.state_inout ? Tensor{} : ctx.arena().take(shape, DType::f32);
    a.memory = memory ? static_cast<float*>(memory.data) : a.state_inout;
    VIM_LAUNCH((scan_generic<T, 0>), grid, generic_threads, 0, stream_of(ctx), a);
}

template <class T>
GenericScan<T> generic_pass(const Scan& a, const ScanPass& p)
{
    const Index len = a.xz.size(1), inner = a.xz.size(2) / 2, state = p.A_log.size(1), rank = p.dt_weight.size(1);
    const Index tokens = p.u.size(1), row = rank + 2 * state;
    const T* q = p.q.as<T>();
    GenericScan<T> s{};
    s.batch = a.xz.size(0);
    s.tokens = tokens;
    s.dim = inner;
    s.state = state;
    s.rank = rank;
    s.reverse = p.reverse;
    s.softplus = true;
    s.log_A = true;
    s.add = p.add;
    s.finish = p.finish;
    s.u = {p.u.as<T>(), tokens * inner, inner};
    s.dt = {q, tokens * row, row};
    s.B = {q + rank, tokens * row, row};
    s.C = {q + rank + state, tokens * row, row};
    s.z = {a.xz.as<T>() + p.begin * 2 * inner + inner, len * 2 * inner, 2 * inner};
    s.out = {a.out.as<T>() + p.begin * inner, len * inner, inner};
    s.dt_weight = p.dt_weight.as<float>();
    s.dt_bias = p.dt_bias.as<float>();
    s.A = p.A_log.as<float>();
    s.D = p.D.as<float>();
    s.state_inout = p.state.as<float>();
    s.checkpoints = p.checkpoints.as<float>();
    s.chunk = a.chunk;
    if (p.checkpoints) s.chunks = p.checkpoints.size(1);
    s.begin = p.begin;
    s.scale = static_cast<float>(a.scale);
    return s;
}

}  // namespace

void force_scan(ScanKernel kernel) { forced = kernel; }
ScanKernel forced_scan() { return forced; }

void scan_forward(Context& ctx, const Scan& args)
{
    const ScanKernel kernel = forced;
    if (kernel != ScanKernel::generic && scan_forward_tuned(ctx, args)) return;
    if (args.passes.size() != 1) {  // not two directions of one sum: one after the other
        Scan single = args;
        for (const ScanPass& pass : args.passes) {
            single.passes = {&pass, 1};
            cuda::scan_forward(ctx, single);
        }
        return;
    }
    if (kernel != ScanKernel::generic && kernel != ScanKernel::automatic)
        throw std::invalid_argument("[scan] the forced kernel does not apply to these sizes");
    dispatch(args.xz.dtype, [&](auto type) { run_generic(ctx, generic_pass<decltype(type)>(args, args.passes[0])); });
}

void selective_scan_forward(Context& ctx, const SelectiveScan& a)
{
    dispatch(a.u.dtype, [&](auto type) {
        using T = decltype(type);
        const Index len = a.u.size(1), dim = a.u.size(2), state = a.A.size(1);
        GenericScan<T> s{};
        s.batch = a.u.size(0);
        s.tokens = len;
        s.dim = dim;
        s.state = state;
        s.reverse = a.reverse;
        s.softplus = a.delta_softplus;
        s.finish = true;
        s.u = {a.u.as<T>(), len * dim, dim};
        s.dt = {a.delta.as<T>(), len * dim, dim};
        s.B = {a.Bm.as<T>(), len * state, state};
        s.C = {a.Cm.as<T>(), len * state, state};
        s.z = {a.z.as<T>(), len * dim, dim};
        s.out = {a.out.as<T>(), len * dim, dim};
        s.dt_bias = a.delta_bias.as<float>();
        s.A = a.A.as<float>();
        s.D = a.D.as<float>();
        s.scale = 1.0f;
        run_generic(ctx, s);
    });
}

}  // namespace vimcore::cuda
