// SPDX-License-Identifier: Apache-2.0
// The scan's gradient for any sizes, one direction, 16 states: the oracle of the tuned kernels. In the order of the
// scan, with a = 2^(delta A), A times log2 e, and gy = scale silu(z) dout the gradient of y:
//   lambda[t] = C[t] gy[t] + a[t + 1] lambda[t + 1]          (lambda beyond the end is 0)
//   du = D gy + delta sum_n B lambda     draw = slope (u sum_n B lambda + ln 2 sum_n A a h[t - 1] lambda)
//   dA = sum_t delta a h[t - 1] lambda   dB = sum_e delta u lambda     dC = sum_e gy h      dD = sum_t gy u
// draw is the gradient of delta before its bias and softplus, whose slope is sigmoid. More than 16 states take a launch
// for every 16 of them, which add to y and to the two sums over n in memory; the last one finishes.
// u, du, dz, draw (B, len, E); B, C, dB, dC (B, len, N).
// A thread walks one channel of one image, a block 64 channels. From the last chunk to the first: a run from the
// checkpoint keeps the states at every eighth token; from the last of these tiles to the first, its states come again
// and stay in the thread's memory, then it is walked back. What a token adds to dB and dC meets in shared memory.
#pragma once

#include "scan/generic.cuh"
#include "vectors.cuh"

