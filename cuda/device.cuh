// SPDX-License-Identifier: Apache-2.0
// What kernels use besides plain C++: special functions, conversions, vector accesses, shared memory, shuffles,
// barriers, asynchronous copies. Device code has no other PTX. tests/shim/device_twin.h defines the same names for the
// host, with checks, where the compiler is not nvcc.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

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

// ---- conversions; activations are float, __half or __nv_bfloat16, computing is float -------------------------------
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

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

// log(1 + e^x) = max(x, 0) + 2 atanh(t / (2 + t)), t = e^-|x|: no overflow, and accurate however small t is. The
// polynomial is atanh(s) / s for s <= 1/3, within 2e-9.
__device__ __forceinline__ float softplus(float x)
{
    const float t = exp2(-log2e * fabsf(x));
    const float s = t * reciprocal(2.0f + t), s2 = s * s;
    float p = 0.14083151519298553f;
    p = fmaf(p, s2, 0.13981635868549347f);
    p = fmaf(p, s2, 0.2001236230134964f);
    p = fmaf(p, s2, 0.3333315849304199f);
    p = fmaf(p, s2, 1.0f);
    return fmaf(2.0f * s, p, fmaxf(x, 0.0f));
}

// Sum over the warp, the same bits in every lane.
__device__ __forceinline__ float warp_sum(float x)
{
#pragma unroll
    for (int mask = warp_size / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}

}  // namespace vimcore::device
