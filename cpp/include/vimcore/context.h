// SPDX-License-Identifier: Apache-2.0
// Context: where and how to compute. Device, threads and scratch memory; one per concurrent caller.
#pragma once

#include <memory>

#include "vimcore/tensor.h"

namespace [[gnu::visibility("default")]] vimcore {

struct ContextInternals;

class Context {
public:
    // threads 0: as many as the machine has cores; at most 1024.
    explicit Context(Device device = Device::cpu(), int threads = 0);
    Context(Context&&) noexcept;
    Context& operator=(Context&&) noexcept;
    ~Context();

    Device device() const { return device_; }
    int threads() const { return threads_; }
    void set_threads(int threads);

    // CUDA: the cudaStream_t that everything is queued on; nullptr is the legacy default stream. What the previous
    // stream still runs in this context's scratch memory is waited for on the new stream.
    void* stream() const { return stream_; }
    void set_stream(void* stream);

    // While held, scratch memory stays where it is: recorded work (a CUDA graph) has its addresses.
    void hold_memory(bool hold);

private:
    friend struct ContextInternals;  // the library's part: scratch memory, backend, the running call
    Context(Device device, int threads, std::unique_ptr<ContextInternals> internals);

    Device device_;
    int threads_;
    void* stream_ = nullptr;
    std::unique_ptr<ContextInternals> internals_;
};

}  // namespace vimcore
