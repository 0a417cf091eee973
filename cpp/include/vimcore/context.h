// SPDX-License-Identifier: Apache-2.0
// Context: where and how to compute. Device, threads and scratch memory; one per concurrent caller.
#pragma once

#include <memory>
#include <vector>

#include "vimcore/tensor.h"

namespace [[gnu::visibility("default")]] vimcore {

class Arena;
class Backend;
class WeightCache;

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

    // The index-th of some single-threaded contexts for parallel work on parts of a batch; made at first use.
    Context& worker(int index);
    Arena& arena() { return *arena_; }  // scratch of the running call
    Backend& backend() { return *backend_; }
    WeightCache* cache = nullptr;  // packed weights of the running call, or none
    bool training = false;         // the running call is the forward or the backward of a training step

    // Tokens that one operator call works on at most. Results do not depend on it.
    std::int64_t tile = 0;  // 0: chosen by the backend

private:
    Device device_;
    int threads_;
    void* stream_ = nullptr;
    Backend* backend_;
    std::unique_ptr<Arena> arena_;
    std::vector<std::unique_ptr<Context>> workers_;
};

}  // namespace vimcore
