// SPDX-License-Identifier: Apache-2.0
// The shim's stand-in for the CUDA runtime: limits of launches, memory, streams, graphs; its 16-bit types and special
// functions, bit by bit.
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>
#include <utility>
#include <vector>

#include "../cpp/check.h"
#include "device.cuh"
#include "launch.h"
#include "runtime.h"

using namespace vimcore;

namespace {

__global__ void empty(int) {}
__global__ void other(int) {}
__global__ void increase(float* x) { x[threadIdx.x] += 1.0f; }
__global__ void twice(float* x) { x[threadIdx.x] *= 2.0f; }
template <int>
__global__ void one_of_many(int)
{
}

template <class... P, class... A>
cudaError_t start(void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared, cudaStream_t stream, A&&... args)
{
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, std::forward<A>(args)...);
}

cudaError_t allow(void (*kernel)(int), int bytes)
{
    return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                bytes);
}

void check_launches()
{
    const auto with = [](dim3 grid, dim3 block) { return start(empty, grid, block, 0, nullptr, 1); };
    CHECK(with({2, 65535, 1}, 1) == cudaSuccess);
    CHECK(with({2, 1, 65535}, 1) == cudaSuccess);
    CHECK(with(70000, 1) == cudaSuccess);
    CHECK(with({1, 65536, 1}, 1) == cudaErrorInvalidConfiguration);
    CHECK(std::strstr(cudaGetErrorString(cudaErrorInvalidConfiguration), "(1, 65536, 1)"));
    CHECK(cudaGetLastError() == cudaErrorInvalidConfiguration && cudaGetLastError() == cudaSuccess);
    CHECK(with({1, 1, 65536}, 1) == cudaErrorInvalidConfiguration);
    CHECK(with({0x80000000u, 1, 1}, 1) == cudaErrorInvalidConfiguration);
    for (const dim3 none : {dim3(0), dim3(1, 0), dim3(1, 1, 0)}) {
        CHECK(with(none, 1) == cudaErrorInvalidConfiguration);
        CHECK(with(1, none) == cudaErrorInvalidConfiguration);
    }
    shim::set_registers(32);
    CHECK(with(1, 1024) == cudaSuccess && with(1, {4, 4, 64}) == cudaSuccess);
    CHECK(with(1, 1025) == cudaErrorInvalidConfiguration);
    CHECK(with(1, {32, 33, 1}) == cudaErrorInvalidConfiguration);
    CHECK(with(1, {1, 1, 65}) == cudaErrorInvalidConfiguration);
    shim::set_registers(shim::thread_registers);

    CHECK(start(other, 1, 1, 48 * 1024, nullptr, 1) == cudaSuccess);
    CHECK(start(other, 1, 1, 48 * 1024 + 1, nullptr, 1) == cudaErrorInvalidValue);
    CHECK(allow(other, 100 * 1024) == cudaSuccess);
    CHECK(start(other, 1, 1, 100 * 1024, nullptr, 1) == cudaSuccess);
    CHECK(start(other, 1, 1, 100 * 1024 + 1, nullptr, 1) == cudaErrorInvalidValue);
    CHECK(start(empty, 1, 1, 100 * 1024, nullptr, 1) == cudaErrorInvalidValue);  // each kernel for itself
}

