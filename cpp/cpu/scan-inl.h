// SPDX-License-Identifier: Apache-2.0
// Selective scan, forward, one direction of one image:
//   delta[t, e] = softplus(dt_bias[e] + sum_r dt[t, r] dt_weight[r, e])
//   h[n, e] = 2^(delta A[n, e]) h[n, e] + delta u[t, e] B[t, n]
//   y[t, e] = sum_n C[t, n] h[n, e] + D[e] u[t, e], then optionally scale y silu(z)
// u, y, z (len, E); dt (len, R); B, C (len, N); A, h (N, E).
// One vector of channels at a time walks all tokens, with its states in registers. Tokens are taken in blocks: first
// delta and delta u of the block, then the recurrence, then the gate, so that each part keeps the pipelines full. More
// states than the registers hold are taken in groups within a block, and in passes over the tokens beyond 16.
// A direction's y is rounded to bf16 before both are added, so that their order changes no bit.
// Every token is computed by the same instructions wherever a block or a call begins, so cutting a sequence into
// several calls changes no bit.
#pragma once

#include "pairs-inl.h"

namespace vimcore::cpu::VIM_ISA {

inline constexpr int scan_block = 32;  // tokens between two visits to the states in memory
// States of one pass over the tokens. bf16 wants all in one, as what a pass leaves is rounded.
template <class T>
inline constexpr int scan_states = narrow<T> ? 256 : 16;
// States whose h stays in registers: 16 of 32 vector registers, or half of 16.
#if VIM_AVX512 || defined(__aarch64__)
inline constexpr int scan_group = 16;
#else
inline constexpr int scan_group = 8;
#endif

// Rows of one tile in scan order: row s is first + s * step.
template <class T>
struct Rows {
    T* first;
    Index step;
    T* at(Index s) const { return first + s * step; }
};
template <class T>
VIM_INLINE Rows<T> rows(T* base, Index ld, Index token, bool reverse)
{
    return {base ? base + token * ld : base, base ? (reverse ? -ld : ld) : 0};
}

// Delta before softplus of `count` tokens, for the channels [e, e + live): out[s] = bias + sum_r dt[s, r] weight[r].
// Tokens go by eights, the last ones repeated, so that all are computed by the same code.
template <class T>
static void scan_delta(const ScanArgs<T>& f, Rows<const T> dt, Index count, Index e, Index live, Wide<T>* out)
{
    using W = Wide<T>;
    const Vec<W> bias = f.dt_bias ? load_upto<W>(f.dt_bias + e, live) : splat(W(0));
    if (f.rank == 0) {
        for (Index s = 0; s < count; s++) store<W>(out + s * lanes<W>, load_upto<T>(dt.at(s) + e, live) + bias);
        return;
    }
    constexpr int wide = 8;
    for (Index s0 = 0; s0 < count; s0 += wide) {
        const T* row[wide];
        Vec<W> sum[wide];
        for (int i = 0; i < wide; i++) {
            row[i] = dt.at(s0 + i < count ? s0 + i : count - 1);
            sum[i] = bias;
        }
        if constexpr (narrow<T>) {
            const Word* weight = reinterpret_cast<const Word*>(f.dt_weight) + e;
            for (Index r = 0; r < f.rank; r += 2, weight += f.dim) {
                const PairWords w = load_words(weight, live);
                const bool odd = r + 1 == f.rank;
#pragma GCC unroll 8
                for (int i = 0; i < wide; i++)
                    sum[i] = dot(sum[i], (odd ? row[i][r].bits : pair_at(row[i] + r)) - PairWords{}, w);
            }
        } else {
            const T* weight = f.dt_weight + e;
            for (Index r = 0; r < f.rank; r++, weight += f.dim) {
                const Vec<W> w = load_upto<T>(weight, live);
#pragma GCC unroll 8
                for (int i = 0; i < wide; i++) sum[i] = fma(w, splat(row[i][r]), sum[i]);
            }
        }
        for (int i = 0; i < wide; i++)
            if (s0 + i < count) store<W>(out + (s0 + i) * lanes<W>, sum[i]);
    }
}

// The recurrence of G states over one block and, if wanted, y += C h. delta, du (delta u) and y are [count][lanes].
template <class T, int G, bool output, bool far>
static void scan_recur(const Wide<T>* A, Wide<T>* state, const Wide<T>* delta, const Wide<T>* du, Rows<const Wide<T>> B,
                       Rows<const Wide<T>> C, Index count, Wide<T>* y)
{
    using W = Wide<T>;
    constexpr int w = lanes<T>;
    Vec<W> h[G];
#pragma GCC unroll 16
    for (int n = 0; n < G; n++) h[n] = load<W>(state + n * w);
    const W *b = B.first, *c = C.first;
    for (Index s = 0; s < count; s++) {
        const Vec<W> d = load<W>(delta + s * w), x = load<W>(du + s * w);
        Vec<W> sum[2] = {};
        if constexpr (output) sum[0] = load<W>(y + s * w);
#pragma GCC unroll 16
        for (int n = 0; n < G; n++) {
            const Vec<W> a = decay_of<T, far>(d, load<W>(A + n * w));
            h[n] = fma(a, h[n], x * b[n]);
            if constexpr (output) sum[n & 1] = fma(h[n], splat(c[n]), sum[n & 1]);
        }
        if constexpr (output) store<W>(y + s * w, sum[0] + sum[1]);
        b += B.step;
        c += C.step;
    }
#pragma GCC unroll 16
    for (int n = 0; n < G; n++) store<W>(state + n * w, h[n]);
}

// All groups of `count` states.
template <class T, bool output, bool far>
static void scan_groups(Index count, const Wide<T>* A, Wide<T>* h, const Wide<T>* delta, const Wide<T>* du,
                        Rows<const Wide<T>> B, Rows<const Wide<T>> C, Index tokens, Wide<T>* y)
{
    Index n = 0;
    auto run = [&](auto recur, Index group) {
        for (; count - n >= group; n += group)
            recur(A + n * lanes<T>, h + n * lanes<T>, delta, du, Rows<const Wide<T>>{B.first + n, B.step},
                  Rows<const Wide<T>>{C.first + n, C.step}, tokens, y);
    };
    run(scan_recur<T, scan_group, output, far>, scan_group);
    if constexpr (scan_group > 8) run(scan_recur<T, 8, output, far>, 8);
    run(scan_recur<T, 4, output, far>, 4);
    run(scan_recur<T, 1, output, far>, 1);
}
// The same for any decay; largest: the magnitudes of A, see largest_of.
template <class T, bool output>
static void scan_groups(Vec<Wide<T>> largest, Index count, const Wide<T>* A, Wide<T>* h, const Wide<T>* delta,
                        const Wide<T>* du, Rows<const Wide<T>> B, Rows<const Wide<T>> C, Index tokens, Wide<T>* y)
{
    if constexpr (exp2_has_far<T>)
        if (exp2_is_far<T>(delta, tokens, largest))
            return scan_groups<T, output, true>(count, A, h, delta, du, B, C, tokens, y);
    scan_groups<T, output, false>(count, A, h, delta, du, B, C, tokens, y);
}

// The largest magnitude in every lane of the vectors A[0, states).
template <class T>
VIM_INLINE Vec<T> largest_of(const T* A, Index states)
{
    Vec<T> largest{};
    for (Index n = 0; n < states; n++) largest = at_least(largest, magnitude(load<T>(A + n * lanes<T>)));
    return largest;
}

// One vector of channels, states [n0, n0 + states), all tokens.
template <class T>
static void scan_pass(const ScanArgs<T>& f, Index e, Index live, Index n0, Index states, bool add, bool finish)
{
    using W = Wide<T>;
    constexpr int w = lanes<T>;
    alignas(64) W A[scan_states<T> * w], h[scan_states<T> * w];
    alignas(64) W delta[scan_block * w], du[scan_block * w], y[scan_block * w];
    for (Index n = 0; n < states; n++) {
        store<W>(A + n * w, load_upto<W>(f.A + (n0 + n) * f.dim + e, live));
        store<W>(h + n * w, f.h ? load_upto<W>(f.h + (n0 + n) * f.dim + e, live) : splat(W(0)));
    }
    const Vec<W> D = f.D && n0 == 0 ? load_upto<W>(f.D + e, live) : splat(W(0));
    const Vec<W> scale = splat(f.scale), largest = largest_of<W>(A, states);

    for (Index done = 0, count; done < f.len; done += count) {
        const Index token = f.reverse ? f.len - 1 - done : done, natural = f.begin + token;
        count = f.len - done < scan_block ? f.len - done : scan_block;
        if (f.checkpoints) {
            const Index inside = f.reverse ? f.chunk - 1 - natural % f.chunk : natural % f.chunk;
            if (inside == 0 || (f.reverse && done == 0))
                for (Index n = 0; n < states; n++)
                    store_upto<W>(f.checkpoints + (natural / f.chunk * f.state + n0 + n) * f.dim + e,
                                  load<W>(h + n * w), live);
            const Index left = f.chunk - inside;  // up to the end of the chunk
            if (count > left) count = left;
        }
        const Rows<const T> u = rows(f.u, f.ldu, token, f.reverse), z = rows(f.z, f.ldz, token, f.reverse);
        const Rows<T> out = rows(f.y, f.ldy, token, f.reverse);
        scan_delta(f, rows(f.dt, f.lddt, token, f.reverse), count, e, live, delta);
        for (Index s = 0; s < count; s++) {
            Vec<W> d = load<W>(delta + s * w);
            if (f.softplus) d = softplus_of<T>(d);
            const Vec<W> in = load_upto<T>(u.at(s) + e, live);
            prefetch(u.at(s + scan_block) + e);
            store<W>(delta + s * w, d);
            store<W>(du + s * w, d * in);
            store<W>(y + s * w, D * in);
        }
        scan_groups<T, true>(largest, states, A, h, delta, du, rows(f.B + n0, f.ldb, token, f.reverse),
                             rows(f.C + n0, f.ldb, token, f.reverse), count, y);
        for (Index s = 0; s < count; s++) {
            Vec<W> v = load<W>(y + s * w);
            prefetch(out.at(s + scan_block) + e);
            if (finish && f.z) prefetch(z.at(s + scan_block) + e);
            if constexpr (narrow<T>)  // as the other direction's is, whichever comes first
                if (add) v = widen(rounded(v));
            if (add) v += load_upto<T>(out.at(s) + e, live);
            if (finish) v *= f.z ? scale * silu_of<T>(load_upto<T>(z.at(s) + e, live)) : scale;
            store_upto<T>(out.at(s) + e, v, live);
        }
    }
    if (f.h)
        for (Index n = 0; n < states; n++) store_upto<W>(f.h + (n0 + n) * f.dim + e, load<W>(h + n * w), live);
}

// (rows, columns) of row stride ld, converted.
template <class T>
static void widen(const T* from, Index ld, Index rows, Index columns, Wide<T>* to)
{
    for (Index i = 0; i < rows; i++, from += ld, to += columns)
        for (Index j = 0; j < columns; j += lanes<T>) {
            const Index n = columns - j < lanes<T> ? columns - j : lanes<T>;
            store_upto<Wide<T>>(to + j, load_upto<T>(from + j, n), n);
        }
}

template <class T>
static void scan_forward(const ScanArgs<T>& f)
{
    for (Index e = f.e0; e < f.e1; e += lanes<T>) {
        const Index live = f.e1 - e < lanes<T> ? f.e1 - e : lanes<T>;
        for (Index n = 0; n < f.state; n += scan_states<T>) {
            const Index states = f.state - n < scan_states<T> ? f.state - n : scan_states<T>;
            scan_pass(f, e, live, n, states, f.add || n > 0, f.finish && n + states == f.state);
        }
    }
}

// out (N, E) = -exp(A_log) log2(e), transposed; finite. In double throughout: it runs once per set of weights.
template <class T>
static void prepare_A(const Wide<T>* A_log, Index dim, Index state, Wide<T>* out)
{
    constexpr double lowest = sizeof(Wide<T>) == 4 ? -0x1.fffffep127 : -0x1.fffffffffffffp1023;
    for (Index n = 0; n < state; n++)
        for (Index e = 0; e < dim; e++) {
            const double A = -__builtin_exp(double(A_log[e * state + n])) * 1.4426950408889634;
            out[n * dim + e] = Wide<T>(A < lowest ? lowest : A);
        }
}

}  // namespace vimcore::cpu::VIM_ISA
