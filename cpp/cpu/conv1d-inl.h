// SPDX-License-Identifier: Apache-2.0
// Depthwise causal convolution of K = width taps, with optional SiLU, channel by channel:
//   forward   p[t] = bias + sum_k w[k] x[t - K + 1 + k],  u[t] = silu(p[t]),  x = 0 outside the sequence
//   backward  dp[t] = du[t] silu'(p[t]), p computed again;  dx[s] = sum_k w[k] dp[s + K - 1 - k]
//             dweight[k] += sum_t dp[t] x[t - K + 1 + k];  dbias += sum_t dp[t]
// x, u (tokens, channels), weight (K, channels). The reverse direction is the same formula on the mirrored sequence:
// a pointer to the last token and a negative stride. Parallel mapping: callers split channels (and tokens in forward);
// lanes are channels. Every p is summed in the order of k, so splits change no bit.
#pragma once

#include "simd.h"

namespace vimcore::cpu::VIM_ISA {

// The sequence as its direction sees it: token 0 is the first in scan order.
template <class T>
struct ConvRows {
    const T* x;
    Index step;  // elements from a token to the next one
    Index total;
};
template <class T>
VIM_INLINE ConvRows<T> conv_rows(const Conv<T>& f)
{
    if (f.reverse) return {f.x + (f.total - 1) * f.ldx, -f.ldx, f.total};
    return {f.x, f.ldx, f.total};
}

// p[t] of the channels at e; W taps known to the compiler, or 0.
template <class T, int W>
VIM_INLINE Vec<T> conv_token(const Conv<T>& f, const ConvRows<T>& rows, Index t, Index e, Index n)
{
    const Index width = W ? W : f.width;
    Vec<T> p = {};
    if (f.bias) p = load_upto<Wide<T>>(f.bias + e, n);
    for (Index k = 0; k < width; k++) {
        const Index s = t - width + 1 + k;
        if (s < 0) continue;
        p = fma(load_upto<Wide<T>>(f.weight + k * f.dim + e, n), load_upto<T>(rows.x + s * rows.step + e, n), p);
    }
    return p;
}

// Calls f(e, n) for the channels [e, e + n) of every vector; n is a constant in all but the last call.
template <class T, class F>
VIM_INLINE void each_channels(const Conv<T>& conv, F f)
{
    Index e = conv.e0;
    for (; e + lanes<T> <= conv.e1; e += lanes<T>) f(e, lanes<T>);
    if (e < conv.e1) f(e, conv.e1 - e);
}

template <class T, int W, bool Silu>
static void conv_forward_width(const ConvForwardArgs<T>& args)
{
    constexpr Index block = 4;  // tokens that share the loads of taps and inputs
    const ConvRows<T> rows = conv_rows(args.f);
    Index first = args.begin, step = args.ldu;
    T* u = args.u;
    if (args.f.reverse) {
        first = args.f.total - args.begin - args.len;
        u += (args.len - 1) * args.ldu;
        step = -step;
    }
    for (Index i = 0; i < args.len;) {
        const Index t = first + i;
        if (W > 0 && t >= W - 1 && args.len - i >= block) {
            each_channels<T>(args.f, [&](Index e, Index n) VIM_INLINE_LAMBDA {
                const T* from = rows.x + (t - W + 1) * rows.step + e;
                T* to = u + i * step + e;
                Vec<T> x[block + W], p[block] = {};
                if (args.f.bias) p[0] = p[1] = p[2] = p[3] = load_upto<Wide<T>>(args.f.bias + e, n);
                for (int s = 0; s < block + W - 1; s++) x[s] = load_upto<T>(from + s * rows.step, n);
                for (int k = 0; k < W; k++) {
                    const Vec<T> tap = load_upto<Wide<T>>(args.f.weight + k * args.f.dim + e, n);
                    for (int s = 0; s < block; s++) p[s] = fma(tap, x[s + k], p[s]);
                }
                for (int s = 0; s < block; s++) p[s] = Silu ? silu_of<T>(p[s]) : p[s];
                for (int s = 0; s < block; s++) store_upto<T>(to + s * step, p[s], n);
            });
            i += block;
        } else {
            each_channels<T>(args.f, [&](Index e, Index n) VIM_INLINE_LAMBDA {
                const Vec<T> p = conv_token<T, W>(args.f, rows, t, e, n);
                store_upto<T>(u + i * step + e, Silu ? silu_of<T>(p) : p, n);
            });
            i++;
        }
    }
}

template <class T>
static void conv_forward(const ConvForwardArgs<T>& args)
{
    if (args.f.width == 4)
        args.f.silu ? conv_forward_width<T, 4, true>(args) : conv_forward_width<T, 4, false>(args);
    else
        args.f.silu ? conv_forward_width<T, 0, true>(args) : conv_forward_width<T, 0, false>(args);
}

// Channels at e of the whole sequence, W taps: inputs and dp of the last W tokens stay in registers.
template <class T, int W>
VIM_INLINE void conv_backward_window(const ConvBackwardArgs<T>& args, Index e, Index n)
{
    const ConvRows<T> rows = conv_rows(args.f);
    const Index total = args.f.total, step = rows.step;
    const Index du_step = args.f.reverse ? -args.lddu : args.lddu, dx_step = args.f.reverse ? -args.lddx : args.lddx;
    const T* x = rows.x + e;
    const T* du = args.du + (args.f.reverse ? (total - 1) * args.lddu : 0) + e;
    T* dx = args.dx + (args.f.reverse ? (total - 1) * args.lddx : 0) + e;

    Vec<T> tap[W], window[W] = {}, recent[W] = {}, dtap[W] = {}, bias = {}, dbias = {};
    for (int k = 0; k < W; k++) tap[k] = load_upto<Wide<T>>(args.f.weight + k * args.f.dim + e, n);
    if (args.f.bias) bias = load_upto<Wide<T>>(args.f.bias + e, n);
    for (Index t = 0; t < total + W - 1; t++) {
        for (int k = 0; k < W - 1; k++) {
            window[k] = window[k + 1];
            recent[k] = recent[k + 1];
        }
        recent[W - 1] = Vec<T>{};
        if (t < total) {
            window[W - 1] = load_upto<T>(x + t * step, n);
            Vec<T> dp = load_upto<T>(du + t * du_step, n);
            if (args.f.silu) {
                Vec<T> p = bias;
                for (int k = 0; k < W; k++) p = fma(tap[k], window[k], p);
                dp *= silu_gradient_of<T>(p);
            }
            for (int k = 0; k < W; k++) dtap[k] = fma(dp, window[k], dtap[k]);
            dbias += dp;
            recent[W - 1] = dp;
        }
        const Index s = t - (W - 1);  // its last term, w[0] dp[s + W - 1], is here now
        if (s >= 0) {
            Vec<T> d = {};
            for (int k = 0; k < W; k++) d = fma(tap[k], recent[W - 1 - k], d);
            if (args.add_dx) d += load_upto<T>(dx + s * dx_step, n);
            store_upto<T>(dx + s * dx_step, d, n);
        }
    }
    for (int k = 0; k < W; k++) {
        Wide<T>* out = args.dweight + k * args.f.dim + e;
        if (args.dweight) store_upto<Wide<T>>(out, load_upto<Wide<T>>(out, n) + dtap[k], n);
    }
    if (args.dbias) store_upto<Wide<T>>(args.dbias + e, load_upto<Wide<T>>(args.dbias + e, n) + dbias, n);
}

// Any width: every dp is added to dx and dweight in memory as it appears.
template <class T>
VIM_INLINE void conv_backward_any(const ConvBackwardArgs<T>& args, Index e, Index n)
{
    const ConvRows<T> rows = conv_rows(args.f);
    const Index total = args.f.total;
    Vec<T> dbias = {};
    for (Index t = 0; t < total; t++) {
        const Index row = args.f.reverse ? total - 1 - t : t;
        if (!args.add_dx) store_upto<T>(args.dx + row * args.lddx + e, Vec<T>{}, n);
        Vec<T> dp = load_upto<T>(args.du + row * args.lddu + e, n);
        if (args.f.silu) dp *= silu_gradient_of<T>(conv_token<T, 0>(args.f, rows, t, e, n));
        dbias += dp;
        for (Index k = 0; k < args.f.width; k++) {
            const Index s = t - args.f.width + 1 + k;
            if (s < 0) continue;
            T* dx = args.dx + (args.f.reverse ? total - 1 - s : s) * args.lddx + e;
            store_upto<T>(dx, load_upto<T>(dx, n) + load_upto<Wide<T>>(args.f.weight + k * args.f.dim + e, n) * dp, n);
            if (!args.dweight) continue;
            Wide<T>* dw = args.dweight + k * args.f.dim + e;
            store_upto<Wide<T>>(dw, load_upto<Wide<T>>(dw, n) + dp * load_upto<T>(rows.x + s * rows.step + e, n), n);
        }
    }
    if (args.dbias) store_upto<Wide<T>>(args.dbias + e, load_upto<Wide<T>>(args.dbias + e, n) + dbias, n);
}

template <class T>
static void conv_backward(const ConvBackwardArgs<T>& args)
{
    Index e = args.f.e0;
    if (args.f.width != 4) {
        for (; e < args.f.e1; e += lanes<T>)
            conv_backward_any<T>(args, e, args.f.e1 - e < lanes<T> ? args.f.e1 - e : lanes<T>);
        return;
    }
    for (; e + lanes<T> <= args.f.e1; e += lanes<T>) conv_backward_window<T, 4>(args, e, lanes<T>);
    if (e < args.f.e1) conv_backward_window<T, 4>(args, e, args.f.e1 - e);
}

}  // namespace vimcore::cpu::VIM_ISA
