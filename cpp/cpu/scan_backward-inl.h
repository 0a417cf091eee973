// SPDX-License-Identifier: Apache-2.0
// Selective scan, backward, one direction of one image. With a = 2^(delta A) and gy the gradient of y:
//   lambda[t] = C[t] gy[t] + a[t + 1] lambda[t + 1]           (t in scan order, lambda beyond the end is 0)
//   du = D gy + delta sum_n B lambda            ddelta = u sum_n B lambda + sum_n A a h[t - 1] lambda
//   dA = sum_t delta a h[t - 1] lambda          dB = sum_e delta u lambda        dC = sum_e gy h
// and ddelta continues through the softplus. u, du, ddelta (len, E); B, dB (len, N); A, dA (N, E).
// From the last chunk in scan order to the first: a first run from the checkpoint keeps the states at every
// scan_tile-th token; then tile by tile, from the last, each vector of channels replays its tile (a, h[t - 1] into
// scratch that fits the first-level cache, y to memory) and walks back, a group of states at a time. The sums over
// channels, dB and dC, grow as vectors over the channel vectors of a tile and are added across lanes once. The order of
// all sums is fixed.
#pragma once

#include "scan-inl.h"

namespace vimcore::cpu::VIM_ISA {

inline constexpr int scan_tile = 8;
#if VIM_AVX512 || defined(__aarch64__)
inline constexpr int walk_group = 8;  // lambda and dA of a group stay in registers
#else
inline constexpr int walk_group = 4;
#endif

// What the recurrence of one vector of channels needs over a tile, [scan_tile][lanes] each; slope is d delta / d raw.
template <class T>
struct ScanTile {
    static constexpr int size = scan_tile * lanes<T>;
    T u[size], delta[size], slope[size], du[size];
};
// What it leaves.
template <class T>
struct ScanSums {
    static constexpr int size = scan_tile * lanes<T>;
    alignas(64) T gy[size], y[size];
    alignas(64) T lambda_B[size], lambda_A[size];  // sum_n lambda B, sum_n lambda a h[t - 1] A
};

// Scratch in elements; N state, V vectors of channels, K tiles of a chunk. All are [..][lanes].
template <class T>
struct ScanScratch {
    T *A, *lambda, *dA;  // [V][N]
    T* dD_dbias;         // [V][2]
    T* largest;          // [V]: magnitude of A
    T* starts;           // [K][V][N]: state on entry of every tile of a chunk
    ScanTile<T>* tiles;  // [K][V]
    T *decay, *before;   // [scan_tile][N]: a, h[t - 1] of one group of states, in the first columns
    T *dB, *dC;          // [scan_tile][N]
    T* zero;             // [N]
};

template <bool value>
struct Flag {};

VIM_INLINE Index scan_ceil(Index a, Index b) { return (a + b - 1) / b; }

// Lays the scratch out from p, or only counts when p is null. Returns the elements.
template <class T>
static Index scan_layout(ScanScratch<T>& s, T* p, Index state, Index chunk, Index channels)
{
    const Index vectors = scan_ceil(channels, lanes<T>), tiles = scan_ceil(chunk, scan_tile);
    Index used = 0;
    auto take = [&](Index count) {
        T* part = p ? p + used : nullptr;
        used += count * lanes<T>;
        return part;
    };
    s.A = take(vectors * state);
    s.lambda = take(vectors * state);
    s.dA = take(vectors * state);
    s.dD_dbias = take(vectors * 2);
    s.largest = take(vectors);
    s.starts = take(tiles * vectors * state);
    s.tiles = reinterpret_cast<ScanTile<T>*>(take(tiles * vectors * 4 * scan_tile));
    s.decay = take(scan_tile * state);
    s.before = take(scan_tile * state);
    s.dB = take(scan_tile * state);
    s.dC = take(scan_tile * state);
    s.zero = take(state);
    return used;
}
template <class T>
static Index scan_backward_scratch(Index state, Index chunk, Index channels)
{
    ScanScratch<Wide<T>> s;
    return scan_layout<Wide<T>>(s, nullptr, state, chunk, channels);
}

// G states of one tile, forward: keeps a and h[t - 1], adds C h to y and gy h to dC. Row s of the kept is at s * ld.
template <class T, int G, bool far>
static void scan_replay(const Wide<T>* A, const Wide<T>* start, const ScanTile<Wide<T>>& tile, const Wide<T>* dy,
                        Rows<const Wide<T>> B, Rows<const Wide<T>> C, Index count, Index ld, Wide<T>* decay,
                        Wide<T>* before, Rows<const Wide<T>> dC_in, Wide<T>* dC, Wide<T>* y)
{
    using W = Wide<T>;
    constexpr int w = lanes<T>;
    Vec<W> h[G];
#pragma GCC unroll 16
    for (int n = 0; n < G; n++) h[n] = load<W>(start + n * w);
    const W *b = B.first, *c = C.first;
    for (Index s = 0; s < count; s++) {
        const Vec<W> d = load<W>(tile.delta + s * w), x = load<W>(tile.du + s * w), gy = load<W>(dy + s * w);
        Vec<W> sum[2] = {load<W>(y + s * w), splat(W(0))};
#pragma GCC unroll 16
        for (int n = 0; n < G; n++) {
            const Vec<W> a = decay_of<T, far>(d, load<W>(A + n * w));
            store<W>(decay + n * w, a);
            store<W>(before + n * w, h[n]);
            h[n] = fma(a, h[n], x * b[n]);
            sum[n & 1] = fma(h[n], splat(c[n]), sum[n & 1]);
            store<W>(dC + n * w, fma(gy, h[n], load<W>(dC_in.first + n * w)));
        }
        store<W>(y + s * w, sum[0] + sum[1]);
        b += B.step;
        c += C.step;
        decay += ld;
        before += ld;
        dC += ld;
        dC_in.first += dC_in.step;
    }
}

// G states of one tile, backward: lambda and dA go on, lambda du is added to dB, the sums over n to the tile.
template <class T, int G>
static void scan_walk(const T* A, T* lambda, T* dA, const ScanTile<T>& tile, ScanSums<T>& sums, Rows<const T> B,
                      Rows<const T> C, Index count, Index ld, const T* decay, const T* before, Rows<const T> dB_in,
                      T* dB)
{
    constexpr int w = lanes<T>;
    Vec<T> carry[G], grad[G];
#pragma GCC unroll 16
    for (int n = 0; n < G; n++) {
        carry[n] = load<T>(lambda + n * w);
        grad[n] = load<T>(dA + n * w);
    }
    for (Index s = count - 1; s >= 0; s--) {
        const T *b = B.at(s), *c = C.at(s), *a = decay + s * ld, *h = before + s * ld;
        const T* old_B = dB_in.at(s);
        T* sum_B = dB + s * ld;
        const Vec<T> d = load<T>(tile.delta + s * w), x = load<T>(tile.du + s * w), gy = load<T>(sums.gy + s * w);
        Vec<T> sum_in = load<T>(sums.lambda_B + s * w), sum_decay = load<T>(sums.lambda_A + s * w);
#pragma GCC unroll 16
        for (int n = 0; n < G; n++) {
            const Vec<T> l = fma(gy, splat(c[n]), carry[n]);
            sum_in = fma(l, splat(b[n]), sum_in);
            store<T>(sum_B + n * w, fma(x, l, load<T>(old_B + n * w)));
            carry[n] = l * load<T>(a + n * w);
            const Vec<T> kept = carry[n] * load<T>(h + n * w);
            sum_decay = fma(kept, load<T>(A + n * w), sum_decay);
            grad[n] = fma(d, kept, grad[n]);
        }
        store<T>(sums.lambda_B + s * w, sum_in);
        store<T>(sums.lambda_A + s * w, sum_decay);
    }
#pragma GCC unroll 16
    for (int n = 0; n < G; n++) {
        store<T>(lambda + n * w, carry[n]);
        store<T>(dA + n * w, grad[n]);
    }
}

template <class T>
struct ScanBackward {
    using W = Wide<T>;
    static constexpr int w = lanes<T>;
    const ScanBackwardArgs<T>& g;
    const ScanArgs<T>& f;
    ScanScratch<W> scratch;
    Index vectors;

