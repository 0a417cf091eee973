// SPDX-License-Identifier: Apache-2.0
// Activations in memory, floats in registers: elements that lie side by side are read and written in vectors of 16
// bytes at most, where sizes and addresses allow it.
#pragma once

#include <initializer_list>

#include "device.cuh"
#include "launch.h"

namespace vimcore::cuda {

// Elements of T in 16 bytes.
template <class T>
inline constexpr int full_vector = 16 / static_cast<int>(sizeof(T));

using device_scratch::aligned;

// Threads of a block and blocks for `count` threads in a row.
inline constexpr int flat_block = 128;
inline dim3 flat_grid(Index count) { return {static_cast<unsigned>(ceil_div(count, flat_block)), 1, 1}; }

}  // namespace vimcore::cuda

namespace vimcore::device {

template <int N>
struct Floats {
    float v[N];
    __device__ float& operator[](int i) { return v[i]; }
    __device__ const float& operator[](int i) const { return v[i]; }
};

template <int N, class T>
__device__ __forceinline__ Floats<N> load_floats(const T* from)
{
    constexpr int step = N * static_cast<int>(sizeof(T)) <= 16 ? N : 16 / static_cast<int>(sizeof(T));
    Floats<N> to;
#pragma unroll
    for (int i = 0; i < N; i += step) {
        const Vec<T, step> part = load<step>(from + i);
#pragma unroll
        for (int j = 0; j < step; j++) to[i + j] = to_float(part[j]);
    }
    return to;
}

template <int N, class T>
__device__ __forceinline__ void store_floats(T* to, const Floats<N>& value)
{
    constexpr int step = N * static_cast<int>(sizeof(T)) <= 16 ? N : 16 / static_cast<int>(sizeof(T));
#pragma unroll
    for (int i = 0; i < N; i += step) {
        Vec<T, step> part;
#pragma unroll
        for (int j = 0; j < step; j++) part[j] = from_float<T>(value[i + j]);
        store<step>(to + i, part);
    }
}

// An activation or a wide tensor: which of the two is known at run time.
template <class T>
struct Either {
    void* data;
    bool wide;

    template <int N>
    __device__ __forceinline__ Floats<N> load(std::int64_t i) const
    {
        return wide ? load_floats<N>(static_cast<const float*>(data) + i)
                    : load_floats<N>(static_cast<const T*>(data) + i);
    }
    template <int N>
    __device__ __forceinline__ void store(std::int64_t i, const Floats<N>& value) const
    {
        if (wide)
            store_floats<N>(static_cast<float*>(data) + i, value);
        else
            store_floats<N>(static_cast<T*>(data) + i, value);
    }
};

// Number of this thread within a grid of one axis.
__device__ __forceinline__ std::int64_t flat_index()
{
    return static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

}  // namespace vimcore::device
