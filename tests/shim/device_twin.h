// SPDX-License-Identifier: Apache-2.0
// Host twins of the device-only part of cuda/device.cuh, with the checks of engine.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "engine.h"

namespace vimcore::device {

// ---- special functions: subnormals count as zero -------------------------------------------------------------------
inline float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
inline float exp2(float x)
{
    const float input = flush(x), y = flush(std::exp2(input));
    return shim::ulp_seed == 0 || input == 0 ? y : flush(shim::off_by_ulps(input, y));
}
inline float log2(float x) { return flush(std::log2(flush(x))); }
inline float reciprocal(float x)
{
    const float input = flush(x), y = flush(1.0f / input);
    return shim::ulp_seed == 0 ? y : flush(shim::off_by_ulps(input, y));
}

// ---- global memory -------------------------------------------------------------------------------------------------
template <int N, class T>
Vec<T, N> load(const T* from, shim::Where where = shim::Where::current())
{
    shim::check_alignment(from, sizeof(Vec<T, N>), "load", where);
    Vec<T, N> value;
    std::memcpy(&value, from, sizeof(value));
    return value;
}
template <int N, class T>
void store(T* to, const Vec<T, N>& value, shim::Where where = shim::Where::current())
{
    shim::check_alignment(to, sizeof(value), "store", where);
    std::memcpy(to, &value, sizeof(value));
}
inline void assume_global(const void*) {}
inline void renew(int&) {}

// ---- shared memory -------------------------------------------------------------------------------------------------
// What s[i] is: reads and writes go through the checks.
template <class T>
class Element {
public:
    explicit Element(T* at) : at_(at) {}
    Element(const Element&) = default;
    operator T() const
    {
        shim::read_shared(at_, sizeof(T));
        return *at_;
    }
    const Element& operator=(T value) const
    {
        shim::write_shared(at_, sizeof(T));
        *at_ = value;
        return *this;
    }
    const Element& operator=(const Element& other) const { return *this = static_cast<T>(other); }
    const Element& operator+=(T value) const { return *this = static_cast<T>(*this) + value; }
    const Element& operator-=(T value) const { return *this = static_cast<T>(*this) - value; }
    const Element& operator*=(T value) const { return *this = static_cast<T>(*this) * value; }

private:
    T* at_;
};

template <class T>
class Shared {
public:
    static_assert(sizeof(T) >= 2 && std::is_trivially_copyable_v<T>);
    Shared(T* data, int count) : data_(data), count_(count) {}
    Element<T> operator[](int i) const { return Element<T>(address(i)); }
    template <int N>
    Vec<T, N> load(int i, shim::Where where = shim::Where::current()) const
    {
        const T* from = vector<N>(i, where);
        shim::read_shared(from, sizeof(Vec<T, N>));
        Vec<T, N> value;
        std::memcpy(&value, from, sizeof(value));
        return value;
    }
    template <int N>
    void store(int i, const Vec<T, N>& value, shim::Where where = shim::Where::current()) const
    {
        T* to = vector<N>(i, where);
        shim::write_shared(to, sizeof(value));
        std::memcpy(to, &value, sizeof(value));
    }
    T* address(int i, int elements = 1) const
    {
        if (i < 0 || elements > count_ - i) shim::fail_index(i, elements, count_);
        return data_ + i;
    }

private:
    template <int N>
    T* vector(int i, const shim::Where& where) const
    {
        T* at = address(i, N);
        shim::check_alignment(at, sizeof(Vec<T, N>), "vector access to shared memory", where);
        return at;
    }