    Index channel(Index v) const { return f.e0 + v * w; }
    Index live(Index v) const { return f.e1 - channel(v) < w ? f.e1 - channel(v) : w; }

    // delta and delta u of one tile whose first token in scan order is `token`.
    void prepare(Index v, Index token, Index count, ScanTile<W>& tile) const
    {
        const Index e = channel(v), n = live(v);
        const Rows<const T> u = rows(f.u, f.ldu, token, f.reverse);
        scan_delta(f, rows(f.dt, f.lddt, token, f.reverse), count, e, n, tile.delta);
        for (Index s = 0; s < count; s++) {
            prefetch(u.at(s + scan_tile) + e);
            const Vec<W> in = load_upto<T>(u.at(s) + e, n), raw = load<W>(tile.delta + s * w);
            Vec<W> d = raw, slope = splat(W(1));
            if (f.softplus) d = softplus_of<T>(raw, slope);
            store<W>(tile.slope + s * w, slope);
            store<W>(tile.delta + s * w, d);
            store<W>(tile.u + s * w, in);
            store<W>(tile.du + s * w, d * in);
        }
    }

    // Everything of a chunk that does not come from the tokens after it: states on entry of its tiles, delta.
    void first_run(Index v, Index chunk, Index token, Index steps) const
    {
        const Index N = f.state, ld = vectors * N * w;
        W* start = scratch.starts + v * N * w;
        const W* entry = f.checkpoints + chunk * N * f.dim + channel(v);
        for (Index n = 0; n < N; n++) store<W>(start + n * w, load_upto<W>(entry + n * f.dim, live(v)));
        ScanTile<W>* tile = scratch.tiles + v;
        for (Index done = 0; done < steps; done += scan_tile, start += ld, tile += vectors) {
            const Index first = f.reverse ? token - done : token + done, left = steps - done;
            prepare(v, first, left < scan_tile ? left : scan_tile, *tile);
            if (left <= scan_tile) break;
            for (Index n = 0; n < N; n++) store<W>(start + ld + n * w, load<W>(start + n * w));
            const Rows<const W> B = rows(f.B, f.ldb, first, f.reverse);
            scan_groups<T, false>(load<W>(scratch.largest + v * w), N, scratch.A + v * N * w, start + ld, tile->delta,
                                  tile->du, B, B, scan_tile, nullptr);
        }
    }

