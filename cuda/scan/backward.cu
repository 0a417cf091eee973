// SPDX-License-Identifier: Apache-2.0
// The gradients of both scans of ops.h: the tuned kernels where they apply, else the generic one, a launch per pass and
// 16 states. What blocks leave behind is summed in a fixed order (scan/sums.h).
#include <stdexcept>

#include "core/context_internals.h"
#include "cuda_operators.h"
#include "scan/args.cuh"
#include "scan/backward_generic.cuh"
#include "scan/choice.h"
#include "scan/sums.h"

namespace vimcore::cuda {

namespace {

float* floats(Context& ctx, const Shape& shape)
{
    return static_cast<float*>(arena_of(ctx).take(shape, DType::f32).data);
}

// Runs `a`, which has everything but scratch memory and the states' share of launches; add, finish: of the pass.
template <class T>
void run_generic(Context& ctx, GenericScanBackward<T> a)
{
    const bool add = a.f.add, finish = a.f.finish;
    const T *const B = a.f.B.data, *const C = a.f.C.data;
    const Shape sequence{a.f.batch, a.f.tokens, a.f.dim};
    const Index blocks = a.f.batch * a.f.groups, tiles = ceil_div(a.f.chunk, generic_tile);
    if (blocks == 0) return;
    Arena::Scope scope(arena_of(ctx));
    a.starts = floats(ctx, {blocks, tiles, generic_states, generic_threads});
    if (a.f.state > generic_states) {
        a.lambda_B = floats(ctx, sequence);
        a.lambda_A = floats(ctx, sequence);
    }
    for (Index n = 0; n < a.f.state; n += generic_states) {
        a.first_state = n;
        a.first = n == 0;
        a.last = n + generic_states >= a.f.state;
        a.f.B.data = B + n;
        a.f.C.data = C + n;
        a.f.add = add || !a.first;
        a.f.finish = finish && a.last;
        VIM_LAUNCH((scan_backward_generic<T>), dim3(static_cast<unsigned>(blocks)), generic_threads, generic_shared,
                   stream_of(ctx), a);
    }
}

// Scratch for what the blocks leave behind.
template <class T>
void take_partials(Context& ctx, GenericScanBackward<T>& a)
{
    a.f.groups = ceil_div(a.f.dim, generic_threads);
    a.part = floats(ctx, {a.f.batch, a.f.groups, a.f.tokens, 2 * a.f.state});
    a.parameters = floats(ctx, {a.f.batch, a.f.state + 2, a.f.dim});
}

// Adds up dA, dD and dbias, or overwrites them with their sums.
template <class T>
void add_parameters(Context& ctx, const GenericScanBackward<T>& a, const Tensor& dA, const Tensor& dD,
                    const Tensor& dbias, bool overwrite)
{
    const Index dim = a.f.dim, stride = (a.f.state + 2) * dim;
    const float* const after_A = a.parameters + a.f.state * dim;
    const float* const A_log = a.f.log_A ? a.f.A : nullptr;
    const PartialSum sums[] = {
        {a.parameters, a.f.batch, stride, a.f.state, dim, A_log, dA.as<float>(), overwrite},
        {after_A, a.f.batch, stride, 1, dim, nullptr, dD.as<float>(), overwrite},
        {after_A + dim, a.f.batch, stride, 1, dim, nullptr, dbias.as<float>(), overwrite},
    };
    add_partials(ctx, sums);
}

template <class T>
void run_pass(Context& ctx, const ScanBackward& a, const ScanBackwardPass& p, float* y, bool add, bool finish)
{
    Arena::Scope scope(arena_of(ctx));
    const Index batch = a.xz.size(0), len = a.xz.size(1), inner = a.xz.size(2) / 2;
    GenericScanBackward<T> s{};
    s.f = generic_pass<T>(a, p, 0);
    s.f.add = add;
    s.f.finish = finish;
    const Index state = s.f.state, row = s.f.dt.row;
    s.dout = {a.dout.as<T>(), len * inner, inner};
    s.du = {p.du.as<T>(), len * inner, inner};
    s.dz = {a.dxz.as<T>() + inner, len * 2 * inner, 2 * inner};
    s.draw = {floats(ctx, p.u.shape), true};
    s.y = y;
    take_partials(ctx, s);
    run_generic(ctx, s);
    T* const dq = p.dq.as<T>();
    const RowSum<T> rows{s.part,    batch,         s.f.groups, len, 2 * state, 2 * state,
                         2 * state, dq + s.f.rank, nullptr,    row, 0};
    sum_rows<T>(ctx, {&rows, 1});
    add_parameters(ctx, s, p.dA_log, p.dD, p.ddt_bias, false);
    dt_backward<T>(ctx, {static_cast<const float*>(s.draw.data), p.dt_weight.as<float>(), p.q.as<T>(), dq,
                         p.ddt_weight.as<float>(), batch * len, inner, s.f.rank, row});
}

template <class T>
void run_passes(Context& ctx, const ScanBackward& a)
{
    Arena::Scope scope(arena_of(ctx));
    bool several = a.passes.size() > 1;
    for (const ScanBackwardPass& p : a.passes) several = several || p.A_log.size(1) > generic_states;
    // y of the launches so far, never rounded to 16 bits
    float* y = nullptr;
    if (several) y = std::is_same_v<T, float> ? a.out.as<float>() : floats(ctx, a.out.shape);
    for (std::size_t i = 0; i < a.passes.size(); i++)
        run_pass<T>(ctx, a, a.passes[i], y, i > 0, i + 1 == a.passes.size());
}

template <class T>
void run_textbook(Context& ctx, const SelectiveScanBackward& a)
{
    constexpr Index chunk = 64;
    Arena::Scope scope(arena_of(ctx));
    const Index batch = a.u.size(0), len = a.u.size(1), dim = a.u.size(2), state = a.A.size(1);
    GenericScanBackward<T> s{};
    s.f = textbook_pass<T>(a);
    s.f.chunk = chunk;
    s.f.chunks = ceil_div(len, chunk);
    s.f.checkpoints = floats(ctx, {batch, s.f.chunks, state, dim});
    run_generic(ctx, s.f);
    s.dout = {a.dout.as<T>(), len * dim, dim};
    s.du = {a.du.as<T>(), len * dim, dim};
    s.dz = {a.dz.as<T>(), len * dim, dim};
    s.draw = {a.ddelta.data, std::is_same_v<T, float>};
    if (state > generic_states) s.y = floats(ctx, a.u.shape);
    take_partials(ctx, s);
    run_generic(ctx, s);
    const RowSum<T> rows{s.part, batch,        s.f.groups,   len,   2 * state, 2 * state,
                         state,  a.dB.as<T>(), a.dC.as<T>(), state, state};
    sum_rows<T>(ctx, {&rows, 1});
    add_parameters(ctx, s, a.dA, a.dD, a.ddelta_bias, true);
}

}  // namespace

void scan_backward(Context& ctx, const ScanBackward& args)
{
    if (args.xz.numel() == 0) return;
    const ScanKernel kernel = forced_scan();
    if (kernel != ScanKernel::generic && scan_backward_tuned(ctx, args)) return;
    if (kernel != ScanKernel::generic && kernel != ScanKernel::automatic)
        throw std::invalid_argument("[scan backward] the tuned kernel does not apply to these sizes");
    dispatch(args.xz.dtype, [&](auto type) { run_passes<decltype(type)>(ctx, args); });
}

void selective_scan_backward(Context& ctx, const SelectiveScanBackward& args)
{
    dispatch(args.u.dtype, [&](auto type) { run_textbook<decltype(type)>(ctx, args); });
}

}  // namespace vimcore::cuda
