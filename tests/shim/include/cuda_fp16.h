// SPDX-License-Identifier: Apache-2.0
// float16 on the host: the type and its conversions, round to nearest even, every NaN becomes 0x7fff (0x7fffffff).
#pragma once

#include <bit>
#include <cstdint>

#include "cuda_runtime.h"

struct __half_raw {
    unsigned short x;
};

struct __half {
    unsigned short __x;

    __half() = default;
    __half(__half_raw raw) : __x(raw.x) {}
    __half(float value) : __x(round(value)) {}
    operator float() const
    {
        const std::uint32_t sign = std::uint32_t{__x & 0x8000u} << 16, magnitude = __x & 0x7fffu;
        if (magnitude > 0x7c00) return std::bit_cast<float>(0x7fffffffu);
        if (magnitude == 0x7c00) return std::bit_cast<float>(sign | 0x7f800000u);
        if (magnitude < 0x400) {  // subnormal: multiples of 2^-24, exact
            const float value = static_cast<float>(magnitude) * 0x1p-24f;
            return sign ? -value : value;
        }
        return std::bit_cast<float>(sign | ((magnitude << 13) + (112u << 23)));
    }

private:
    static unsigned short round(float value)
    {
        const auto bits = std::bit_cast<std::uint32_t>(value);
        const std::uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
        if (magnitude > 0x7f800000u) return 0x7fff;
        if (magnitude >= 0x477ff000u) return static_cast<unsigned short>(sign | 0x7c00u);  // 65520 and above: infinity
        if (magnitude < 0x38800000u) {
            // Below 2^-14: 0.5 has its last bit at 2^-24, so that adding it rounds there.
            const float sum = std::bit_cast<float>(magnitude) + 0.5f;
            return static_cast<unsigned short>(sign | (std::bit_cast<std::uint32_t>(sum) - 0x3f000000u));
        }
        return static_cast<unsigned short>(sign | ((magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1)) >> 13));
    }
};

inline float __half2float(__half value) { return value; }
inline __half __float2half_rn(float value) { return value; }
inline unsigned short __half_as_ushort(__half value) { return value.__x; }
inline __half __ushort_as_half(unsigned short bits) { return __half_raw{bits}; }
