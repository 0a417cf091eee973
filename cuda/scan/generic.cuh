// SPDX-License-Identifier: Apache-2.0
// Selective scan for any sizes, one direction: the oracle of the tuned kernels.
//   delta[t, e] = softplus(dt_bias[e] + sum_r dt[t, r] dt_weight[e, r]), or of a given delta
//   h[n, e] = 2^(delta A[e, n] log2 e) h[n, e] + delta u[t, e] B[t, n]
//   y[t, e] = sum_n C[t, n] h[n, e] + D[e] u[t, e], then optionally y += out, y *= scale silu(z)
// u, out, z (B, len, E); dt (B, len, R) or (B, len, E); B, C (B, len, N); state (B, N, E).
// A thread walks one channel of one image through time; its states are in registers, or in memory where there are many.
#pragma once

#include "core/device_scratch.h"
#include "device.cuh"
#include "launch.h"

namespace vimcore::cuda {

// Rows of one tensor: element (b, t, i) is data[b * image + t * row + i].
template <class T>
struct ScanRows {
    T* data;
    Index image, row;
};

template <class T>
struct GenericScan {
    Index batch, groups, tokens, dim, state, rank;  // groups of channels; rank 0: dt is delta before bias and softplus
    bool reverse, softplus, log_A, add, finish;     // log_A: A is -exp(what is stored)
    ScanRows<const T> u, dt, B, C, z;               // z, and the parameters below, or null
    ScanRows<T> out;
    const float *dt_weight, *dt_bias, *A, *D;
    float* state_inout;  // (B, N, E) or null: starts at zero
    float* memory;       // (B, N, E) of working states for the kernel that keeps them there; may be state_inout
    float* checkpoints;  // (B, chunks, N, E) or null
    Index chunk, chunks, begin;
    float scale;
};

inline constexpr int generic_threads = device_scratch::generic_channels;
inline constexpr int generic_states = device_scratch::generic_states;  // that fit in registers

// What is multiplied with delta to give the exponent of 2.
__device__ __forceinline__ float scan_decay(float stored, bool log_A)
{
    return log_A ? -expf(stored) * device::log2e : stored * device::log2e;
}

template <class T, int states>  // states in registers; 0: in memory
__global__ void __launch_bounds__(generic_threads) scan_generic(GenericScan<T> a)
{
    const Index b = blockIdx.x / a.groups;
    const Index e = blockIdx.x % a.groups * generic_threads + threadIdx.x;
    if (e >= a.dim) return;
    float h_register[states > 0 ? states : 1] = {}, A_register[states > 0 ? states : 1] = {};
    float* const saved = a.state_inout ? a.state_inout + b * a.state * a.dim + e : nullptr;
    float* const memory = a.memory ? a.memory + b * a.state * a.dim + e : nullptr;
    const float* const A = a.A + e * a.state;
    if constexpr (states > 0) {
#pragma unroll
        for (int n = 0; n < states; n++) {
            if (n >= a.state) continue;
            A_register[n] = scan_decay(A[n], a.log_A);
            if (saved) h_register[n] = saved[n * a.dim];
        }
    } else if (!saved) {
        for (Index n = 0; n < a.state; n++) memory[n * a.dim] = 0.0f;
    }
    const float bias = a.dt_bias ? a.dt_bias[e] : 0.0f, D = a.D ? a.D[e] : 0.0f;
    float* const checkpoints = a.checkpoints ? a.checkpoints + b * a.chunks * a.state * a.dim + e : nullptr;

    for (Index step = 0; step < a.tokens; step++) {
        const Index t = a.reverse ? a.tokens - 1 - step : step, natural = a.begin + t;
        if (checkpoints && (a.reverse ? step == 0 || (natural + 1) % a.chunk == 0 : natural % a.chunk == 0)) {
            float* const to = checkpoints + natural / a.chunk * a.state * a.dim;
            if constexpr (states > 0) {
#pragma unroll
                for (int n = 0; n < states; n++)
                    if (n < a.state) to[n * a.dim] = h_register[n];
            } else {
                for (Index n = 0; n < a.state; n++) to[n * a.dim] = memory[n * a.dim];
            }
        }

        float delta = bias;
        const T* const dt = a.dt.data + b * a.dt.image + t * a.dt.row;
        if (a.rank == 0) delta += device::to_float(dt[e]);
        for (Index r = 0; r < a.rank; r++) delta = fmaf(a.dt_weight[e * a.rank + r], device::to_float(dt[r]), delta);
        if (a.softplus) delta = device::softplus(delta);
        const float u = device::to_float(a.u.data[b * a.u.image + t * a.u.row + e]), du = delta * u;
        const T* const B = a.B.data + b * a.B.image + t * a.B.row;
        const T* const C = a.C.data + b * a.C.image + t * a.C.row;
        float y = D * u;
        if constexpr (states > 0) {
#pragma unroll
            for (int n = 0; n < states; n++) {
                if (n >= a.state) continue;
                const float bu = du * device::to_float(B[n]);
                h_register[n] = fmaf(device::exp2(delta * A_register[n]), h_register[n], bu);
                y = fmaf(device::to_float(C[n]), h_register[n], y);
            }
        } else {
            for (Index n = 0; n < a.state; n++) {
                const float bu = du * device::to_float(B[n]);
                const float h = fmaf(device::exp2(delta * scan_decay(A[n], a.log_A)), memory[n * a.dim], bu);
                memory[n * a.dim] = h;
                y = fmaf(device::to_float(C[n]), h, y);
            }
        }

        T* const out = a.out.data + b * a.out.image + t * a.out.row + e;
        if (a.add) y += device::to_float(*out);
        if (a.finish) {
            y *= a.scale;
            if (a.z.data) y *= device::silu(device::to_float(a.z.data[b * a.z.image + t * a.z.row + e]));
        }
        *out = device::from_float<T>(y);
    }

    if constexpr (states > 0) {
        if (!saved) return;
#pragma unroll
        for (int n = 0; n < states; n++)
            if (n < a.state) saved[n * a.dim] = h_register[n];
    }
}

}  // namespace vimcore::cuda
