// SPDX-License-Identifier: Apache-2.0
#include "vimcore/build_info.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>

#include "isa.h"
#include "threads.h"
#include "vimcore/image.h"
#include "vimcore/version.h"

namespace vimcore {

BuildInfo build_info()
{
    BuildInfo info;
    info.version = VIMCORE_VERSION;
#if defined(__clang__)
    info.compiler = "clang " __clang_version__;
#elif defined(__GNUC__)
    info.compiler = "gcc " __VERSION__;
#else
    info.compiler = "unknown";
#endif
    info.isa = cpu::isa_in_use();
    info.isas = cpu::isas_built();
#if defined(VIMCORE_CUDA)
    info.cuda = true;
#endif
    info.jpeg = has_jpeg();
    info.png = has_png();
#if defined(VIMCORE_OPENMP)
    info.openmp = true;
#endif
    return info;
}

std::string bf16_unit() { return cpu::bf16_in_use(); }
std::string bf16_refusal() { return cpu::bf16_missing(); }

namespace {

template <class T>
double peak(const char* op, int threads)
{
    if (threads < 1)
        throw std::invalid_argument(std::string("[") + op + "] threads: expected 1 or more, got " +
                                    std::to_string(threads));
    using Clock = std::chrono::steady_clock;
    const auto& kernel = cpu::kernels<T>();
    constexpr cpu::Index rounds = 200000;
    double best = 0;
    for (int repeat = 0; repeat < 9; repeat++) {
        const auto start = Clock::now();
        cpu::parallel_for(threads, threads, [&](std::int64_t) { kernel.fma_peak(rounds); });
        const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
        best =
            std::max(best, static_cast<double>(threads) * static_cast<double>(rounds * kernel.fma_per_round) / seconds);
    }
    return best * 1e-9;
}

}  // namespace

double fma_peak(int threads) { return peak<float>("fma_peak", threads); }
double bf16_peak(int threads) { return peak<cpu::bf16>("bf16_peak", threads); }

}  // namespace vimcore