// What a launch may take on each GPU, and what is refused there alone.
void check_architectures()
{
    const auto threads = [](unsigned count) { return start(empty, 1, count, 0, nullptr, 1); };
    const auto cluster = [](unsigned blocks, dim3 grid) {
        cudaLaunchConfig_t config = {};
        cudaLaunchAttribute attribute = {};
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim = {blocks, 1, 1};
        config.gridDim = grid;
        config.blockDim = 32;
        config.attrs = &attribute;
        config.numAttrs = 1;
        return cudaLaunchKernelEx(&config, empty, 1);
    };
    for (const shim::Architecture& gpu : shim::architectures) {
        shim::set_architecture(gpu.number);
        const int most = static_cast<int>(gpu.block_shared);
        CHECK(allow(other, most) == cudaSuccess && allow(other, most + 1) == cudaErrorInvalidValue);
        CHECK(start(other, 1, 1, gpu.block_shared, nullptr, 1) == cudaSuccess);
        int value = 0;
        CHECK(cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0) == cudaSuccess);
        CHECK(value == most);
        CHECK(cudaDeviceGetAttribute(&value, cudaDevAttrComputeCapabilityMajor, 0) == cudaSuccess);
        CHECK(value == gpu.number / 10);
        CHECK(threads(256) == cudaSuccess && threads(257) == cudaErrorLaunchOutOfResources);
        shim::set_registers(64);
        CHECK(threads(1024) == cudaSuccess);
        shim::set_registers(65);
        CHECK(threads(1024) == cudaErrorLaunchOutOfResources && threads(896) == cudaSuccess);
        shim::set_registers(shim::thread_registers);
        const bool clusters = gpu.number >= 90;
        CHECK(cluster(1, 3) == cudaSuccess && cluster(0, 3) == cudaErrorInvalidClusterSize);
        CHECK(cluster(8, 16) == (clusters ? cudaSuccess : cudaErrorInvalidClusterSize));
        CHECK(cluster(9, 18) == cudaErrorInvalidClusterSize && cluster(2, 3) == cudaErrorInvalidClusterSize);
    }
    shim::set_architecture(90);
    try {
        shim::set_architecture(75);
        CHECK(false);
    } catch (const shim::Failure& failure) {
        CHECK(std::strstr(failure.what(), "there is no 75, but 80 86 89 90 100 120"));
    }
    CHECK(shim::architecture().number == 90);

    // Three blocks of the scan's backward fit an H100; with all 16 barriers each, an RTX 5090 has one of any size.
    constexpr shim::Footprint backward = {128, 168, 16, 68 * shim::KiB};
    CHECK(shim::resident_blocks(shim::architecture(), backward) == 3);
    CHECK(shim::resident_blocks(shim::architectures[0], backward) == 2);
    CHECK(shim::resident_blocks(shim::architectures[5], {128, 168, 16, 1024}) == 1);
    CHECK(shim::resident_blocks(shim::architectures[5], {128, 168, 3, 1024}) == 3);
}

