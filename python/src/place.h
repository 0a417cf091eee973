// SPDX-License-Identifier: Apache-2.0
// Where a call from Python computes, and the contexts that such calls share.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <string>
#include <utility>

#include "convert.h"
#include "reusable.h"

namespace vimcore::python {

// threads: on the CPU, 0 for all. On CUDA the stream, as the integer that torch and CuPy give, and whether it is being
// captured into a graph.
struct Place {
    int threads = 0;
    std::uintptr_t stream = 0;
    bool capturing = false;
};

// A context is reused by calls on the same device and stream only: there, what still runs in its scratch memory comes
// before what the next call queues. A captured graph runs again in the scratch memory of the call that was captured,
// beside anything else, so that context is never used again.
class Contexts {
public:
    class Lease {
    public:
        Lease(Contexts& all, Device device, const Place& place)
            : all_(all),
              contexts_(all.of(device, place.stream)),
              place_(place),
              context_(contexts_.take([&] { return std::make_unique<Context>(device); }))
        {
            context_->set_threads(place.threads);
            if (device.type == Device::Type::cpu) return;
            context_->hold_memory(place.capturing);
            context_->set_stream(reinterpret_cast<void*>(place.stream));
        }
        Lease(const Lease&) = delete;
        Lease& operator=(const Lease&) = delete;
        ~Lease()
        {
            if (place_.capturing)
                all_.captured_.give(std::move(context_));
            else
                contexts_.give(std::move(context_));
        }
        Context& operator*() { return *context_; }

    private:
        Contexts& all_;
        Reusable<Context>& contexts_;
        Place place_;
        std::unique_ptr<Context> context_;
    };

    // Frees all scratch memory. Graphs captured before must not run again.
    void clear()
    {
        std::lock_guard lock(mutex_);
        for (auto& [key, pool] : by_place_) pool.clear();
        captured_.clear();
    }

private:
    Reusable<Context>& of(Device device, std::uintptr_t stream)
    {
        std::lock_guard lock(mutex_);
        return by_place_[{device.type == Device::Type::cpu ? -1 : device.index, stream}];
    }

    std::mutex mutex_;
    std::map<std::pair<int, std::uintptr_t>, Reusable<Context>> by_place_;
    Reusable<Context> captured_;
};

// Never destroyed: threads may still run when the interpreter ends.
inline Contexts& contexts()
{
    static auto* all = new Contexts;
    return *all;
}

// A warning of Python, once a process: cuBLASLt had no algorithm for a product.
inline void warn_of_slow_products()
{
    static std::atomic<bool> warned = false;
    if (warned) return;
    const CudaProducts products = cuda_products();
    if (products.built_in == 0 || warned.exchange(true)) return;
    const std::string text =
        "cuBLASLt has no algorithm for a product of matrices (" + products.first_built_in +
        "): a built-in kernel computes it, many times slower. vimcore.build_info() counts such products";
    if (PyErr_WarnEx(PyExc_RuntimeWarning, text.c_str(), 1) < 0) throw nb::python_error();
}

// Runs f(context) with the GIL released.
template <class F>
void with_context(Device device, const Place& place, F&& f)
{
    {
        Contexts::Lease context(contexts(), device, place);
        const nb::gil_scoped_release release;
        f(*context);
    }
    if (device.type == Device::Type::cuda) warn_of_slow_products();
}

}  // namespace vimcore::python
