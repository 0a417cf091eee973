// SPDX-License-Identifier: Apache-2.0
// Micro-benchmarks of the rates that the floors of the GPU benchmark rest on; prints one JSON object.
// Every kernel runs enough warps to fill the device; each thread repeats one instruction on 8 independent chains, so
// that neither latency nor memory is what limits it. Rates are the best of several launches, timed by events.
//   *_per_s       operations of single lanes a second (ex2, ffma), or bytes (copy)
//   *_warp_per_s  instructions of whole warps a second (shfl, lds128)
// And what the scan's gradient takes for granted of products of matrices (cuda/device.cuh, tests/shim/device_twin.h):
//   tf32_cuts     1: of a float operand the bits beyond tf32's 10 are cut off; 0: it is rounded
//   sum_bits      bits of a term that a sum of products keeps beside a larger one, as seen by 8 terms: 24 or more
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>

namespace {

constexpr int chains = 8, rounds = 2048, threads = 256;

void check(cudaError_t status, const char* what, int line)
{
    if (status == cudaSuccess) return;
    std::fprintf(stderr, "rates.cu:%d: %s: %s\n", line, what, cudaGetErrorString(status));
    std::exit(1);
}
#define CHECK(call) check((call), #call, __LINE__)

__device__ float ex2(float x)
{
    float y;
    asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ long long nanoseconds()
{
    long long t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
}

// x = 2^-x stays near 0.64; the sign is a modifier of the operand and costs nothing.
struct Ex2 {
    __device__ static void step(float* x, float, float)
    {
#pragma unroll
        for (int i = 0; i < chains; i++) x[i] = ex2(-x[i]);
    }
};

struct Ffma {
    __device__ static void step(float* x, float a, float b)
    {
#pragma unroll
        for (int i = 0; i < chains; i++) x[i] = fmaf(x[i], a, b);
    }
};

// What one state of the scan does for one token: an exponential beside three multiplications or multiply-adds.
struct Mix {
    __device__ static void step(float* x, float a, float b)
    {
#pragma unroll
        for (int i = 0; i < chains; i++) {
            const float decay = ex2(x[i] * a);
            x[i] = fmaf(decay, x[i], b);
            x[i] = fmaf(x[i], b, a);
        }
    }
};

struct Shfl {
    __device__ static void step(float* x, float, float)
    {
#pragma unroll
        for (int i = 0; i < chains; i++) x[i] = __shfl_xor_sync(~0u, x[i], 1);
    }
};

template <class Op>
__global__ void __launch_bounds__(threads) repeat(float* out, float a, float b, long long* duration)
{
    float x[chains];
#pragma unroll
    for (int i = 0; i < chains; i++) x[i] = 0.5f + 0.01f * static_cast<float>(threadIdx.x % 32 + i);
    const long long begin = clock64(), begin_ns = nanoseconds();
#pragma unroll 4
    for (int round = 0; round < rounds; round++) Op::step(x, a, b);
    const long long end = clock64(), end_ns = nanoseconds();
    float sum = 0;
#pragma unroll
    for (int i = 0; i < chains; i++) sum += x[i];
    out[blockIdx.x * threads + threadIdx.x] = sum;
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        duration[0] = end - begin;
        duration[1] = end_ns - begin_ns;
    }
}

// 16-byte loads of shared memory (volatile, or the assembler drops what is not used); `groups` lanes in turn read
// different addresses: 1 is a broadcast, 32 has no two alike.
template <int groups>
__global__ void __launch_bounds__(threads) load_shared(float* out)
{
    __shared__ float4 values[256];
    for (int i = static_cast<int>(threadIdx.x); i < 256; i += threads) values[i] = make_float4(1.f, 2.f, 3.f, 4.f);
    __syncthreads();
    unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(values)) + 16 * (threadIdx.x % groups);
    float sum = 0;
#pragma unroll 2
    for (int round = 0; round < rounds; round++) {
#pragma unroll
        for (int i = 0; i < chains; i++) {
            float4 v;
            asm volatile("ld.volatile.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                         : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                         : "r"(address + 512 * i));
            if (i == chains - 1) sum += v.x;
        }
    }
    out[blockIdx.x * threads + threadIdx.x] = sum;
}

__global__ void copy(const float4* from, float4* to, long long count)
{
    const long long step = static_cast<long long>(gridDim.x) * blockDim.x;
    for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step)
        to[i] = from[i];
}