void check_memory()
{
    char *memory = nullptr, *more = nullptr, host[64] = {};
    CHECK(cudaMalloc(&memory, 48) == cudaSuccess && reinterpret_cast<std::uintptr_t>(memory) % 256 == 0);
    float first = 0;
    CHECK(cudaMemcpy(&first, memory, 4, cudaMemcpyDeviceToHost) == cudaSuccess && std::isnan(first));
    CHECK(cudaMemcpy(memory, host, 48, cudaMemcpyHostToDevice) == cudaSuccess);
    CHECK(cudaMemcpy(memory + 8, memory, 8, cudaMemcpyDeviceToDevice) == cudaSuccess);
    CHECK(cudaMemcpy(memory + 8, host, 41, cudaMemcpyHostToDevice) == cudaErrorInvalidValue);
    CHECK(cudaMemcpy(host, memory + 47, 2, cudaMemcpyDeviceToHost) == cudaErrorInvalidValue);
    CHECK(cudaMemcpy(host, host + 32, 8, cudaMemcpyHostToDevice) == cudaErrorInvalidValue);
    CHECK(std::strstr(cudaGetErrorString(cudaErrorInvalidValue), "the destination is not device memory"));
    CHECK(cudaMemcpy(memory, host, 8, cudaMemcpyDeviceToDevice) == cudaErrorInvalidValue);
    CHECK(cudaMemcpy(memory, memory + 8, 8, cudaMemcpyHostToDevice) == cudaErrorInvalidValue);
    CHECK(cudaMemcpy(memory, memory + 8, 8, cudaMemcpyDeviceToHost) == cudaErrorInvalidValue);
    CHECK(cudaMemset(memory, 7, 48) == cudaSuccess && cudaMemset(memory, 7, 49) == cudaErrorInvalidValue);
    CHECK(cudaMemset(host, 7, 1) == cudaErrorInvalidValue);
    CHECK(cudaMemcpy(host, memory, 48, cudaMemcpyDeviceToHost) == cudaSuccess && host[47] == 7);
    CHECK(cudaMalloc(&more, shim::device_memory()) == cudaErrorMemoryAllocation && !more);
    CHECK(cudaFree(memory + 1) == cudaErrorInvalidValue);
    CHECK(cudaFree(memory) == cudaSuccess && cudaFree(memory) == cudaErrorInvalidValue &&
          cudaFree(nullptr) == cudaSuccess);
    CHECK(cudaMemcpy(host, memory, 1, cudaMemcpyDeviceToHost) == cudaErrorInvalidValue);

    cudaStream_t stream = nullptr;
    CHECK(cudaSetDevice(shim::device_count()) == cudaErrorInvalidDevice);
    CHECK(cudaSetDevice(1) == cudaSuccess && cudaStreamCreate(&stream) == cudaSuccess &&
          cudaSetDevice(0) == cudaSuccess);
    CHECK(start(empty, 1, 1, 0, stream, 1) == cudaErrorInvalidResourceHandle);  // of another device
    CHECK(cudaStreamDestroy(stream) == cudaSuccess && cudaStreamDestroy(stream) == cudaErrorInvalidResourceHandle);
    CHECK(start(empty, 1, 1, 0, stream, 1) == cudaErrorInvalidResourceHandle);
}

// ---- graphs --------------------------------------------------------------------------------------------------------
struct Stream {
    cudaStream_t stream = nullptr;
    explicit Stream(unsigned flags = cudaStreamNonBlocking)
    {
        CHECK(cudaStreamCreateWithFlags(&stream, flags) == cudaSuccess);
    }
    ~Stream() { CHECK(cudaStreamDestroy(stream) == cudaSuccess); }
    operator cudaStream_t() const { return stream; }
};
struct Event {
    cudaEvent_t event = nullptr;
    Event() { CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming) == cudaSuccess); }
    ~Event() { CHECK(cudaEventDestroy(event) == cudaSuccess); }
    operator cudaEvent_t() const { return event; }
};

// How a capture ends during which `work` is queued.
template <class F>
cudaError_t capture(cudaStreamCaptureMode mode, F&& work, unsigned flags = cudaStreamNonBlocking)
{
    const Stream stream(flags);
    CHECK(cudaStreamBeginCapture(stream, mode) == cudaSuccess);
    work(stream.stream);
    cudaGraph_t graph = nullptr;
    const cudaError_t status = cudaStreamEndCapture(stream, &graph);
    CHECK((graph != nullptr) == (status == cudaSuccess));
    if (graph) CHECK(cudaGraphDestroy(graph) == cudaSuccess);
    return status;
}

