// SPDX-License-Identifier: Apache-2.0
// Selective scan, backward, one direction of one image. With a = 2^(delta A) and gy the gradient of y:
//   lambda[t] = C[t] gy[t] + a[t + 1] lambda[t + 1]           (t in scan order, lambda beyond the end is 0)
//   du = D gy + delta sum_n B lambda            ddelta = u sum_n B lambda + sum_n A a h[t - 1] lambda
//   dA = sum_t delta a h[t - 1] lambda          dB = sum_e delta u lambda        dC = sum_e gy h
// and ddelta continues through the softplus. u, du, ddelta (len, E); B, dB (len, N); A, dA (N, E).
// From the last chunk in scan order to the first: a first run from the checkpoint keeps the states at every
// scan_tile-th token; then tile by tile, from the last, each vector of channels replays its tile (a, h[t - 1] into
// scratch that fits the first-level cache, y to memory) and walks back. The sums over channels, dB and dC, grow as
// vectors over the channel vectors of a tile and are added across lanes once. The order of all sums is fixed.
#pragma once

#include "scan-inl.h"

namespace vimcore::cpu::VIM_ISA {

inline constexpr int scan_tile = 8;
#if VIM_AVX512 || defined(__aarch64__)
inline constexpr int walk_group = 8;  // lambda and dA of a group stay in registers
#else
inline constexpr int walk_group = 4;
#endif

// Everything of one vector of channels that a tile needs, [scan_tile][lanes] each.
template <class T> struct ScanTile {
    static constexpr int size = scan_tile * lanes<T>;
    alignas(64) T u[size], delta[size], slope[size], du[size], gy[size], y[size];
    alignas(64) T lambda_B[size], lambda_A[size];  // sum_n lambda B, sum_n lambda a h[t - 1] A
};

// Scratch in elements; N state, V vectors of channels, K tiles of a chunk. All are [..][lanes].
template <class T> struct ScanScratch {
    T *A, *lambda, *dA;        // [V][N]
    T* dD_dbias;               // [V][2]
    T* starts;                 // [K][V][N]: state on entry of every tile of a chunk
    T *decay, *before;         // [scan_tile][N]: a, h[t - 1] of one vector of channels
    T *dB, *dC;                // [scan_tile][N]
};

VIM_INLINE Index scan_ceil(Index a, Index b) { return (a + b - 1) / b; }

template <class T> static Index scan_backward_scratch(Index state, Index chunk, Index channels)
{
    const Index vectors = scan_ceil(channels, lanes<T>), tiles = scan_ceil(chunk, scan_tile);
    return lanes<T> * (vectors * (state * (3 + tiles) + 2) + 4 * scan_tile * state);
}
template <class T> static ScanScratch<T> scan_scratch(T* p, Index state, Index chunk, Index channels)
{
    const Index vectors = scan_ceil(channels, lanes<T>), tiles = scan_ceil(chunk, scan_tile);
    auto take = [&](Index count) {
        T* part = p;
        p += count * lanes<T>;
        return part;
    };
    ScanScratch<T> s;
    s.A = take(vectors * state);
    s.lambda = take(vectors * state);
    s.dA = take(vectors * state);
    s.dD_dbias = take(vectors * 2);
    s.starts = take(tiles * vectors * state);
    s.decay = take(scan_tile * state);
    s.before = take(scan_tile * state);
    s.dB = take(scan_tile * state);
    s.dC = take(scan_tile * state);
    return s;
}

// G states of one tile, forward: keeps a and h[t - 1], adds C h to y and gy h to dC. Row s of the kept is at s * ld.
template <class T, int G>
static void scan_replay(const T* A, const T* start, const ScanTile<T>& tile, Rows<const T> B, Rows<const T> C, Index count,
                        Index ld, T* decay, T* before, T* dC, T* y)
{
    constexpr int w = lanes<T>;
    Vec<T> h[G];
#pragma GCC unroll 16
    for (int n = 0; n < G; n++) h[n] = load<T>(start + n * w);
    const T *b = B.first, *c = C.first;
    for (Index s = 0; s < count; s++) {
        const Vec<T> d = load<T>(tile.delta + s * w), x = load<T>(tile.du + s * w), gy = load<T>(tile.gy + s * w);
        Vec<T> sum[2] = {load<T>(y + s * w), splat(T(0))};
#pragma GCC unroll 16
        for (int n = 0; n < G; n++) {
            const Vec<T> a = exp2_product(d, load<T>(A + n * w));
            const Vec<T> in = x * b[n];
            store<T>(decay + n * w, a);
            store<T>(before + n * w, h[n]);
            h[n] = a * h[n] + in;
            sum[n & 1] += h[n] * c[n];
            store<T>(dC + n * w, load<T>(dC + n * w) + gy * h[n]);
        }
        store<T>(y + s * w, sum[0] + sum[1]);
        b += B.step;
        c += C.step;
        decay += ld;
        before += ld;
        dC += ld;
    }
}

// G states of one tile, backward: lambda and dA go on, lambda du is added to dB, the sums over n to the tile.
template <class T, int G>
static void scan_walk(const T* A, T* lambda, T* dA, ScanTile<T>& tile, Rows<const T> B, Rows<const T> C, Index count,
                      Index ld, const T* decay, const T* before, T* dB)
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
        T* sum_B = dB + s * ld;
        const Vec<T> d = load<T>(tile.delta + s * w), x = load<T>(tile.du + s * w), gy = load<T>(tile.gy + s * w);
        Vec<T> sum_in = load<T>(tile.lambda_B + s * w), sum_decay = load<T>(tile.lambda_A + s * w);
#pragma GCC unroll 16
        for (int n = 0; n < G; n++) {
            const Vec<T> l = carry[n] + gy * c[n];
            sum_in += l * b[n];
            store<T>(sum_B + n * w, load<T>(sum_B + n * w) + x * l);
            carry[n] = l * load<T>(a + n * w);
            const Vec<T> kept = carry[n] * load<T>(h + n * w);
            sum_decay += kept * load<T>(A + n * w);
            grad[n] += d * kept;
        }
        store<T>(tile.lambda_B + s * w, sum_in);
        store<T>(tile.lambda_A + s * w, sum_decay);
    }
