// SPDX-License-Identifier: Apache-2.0
// Recording and replaying on the fake runtime for the tests in Python, which load the extension with ctypes.
#include <stdexcept>

#include "runtime.h"

namespace {

void check(cudaError_t status)
{
    if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

}  // namespace

extern "C" {

[[gnu::visibility("default")]] void* vimcore_shim_begin()  // a stream that is being captured
{
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    return stream;
}

[[gnu::visibility("default")]] void* vimcore_shim_end(void* stream)  // what was recorded
{
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    check(cudaStreamEndCapture(static_cast<cudaStream_t>(stream), &graph));
    check(cudaGraphInstantiate(&exec, graph));
    check(cudaGraphDestroy(graph));
    return exec;
}

[[gnu::visibility("default")]] void vimcore_shim_replay(void* exec)
{
    check(cudaGraphLaunch(static_cast<cudaGraphExec_t>(exec), nullptr));
    check(cudaStreamSynchronize(nullptr));
}

[[gnu::visibility("default")]] long long vimcore_shim_used_bytes()
{
    std::size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total));
    return static_cast<long long>(total - free);
}

[[gnu::visibility("default")]] void vimcore_shim_set_memory(long long bytes)  // of a device
{
    vimcore::shim::set_device_memory(static_cast<std::size_t>(bytes));
}

}  // extern "C"