    T* data_;
    int count_;
};

template <class T>
Shared<T> shared(int offset, int count, shim::Where where = shim::Where::current())
{
    auto* memory = shim::shared_memory(offset, static_cast<std::int64_t>(count) * static_cast<int>(sizeof(T)), where);
    return Shared<T>(reinterpret_cast<T*>(memory), count);
}

template <int Bytes, class T>
void cp_async(Shared<T> to, int index, const T* from, bool valid, shim::Where where = shim::Where::current())
{
    static_assert((Bytes == 4 || Bytes == 8 || Bytes == 16) && Bytes % sizeof(T) == 0);
    T* const address = to.address(index, Bytes / static_cast<int>(sizeof(T)));
    shim::check_alignment(address, Bytes, "cp_async to shared memory", where);
    shim::check_alignment(from, Bytes, "cp_async from global memory", where);
    shim::start_copy(address, valid ? from : nullptr, Bytes);
}
inline void cp_async_commit() { shim::commit_copies(); }
template <int Pending>
void cp_async_wait()
{
    static_assert(Pending >= 0);
    shim::wait_copies(Pending);
}

// ---- products of matrices of bfloat16 by a warp --------------------------------------------------------------------
// Products are exact; of sums a device promises less than one rounding.
inline void multiply_add(float (&d)[4], const Vec<std::uint32_t, 4>& a, const Vec<std::uint32_t, 2>& b,
                         shim::Where where = shim::Where::current())
{
    float own[6];
    std::memcpy(own, a.v, sizeof(a));
    std::memcpy(own + 4, b.v, sizeof(b));
    const auto* all = shim::exchange(own, where);
    const auto half = [](float pair, int i) {
        std::uint32_t bits;
        std::memcpy(&bits, &pair, sizeof(bits));
        bits = i == 0 ? bits << 16 : bits & 0xffff0000u;
        std::memcpy(&pair, &bits, sizeof(bits));
        return static_cast<double>(pair);
    };
    const int g = shim::lane() / 4, q = shim::lane() % 4;
    double sums[4] = {d[0], d[1], d[2], d[3]};
    for (int pair = 0; pair < 8; pair++) {  // each number converted once: whole networks spend their time here
        const float* rows = all[4 * g + pair % 4] + pair / 4 * 2;
        const float columns[2] = {all[8 * q + pair % 4][4 + pair / 4], all[8 * q + 4 + pair % 4][4 + pair / 4]};
        const double a0[2] = {half(rows[0], 0), half(rows[0], 1)}, a1[2] = {half(rows[1], 0), half(rows[1], 1)};
        const double b0[2] = {half(columns[0], 0), half(columns[0], 1)};
        const double b1[2] = {half(columns[1], 0), half(columns[1], 1)};
        for (int k = 0; k < 2; k++) {
            sums[0] += a0[k] * b0[k];
            sums[1] += a0[k] * b1[k];
            sums[2] += a1[k] * b0[k];
            sums[3] += a1[k] * b1[k];
        }
    }
    for (int i = 0; i < 4; i++) {
        const auto y = static_cast<float>(sums[i]);
        d[i] = shim::ulp_seed == 0 ? y : shim::off_by_ulps(y, y);
    }
}

// ---- between threads -----------------------------------------------------------------------------------------------
inline void sync_block(shim::Where where = shim::Where::current()) { shim::block_barrier(where); }
inline void sync_group(int id, int count, shim::Where where = shim::Where::current())
{
    shim::group_barrier(id, count, where);
}
inline void sync_warp(shim::Where where = shim::Where::current()) { shim::warp_barrier(where); }
inline float shuffle_xor(float value, int mask, shim::Where where = shim::Where::current())
{
    return shim::shuffle_xor(value, mask, where);
}

// ---- products of matrices by a warp --------------------------------------------------------------------------------
inline float tf32(float x)  // what the multiplier sees of x
{
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    bits &= tf32_bits;
    std::memcpy(&x, &bits, sizeof(bits));
    return x;
}
inline void multiply_add(float (&d)[4], float a0, float a1, float a2, float a3, float b0, float b1,
                         shim::Where where = shim::Where::current())
{
    const float own[] = {tf32(a0), tf32(a1), tf32(a2), tf32(a3), tf32(b0), tf32(b1)};
    const auto* all = shim::exchange(own, where);
    const int g = shim::lane() / 4, q = shim::lane() % 4;
    for (int i = 0; i < 4; i++) {
        const int row = 4 * g, column = 4 * (2 * q + i % 2);
        double sum = d[i];
        for (int k = 0; k < 4; k++)
            sum += static_cast<double>(all[row + k][i / 2]) * all[column + k][4] +
                   static_cast<double>(all[row + k][2 + i / 2]) * all[column + k][5];
        d[i] = static_cast<float>(sum);
    }
}

}  // namespace vimcore::device