#pragma GCC unroll 16
    for (int n = 0; n < G; n++) {
        store<T>(lambda + n * w, carry[n]);
        store<T>(dA + n * w, grad[n]);
    }
}

template <class T> struct ScanBackward {
    static constexpr int w = lanes<T>;
    const ScanBackwardArgs<T>& g;
    const ScanArgs<T>& f;
    ScanScratch<T> scratch;
    Index vectors;

    Index channel(Index v) const { return f.e0 + v * w; }
    Index live(Index v) const { return f.e1 - channel(v) < w ? f.e1 - channel(v) : w; }

    // delta and delta u of one tile whose first token in scan order is `token`.
    void prepare(Index v, Index token, Index count, ScanTile<T>& tile) const
    {
        const Index e = channel(v), n = live(v);
        const Rows<const T> u = rows(f.u, f.ldu, token, f.reverse);
        scan_delta(f, rows(f.dt, f.lddt, token, f.reverse), count, e, n, tile.delta);
        for (Index s = 0; s < count; s++) {
            const Vec<T> in = load_live<T>(u.at(s) + e, n), raw = load<T>(tile.delta + s * w);
            const Vec<T> d = f.softplus ? softplus(raw) : raw;
            store<T>(tile.slope + s * w, f.softplus ? softplus_gradient<T>(raw) : splat(T(1)));
            store<T>(tile.delta + s * w, d);
            store<T>(tile.u + s * w, in);
            store<T>(tile.du + s * w, d * in);
        }
    }

    // The states on entry of all tiles of a chunk.
    void first_run(Index v, Index chunk, Index token, Index tiles, ScanTile<T>& tile) const
    {
        const Index N = f.state, ld = vectors * N * w;
        T* start = scratch.starts + v * N * w;
        const T* entry = f.checkpoints + chunk * N * f.dim + channel(v);
        for (Index n = 0; n < N; n++) store<T>(start + n * w, load_live<T>(entry + n * f.dim, live(v)));
        for (Index k = 0; k + 1 < tiles; k++, start += ld) {
            const Index first = f.reverse ? token - k * scan_tile : token + k * scan_tile;
            for (Index n = 0; n < N; n++) store<T>(start + ld + n * w, load<T>(start + n * w));
            prepare(v, first, scan_tile, tile);
            scan_groups<T>(N, scratch.A + v * N * w, start + ld, tile.delta, tile.du, rows(f.B, f.ldb, first, f.reverse),
                           rows(f.C, f.ldb, first, f.reverse), scan_tile, tile.y);
        }
    }

    void run_tile(Index v, const T* start, Index token, Index count, ScanTile<T>& tile) const
    {
        const Index e = channel(v), n_live = live(v), N = f.state, ld = N * w;
        const Rows<const T> B = rows(f.B, f.ldb, token, f.reverse), C = rows(f.C, f.ldb, token, f.reverse);
        const Rows<const T> z = rows(f.z, f.ldz, token, f.reverse), dout = rows(g.dout, g.lddout, token, f.reverse);
        const Rows<T> y = rows(f.y, f.ldy, token, f.reverse), du = rows(g.du, g.lddu, token, f.reverse);
        const Rows<T> ddelta = rows(g.ddelta, g.ldddelta, token, f.reverse);
        const Vec<T> D = f.D ? load_live<T>(f.D + e, n_live) : splat(T(0)), scale = splat(f.scale);
        prepare(v, token, count, tile);
        for (Index s = 0; s < count; s++) {
            Vec<T> gate = scale;
            if (f.z) gate *= silu(load_live<T>(z.at(s) + e, n_live));
            store<T>(tile.gy + s * w, gate * load_live<T>(dout.at(s) + e, n_live));
            store<T>(tile.y + s * w, D * load<T>(tile.u + s * w));
            store<T>(tile.lambda_B + s * w, splat(T(0)));
            store<T>(tile.lambda_A + s * w, splat(T(0)));
        }
        T *A = scratch.A + v * N * w, *lambda = scratch.lambda + v * N * w, *dA = scratch.dA + v * N * w;
        Index n = 0;
        auto replay = [&](auto body, Index group) {
            for (; N - n >= group; n += group)
                body(A + n * w, start + n * w, tile, {B.first + n, B.step}, {C.first + n, C.step}, count, ld,
                     scratch.decay + n * w, scratch.before + n * w, scratch.dC + n * w, tile.y);
        };
        replay(scan_replay<T, scan_group>, scan_group);
        if constexpr (scan_group > 8) replay(scan_replay<T, 8>, 8);
        replay(scan_replay<T, 4>, 4);
        replay(scan_replay<T, 1>, 1);
        n = 0;
        auto walk = [&](auto body, Index group) {
            for (; N - n >= group; n += group)
                body(A + n * w, lambda + n * w, dA + n * w, tile, {B.first + n, B.step}, {C.first + n, C.step}, count, ld,
                     scratch.decay + n * w, scratch.before + n * w, scratch.dB + n * w);
        };
        walk(scan_walk<T, walk_group>, walk_group);
        if constexpr (walk_group > 4) walk(scan_walk<T, 4>, 4);
        walk(scan_walk<T, 1>, 1);

        T* sums = scratch.dD_dbias + v * 2 * w;
        Vec<T> dD = load<T>(sums), dbias = load<T>(sums + w);
        for (Index s = 0; s < count; s++) {
            const Vec<T> in = load<T>(tile.u + s * w), gy = load<T>(tile.gy + s * w);
            const Vec<T> via_B = load<T>(tile.lambda_B + s * w), via_A = load<T>(tile.lambda_A + s * w);
            Vec<T> out = load<T>(tile.y + s * w);
            if (f.add) out += load_live<T>(y.at(s) + e, n_live);
            store_live<T>(y.at(s) + e, out, n_live);
            store_live<T>(du.at(s) + e, D * gy + load<T>(tile.delta + s * w) * via_B, n_live);
            const Vec<T> change = in * via_B + via_A * T(0.69314718055994531);  // the kept A is A log2(e)
            const Vec<T> raw = load<T>(tile.slope + s * w) * change;
            store_live<T>(ddelta.at(s) + e, raw, n_live);
            dD += gy * in;
            dbias += raw;
        }
        store<T>(sums, dD);
        store<T>(sums + w, dbias);
    }

    void run_chunk(Index chunk, ScanTile<T>& tile) const
    {
        const Index N = f.state, low = chunk * f.chunk, high = f.len - low < f.chunk ? f.len : low + f.chunk;
        const Index token = f.reverse ? high - 1 : low, tiles = scan_ceil(high - low, scan_tile);
        for (Index v = 0; v < vectors; v++) first_run(v, chunk, token, tiles, tile);
        for (Index k = tiles - 1; k >= 0; k--) {
            const Index left = high - low - k * scan_tile, count = left < scan_tile ? left : scan_tile;
            const Index first = f.reverse ? token - k * scan_tile : token + k * scan_tile;
            for (Index i = 0; i < count * N; i++) {
                store<T>(scratch.dB + i * w, splat(T(0)));
                store<T>(scratch.dC + i * w, splat(T(0)));
            }
            for (Index v = 0; v < vectors; v++)
                run_tile(v, scratch.starts + (k * vectors + v) * N * w, first, count, tile);
            const Rows<T> dB = rows(g.dB, N, first, f.reverse), dC = rows(g.dC, N, first, f.reverse);
            for (Index s = 0; s < count; s++)
                for (Index n = 0; n < N; n++) {
                    dB.at(s)[n] = sum<T>(load<T>(scratch.dB + (s * N + n) * w));
                    dC.at(s)[n] = sum<T>(load<T>(scratch.dC + (s * N + n) * w));
                }
        }
    }
};

