// SPDX-License-Identifier: Apache-2.0
// Sums of activations; sums and scaled rows of parameters and their gradients.
#include "cpu_backend.h"

namespace vimcore::cpu {

namespace {

constexpr Index rows_of_task = 64;  // tokens

template <class F>
void dispatch_narrow(DType dtype, F&& f)
{
    if (dtype == DType::bf16)
        f(bf16{});
    else
        f(float{});
}

// Each in its own type; the sum in S.
template <class A, class B, class Out, class S>
void add_rows(Context& ctx, const Add& args, S one)
{
    const auto &a = args.a, &b = args.b, &out = args.out, &row_scale = args.row_scale;
    const Index len = out.size(1), dim = out.size(2), blocks = ceil_div(len, rows_of_task);
    parallel_for(ctx, out.size(0) * blocks, [&](Index task) {
        const Index image = task / blocks, row = task % blocks * rows_of_task, offset = (image * len + row) * dim;
        const Index count = std::min(rows_of_task, len - row) * dim;
        const S scale = row_scale ? row_scale.as<S>()[image] : one;
        const A* pa = a.as<A>() + offset;
        const B* pb = b.as<B>() + offset;
        Out* po = out.as<Out>() + offset;
        for (Index i = 0; i < count; i++) po[i] = Out(S(pa[i]) + scale * S(pb[i]));
    });
}

}  // namespace

void CpuBackend::add(Context& ctx, const Add& args)
{
    if (args.out.dtype == DType::f64) return add_rows<double, double, double>(ctx, args, 1.0);
    dispatch_narrow(args.a.dtype, [&](auto a) {
        dispatch_narrow(args.b.dtype, [&](auto b) {
            dispatch_narrow(args.out.dtype,
                            [&](auto out) { add_rows<decltype(a), decltype(b), decltype(out)>(ctx, args, 1.0f); });
        });
    });
}

void CpuBackend::scale_rows(Context& ctx, const ScaleRows& args)
{
    if (counts(ctx)) return;
    const auto &matrix = args.matrix, &factor = args.factor, &out = args.out;
    dispatch_wide(out.dtype, [&](auto zero) {
        using T = decltype(zero);
        const Index columns = matrix.size(1);
        for (Index i = 0; i < matrix.numel(); i++) out.as<T>()[i] = matrix.as<T>()[i] * factor.as<T>()[i / columns];
    });
}

void CpuBackend::scale_rows_backward(Context& ctx, const ScaleRowsBackward& args)
{
    if (counts(ctx)) return;
    const auto &matrix = args.matrix, &factor = args.factor, &dout = args.dout, &dmatrix = args.dmatrix,
               &dfactor = args.dfactor;
    dispatch_wide(matrix.dtype, [&](auto zero) {
        using T = decltype(zero);
        const T *d = dout.as<T>(), *w = matrix.as<T>(), *f = factor.as<T>();
        const Index columns = matrix.size(1);
        for (Index i = 0; i < matrix.size(0); i++) {
            T sum = 0;
            for (Index j = i * columns; j < (i + 1) * columns; j++) {
                if (dmatrix) dmatrix.as<T>()[j] += f[i] * d[j];
                sum += w[j] * d[j];
            }
            if (dfactor) dfactor.as<T>()[i] += sum;
        }
    });
}

// Every thread takes its share of every tensor.
void CpuBackend::accumulate(Context& ctx, const Accumulate& args)
{
    const auto &to = args.to, &from = args.from;
    const Index workers = ctx.threads();
    parallel_for(ctx, workers, [&](Index worker) {
        for (std::size_t i = 0; i < to.size(); i++) {
            if (!to[i]) continue;
            const Index n = to[i].numel(), begin = n * worker / workers, end = n * (worker + 1) / workers;
            dispatch_wide(to[i].dtype, [&](auto zero) {
                using T = decltype(zero);
                T* sum = to[i].as<T>();
                const T* part = from[i].as<T>();
                for (Index j = begin; j < end; j++) sum[j] += part[j];
            });
        }
    });
}

}  // namespace vimcore::cpu