void check_replay()
{
    float *x = nullptr, host[4] = {1, 2, 3, 4};
    CHECK(cudaMalloc(&x, 16) == cudaSuccess);
    const Stream stream, side;
    const Event fork, join;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess);
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    CHECK(cudaStreamIsCapturing(stream, &status) == cudaSuccess && status == cudaStreamCaptureStatusActive);
    unsigned long long number = 0, later = 0;
    CHECK(cudaStreamGetCaptureInfo(stream, &status, &number) == cudaSuccess && number > 0);
    CHECK(cudaStreamGetCaptureInfo(side, &status, &later) == cudaSuccess && status == cudaStreamCaptureStatusNone);
    CHECK(later == 0);
    CHECK(cudaMemcpyAsync(x, host, 16, cudaMemcpyHostToDevice, stream) == cudaSuccess);
    CHECK(cudaEventRecord(fork, stream) == cudaSuccess && cudaStreamWaitEvent(side, fork) == cudaSuccess);
    CHECK(start(increase, 1, 4, 0, side, x) == cudaSuccess);
    CHECK(cudaEventRecord(join, side) == cudaSuccess && cudaStreamWaitEvent(stream, join) == cudaSuccess);
    CHECK(cudaMemsetAsync(x + 3, 0, 4, stream) == cudaSuccess);
    CHECK(cudaMemcpyAsync(host, x, 16, cudaMemcpyDeviceToHost, stream) == cudaSuccess);
    CHECK(cudaEventQuery(join) == cudaErrorCapturedEvent);
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    CHECK(cudaStreamEndCapture(stream, &graph) == cudaSuccess);
    CHECK(host[0] == 1.0f);  // nothing has run
    CHECK(cudaGraphInstantiate(&exec, graph, 0) == cudaSuccess && cudaGraphDestroy(graph) == cudaSuccess);
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess);  // another number
    CHECK(cudaStreamGetCaptureInfo(stream, &status, &later) == cudaSuccess && later > number);
    CHECK(cudaStreamEndCapture(stream, &graph) == cudaSuccess && cudaGraphDestroy(graph) == cudaSuccess);
    const std::int64_t before = shim::launches();
    CHECK(cudaGraphLaunch(exec, stream) == cudaSuccess && cudaGraphLaunch(exec, stream) == cudaSuccess);
    CHECK(shim::launches() == before + 2);
    CHECK(host[0] == 3.0f && host[1] == 4.0f && host[2] == 5.0f && host[3] == 0.0f);
    CHECK(cudaGraphExecDestroy(exec) == cudaSuccess && cudaGraphLaunch(exec, stream) == cudaErrorInvalidResourceHandle);
    CHECK(cudaFree(x) == cudaSuccess);
}

void check_captures()
{
    constexpr auto global = cudaStreamCaptureModeGlobal, relaxed = cudaStreamCaptureModeRelaxed;
    void* memory = nullptr;
    CHECK(capture(global, [](cudaStream_t s) { CHECK(start(empty, 1, 1, 0, s, 1) == cudaSuccess); }) == cudaSuccess);
    CHECK(capture(global, [&](cudaStream_t) { CHECK(cudaMalloc(&memory, 4) == cudaErrorStreamCaptureUnsupported); }) ==
          cudaErrorStreamCaptureInvalidated);
    CHECK(capture(relaxed, [&](cudaStream_t) { CHECK(cudaMalloc(&memory, 4) == cudaSuccess); }) == cudaSuccess);
    CHECK(capture(global, [&](cudaStream_t) { CHECK(cudaFree(memory) == cudaErrorStreamCaptureUnsupported); }) ==
          cudaErrorStreamCaptureInvalidated);
    CHECK(capture(global, [&](cudaStream_t) {
              cudaStreamCaptureMode mode = relaxed;
              CHECK(cudaThreadExchangeStreamCaptureMode(&mode) == cudaSuccess && mode == global);
              CHECK(cudaFree(memory) == cudaSuccess);
              CHECK(cudaThreadExchangeStreamCaptureMode(&mode) == cudaSuccess && mode == relaxed);
          }) == cudaSuccess);
    CHECK(capture(global, [](cudaStream_t) { CHECK(cudaDeviceSynchronize() == cudaErrorStreamCaptureUnsupported); }) ==
          cudaErrorStreamCaptureInvalidated);
    CHECK(capture(relaxed, [](cudaStream_t s) {
              CHECK(cudaStreamSynchronize(s) == cudaErrorStreamCaptureUnsupported);
              CHECK(start(empty, 1, 1, 0, s, 1) == cudaErrorStreamCaptureInvalidated);
          }) == cudaErrorStreamCaptureInvalidated);
    // the default stream waits for those that are not cudaStreamNonBlocking
    CHECK(capture(relaxed, [](cudaStream_t) { CHECK(start(empty, 1, 1, 0, nullptr, 1) == cudaSuccess); }) ==
          cudaSuccess);
    CHECK(capture(
              relaxed, [](cudaStream_t) { CHECK(start(empty, 1, 1, 0, nullptr, 1) == cudaErrorStreamCaptureImplicit); },
              cudaStreamDefault) == cudaErrorStreamCaptureInvalidated);
    CHECK(cudaStreamBeginCapture(nullptr, global) == cudaErrorStreamCaptureUnsupported);

    const Stream side;
    const Event event;
    CHECK(cudaEventRecord(event, side) == cudaSuccess);
    CHECK(capture(relaxed, [&](cudaStream_t s) {
              CHECK(cudaStreamWaitEvent(s, event) == cudaErrorStreamCaptureIsolation);
          }) == cudaErrorStreamCaptureInvalidated);
    CHECK(capture(relaxed, [&](cudaStream_t s) {
              CHECK(cudaEventRecord(event, s) == cudaSuccess && cudaStreamWaitEvent(side, event) == cudaSuccess);
              CHECK(start(empty, 1, 1, 0, side, 1) == cudaSuccess);
          }) == cudaErrorStreamCaptureUnjoined);
    CHECK(start(empty, 1, 1, 0, side, 1) == cudaSuccess);  // no longer part of it
}

