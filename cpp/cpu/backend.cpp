// SPDX-License-Identifier: Apache-2.0
// Services of the CPU: memory, copies, and what only devices with streams have.
#include "cpu_backend.h"

#include <sys/mman.h>

#include <stdexcept>
#include <string>

#include "core/counting.h"
#include "vimcore/error.h"

namespace vimcore {

Backend& cpu_backend()
{
    static auto& backend = *new cpu::CpuBackend;  // never destroyed: memory may be given back at any time
    return backend;
}

std::unique_ptr<Backend> counting_cpu() { return std::make_unique<Counting<cpu::CpuBackend>>(); }

namespace cpu {

void* CpuBackend::allocate(std::size_t bytes, int)
{
    // Large blocks in huge pages: a small page costs microseconds at its first use, and a TLB entry ever after.
    constexpr std::size_t huge = std::size_t{2} << 20;
    const std::size_t alignment = bytes < huge ? 64 : huge;
    void* memory = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
    if (!memory) throw OutOfMemory("[buffer] out of memory: " + std::to_string(bytes) + " bytes");
#ifdef MADV_HUGEPAGE
    if (alignment == huge) (void)::madvise(memory, bytes, MADV_HUGEPAGE);  // only advice
#endif
    return memory;
}

void CpuBackend::copy(Context& ctx, const Tensor& from, const Tensor& to)
{
    if (from.dtype == to.dtype) {
        std::memcpy(to.data, from.data, to.bytes());
        return;
    }
    for (const DType dtype : {from.dtype, to.dtype})
        if (dtype != DType::f32 && dtype != DType::f64 && dtype != DType::bf16)
            throw std::invalid_argument("[copy] to: expected " + describe(from) + ", got " + describe(to));
    constexpr Index piece = 1 << 14;
    dispatch(from.dtype, [&](auto source) {
        dispatch(to.dtype, [&](auto target) {
            using From = decltype(source);
            using To = decltype(target);
            const Index count = to.numel();
            parallel_for(ctx, ceil_div(count, piece), [&](Index task) {
                const Index end = std::min(count, (task + 1) * piece);
                const From* x = from.as<From>();
                To* y = to.as<To>();
                for (Index i = task * piece; i < end; i++)
                    y[i] = To(static_cast<Wide<To>>(static_cast<Wide<From>>(x[i])));
            });
        });
    });
}

void CpuBackend::change_stream(Context&, void*, void*)
{
    throw std::invalid_argument("[context] stream: the cpu has none");
}

std::shared_ptr<void> CpuBackend::record(Context&, void (*)(void*), void*)
{
    throw std::invalid_argument("[context] record: the cpu has no streams to record");
}

void CpuBackend::replay(Context&, void*) { throw std::invalid_argument("[context] replay: the cpu has no streams"); }

}  // namespace cpu
}  // namespace vimcore
