// SPDX-License-Identifier: Apache-2.0
// The part of the CUDA runtime that vimcore uses, for the host: runtime.cpp implements it with host memory. No toolkit.
#pragma once

#include <math.h>

#include <cstddef>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

// ---- types ---------------------------------------------------------------------------------------------------------
struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned vx = 1, unsigned vy = 1, unsigned vz = 1) : x(vx), y(vy), z(vz) {}
};

// Of the thread that runs now.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

// ---- errors --------------------------------------------------------------------------------------------------------
// clang-format off
#define VIMCORE_SHIM_ERRORS(X)                                                                                          \
    X(cudaSuccess, 0) X(cudaErrorInvalidValue, 1) X(cudaErrorMemoryAllocation, 2) X(cudaErrorInitializationError, 3)   \
    X(cudaErrorInvalidConfiguration, 9) X(cudaErrorInsufficientDriver, 35) X(cudaErrorNoDevice, 100)                   \
    X(cudaErrorInvalidDevice, 101) X(cudaErrorNoKernelImageForDevice, 209) X(cudaErrorECCUncorrectable, 214)           \
    X(cudaErrorInvalidResourceHandle, 400) X(cudaErrorIllegalAddress, 700)                                             \
    X(cudaErrorLaunchOutOfResources, 701) X(cudaErrorLaunchTimeout, 702)                                               \
    X(cudaErrorAssert, 710) X(cudaErrorHardwareStackError, 714) X(cudaErrorIllegalInstruction, 715)                    \
    X(cudaErrorMisalignedAddress, 716) X(cudaErrorInvalidAddressSpace, 717) X(cudaErrorInvalidPc, 718)                 \
    X(cudaErrorLaunchFailure, 719) X(cudaErrorStreamCaptureUnsupported, 900)                                           \
    X(cudaErrorStreamCaptureInvalidated, 901) X(cudaErrorStreamCaptureUnmatched, 903)                                  \
    X(cudaErrorStreamCaptureUnjoined, 904) X(cudaErrorStreamCaptureIsolation, 905)                                     \
    X(cudaErrorStreamCaptureImplicit, 906) X(cudaErrorCapturedEvent, 907) X(cudaErrorInvalidClusterSize, 912)
// clang-format on
enum cudaError_t {
#define VIMCORE_SHIM_ENUMERATOR(name, value) name = value,
    VIMCORE_SHIM_ERRORS(VIMCORE_SHIM_ENUMERATOR)
};
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);  // with the reason where it is the last error
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();

// ---- devices -------------------------------------------------------------------------------------------------------
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
struct cudaDeviceProp {
    char name[256];
    std::size_t totalGlobalMem;
    int major, minor, multiProcessorCount;
};
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total);

// ---- streams, events, graphs ---------------------------------------------------------------------------------------
using cudaStream_t = struct CUstream_st*;
using cudaEvent_t = struct CUevent_st*;
using cudaGraph_t = struct CUgraph_st*;
using cudaGraphExec_t = struct CUgraphExec_st*;
enum : unsigned { cudaStreamDefault = 0, cudaStreamNonBlocking = 1 };
enum : unsigned { cudaEventDefault = 0, cudaEventDisableTiming = 2 };
enum cudaStreamCaptureMode {
    cudaStreamCaptureModeGlobal = 0,
    cudaStreamCaptureModeThreadLocal = 1,
    cudaStreamCaptureModeRelaxed = 2,
};
enum cudaStreamCaptureStatus {
    cudaStreamCaptureStatusNone = 0,
    cudaStreamCaptureStatusActive = 1,
    cudaStreamCaptureStatusInvalidated = 2,
};
cudaError_t cudaStreamCreate(cudaStream_t* stream);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags = 0);
cudaError_t cudaEventCreate(cudaEvent_t* event);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = nullptr);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end);
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode);
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* number);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long flags = 0);
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec);

// ---- memory --------------------------------------------------------------------------------------------------------
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
cudaError_t cudaMalloc(void** memory, std::size_t bytes);
template <class T>
cudaError_t cudaMalloc(T** memory, std::size_t bytes)
{
    return cudaMalloc(reinterpret_cast<void**>(memory), bytes);
}
cudaError_t cudaFree(void* memory);
cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream = nullptr);
cudaError_t cudaMemset(void* memory, int value, std::size_t bytes);
cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t stream = nullptr);

// ---- launches ------------------------------------------------------------------------------------------------------
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    union {
        struct {
            unsigned x, y, z;
        } clusterDim;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

namespace vimcore::shim {
// name: how messages call the next kernel that this host thread launches; without it they give its argument types.
void name_kernel(const char* name);
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const char* type,
                   std::function<void()> thread);
}  // namespace vimcore::shim

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... args)
{
    static_assert((std::is_trivially_copyable_v<P> && ...), "kernel arguments are copied byte by byte");
    static_assert((sizeof(P) + ... + 0) <= 4096, "more than 4 KiB of kernel arguments");
    return vimcore::shim::launch(
        *config, reinterpret_cast<const void*>(kernel), __PRETTY_FUNCTION__,
        [kernel, values = std::tuple<P...>(std::forward<A>(args)...)] { std::apply(kernel, values); });
}
