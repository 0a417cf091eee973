// SPDX-License-Identifier: Apache-2.0
// Calls that compute nothing and only take their scratch memory, in an arena that counts: how much a call needs is what
// its own code takes. Nothing that a tensor points at is read or written.
#pragma once

#include <algorithm>
#include <stdexcept>

#include "core/backend.h"

namespace vimcore {

// Base: a backend whose operators take scratch memory and, in a context that counts, nothing else.
template <class Base>
class Counting final : public Base {
public:
    using Base::Base;

    void run(Context&, void (*program)(void*), void* context) override { program(context); }
    // The first and the last stand for all: worker_of() has no others.
    void run_workers(Context&, int count, void (*body)(void*, int), void* context) override
    {
        if (count > 0) body(context, 0);
        if (count > 1) body(context, count - 1);
    }
    void* allocate(std::size_t, int) override { throw std::logic_error("[plan] memory where only sizes are counted"); }
    void release(void*, int) noexcept override {}
    void upload(Context&, const void*, const Tensor&) override {}
    void download(Context&, const Tensor&, void*) override {}
    void copy(Context&, const Tensor&, const Tensor&) override {}
    void fill_zero(Context&, const Tensor&) override {}
    void change_stream(Context&, void*, void*) override {}
    std::shared_ptr<void> mark(Context&) override { return nullptr; }
    void await(Context&, void*) override {}
    std::uint64_t recording(Context&) override { return 0; }
    std::shared_ptr<void> make_stream(int) override { return nullptr; }
    std::shared_ptr<void> record(Context&, void (*)(void*), void*) override { return nullptr; }
    void replay(Context&, void*) override {}
};

// Counts in place of the device's backend, which need not be there. product_bytes: what a product of matrices may take
// from a library; the CPU has none.
std::unique_ptr<Backend> counting_backend(Device device, std::size_t product_bytes);
std::unique_ptr<Backend> counting_cpu();

// f(i) for i = begin, begin + step, ... below end. Where memory is counted, only for the first, middle and last few:
// the others take as much as their neighbours.
template <class F>
void for_each_step(Context& ctx, std::int64_t begin, std::int64_t end, std::int64_t step, F&& f)
{
    const std::int64_t count = end > begin ? (end - begin - 1) / step + 1 : 0, middle = count / 2;
    for (std::int64_t i = 0; i < count; i++) {
        if (counts(ctx)) {
            if (i > 1) i = std::max(i, std::min(middle - 1, count - 2));
            if (i > middle + 1) i = std::max(i, count - 2);
        }
        f(begin + i * step);
    }
}

}  // namespace vimcore
