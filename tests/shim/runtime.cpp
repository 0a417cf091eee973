// SPDX-License-Identifier: Apache-2.0
// The fake runtime: errors, devices, memory, launches. Device memory is host memory of exactly the size asked for.
#include "runtime.h"

#include <unistd.h>
#include <algorithm>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <vector>

#include "engine.h"

namespace vimcore::shim {
namespace {

struct Allocation {
    std::size_t bytes;
    int device;
};

Architecture find_architecture(int number)
{
    std::string known;
    for (const Architecture& gpu : architectures) {
        if (gpu.number == number) return gpu;
        known += " " + std::to_string(gpu.number);
    }
    throw Failure(join("VIMCORE_SHIM_ARCH: there is no ", number, ", but", known));
}

struct State {
    std::map<std::uintptr_t, Allocation> memory;
    std::map<const void*, std::size_t> shared;  // of kernels, from cudaFuncSetAttribute
    std::size_t used = 0, most = 0, memory_size = std::size_t{8} << 30;
    Architecture gpu = find_architecture(90);
    int devices = 2, registers = thread_registers;
    bool foreign = false;
    State()
    {
        if (const char* text = std::getenv("VIMCORE_SHIM_ARCH")) gpu = find_architecture(std::atoi(text));
        if (const char* text = std::getenv("VIMCORE_SHIM_DEVICES")) devices = std::atoi(text);
        if (const char* text = std::getenv("VIMCORE_SHIM_FOREIGN")) foreign = std::atoi(text) != 0;
    }
};
State& state()
{
    static State& value = *new State;  // outlives everything that frees device memory
    return value;
}
// cuBLASLt computes on a GPU only: vimcore is to use its own kernels.
[[maybe_unused]] const int no_cublaslt = setenv("VIMCORE_CUBLASLT", "none", 0);

std::atomic<std::int64_t> allocation_count, launch_count;

thread_local cudaError_t last_error = cudaSuccess, explained = cudaSuccess;
thread_local std::string explanation, message;
thread_local int device_in_use = 0;
thread_local const char* next_kernel = nullptr;

// The allocation that holds the address, or null. state_lock() is held.
const std::pair<const std::uintptr_t, Allocation>* find(const void* memory)
{
    const auto address = reinterpret_cast<std::uintptr_t>(memory);
    auto next = state().memory.upper_bound(address);
    if (next == state().memory.begin()) return nullptr;
    --next;
    return address < next->first + next->second.bytes ? &*next : nullptr;
}

// state_lock() is held.
std::size_t free_memory() { return state().memory_size - std::min(state().memory_size, state().used); }

cudaError_t check_range(const void* memory, std::size_t bytes, bool device, const char* name)
{
    const auto* allocation = find(memory);
    if (!allocation && (!device || state().foreign)) return cudaSuccess;
    if (!allocation || !device)
        return error(cudaErrorInvalidValue, name, (device ? " is not device memory" : " is device memory"));
    const std::size_t offset = reinterpret_cast<std::uintptr_t>(memory) - allocation->first;
    if (bytes > allocation->second.bytes - offset)
        return error(cudaErrorInvalidValue, name, ": ", bytes, " bytes at byte ", offset, " of an allocation of ",
                     allocation->second.bytes);
    return cudaSuccess;
}

cudaError_t check_copy(const void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind)
{
    const std::lock_guard lock(state_lock());
    if (kind < cudaMemcpyHostToDevice || kind > cudaMemcpyDeviceToDevice) return error(cudaErrorInvalidValue, "kind");
    if (const cudaError_t status = check_range(to, bytes, (kind & 1) != 0, "the destination")) return status;
    return check_range(from, bytes, (kind & 2) != 0, "the source");
}

cudaError_t check_device(int device)
{
    if (const cudaError_t status = check_process()) return status;
    if (device_count() == 0) return error(cudaErrorNoDevice, "VIMCORE_SHIM_DEVICES");
    if (device >= 0 && device < device_count()) return cudaSuccess;
    return error(cudaErrorInvalidDevice, "device ", device, " of ", device_count());
}

// What the launch asks for beside its grid: a cluster.
cudaError_t check_attributes(const cudaLaunchConfig_t& config)
{
    for (unsigned i = 0; i < config.numAttrs; i++) {
        if (config.attrs[i].id != cudaLaunchAttributeClusterDimension)
            return error(cudaErrorInvalidValue, "launch attribute ", static_cast<int>(config.attrs[i].id));
        const auto& size = config.attrs[i].val.clusterDim;
        const std::uint64_t blocks = std::uint64_t{size.x} * size.y * size.z, most = state().gpu.cluster;
        const dim3 grid = config.gridDim;
        if (blocks == 0 || blocks > most)
            return error(cudaErrorInvalidClusterSize, "a cluster of ", blocks, " blocks, sm_", state().gpu.number,
                         " has clusters of ", most);
        if (grid.x % size.x != 0 || grid.y % size.y != 0 || grid.z % size.z != 0)
            return error(cudaErrorInvalidClusterSize, "the grid is not made of whole clusters");
    }
    return cudaSuccess;
}

cudaError_t check_launch(const cudaLaunchConfig_t& config, const void* kernel)
{
    const dim3 grid = config.gridDim, block = config.blockDim;
    const auto show = [](const dim3& d) { return join("(", d.x, ", ", d.y, ", ", d.z, ")"); };
    if (grid.x == 0 || grid.y == 0 || grid.z == 0)
        return error(cudaErrorInvalidConfiguration, "empty grid ", show(grid));
    if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
        return error(cudaErrorInvalidConfiguration, "grid ", show(grid), " is larger than (2147483647, 65535, 65535)");
    if (block.x == 0 || block.y == 0 || block.z == 0)
        return error(cudaErrorInvalidConfiguration, "empty block ", show(block));
    if (block.x > 1024 || block.y > 1024 || block.z > 64 || std::uint64_t{block.x} * block.y * block.z > 1024)
        return error(cudaErrorInvalidConfiguration, "block ", show(block), " has more than 1024 threads or 64 in z");
    const std::lock_guard lock(state_lock());
    const auto allowed = state().shared.find(kernel);
    const std::size_t limit =
        allowed == state().shared.end() ? granted_shared : std::max(granted_shared, allowed->second);
    if (config.dynamicSmemBytes > limit)
        return error(cudaErrorInvalidValue, config.dynamicSmemBytes, " bytes of shared memory, the kernel may use ",
                     limit, " (cudaFuncSetAttribute)");
    const int threads = static_cast<int>(block.x * block.y * block.z);
    if (resident_blocks(state().gpu, {threads, state().registers, 1, config.dynamicSmemBytes}) == 0)
        return error(cudaErrorLaunchOutOfResources, threads, " threads, which may have ", state().registers,
                     " registers each, and ", config.dynamicSmemBytes, " bytes of shared memory on sm_",
                     state().gpu.number);
    return check_attributes(config);
}

}  // namespace

std::mutex& state_lock()
{
    static std::mutex lock;
    return lock;
}

cudaError_t check_process()
{
    static const pid_t first = getpid();
    return getpid() == first ? cudaSuccess : error(cudaErrorInitializationError, "the process was forked");
}

cudaError_t remember_error(cudaError_t code, std::string why)
{
    last_error = explained = code;
    explanation = std::move(why);
    return code;
}

const Architecture& architecture() { return state().gpu; }
void set_architecture(int number) { state().gpu = find_architecture(number); }
void set_registers(int of_thread) { state().registers = of_thread; }
int device_count() { return state().devices; }
int current_device() { return device_in_use; }
std::int64_t allocations() { return allocation_count; }
std::int64_t launches()
{
    run_everything();
    return launch_count;
}
std::size_t device_memory()
{
    const std::lock_guard lock(state_lock());
    return state().memory_size;
}
void set_device_memory(std::size_t bytes)
{
    const std::lock_guard lock(state_lock());
    state().memory_size = bytes;
}
std::size_t most_memory()
{
    const std::lock_guard lock(state_lock());
    return std::exchange(state().most, state().used);
}
void name_kernel(const char* name) { next_kernel = name; }

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const char* type, std::function<void()> thread)
{
    std::string name = next_kernel ? next_kernel : type;
    next_kernel = nullptr;
    if (const cudaError_t status = check_device(device_in_use)) return status;
    if (const cudaError_t status = check_launch(config, kernel)) return status;
    return submit(config.stream, [launch = Launch{std::move(name), config.gridDim, config.blockDim,
                                                  config.dynamicSmemBytes, std::move(thread)}] {
        launch_count++;
        run(launch);
    });
}

}  // namespace vimcore::shim