// ---- types and functions -------------------------------------------------------------------------------------------
// What a pattern of 16 bits means, with so many bits of mantissa.
double meaning(unsigned bits, int mantissa_bits)
{
    const int bias = (1 << (14 - mantissa_bits)) - 1, exponent = static_cast<int>(bits & 0x7fff) >> mantissa_bits;
    const int mantissa = static_cast<int>(bits) & ((1 << mantissa_bits) - 1), top = 2 * bias + 1;
    double value = exponent == 0 ? std::ldexp(mantissa, 1 - bias - mantissa_bits)
                                 : std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
    if (exponent == top)
        value = mantissa ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
    return bits & 0x8000 ? -value : value;
}

// Every pattern there and back; between every two neighbours the middle, which goes to the even one, and what is beside
// it.
template <class T>
void check_type(int mantissa_bits, T (*round)(float), float (*widen)(T), unsigned short (*bits_of)(T),
                T (*of_bits)(unsigned short))
{
    const unsigned infinity = 0x7fffu >> mantissa_bits << mantissa_bits;
    int wrong = 0;
    for (unsigned bits = 0; bits < 0x10000; bits++) {
        const float value = widen(of_bits(static_cast<unsigned short>(bits)));
        const double expected = meaning(bits, mantissa_bits);
        if (std::isnan(expected)) {
            wrong += !std::isnan(value) || bits_of(round(value)) != 0x7fff;
            continue;
        }
        wrong += value != expected || std::signbit(value) != (bits >= 0x8000) || bits_of(round(value)) != bits;
        if ((bits & 0x7fff) >= infinity) continue;
        // infinity takes the place of the value that would come next
        const double next = (bits & 0x7fff) + 1 == infinity ? 2 * expected - meaning(bits - 1, mantissa_bits)
                                                            : meaning(bits + 1, mantissa_bits);
        const auto middle = static_cast<float>((expected + next) / 2), away = std::copysign(INFINITY, middle);
        wrong += bits_of(round(middle)) != bits + bits % 2;
        wrong += bits_of(round(std::nextafterf(middle, 0.0f))) != bits;
        wrong += bits_of(round(std::nextafterf(middle, away))) != bits + 1;
    }
    CHECK(wrong == 0);
    CHECK(bits_of(round(std::numeric_limits<float>::max())) == infinity);
    CHECK(bits_of(round(-std::numeric_limits<float>::infinity())) == (infinity | 0x8000));
    CHECK(bits_of(round(-std::numeric_limits<float>::quiet_NaN())) == 0x7fff);
    CHECK(bits_of(round(-std::numeric_limits<float>::denorm_min())) == 0x8000);
}

