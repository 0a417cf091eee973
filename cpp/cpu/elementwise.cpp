// SPDX-License-Identifier: Apache-2.0
// Sums of activations; sums and scaled rows of parameters and their gradients.
#include "cpu_backend.h"

namespace vimcore::cpu {

namespace {

constexpr Index add_rows = 64;  // tokens of a task

template <class T>
void add(Context& ctx, const Add& args)
{
    const auto &a = args.a, &b = args.b, &out = args.out, &row_scale = args.row_scale;
    const Index len = out.size(1), dim = out.size(2), blocks = ceil_div(len, add_rows);
    parallel_for(ctx, out.size(0) * blocks, [&](Index task) {
        const Index image = task / blocks, row = task % blocks * add_rows, offset = (image * len + row) * dim;
        const Index count = std::min(add_rows, len - row) * dim;
        const T scale = row_scale ? row_scale.as<T>()[image] : T(1);
        const T *pa = a.as<T>() + offset, *pb = b.as<T>() + offset;
        T* po = out.as<T>() + offset;
        for (Index i = 0; i < count; i++) po[i] = pa[i] + scale * pb[i];
    });
}

}  // namespace

void CpuBackend::add(Context& ctx, const Add& args)
{
    dispatch(args.out.dtype, [&](auto t) { cpu::add<decltype(t)>(ctx, args); });
}

void CpuBackend::scale_rows(Context& ctx, const ScaleRows& args)
{
    if (counts(ctx)) return;
    const auto &matrix = args.matrix, &factor = args.factor, &out = args.out;
    dispatch(out.dtype, [&](auto zero) {
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
    dispatch(matrix.dtype, [&](auto zero) {
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
            dispatch(to[i].dtype, [&](auto zero) {
                using T = decltype(zero);
                T* sum = to[i].as<T>();
                const T* part = from[i].as<T>();
                for (Index j = begin; j < end; j++) sum[j] += part[j];
            });
        }
    });
}

}  // namespace vimcore::cpu
