// SPDX-License-Identifier: Apache-2.0
// From tokens to rows: the mean, the maximum, or one or two chosen tokens.
#include "cpu_backend.h"

namespace vimcore::cpu {

namespace {

template <class T>
void readout_forward(Context& ctx, const ReadoutForward& a)
{
    const Index len = a.x.size(1), dim = a.x.size(2);
    parallel_for(ctx, a.x.size(0), [&](Index b) {
        const T* x = a.x.as<T>() + b * len * dim;
        T* out = a.out.as<T>() + b * dim;
        if (a.reduce == Reduce::select) {
            const bool two = a.index[1] >= 0;
            for (Index d = 0; d < dim; d++) {
                const T first = x[a.index[0] * dim + d];
                out[d] = two ? (first + x[a.index[1] * dim + d]) / 2 : first;
            }
            return;
        }
        std::copy_n(x, dim, out);
        for (Index t = 1; t < len; t++)
            for (Index d = 0; d < dim; d++) {
                const T value = x[t * dim + d];
                out[d] =
                    a.reduce == Reduce::mean ? out[d] + value : (value > out[d] || value != value ? value : out[d]);
            }
        if (a.reduce == Reduce::mean)
            for (Index d = 0; d < dim; d++) out[d] /= static_cast<T>(len);
    });
}

template <class T>
void readout_backward(Context& ctx, const ReadoutBackward& a)
{
    const Index len = a.dx.size(1), dim = a.dx.size(2);
    parallel_for(ctx, a.dx.size(0), [&](Index b) {
        T* dx = a.dx.as<T>() + b * len * dim;
        const T* dout = a.dout.as<T>() + b * dim;
        if (a.reduce == Reduce::mean) {
            for (Index t = 0; t < len; t++)
                for (Index d = 0; d < dim; d++) dx[t * dim + d] = dout[d] / static_cast<T>(len);
            return;
        }
        std::fill_n(dx, len * dim, T(0));
        if (a.reduce == Reduce::select) {
            const T share = a.index[1] >= 0 ? T(0.5) : T(1);
            for (Index i : a.index)
                for (Index d = 0; i >= 0 && d < dim; d++) dx[i * dim + d] += share * dout[d];
            return;
        }
        const T* x = a.x.as<T>() + b * len * dim;
        for (Index d = 0; d < dim; d++) {  // the first of equal maxima
            Index best = 0;
            for (Index t = 1; t < len; t++)
                if (x[t * dim + d] > x[best * dim + d]) best = t;
            dx[best * dim + d] = dout[d];
        }
    });
}

}  // namespace

void CpuBackend::readout_forward(Context& ctx, const ReadoutForward& args)
{
    dispatch(args.x.dtype, [&](auto t) { cpu::readout_forward<decltype(t)>(ctx, args); });
}

void CpuBackend::readout_backward(Context& ctx, const ReadoutBackward& args)
{
    dispatch(args.dx.dtype, [&](auto t) { cpu::readout_backward<decltype(t)>(ctx, args); });
}

}  // namespace vimcore::cpu
