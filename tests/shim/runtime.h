// SPDX-License-Identifier: Apache-2.0
// What the parts of the fake runtime share, and what tests may ask it. Device memory is what cudaMalloc gave;
// VIMCORE_SHIM_FOREIGN=1 accepts other memory as well.
#pragma once

#include <functional>
#include <mutex>
#include <string>

#include "architecture.h"
#include "cuda_runtime.h"
#include "engine.h"

namespace vimcore::shim {

// The GPU whose limits launches are held to: 90 unless VIMCORE_SHIM_ARCH says otherwise, of architecture.h.
const Architecture& architecture();
void set_architecture(int number);
// Registers that a thread of any kernel may have: 255, since only nvcc knows. So no block has more than 256 threads.
void set_registers(int of_thread);
int device_count();           // 2 unless VIMCORE_SHIM_DEVICES says otherwise
std::int64_t allocations();   // calls of cudaMalloc so far
std::int64_t launches();      // kernels run so far
std::size_t most_memory();    // bytes of cudaMalloc at the most since the last call
std::size_t device_memory();  // bytes of a device: 8 GiB, unless
void set_device_memory(std::size_t bytes);

// Remembers the error and why it came; returns it.
cudaError_t remember_error(cudaError_t code, std::string why);
template <class... T>
cudaError_t error(cudaError_t code, const T&... why)
{
    return remember_error(code, join(why...));
}
int current_device();
// An error in the child of a process that used the runtime before it was forked.
cudaError_t check_process();
std::mutex& state_lock();

// An error for calls that may not be made while a stream is being captured, cudaSuccess otherwise. state_lock() is
// held.
cudaError_t allow_unsafe(const char* call);
// Runs `work` as if queued on the stream, or adds it to the graph that the stream is being captured into.
// Exported to tests/cuda/fake_cublaslt.cpp.
[[gnu::visibility("default")]] cudaError_t submit(cudaStream_t stream, std::function<void()> work);
// Whether work runs late, drawn from which seed (0: at once); VIMCORE_SHIM_LATE sets it at the start.
void set_late(std::uint64_t seed);
// Ends all work that was queued. Not under state_lock().
void run_everything();

}  // namespace vimcore::shim