template <class T> static void scan_backward(const ScanBackwardArgs<T>& g)
{
    constexpr int w = lanes<T>;
    const ScanArgs<T>& f = g.f;
    const Index channels = f.e1 - f.e0;
    const ScanBackward<T> run{g, f, scan_scratch(g.scratch, f.state, f.chunk, channels), scan_ceil(channels, w)};
    const ScanScratch<T>& s = run.scratch;
    for (Index v = 0; v < run.vectors; v++) {
        for (Index i = v * f.state, n = 0; n < f.state; i++, n++) {
            store<T>(s.A + i * w, load_live<T>(f.A + n * f.dim + run.channel(v), run.live(v)));
            store<T>(s.lambda + i * w, splat(T(0)));
            store<T>(s.dA + i * w, splat(T(0)));
        }
        store<T>(s.dD_dbias + 2 * v * w, splat(T(0)));
        store<T>(s.dD_dbias + (2 * v + 1) * w, splat(T(0)));
    }
    ScanTile<T> tile;
    const Index chunks = scan_ceil(f.len, f.chunk);
    for (Index i = 0; i < chunks; i++) run.run_chunk(f.reverse ? i : chunks - 1 - i, tile);
    for (Index v = 0; v < run.vectors; v++) {
        const Index e = run.channel(v), live = run.live(v);
        for (Index n = 0; n < f.state; n++)
            store_live<T>(g.dA + n * f.dim + e, load<T>(s.dA + (v * f.state + n) * w), live);
        if (g.dD) store_live<T>(g.dD + e, load<T>(s.dD_dbias + 2 * v * w), live);
        if (g.dbias) store_live<T>(g.dbias + e, load<T>(s.dD_dbias + (2 * v + 1) * w), live);
    }
}

template <class T> static void gate_backward(const GateBackwardArgs<T>& g)
{
    const Vec<T> scale = splat(g.scale);
    for (Index t = 0; t < g.len; t++)
        for (Index e = g.e0; e < g.e1; e += lanes<T>) {
            const Index live = g.e1 - e < lanes<T> ? g.e1 - e : lanes<T>;
            const Vec<T> y = load_live<T>(g.y + t * g.ldy + e, live), z = load_live<T>(g.z + t * g.ldz + e, live);
            if (g.dz) {
                const Vec<T> dout = load_live<T>(g.dout + t * g.lddout + e, live);
                store_live<T>(g.dz + t * g.lddz + e, scale * dout * y * silu_gradient(z), live);
            }
            store_live<T>(g.y + t * g.ldy + e, scale * y * silu(z), live);
        }
}

}  // namespace vimcore::cpu::VIM_ISA
