// SPDX-License-Identifier: Apache-2.0
// Errors of CUDA calls and launches. A kernel that fails is reported by some later call; so that the message can still
// say which it may have been, every thread remembers the last kernels that it launched.
#include "launch.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <string>

#include "vimcore/error.h"

#ifndef VIMCORE_CUDA_ARCHITECTURES
#define VIMCORE_CUDA_ARCHITECTURES "unknown"
#endif

namespace vimcore::cuda {

namespace {

struct Launched {
    std::array<const char*, 4> kernel{};
    std::size_t count = 0;
};
thread_local Launched launched;

std::string last_launched()
{
    std::string text;
    for (std::size_t i = 0; i < std::min(launched.count, launched.kernel.size()); i++)
        text += (i ? ", " : "") + std::string(launched.kernel[(launched.count - 1 - i) % launched.kernel.size()]);
    return text.empty() ? "nothing by this thread" : text;
}

std::string describe(cudaError_t status)
{
    return std::string(cudaGetErrorString(status)) + " (" + cudaGetErrorName(status) + ")";
}

std::string place(const char* file, int line)
{
    const char* slash = std::strrchr(file, '/');
    return std::string(" [") + (slash ? slash + 1 : file) + ":" + std::to_string(line) + "]";
}

// Errors that a kernel leaves behind and any later call returns.
bool left_by_a_kernel(cudaError_t status)
{
    switch (status) {
        case cudaErrorIllegalAddress:
        case cudaErrorMisalignedAddress:
        case cudaErrorInvalidAddressSpace:
        case cudaErrorIllegalInstruction:
        case cudaErrorInvalidPc:
        case cudaErrorHardwareStackError:
        case cudaErrorLaunchFailure:
        case cudaErrorLaunchTimeout:
        case cudaErrorAssert:
        case cudaErrorECCUncorrectable:
            return true;
        default:
            return false;
    }
}

bool synchronous()
{
    static const bool wanted = [] {
        const char* value = std::getenv("VIMCORE_CUDA_SYNC");
        return value && *value && std::strcmp(value, "0") != 0;
    }();
    return wanted;
}

bool capturing(cudaStream_t stream)
{
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    return cudaStreamIsCapturing(stream, &status) != cudaSuccess || status != cudaStreamCaptureStatusNone;
}

// What to do about it, for errors whose name does not say.
std::string remedy(cudaError_t status)
{
    if (left_by_a_kernel(status))
        return "; a kernel launched earlier failed, last launched: " + last_launched() +
               "; VIMCORE_CUDA_SYNC=1 names the one that fails. The process must be restarted to use the device again";
    if (status == cudaErrorInitializationError) return forked_remedy;
    if (status == cudaErrorNoKernelImageForDevice)
        return "; this build has kernels for the architectures " VIMCORE_CUDA_ARCHITECTURES
               ", build with -DCMAKE_CUDA_ARCHITECTURES for others";
    if (status == cudaErrorStreamCaptureUnsupported || status == cudaErrorStreamCaptureImplicit)
        return "; run once with the same sizes before capturing a graph";
    int devices = 0;
    if (status == cudaErrorInvalidDevice && cudaGetDeviceCount(&devices) == cudaSuccess)
        return "; devices 0 to " + std::to_string(devices - 1) + " are there";
    return {};
}

}  // namespace

void check(cudaError_t status, const char* call, const char* file, int line)
{
    if (status == cudaSuccess) return;
    (void)cudaGetLastError();  // so that the next call does not return this error again
    throw Error("[cuda] " + std::string(call) + ": " + describe(status) + remedy(status) + place(file, line));
}

void after_launch(cudaError_t status, const char* kernel, const char* file, int line, cudaStream_t stream)
{
    const bool left_behind = left_by_a_kernel(status);
    if (!left_behind) launched.kernel[launched.count++ % launched.kernel.size()] = kernel;
    if (status == cudaSuccess) {
        if (!synchronous() || capturing(stream)) return;
        status = cudaStreamSynchronize(stream);
        if (status == cudaSuccess) return;
        (void)cudaGetLastError();
        throw Error("[cuda] kernel " + std::string(kernel) + " failed: " + describe(status) + place(file, line));
    }
    (void)cudaGetLastError();
    throw Error("[cuda] kernel " + std::string(kernel) + (left_behind ? " was not launched: " : ": ") +
                describe(status) + remedy(status) + place(file, line));
}

void allow_shared_memory(const void* kernel, std::size_t bytes)
{
    static std::shared_mutex mutex;
    static std::map<std::pair<int, const void*>, std::size_t> allowed;
    int device = 0;
    VIM_CUDA(cudaGetDevice(&device));
    const std::pair key{device, kernel};
    {
        std::shared_lock lock(mutex);
        const auto found = allowed.find(key);
        if (found != allowed.end() && found->second >= bytes) return;
    }
    int limit = 0;
    VIM_CUDA(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    if (bytes > static_cast<std::size_t>(limit))
        throw Error("[cuda] a kernel needs " + std::to_string(bytes) + " bytes of shared memory, device " +
                    std::to_string(device) + " grants a block " + std::to_string(limit));
    std::unique_lock lock(mutex);
    std::size_t& largest = allowed[key];
    if (largest >= bytes) return;  // another thread was here, with more: less would lower it
    VIM_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
    largest = bytes;
}

DeviceGuard::DeviceGuard(int device)
{
    int current = 0;
    VIM_CUDA(cudaGetDevice(&current));
    if (current == device) return;
    VIM_CUDA(cudaSetDevice(device));
    before_ = current;
}

DeviceGuard::~DeviceGuard()
{
    if (before_ >= 0) (void)cudaSetDevice(before_);
}

}  // namespace vimcore::cuda
