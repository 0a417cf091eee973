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

float* floats(Context& ctx, const Shape& shape) { return static_cast<float*>(device_scratch::floats(ctx, shape).data); }

// Runs `a`, which has everything but scratch memory and the states' share of launches; add, finish: of the pass.
template <class T>
void run_generic(Context& ctx, GenericScanBackward<T> a)
{
    const bool add = a.f.add, finish = a.f.finish;
    const T *const B = a.f.B.data, *const C = a.f.C.data;
    const Index blocks = a.f.batch * a.f.groups;
    if (blocks == 0) return;
    Arena::Scope scope(arena_of(ctx));
    const device_scratch::GenericStates own =
        device_scratch::generic_backward_states(ctx, a.f.batch, a.f.tokens, a.f.state, a.f.dim, a.f.chunk);
    a.starts = static_cast<float*>(own.starts.data);
    a.lambda_B = static_cast<float*>(own.lambda_B.data);
    a.lambda_A = static_cast<float*>(own.lambda_A.data);
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
    const device_scratch::GenericPartials own =
        device_scratch::generic_partials(ctx, a.f.batch, a.f.tokens, a.f.state, a.f.dim);
    a.f.groups = own.groups;
    a.part = static_cast<float*>(own.part.data);
    a.parameters = static_cast<float*>(own.parameters.data);
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
    const Index zeros = row - s.f.rank - 2 * state;
    const RowSum<T> rows{s.part,    batch,         s.f.groups, len, 2 * state, 2 * state,
                         2 * state, dq + s.f.rank, nullptr,    row, 0,         zeros};
    sum_rows<T>(ctx, {&rows, 1});
    add_parameters(ctx, s, p.dA_log, p.dD, p.ddt_bias, false);
    dt_backward<T>(ctx, {static_cast<const float*>(s.draw.data), p.dt_weight.as<float>(), p.q.as<T>(), dq,
                         p.ddt_weight.as<float>(), batch * len, inner, s.f.rank, row});
}

template <class T>
void run_passes(Context& ctx, const ScanBackward& a)
{
    Arena::Scope scope(arena_of(ctx));
    float* const y = static_cast<float*>(device_scratch::launches_sum(ctx, a).data);
    for (std::size_t i = 0; i < a.passes.size(); i++)
        run_pass<T>(ctx, a, a.passes[i], y, i > 0, i + 1 == a.passes.size());
}

template <class T>
void run_textbook(Context& ctx, const SelectiveScanBackward& a)
{
    constexpr Index chunk = device_scratch::textbook_chunk;
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
                         state,  a.dB.as<T>(), a.dC.as<T>(), state, state,     0};
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