using namespace vimcore::shim;

// ---- errors --------------------------------------------------------------------------------------------------------
const char* cudaGetErrorName(cudaError_t code)
{
    switch (code) {
#define VIMCORE_SHIM_NAME(name, value) \
    case name:                         \
        return #name;
        VIMCORE_SHIM_ERRORS(VIMCORE_SHIM_NAME)
    }
    return "unrecognized error code";
}
const char* cudaGetErrorString(cudaError_t code)
{
    message = cudaGetErrorName(code);
    if (code != cudaSuccess && code == explained) message += ": " + explanation;
    return message.c_str();
}
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

// ---- devices -------------------------------------------------------------------------------------------------------
cudaError_t cudaGetDeviceCount(int* count)
{
    *count = 0;
    if (const cudaError_t status = check_process()) return status;
    *count = device_count();
    return *count > 0 ? cudaSuccess : error(cudaErrorNoDevice, "VIMCORE_SHIM_DEVICES");
}
cudaError_t cudaGetDevice(int* device)
{
    *device = device_in_use;
    return check_device(device_in_use);
}
cudaError_t cudaSetDevice(int device)
{
    if (const cudaError_t status = check_device(device)) return status;
    device_in_use = device;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* to, int device)
{
    if (const cudaError_t status = check_device(device)) return status;
    *to = {};
    to->totalGlobalMem = device_memory();
    to->major = architecture().number / 10;
    to->minor = architecture().number % 10;
    to->multiProcessorCount = 4;
    std::snprintf(to->name, sizeof(to->name), "CPU shim, sm_%d", architecture().number);
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device)
{
    cudaDeviceProp p;
    if (const cudaError_t status = cudaGetDeviceProperties(&p, device)) return status;
    *value = attribute == cudaDevAttrComputeCapabilityMajor   ? p.major
             : attribute == cudaDevAttrComputeCapabilityMinor ? p.minor
             : attribute == cudaDevAttrMultiProcessorCount    ? p.multiProcessorCount
                                                              : static_cast<int>(architecture().block_shared);
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version)
{
    *version = 13000;
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { return cudaRuntimeGetVersion(version); }

// ---- memory --------------------------------------------------------------------------------------------------------
cudaError_t cudaMalloc(void** memory, std::size_t bytes)
{
    const std::lock_guard lock(state_lock());
    if (const cudaError_t status = check_device(device_in_use)) return status;
    if (const cudaError_t status = allow_unsafe("cudaMalloc")) return status;
    allocation_count++;
    *memory = nullptr;
    if (bytes == 0) return cudaSuccess;
    if ((running() && bytes > free_memory()) || posix_memalign(memory, 256, bytes))
        return error(cudaErrorMemoryAllocation, bytes, " bytes");
    if (running()) fill_poison(*memory, bytes);
    state().used += bytes;
    state().most = std::max(state().most, state().used);
    state().memory[reinterpret_cast<std::uintptr_t>(*memory)] = {bytes, device_in_use};
    return cudaSuccess;
}
cudaError_t cudaFree(void* memory)
{
    {
        const std::lock_guard lock(state_lock());
        if (const cudaError_t status = allow_unsafe("cudaFree")) return status;
        if (!memory) return cudaSuccess;
    }
    run_everything();  // it waits for the device
    const std::lock_guard lock(state_lock());
    const auto found = state().memory.find(reinterpret_cast<std::uintptr_t>(memory));
    if (found == state().memory.end())
        return error(cudaErrorInvalidValue, "cudaFree: not from cudaMalloc, or freed before");
    state().used -= found->second.bytes;
    state().memory.erase(found);
    std::free(memory);
    return cudaSuccess;
}
cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total)
{
    const std::lock_guard lock(state_lock());
    *total = state().memory_size;
    *free = free_memory();
    return check_device(device_in_use);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t stream)
{
    if (bytes == 0) return cudaSuccess;
    if (const cudaError_t status = check_copy(to, from, bytes, kind)) return status;
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    if (stream && cudaStreamIsCapturing(stream, &capture) != cudaSuccess) return cudaPeekAtLastError();
    if (kind != cudaMemcpyHostToDevice || capture != cudaStreamCaptureStatusNone)
        return submit(stream, [=] { std::memcpy(to, from, bytes); });
    // Ordinary host memory has been read when the call returns; that in a graph when it runs.
    const auto* first = static_cast<const unsigned char*>(from);
    return submit(stream, [to, values = std::vector<unsigned char>(first, first + bytes)] {
        std::memcpy(to, values.data(), values.size());
    });
}
cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind)
{
    {
        const std::lock_guard lock(state_lock());
        if (const cudaError_t status = allow_unsafe("cudaMemcpy")) return status;
    }
    const cudaError_t status = cudaMemcpyAsync(to, from, bytes, kind, nullptr);
    return status ? status : cudaStreamSynchronize(nullptr);
}
cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t stream)
{
    if (bytes == 0) return cudaSuccess;
    {
        const std::lock_guard lock(state_lock());
        if (const cudaError_t status = check_range(memory, bytes, true, "the memory")) return status;
    }
    return submit(stream, [=] {
        if (running()) std::memset(memory, value, bytes);
    });
}
cudaError_t cudaMemset(void* memory, int value, std::size_t bytes)
{
    {
        const std::lock_guard lock(state_lock());
        if (const cudaError_t status = allow_unsafe("cudaMemset")) return status;
    }
    return cudaMemsetAsync(memory, value, bytes, nullptr);
}

// ---- launches ------------------------------------------------------------------------------------------------------
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value)
{
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < 0 || static_cast<std::size_t>(value) > architecture().block_shared)
        return error(cudaErrorInvalidValue, value, " bytes of shared memory, a block may have ",
                     architecture().block_shared);
    const std::lock_guard lock(state_lock());
    state().shared[kernel] = static_cast<std::size_t>(value);
    return cudaSuccess;
}
