// SPDX-License-Identifier: Apache-2.0
// From tokens to rows: the mean, the maximum, the mean of chosen tokens, or these one after the other.
#include "cpu_backend.h"

namespace vimcore::cpu {

namespace {

template <class T>
void readout_forward(Context& ctx, const ReadoutForward& a)
{
    using W = Wide<T>;
    const Index len = a.x.size(1), dim = a.x.size(2);
    parallel_for(ctx, a.x.size(0), [&](Index b) {
        const T* x = a.x.as<T>() + b * len * dim;
        T* out = a.out.as<T>() + b * a.out.size(1);
        if (a.reduce == Reduce::join) {
            for (Index k = 0; k < a.places.count; k++) std::copy_n(x + a.places.at(k) * dim, dim, out + k * dim);
            return;
        }
        if (a.reduce == Reduce::select) {
            for (Index d = 0; d < dim; d++) {
                W sum = W(x[a.places.at(0) * dim + d]);
                for (Index k = 1; k < a.places.count; k++) sum += W(x[a.places.at(k) * dim + d]);
                out[d] = T(sum / static_cast<W>(a.places.count));
            }
            return;
        }
        constexpr Index width = 64;
        for (Index d0 = 0; d0 < dim; d0 += width) {
            const Index count = std::min(width, dim - d0);
            W row[width];
            for (Index d = 0; d < count; d++) row[d] = W(x[d0 + d]);
            for (Index t = 1; t < len; t++)
                for (Index d = 0; d < count; d++) {
                    const W value = W(x[t * dim + d0 + d]);
                    row[d] =
                        a.reduce == Reduce::mean ? row[d] + value : (value > row[d] || value != value ? value : row[d]);
                }
            for (Index d = 0; d < count; d++)
                out[d0 + d] = T(a.reduce == Reduce::mean ? row[d] / static_cast<W>(len) : row[d]);
        }
    });
}

template <class T>
void readout_backward(Context& ctx, const ReadoutBackward& a)
{
    using W = Wide<T>;
    const Index len = a.dx.size(1), dim = a.dx.size(2);
    parallel_for(ctx, a.dx.size(0), [&](Index b) {
        T* dx = a.dx.as<T>() + b * len * dim;
        const T* dout = a.dout.as<T>() + b * a.dout.size(1);
        if (a.reduce == Reduce::mean) {
            for (Index t = 0; t < len; t++)
                for (Index d = 0; d < dim; d++) dx[t * dim + d] = T(W(dout[d]) / static_cast<W>(len));
            return;
        }
        std::fill_n(dx, len * dim, T(W(0)));
        if (a.reduce == Reduce::join) {
            for (Index k = 0; k < a.places.count; k++) std::copy_n(dout + k * dim, dim, dx + a.places.at(k) * dim);
            return;
        }
        if (a.reduce == Reduce::select) {
            for (Index k = 0; k < a.places.count; k++)
                for (Index d = 0; d < dim; d++)
                    dx[a.places.at(k) * dim + d] = T(W(dout[d]) / static_cast<W>(a.places.count));
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