double ulps(float got, double expected)
{
    const auto nearest = static_cast<float>(expected);
    return std::abs(got - expected) / (std::nextafterf(std::abs(nearest), INFINITY) - std::abs(nearest));
}

void check_functions()
{
    double worst = 0;
    for (float x = -125.9f; x < 127.9f; x += 0.00137f)
        worst = std::fmax(worst, ulps(device::exp2(x), std::exp2(double{x})));
    for (float x = 0x1p-125f; x < 0x1p125f; x *= 1.00137f) {
        worst = std::fmax(worst, ulps(device::reciprocal(-x), -1.0 / x));
        const double log2 = std::log2(double{x});
        worst = std::fmax(worst, std::fmin(ulps(device::log2(x), log2), std::abs(device::log2(x) - log2) * 0x1p22));
    }
    CHECK(worst <= 2);
    CHECK(device::exp2(-126.5f) == 0 && device::exp2(-126.0f) == 0x1p-126f && device::exp2(128.0f) == INFINITY);
    CHECK(device::exp2(0x1p-140f) == 1 && device::exp2(-INFINITY) == 0 && std::isnan(device::exp2(NAN)));
    CHECK(device::log2(0x1p-127f) == -INFINITY && device::log2(1.0f) == 0 && std::isnan(device::log2(-1.0f)));
    CHECK(device::reciprocal(-0x1p-127f) == -INFINITY && device::reciprocal(INFINITY) == 0);
    CHECK(std::signbit(device::reciprocal(-0x1p127f)) && device::reciprocal(-0x1p127f) == 0);  // subnormal: flushed
    CHECK(device::reciprocal(0x1p126f) == 0x1p-126f);
}

// Memory at the most, whatever was given back since.
void check_most_memory()
{
    (void)shim::most_memory();
    const std::size_t before = shim::most_memory();
    float *x = nullptr, *y = nullptr;
    CHECK(cudaMalloc(&x, 1000) == cudaSuccess && cudaMalloc(&y, 24) == cudaSuccess && cudaFree(x) == cudaSuccess);
    CHECK(shim::most_memory() == before + 1024 && shim::most_memory() == before + 24);
    CHECK(cudaFree(y) == cudaSuccess);
}

// Work that runs late: a stream in its own order, others when an event or the host waits; else in any order.
void check_late()
{
    constexpr int n = 4;
    const auto run = [&](std::uint64_t seed, bool waits) {
        shim::set_late(seed);
        float *device = nullptr, host[n] = {3, 3, 3, 3};
        CHECK(cudaMalloc(&device, sizeof host) == cudaSuccess);
        {
            Stream one, two;
            Event event;
            CHECK(cudaMemcpyAsync(device, host, sizeof host, cudaMemcpyHostToDevice, one) == cudaSuccess);
            host[0] = 100;  // has been read
            for (int i = 0; i < 3; i++) CHECK(start(increase, 1, n, 0, one, device) == cudaSuccess);
            CHECK(cudaEventRecord(event, one) == cudaSuccess);
            if (waits) CHECK(cudaStreamWaitEvent(two, event) == cudaSuccess);
            CHECK(start(twice, 1, n, 0, two, device) == cudaSuccess);
            CHECK(cudaMemcpyAsync(host, device, sizeof host, cudaMemcpyDeviceToHost, two) == cudaSuccess);
            CHECK(cudaStreamSynchronize(two) == cudaSuccess);
            CHECK(cudaEventSynchronize(event) == cudaSuccess && cudaEventQuery(event) == cudaSuccess);
        }
        CHECK(cudaFree(device) == cudaSuccess);
        return host[0];
    };
    int wrong = 0;
    for (std::uint64_t seed = 1; seed <= 20; seed++) {
        CHECK(run(seed, true) == 12);
        wrong += run(seed, false) != 12;
    }
    CHECK(wrong > 10);

    // The default stream waits for streams that are blocking, and these for it.
    for (std::uint64_t seed = 1; seed <= 20; seed++) {
        shim::set_late(seed);
        float *device = nullptr, host[n] = {1, 1, 1, 1};
        CHECK(cudaMalloc(&device, sizeof host) == cudaSuccess);
        CHECK(cudaMemcpy(device, host, sizeof host, cudaMemcpyHostToDevice) == cudaSuccess);
        Stream blocking(cudaStreamDefault);
        CHECK(start(increase, 1, n, 0, blocking, device) == cudaSuccess);
        CHECK(start(twice, 1, n, 0, nullptr, device) == cudaSuccess);
        CHECK(start(increase, 1, n, 0, blocking, device) == cudaSuccess);
        CHECK(cudaDeviceSynchronize() == cudaSuccess);
        CHECK(cudaMemcpy(host, device, sizeof host, cudaMemcpyDeviceToHost) == cudaSuccess && host[0] == 5);
        CHECK(cudaFree(device) == cudaSuccess);
    }
    shim::set_late(0);
}