namespace vimcore::cuda {

template <class T>
struct GenericScanBackward {
    GenericScan<T> f;   // out, B, C, dt: as in forward; B, C and A begin at the launch's first state
    Index first_state;  // of the launch
    bool first, last;   // launch of its pass
    ScanRows<const T> dout;
    ScanRows<T> du, dz;          // dz or none
    device::Either<T> draw;      // (B, len, E)
    float* y;                    // (B, len, E) sums of launches so far, or null: this is the only one
    float *lambda_B, *lambda_A;  // (B, len, E), or null: first and last
    float* starts;               // (blocks, tiles of a chunk, 16, 64)
    float* part;                 // (B, groups, len, 2N): sums over the block's channels of dB and dC
    float* parameters;           // (B, N + 2, E): dA, dD, dbias
};

inline constexpr int generic_tile = device_scratch::generic_tile, generic_pitch = generic_threads + 1;
inline constexpr int generic_shared = 2 * generic_states * generic_pitch * static_cast<int>(sizeof(float));

// One token of a channel.
struct ScanToken {
    Index t;
    float u, delta, slope, gy;
};

template <class T>
__global__ void __launch_bounds__(generic_threads) scan_backward_generic(GenericScanBackward<T> a)
{
    constexpr int N = generic_states, K = generic_tile;
    constexpr float ln2 = 0.69314718055994531f;
    const GenericScan<T>& f = a.f;
    const auto terms = device::shared<float>(0, 2 * N * generic_pitch);
    const int thread = static_cast<int>(threadIdx.x);
    const Index b = blockIdx.x / f.groups, own = blockIdx.x % f.groups * generic_threads + thread;
    const bool live = own < f.dim;  // the others follow the last channel with nothing of their own
    const Index e = live ? own : f.dim - 1;
    const int states = f.state - a.first_state < N ? static_cast<int>(f.state - a.first_state) : N;
    const float bias = f.dt_bias ? f.dt_bias[e] : 0.0f, D = f.D ? f.D[e] : 0.0f;
    float A[N] = {}, lambda[N] = {}, dA[N] = {}, h[N] = {}, before[K + 1][N], dD = 0, dbias = 0;
#pragma unroll
    for (int n = 0; n < N; n++)
        if (n < states) A[n] = scan_decay(f.A[e * f.state + a.first_state + n], f.log_A);

    auto token = [&](Index t) {
        const T* const dt = f.dt.data + b * f.dt.image + t * f.dt.row;
        float raw = bias;
        if (f.rank == 0) raw += device::to_float(dt[e]);
        for (Index r = 0; r < f.rank; r++) raw = fmaf(f.dt_weight[e * f.rank + r], device::to_float(dt[r]), raw);
        ScanToken x{t, 0, raw, 1, 0};
        if (f.softplus) {
            x.delta = device::softplus(raw);
            x.slope = device::sigmoid(raw);
        }
        if (!live) return x;
        x.u = device::to_float(f.u.data[b * f.u.image + t * f.u.row + e]);
        x.gy = f.scale * device::to_float(a.dout.data[b * a.dout.image + t * a.dout.row + e]);
        if (f.z.data) x.gy *= device::silu(device::to_float(f.z.data[b * f.z.image + t * f.z.row + e]));
        return x;
    };
    auto advance = [&](const ScanToken& x) {
        const T* const B = f.B.data + b * f.B.image + x.t * f.B.row;
        const float du = x.delta * x.u;
#pragma unroll
        for (int n = 0; n < N; n++)
            if (n < states) h[n] = fmaf(device::exp2(x.delta * A[n]), h[n], du * device::to_float(B[n]));
    };
    // y of a token whose states are h; the last launch of all gates it.
    auto leave_y = [&](const ScanToken& x) {
        const T* const C = f.C.data + b * f.C.image + x.t * f.C.row;
        float y = a.first ? D * x.u : 0.0f;
#pragma unroll
        for (int n = 0; n < N; n++)
            if (n < states) y = fmaf(device::to_float(C[n]), h[n], y);
        if (!live) return;
        const Index at = (b * f.tokens + x.t) * f.dim + e;
        if (f.add) y += a.y[at];
        if (!f.finish) {
            a.y[at] = y;
            return;
        }
        float gate = f.scale;
        if (f.z.data) {
            const float z = device::to_float(f.z.data[b * f.z.image + x.t * f.z.row + e]), s = device::sigmoid(z);
            const float dout = device::to_float(a.dout.data[b * a.dout.image + x.t * a.dout.row + e]);
            gate *= z * s;
            a.dz.data[b * a.dz.image + x.t * a.dz.row + e] =
                device::from_float<T>(f.scale * dout * y * s * fmaf(z, 1.0f - s, 1.0f));
        }
        f.out.data[b * f.out.image + x.t * f.out.row + e] = device::from_float<T>(gate * y);
    };
    // One step back; h_before and h_after: states before and after the token.
    auto walk = [&](const ScanToken& x, const float (&h_before)[N], const float (&h_after)[N]) {
        const T* const B = f.B.data + b * f.B.image + x.t * f.B.row;
        const T* const C = f.C.data + b * f.C.image + x.t * f.C.row;
        const Index at = (b * f.tokens + x.t) * f.dim + e;
        const float du = x.delta * x.u;
        float sum_B = a.first ? 0.0f : a.lambda_B[at], sum_A = a.first ? 0.0f : a.lambda_A[at];
#pragma unroll
        for (int n = 0; n < N; n++) {
            if (n >= states) continue;
            const float l = fmaf(x.gy, device::to_float(C[n]), lambda[n]);
            sum_B = fmaf(l, device::to_float(B[n]), sum_B);
            terms[n * generic_pitch + thread] = l * du;
            terms[(N + n) * generic_pitch + thread] = x.gy * h_after[n];
            lambda[n] = l * device::exp2(x.delta * A[n]);
            const float kept = lambda[n] * h_before[n];
            sum_A = fmaf(kept, A[n], sum_A);
            dA[n] = fmaf(x.delta, kept, dA[n]);
        }
        if (!live) return;
        if (!a.last) {
            a.lambda_B[at] = sum_B;
            a.lambda_A[at] = sum_A;
            return;
        }
        const float draw = x.slope * fmaf(x.u, sum_B, ln2 * sum_A);
        a.du.data[b * a.du.image + x.t * a.du.row + e] = device::from_float<T>(fmaf(x.delta, sum_B, D * x.gy));
        a.draw.template store<1>(at, {{draw}});
        dD = fmaf(x.gy, x.u, dD);
        dbias += draw;
    };
    // The block's sums of what `walk` left.
    auto sum_terms = [&](Index t) {
        const int n = thread % N, which = thread / N;
        if (which > 1 || n >= states) return;
        float sum = 0;
        for (int i = 0; i < generic_threads; i++) sum += terms[(which * N + n) * generic_pitch + i];
        a.part[(blockIdx.x * f.tokens + t) * 2 * f.state + which * f.state + a.first_state + n] = sum;
    };

    const Index tiles_of_chunk = ceil_div(f.chunk, K);
    float* const starts = a.starts + blockIdx.x * tiles_of_chunk * N * generic_threads + thread;
    for (Index i = 0; i < f.chunks; i++) {
        const Index chunk = f.reverse ? i : f.chunks - 1 - i, low = chunk * f.chunk;
        const Index high = f.tokens - low < f.chunk ? f.tokens : low + f.chunk, tiles = ceil_div(high - low, K);
        auto natural = [&](Index step) { return f.reverse ? high - 1 - step : low + step; };
        const float* const entry = f.checkpoints + ((b * f.chunks + chunk) * f.state + a.first_state) * f.dim + e;
#pragma unroll
        for (int n = 0; n < N; n++)
            if (n < states) h[n] = entry[n * f.dim];
        for (Index k = 0; k < tiles; k++) {
#pragma unroll
            for (int n = 0; n < N; n++) starts[(k * N + n) * generic_threads] = h[n];
            for (int s = 0; s < K && k + 1 < tiles; s++) advance(token(natural(k * K + s)));
        }
        for (Index k = tiles - 1; k >= 0; k--) {
            const int count = static_cast<int>(high - low - k * K < K ? high - low - k * K : K);
            ScanToken x[K];
#pragma unroll
            for (int n = 0; n < N; n++) before[0][n] = h[n] = starts[(k * N + n) * generic_threads];
            for (int s = 0; s < count; s++) {
                x[s] = token(natural(k * K + s));
                advance(x[s]);
                leave_y(x[s]);
#pragma unroll
                for (int n = 0; n < N; n++) before[s + 1][n] = h[n];
            }
            for (int s = count - 1; s >= 0; s--) {
                walk(x[s], before[s], before[s + 1]);
                device::sync_block();
                sum_terms(x[s].t);
                device::sync_block();
            }
        }
    }

    if (!live) return;
    float* const to = a.parameters + b * (f.state + 2) * f.dim + e;
#pragma unroll
    for (int n = 0; n < N; n++)
        if (n < states) to[(a.first_state + n) * f.dim] = dA[n];
    if (!a.last) return;
    to[f.state * f.dim] = dD;
    to[(f.state + 1) * f.dim] = dbias;
}

}  // namespace vimcore::cuda