    void run_tile(Index v, const W* start, const ScanTile<W>& tile, Index token, Index count) const
    {
        const Index e = channel(v), n_live = live(v), N = f.state, ld = N * w;
        const Rows<const W> B = rows(f.B, f.ldb, token, f.reverse), C = rows(f.C, f.ldb, token, f.reverse);
        const Rows<const T> z = rows(f.z, f.ldz, token, f.reverse), dout = rows(g.dout, g.lddout, token, f.reverse);
        const Rows<T> y = rows(f.y, f.ldy, token, f.reverse), du = rows(g.du, g.lddu, token, f.reverse);
        const Rows<T> ddelta = rows(g.ddelta, g.ldddelta, token, f.reverse);
        const Vec<W> D = f.D ? load_upto<W>(f.D + e, n_live) : splat(W(0)), scale = splat(f.scale);
        ScanSums<W> sums;
        const Index old_ld = v ? ld : 0;  // the first vector adds to zeros
        const W *old_B = v ? scratch.dB : scratch.zero, *old_C = v ? scratch.dC : scratch.zero;
        for (Index s = 0; s < count; s++) {
            // the same rows for the vector that follows, which finds them in the first-level cache
            prefetch(dout.at(s) + e + w);
            prefetch(y.at(s) + e + w);
            prefetch(du.at(s) + e + w);
            prefetch(ddelta.at(s) + e + w);
            if (f.z) prefetch(z.at(s) + e + w);
            Vec<W> gate = scale;
            if (f.z) gate *= silu_of<T>(load_upto<T>(z.at(s) + e, n_live));
            store<W>(sums.gy + s * w, gate * load_upto<T>(dout.at(s) + e, n_live));
            store<W>(sums.y + s * w, D * load<W>(tile.u + s * w));
            store<W>(sums.lambda_B + s * w, splat(W(0)));
            store<W>(sums.lambda_A + s * w, splat(W(0)));
        }
        W *A = scratch.A + v * N * w, *lambda = scratch.lambda + v * N * w, *dA = scratch.dA + v * N * w;
        Index n = 0;
        auto both = [&](auto replay, auto walk, Index group) {
            for (; N - n >= group; n += group) {
                const Rows<const W> b{B.first + n, B.step}, c{C.first + n, C.step};
                replay(A + n * w, start + n * w, tile, sums.gy, b, c, count, ld, scratch.decay, scratch.before,
                       {old_C + n * w, old_ld}, scratch.dC + n * w, sums.y);
                walk(A + n * w, lambda + n * w, dA + n * w, tile, sums, b, c, count, ld, scratch.decay, scratch.before,
                     {old_B + n * w, old_ld}, scratch.dB + n * w);
            }
        };
        auto groups = [&]<bool far>(Flag<far>) {
            both(scan_replay<T, walk_group, far>, scan_walk<W, walk_group>, walk_group);
            if constexpr (walk_group > 4) both(scan_replay<T, 4, far>, scan_walk<W, 4>, 4);
            both(scan_replay<T, 1, far>, scan_walk<W, 1>, 1);
        };
        if constexpr (exp2_has_far<T>)
            exp2_is_far<T>(tile.delta, count, load<W>(scratch.largest + v * w)) ? groups(Flag<true>{})
                                                                                : groups(Flag<false>{});
        else
            groups(Flag<false>{});

        W* totals = scratch.dD_dbias + v * 2 * w;
        Vec<W> dD = load<W>(totals), dbias = load<W>(totals + w);
        for (Index s = 0; s < count; s++) {
            const Vec<W> in = load<W>(tile.u + s * w), gy = load<W>(sums.gy + s * w);
            const Vec<W> via_B = load<W>(sums.lambda_B + s * w), via_A = load<W>(sums.lambda_A + s * w);
            Vec<W> out = load<W>(sums.y + s * w);
            if (f.add) out += load_upto<T>(y.at(s) + e, n_live);
            store_upto<T>(y.at(s) + e, out, n_live);
            store_upto<T>(du.at(s) + e, D * gy + load<W>(tile.delta + s * w) * via_B, n_live);
            const Vec<W> change = in * via_B + via_A * W(0.69314718055994531);  // the kept A is A log2(e)
            const Vec<W> raw = load<W>(tile.slope + s * w) * change;
            store_upto<T>(ddelta.at(s) + e, raw, n_live);
            dD += gy * in;
            dbias += raw;
        }
        store<W>(totals, dD);
        store<W>(totals + w, dbias);
    }