// Special functions that err: by up to 2 ulp, always alike, to the side that the seed says; 2^0 is 1.
void check_errors_of_functions()
{
    for (const std::uint64_t seed : {3, 1, 2}) {
        int up = 0, down = 0;
        for (int i = 1; i < 2000; i++) {
            const float x = -0.01f * static_cast<float>(i);
            for (const bool inverse : {false, true}) {
                const auto f = [&] { return inverse ? device::reciprocal(x) : device::exp2(x); };
                shim::ulp_seed = 0;
                const int exact = std::bit_cast<int>(f());
                shim::ulp_seed = seed;
                const int found = std::bit_cast<int>(f());
                CHECK(std::abs(found - exact) <= 2 && found == std::bit_cast<int>(f()));
                up += found > exact;
                down += found < exact;
            }
        }
        CHECK(device::exp2(0.0f) == 1 && device::exp2(-0.0f) == 1 && device::exp2(-200.0f) == 0);
        CHECK((up > 1000) == (seed != 2) && (down > 1000) == (seed != 1));
        CHECK((up == 0) == (seed == 2) && (down == 0) == (seed == 1));
    }
    shim::ulp_seed = 0;
}

// Two threads that use a kernel first, with two sizes of shared memory: the larger one stays allowed.
template <int... kernels>
void check_shared_memory_of_threads(std::integer_sequence<int, kernels...>)
{
    const auto race = [](void (*kernel)(int)) {
        const auto* address = reinterpret_cast<const void*>(kernel);
        std::atomic<int> ready = 0;
        const auto allow_when_both_are_there = [&](std::size_t bytes) {
            ready++;
            while (ready < 2) std::this_thread::yield();
            cuda::allow_shared_memory(address, bytes);
        };
        std::thread other(allow_when_both_are_there, 57 * 1024);
        allow_when_both_are_there(65 * 1024);
        other.join();
        CHECK(start(kernel, 1, 1, 65 * 1024, nullptr, 1) == cudaSuccess);
    };
    (race(one_of_many<kernels>), ...);
}

}  // namespace

int main()
{
    check_launches();
    check_architectures();
    check_late();
    check_errors_of_functions();
    check_shared_memory_of_threads(std::make_integer_sequence<int, 64>{});
    check_memory();
    check_replay();
    check_most_memory();
    check_captures();
    check_type<__nv_bfloat16>(7, __float2bfloat16_rn, __bfloat162float, __bfloat16_as_ushort, __ushort_as_bfloat16);
    check_type<__half>(10, __float2half_rn, __half2float, __half_as_ushort, __ushort_as_half);
    check_functions();
    return check_failures();
}
