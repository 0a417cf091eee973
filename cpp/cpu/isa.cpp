// SPDX-License-Identifier: Apache-2.0
#include "isa.h"

#include <cstdlib>
#if defined(VIMCORE_HAVE_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(VIMCORE_HAVE_NEONBF16)
#include <sys/auxv.h>
#endif

#include "vimcore/error.h"

namespace vimcore::cpu {
namespace {

[[maybe_unused]] bool always() { return true; }
#if defined(VIMCORE_HAVE_AVX2)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif
#if defined(VIMCORE_HAVE_AVX512)
bool has_avx512()
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}
#endif
#if defined(VIMCORE_HAVE_AVX512BF16)
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

#if defined(VIMCORE_HAVE_AMX)
// The processor, and the system's permission for this process, asked for once: without it a tile is a fault.
bool has_amx()
{
    static const bool granted = [] {
        unsigned a = 0, b = 0, c = 0, d = 0;
        constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
        if (!has_avx512bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
        if ((d & amx_bf16) == 0 || (d & amx_tile) == 0) return false;
#if defined(__linux__)
        constexpr long request_permission = 0x1023, tile_data = 18;
        return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
        return false;
#endif
    }();
    return granted;
}
#endif
#if defined(VIMCORE_HAVE_NEONBF16)
bool has_neonbf16()
{
#if defined(__linux__) && defined(HWCAP2_BF16)
    return (getauxval(AT_HWCAP2) & HWCAP2_BF16) != 0 && (getauxval(AT_HWCAP) & HWCAP_ASIMDHP) != 0;
#else
    return false;
#endif
}
#endif

struct Entry {
    const char* name;
    bool (*available)();
    const Kernels<float>* (*f32)();
    const Kernels<double>* (*f64)();
    const Kernels<bf16>* (*b16)();
    bool bf16_unit;  // else bf16 is emulated
};

constexpr Entry entries[] = {
// widest last
#if defined(VIMCORE_HAVE_BASELINE)
    {"baseline", always, kernels_baseline<float>, kernels_baseline<double>, kernels_baseline<bf16>, false},
#endif
#if defined(VIMCORE_HAVE_NEON)
    {"neon", always, kernels_neon<float>, kernels_neon<double>, kernels_neon<bf16>, false},
#endif
#if defined(VIMCORE_HAVE_NEONBF16)
    {"neonbf16", has_neonbf16, kernels_neon<float>, kernels_neon<double>, kernels_neonbf16<bf16>, true},
#endif
#if defined(VIMCORE_HAVE_AVX2)
    {"avx2", has_avx2, kernels_avx2<float>, kernels_avx2<double>, kernels_avx2<bf16>, false},
#endif
#if defined(VIMCORE_HAVE_AVX512)
    {"avx512", has_avx512, kernels_avx512<float>, kernels_avx512<double>, kernels_avx512<bf16>, false},
#endif
#if defined(VIMCORE_HAVE_AVX512BF16)
    {"avx512bf16", has_avx512bf16, kernels_avx512<float>, kernels_avx512<double>, kernels_avx512bf16<bf16>, true},
#endif
#if defined(VIMCORE_HAVE_AMX)
    {"amx", has_amx, kernels_avx512<float>, kernels_avx512<double>, kernels_amx<bf16>, true},
#endif
};

std::string joined(const std::vector<std::string>& names)
{
    std::string text;
    for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
    return text;
}

const Entry& find(const std::string& isa)  // "": the widest
{
    const Entry* found = nullptr;
    for (const Entry& entry : entries)
        if ((isa.empty() || entry.name == isa) && entry.available()) found = &entry;
    if (!found)
        throw Error("[isa] " + isa + " is not available; built: " + joined(isas_built()) +
                    "; this machine can run: " + joined(isas_available()));
    return *found;
}

const Entry& chosen()
{
    static const Entry& entry = []() -> const Entry& {
        const char* wanted = std::getenv("VIMCORE_ISA");
        return find(wanted ? wanted : "");
    }();
    return entry;
}

bool isa_named() { return std::getenv("VIMCORE_ISA") != nullptr; }

template <class T>
const Kernels<T>& table(const Entry& entry)
{
    if constexpr (sizeof(T) == sizeof(bf16))
        return *entry.b16();
    else if constexpr (sizeof(T) == sizeof(float))
        return *entry.f32();
    else
        return *entry.f64();
}

}  // namespace

template <class T>
const Kernels<T>& kernels()
{
    static const Kernels<T>& of_choice = table<T>(chosen());
    return of_choice;
}
template <class T>
const Kernels<T>& kernels(const std::string& isa)
{
    return table<T>(find(isa));
}
template <>
const Kernels<bf16>& kernels<bf16>()
{
    static const Kernels<bf16>& of_choice = []() -> const Kernels<bf16>& {
        if (const std::string why = bf16_missing(); !why.empty()) throw Error("[isa] " + why);
        return table<bf16>(chosen());
    }();
    return of_choice;
}
template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();
template const Kernels<float>& kernels<float>(const std::string& isa);
template const Kernels<double>& kernels<double>(const std::string& isa);
template const Kernels<bf16>& kernels<bf16>(const std::string& isa);

std::string isa_in_use() { return chosen().name; }

std::string bf16_in_use()
{
    if (chosen().bf16_unit) return chosen().name;
    return isa_named() ? "emulated" : "";
}

std::string bf16_missing()
{
    if (!bf16_in_use().empty()) return "";
    return "bf16 needs a CPU with amx_bf16, avx512_bf16 or (ARM) bf16: take float32, or VIMCORE_ISA=" + isa_in_use() +
           " for an exact but slow emulation";
}

std::vector<std::string> isas_built()
{
    std::vector<std::string> names;
    for (const Entry& entry : entries) names.push_back(entry.name);
    return names;
}

std::vector<std::string> isas_available()
{
    std::vector<std::string> names;
    for (const Entry& entry : entries)
        if (entry.available()) names.push_back(entry.name);
    return names;
}

std::vector<std::string> isas_of_float()
{
    std::vector<std::string> names = isas_available();
    std::erase_if(names, [](const std::string& name) { return kernels<float>(name).isa != name; });
    return names;
}

}  // namespace vimcore::cpu