    // The sums of a tile over the channels: out[s][n] is the sum of the vector in[s][n].
    void sum_lanes(const W* in, Rows<W> out, Index count) const
    {
        const Index N = f.state;
        for (Index s = 0; s < count; s++, in += N * w)
            for (Index n = 0; n < N; n += w) {
                const W* row[w];
                for (Index i = 0; i < w; i++) row[i] = in + (n + i < N ? n + i : N - 1) * w;
                store_upto<W>(out.at(s) + n, sum_rows<W>(row), N - n < w ? N - n : w);
            }
    }

    void run_chunk(Index chunk) const
    {
        const Index N = f.state, low = chunk * f.chunk, high = f.len - low < f.chunk ? f.len : low + f.chunk;
        const Index token = f.reverse ? high - 1 : low, tiles = scan_ceil(high - low, scan_tile);
        for (Index v = 0; v < vectors; v++) first_run(v, chunk, token, high - low);
        for (Index k = tiles - 1; k >= 0; k--) {
            const Index left = high - low - k * scan_tile, count = left < scan_tile ? left : scan_tile;
            const Index first = f.reverse ? token - k * scan_tile : token + k * scan_tile;
            for (Index v = 0; v < vectors; v++) {
                const Index i = k * vectors + v;
                run_tile(v, scratch.starts + i * N * w, scratch.tiles[i], first, count);
            }
            sum_lanes(scratch.dB, rows(g.dB, N, first, f.reverse), count);
            sum_lanes(scratch.dC, rows(g.dC, N, first, f.reverse), count);
        }
    }
};

template <class T>
static void scan_backward(const ScanBackwardArgs<T>& g)
{
    using W = Wide<T>;
    constexpr int w = lanes<T>;
    const ScanArgs<T>& f = g.f;
    const Index channels = f.e1 - f.e0;
    ScanBackward<T> run{g, f, {}, scan_ceil(channels, w)};
    ScanScratch<W>& s = run.scratch;
    scan_layout(s, g.scratch, f.state, f.chunk, channels);
    for (Index n = 0; n < f.state; n++) store<W>(s.zero + n * w, splat(W(0)));
    for (Index v = 0; v < run.vectors; v++) {
        for (Index i = v * f.state, n = 0; n < f.state; i++, n++) {
            store<W>(s.A + i * w, load_upto<W>(f.A + n * f.dim + run.channel(v), run.live(v)));
            store<W>(s.lambda + i * w, splat(W(0)));
            store<W>(s.dA + i * w, splat(W(0)));
        }
        store<W>(s.largest + v * w, largest_of<W>(s.A + v * f.state * w, f.state));
        store<W>(s.dD_dbias + 2 * v * w, splat(W(0)));
        store<W>(s.dD_dbias + (2 * v + 1) * w, splat(W(0)));
    }
    const Index chunks = scan_ceil(f.len, f.chunk);
    for (Index i = 0; i < chunks; i++) run.run_chunk(f.reverse ? i : chunks - 1 - i);
    for (Index v = 0; v < run.vectors; v++) {
        const Index e = run.channel(v), live = run.live(v);
        for (Index n = 0; n < f.state; n++)
            store_upto<W>(g.dA + n * f.dim + e, load<W>(s.dA + (v * f.state + n) * w), live);
        if (g.dD) store_upto<W>(g.dD + e, load<W>(s.dD_dbias + 2 * v * w), live);
        if (g.dbias) store_upto<W>(g.dbias + e, load<W>(s.dD_dbias + (2 * v + 1) * w), live);
    }
}

template <class T>
static void gate_backward(const GateBackwardArgs<T>& g)
{
    using W = Wide<T>;
    const Vec<W> scale = splat(g.scale);
    for (Index t = 0; t < g.len; t++)
        for (Index e = g.e0; e < g.e1; e += lanes<T>) {
            const Index live = g.e1 - e < lanes<T> ? g.e1 - e : lanes<T>;
            const Vec<W> y = load_upto<T>(g.y + t * g.ldy + e, live), z = load_upto<T>(g.z + t * g.ldz + e, live);
            if (g.dz) {
                const Vec<W> dout = load_upto<T>(g.dout + t * g.lddout + e, live);
                store_upto<T>(g.dz + t * g.lddz + e, scale * dout * y * silu_gradient_of<T>(z), live);
            }
            store_upto<T>(g.y + t * g.ldy + e, scale * y * silu_of<T>(z), live);
        }
}

}  // namespace vimcore::cpu::VIM_ISA
