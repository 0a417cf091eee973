// SPDX-License-Identifier: Apache-2.0
// What kernels use besides plain C++: special functions, conversions, vector accesses, shared memory, shuffles,
// barriers, asynchronous copies. Device code has no other PTX. tests/shim/device_twin.h defines the same names for the
// host, with checks, where the compiler is not nvcc.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace vimcore::device {

inline constexpr int warp_size = 32;
inline constexpr float log2e = 1.4426950408889634f;
inline constexpr std::uint32_t tf32_bits = 0xffffe000u;  // of a float that multiply_add looks at

// N elements that are read and written at once; the address is a multiple of the size (2, 4, 8 or 16 bytes).
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
    T v[N];
    __host__ __device__ T& operator[](int i) { return v[i]; }
    __host__ __device__ const T& operator[](int i) const { return v[i]; }
};

}  // namespace vimcore::device

#ifdef __CUDACC__

namespace vimcore::device {

// ---- special functions: 2^x and log2 x within 2 ulp, subnormals flushed --------------------------------------------
__device__ __forceinline__ float exp2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float log2(float x)
{
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float reciprocal(float x)
{
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// ---- global memory -------------------------------------------------------------------------------------------------
template <int N, class T>
__device__ __forceinline__ Vec<T, N> load(const T* from)
{
    return *reinterpret_cast<const Vec<T, N>*>(from);
}
template <int N, class T>
__device__ __forceinline__ void store(T* to, const Vec<T, N>& value)
{
    *reinterpret_cast<Vec<T, N>*>(to) = value;
}
// An address that was itself read from memory: only arguments of kernels are known to be of global memory.
template <class T>
__device__ __forceinline__ void assume_global(T* address)
{
    __builtin_assume(__isGlobal(address));
}

// From here on x is as if it had just been read: what was computed from it before is not kept in registers.
__device__ __forceinline__ void renew(int& x) { asm volatile("" : "+r"(x)); }

// ---- shared memory: one dynamic allocation per block, cut up by the kernel -----------------------------------------
template <class T>
class Shared {
public:
    __device__ __forceinline__ explicit Shared(T* data) : data_(data) {}
    __device__ __forceinline__ T& operator[](int i) const { return data_[i]; }
    template <int N>
    __device__ __forceinline__ Vec<T, N> load(int i) const
    {
        return *reinterpret_cast<const Vec<T, N>*>(data_ + i);
    }
    template <int N>
    __device__ __forceinline__ void store(int i, const Vec<T, N>& value) const
    {
        *reinterpret_cast<Vec<T, N>*>(data_ + i) = value;
    }
    __device__ __forceinline__ T* address(int i) const { return data_ + i; }  // for cp_async only

private:
    T* data_;
};

// The `count` elements at `offset` bytes of the block's shared memory. offset: a multiple of 16.
template <class T>
__device__ __forceinline__ Shared<T> shared(int offset, int count)
{
    extern __shared__ __align__(128) unsigned char vimcore_shared_memory[];
    (void)count;
    return Shared<T>(reinterpret_cast<T*>(vimcore_shared_memory + offset));
}

// Starts a copy of Bytes (4, 8 or 16) from global to shared memory; zeros where not valid. Seen after cp_async_wait and
// a barrier.
template <int Bytes, class T>
__device__ __forceinline__ void cp_async(Shared<T> to, int index, const T* from, bool valid)
{
    const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(to.address(index)));
    const int bytes = valid ? Bytes : 0;
    if constexpr (Bytes == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(Bytes), "r"(bytes)
                     : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>  // waits until at most Pending of the groups committed by this thread are under way
__device__ __forceinline__ void cp_async_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// ---- products of matrices of bfloat16 by a warp --------------------------------------------------------------------
// D (16, 8) += A (16, 16) B (16, 8), sums in float. Of A and B a word has two neighbours, in a row of A or a column of
// B, the first one in its lower half. With g = lane / 4 and q = lane % 4, a lane has those of A from [g][2q],
// [g + 8][2q], [g][2q + 8], [g + 8][2q + 8] on, those of B from [2q][g], [2q + 8][g] on, and D[g][2q], D[g][2q + 1],
// D[g + 8][2q], D[g + 8][2q + 1].
__device__ __forceinline__ void multiply_add(float (&d)[4], const Vec<std::uint32_t, 4>& a,
                                             const Vec<std::uint32_t, 2>& b)
{
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- between threads -----------------------------------------------------------------------------------------------
__device__ __forceinline__ void sync_block() { __syncthreads(); }
// Barrier `id` (1..15) of `count` threads of the block, whole warps.
__device__ __forceinline__ void sync_group(int id, int count)
{
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}
// All 32 lanes take part in both.
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
__device__ __forceinline__ float shuffle_xor(float value, int mask)
{
    return __shfl_xor_sync(0xffffffffu, value, mask);
}

// ---- products of matrices by a warp --------------------------------------------------------------------------------
// D (16 x 8) += A (16 x 8) B (8 x 8), in float, of elements of A and B cut off after 10 bits of fraction. The lane with
// g = lane / 4 and q = lane % 4 has A[g][q], A[g + 8][q], A[g][q + 4], A[g + 8][q + 4]; B[q][g], B[q + 4][g]; and
// D[g][2q], D[g][2q + 1], D[g + 8][2q], D[g + 8][2q + 1].
__device__ __forceinline__ void multiply_add(float (&d)[4], float a0, float a1, float a2, float a3, float b0, float b1)
{
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
          "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}
__device__ __forceinline__ float tf32(float x) { return __uint_as_float(__float_as_uint(x) & tf32_bits); }

}  // namespace vimcore::device

#else
#include "device_twin.h"
#endif

namespace vimcore::device {

// Two numbers of 16 bits in a word, the first in the lower half.
template <class T>
__device__ __forceinline__ std::uint32_t bits(const Vec<T, 2>& pair)
{
    static_assert(sizeof(T) == 2);
    std::uint32_t word;
    memcpy(&word, &pair, sizeof(word));
    return word;
}

// ---- conversions; activations are float, __half or __nv_bfloat16, computing is float -------------------------------
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// The same, of a vector: two bfloat16 of a word take an instruction each.
template <class T, int N>
__device__ __forceinline__ Vec<float, N> to_floats(const Vec<T, N>& x)
{
    Vec<float, N> y;
    if constexpr (std::is_same_v<T, __nv_bfloat16> && N % 2 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 2) {
            const std::uint32_t word = bits(Vec<T, 2>{{x[i], x[i + 1]}}), low = word << 16, high = word & 0xffff0000u;
            memcpy(&y[i], &low, sizeof(float));
            memcpy(&y[i + 1], &high, sizeof(float));
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) y[i] = to_float(x[i]);
    }
    return y;
}

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x)
{
    return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x)
{
    return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x)
{
    return __float2bfloat16_rn(x);
}

// ---- functions of the network --------------------------------------------------------------------------------------
__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.0f + exp2(-log2e * x)); }
__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }
// silu(x) / inverse: the factor costs nothing.
__device__ __forceinline__ float scaled_silu(float x, float inverse)
{
    return x * reciprocal(fmaf(exp2(-log2e * x), inverse, inverse));
}

// log(1 + e^x) = max(x, 0) + log(1 + t), t = e^-|x|: no overflow, and accurate however small t is. The polynomial is
// log(1 + t) / t for t <= 1, within 6e-8, and 1 at 0; a reciprocal would cost as much as an exponential.
__device__ __forceinline__ float softplus(float x)
{
    const float t = exp2(-log2e * fabsf(x));
    float p = 0.0053648287430405617f;
    p = fmaf(p, t, -0.03006580993533134f);
    p = fmaf(p, t, 0.07920456677675247f);
    p = fmaf(p, t, -0.13753804564476013f);
    p = fmaf(p, t, 0.1915365606546402f);
    p = fmaf(p, t, -0.24857163429260254f);
    p = fmaf(p, t, 0.3332132399082184f);
    p = fmaf(p, t, -0.49999648332595825f);
    p = fmaf(p, t, 1.0f);
    return fmaf(t, p, fmaxf(x, 0.0f));
}

// Sum over the warp, the same bits in every lane.
__device__ __forceinline__ float warp_sum(float x)
{
#pragma unroll
    for (int mask = warp_size / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}

}  // namespace vimcore::device