// D = 1 + A B of eight equal products, by a warp.
__global__ void add_products(float a, float b, float* out)
{
    float d[4] = {1, 1, 1, 1};
    const unsigned x = __float_as_uint(a), y = __float_as_uint(b);
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %4, %4, %4}, {%5, %5}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(x), "r"(y));
    if (threadIdx.x == 0) *out = d[0];
}

float one_and_products(float a, float b, float* out)
{
    add_products<<<1, 32>>>(a, b, out);
    float sum = 0;
    CHECK(cudaMemcpy(&sum, out, sizeof sum, cudaMemcpyDeviceToHost));
    return sum;
}

cudaEvent_t before, after;

// Seconds of one launch, the best of seven after two.
template <class F>
double best(F&& launch)
{
    double seconds = 1e30;
    for (int i = 0; i < 9; i++) {
        CHECK(cudaEventRecord(before));
        launch();
        CHECK(cudaGetLastError());
        CHECK(cudaEventRecord(after));
        CHECK(cudaEventSynchronize(after));
        float ms = 0;
        CHECK(cudaEventElapsedTime(&ms, before, after));
        if (i >= 2) seconds = std::min(seconds, 1e-3 * ms);
    }
    return seconds;
}

}  // namespace

int main()
{
    cudaDeviceProp device;
    CHECK(cudaGetDeviceProperties(&device, 0));
    CHECK(cudaEventCreate(&before));
    CHECK(cudaEventCreate(&after));
    const int blocks = device.multiProcessorCount * 8 * 4;  // 8 blocks fill an SM; four such waves
    float* out;
    long long *duration, cycles_and_ns[2];
    CHECK(cudaMalloc(&out, sizeof(float) * blocks * threads));
    CHECK(cudaMalloc(&duration, sizeof cycles_and_ns));
    const double operations = 1.0 * blocks * threads * rounds * chains;

    std::printf("{\"device\": \"%s\", \"sms\": %d", device.name, device.multiProcessorCount);
    auto lanes = [&](const char* name, auto op, double scale) {
        using Op = decltype(op);
        const double seconds = best([&] { repeat<Op><<<blocks, threads>>>(out, -0.5f, 0.25f, duration); });
        std::printf(", \"%s\": %.5g", name, operations * scale / seconds);
    };
    lanes("ex2_per_s", Ex2{}, 1.0);
    lanes("ffma_per_s", Ffma{}, 1.0);
    lanes("ex2_in_mix_per_s", Mix{}, 1.0);
    lanes("shfl_warp_per_s", Shfl{}, 1.0 / 32);
    auto shared = [&](const char* name, auto kernel) {
        const double seconds = best([&] { kernel<<<blocks, threads>>>(out); });
        std::printf(", \"%s\": %.5g", name, operations / 32 / seconds);
    };
    shared("lds128_broadcast_warp_per_s", load_shared<1>);
    shared("lds128_four_addresses_warp_per_s", load_shared<4>);
    shared("lds128_distinct_warp_per_s", load_shared<32>);

    // The SM clock under load: one block's cycles against its time.
    repeat<Ffma><<<blocks, threads>>>(out, -0.5f, 0.25f, duration);
    CHECK(cudaMemcpy(cycles_and_ns, duration, sizeof cycles_and_ns, cudaMemcpyDeviceToHost));
    std::printf(", \"sm_clock_per_s\": %.4g",
                1e9 * static_cast<double>(cycles_and_ns[0]) / static_cast<double>(cycles_and_ns[1]));

    std::printf(", \"tf32_cuts\": %d", one_and_products(1 + 0x1.8p-11f, 1, out) == 9);
    int bits = 24;
    while (bits < 32 && one_and_products(std::ldexp(1.0f, -bits), 1, out) > 1) bits++;
    std::printf(", \"sum_bits\": %d", bits);

    const long long bytes = std::min<long long>(1ll << 30, static_cast<long long>(device.totalGlobalMem / 8) / 16 * 16);
    float4 *from, *to;
    CHECK(cudaMalloc(&from, bytes));
    CHECK(cudaMalloc(&to, bytes));
    CHECK(cudaMemset(from, 0x3f, bytes));
    const double by_kernel = best([&] { copy<<<device.multiProcessorCount * 16, 512>>>(from, to, bytes / 16); });
    const double by_driver = best([&] { CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice)); });
    std::printf(", \"copy_bytes_per_s\": %.5g}\n", 2.0 * static_cast<double>(bytes) / std::min(by_kernel, by_driver));
    return 0;
}
