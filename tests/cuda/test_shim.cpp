// SPDX-License-Identifier: Apache-2.0
// The checks of the shim (tests/shim): for each a kernel that is wrong in just that way, and its right twin.
#include <cmath>
#include <string>
#include <thread>
#include <vector>

#include "../cpp/check.h"
#include "device.cuh"
#include "runtime.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

using namespace vimcore;
using namespace vimcore::device;

namespace {

template <class... P, class... A>
cudaError_t start(void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared, A&&... args)
{
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    shim::name_kernel("the_kernel");
    return cudaLaunchKernelEx(&config, kernel, std::forward<A>(args)...);
}

// What the failure of one block says; empty where it runs to its end.
template <class... P, class... A>
std::string failure(void (*kernel)(P...), unsigned block, std::size_t shared, A&&... args)
{
    try {
        CHECK(start(kernel, 1, block, shared, std::forward<A>(args)...) == cudaSuccess);
    } catch (const shim::Failure& failure) {
        return failure.what();
    }
    return {};
}

bool has(const std::string& text, const std::vector<const char*>& parts)
{
    for (const char* part : parts)
        if (text.find(part) == std::string::npos) {
            std::printf("'%s' does not contain '%s'\n", text.c_str(), part);
            return false;
        }
    return true;
}
bool ends(const std::string& text)  // without a failure
{
    if (!text.empty()) std::printf("%s\n", text.c_str());
    return text.empty();
}

enum Fault { none, ends_early, elsewhere, count, id, lanes, mask, kind, index, negative, offset, vector };

// ---- barriers ------------------------------------------------------------------------------------------------------
__global__ void block_barrier(Fault fault)
{
    const unsigned t = threadIdx.x;
    if (fault == ends_early && t == 5) return;
    if (fault == elsewhere && t >= 32)
        sync_block();
    else if (fault == kind && t < 32)
        sync_warp();
    else if (fault == kind && t < 64)
        shuffle_xor(1, 1);
    else
        sync_block();
    if (fault == kind && t < 32) sync_warp(), sync_warp();
    sync_block();
}

__global__ void group_barrier(Fault fault)
{
    const int t = static_cast<int>(threadIdx.x), half = t / 64;
    for (int i = 0; i < 3; i++) {
        if (fault == ends_early && i == 1 && t >= 32 && t < 64) return;
        if (fault == count && i == 2)
            sync_group(1, t < 32 ? 64 : 96);
        else if (fault == lanes)
            sync_group(1 + t / 16 % 2, 64);  // 16 lanes of every warp
        else if (fault == id)
            sync_group(0, 64);
        else if (fault == index)
            sync_group(16, 64);
        else if (fault == mask)
            sync_group(1 + half, 48);
        else if (fault == elsewhere && t % 2)
            sync_group(1 + half, 64);
        else
            sync_group(1 + half, 64);
    }
}

__global__ void shuffles(Fault fault)
{
    const int t = static_cast<int>(threadIdx.x);
    if (fault == ends_early && t == 3) return;
    float x = static_cast<float>(t);
    if (fault == elsewhere && t % 2)
        x = shuffle_xor(x, 1);
    else
        x = shuffle_xor(x, fault == mask ? 1 + t % 2 : 1);
    if (fault == kind && t % 2) sync_warp();
    if (x != static_cast<float>(t ^ 1)) shim::fail("the shuffle gave another lane's value");
    x = shuffle_xor(x, fault == index ? 32 : 16);
    if (x != static_cast<float>(t ^ 17)) shim::fail("the shuffle gave another lane's value");
    sync_warp();
}
__global__ void partial_sync() { sync_warp(); }

// A (16 x 8), B (8 x 8) and D (16 x 8) of numbers that tf32 has, but for one bit that it cuts off.
__global__ void products(Fault fault)
{
    const int t = static_cast<int>(threadIdx.x), g = t / 4, q = t % 4;
    auto A = [](int i, int k) { return static_cast<float>((5 * i + 3 * k) % 11 - 5); };
    auto B = [](int k, int j) { return static_cast<float>((7 * k + j) % 13 - 6); };
    float d[4] = {1, 2, 3, 4};
    if (fault == ends_early && t == 3) return;
    const float cut = A(g, q) * (1 + 0x1p-11f);
    if (fault == kind && t % 2) sync_warp();
    multiply_add(d, cut, A(g + 8, q), A(g, q + 4), A(g + 8, q + 4), B(q, g), B(q + 4, g));
    for (int n = 0; n < 4; n++) {
        float sum = static_cast<float>(n + 1);
        for (int k = 0; k < 8; k++) sum += A(g + n / 2 * 8, k) * B(k, 2 * q + n % 2);
        if (d[n] != sum) shim::fail("the product is another one");
    }
}

// 1 + 8 2^-26, and 1 + 16 2^-26 of bfloat16.
__global__ void small_products(float tf32, float bf16)
{
    float d[4] = {1, 1, 1, 1}, e[4] = {1, 1, 1, 1};
    multiply_add(d, 0x1p-13f, 0x1p-13f, 0x1p-13f, 0x1p-13f, 0x1p-13f, 0x1p-13f);
    constexpr std::uint32_t two = 0x39003900;  // 2^-13 in either half
    multiply_add(e, {{two, two, two, two}}, {{two, two}});
    for (int i = 0; i < 4; i++)
        if (d[i] != tf32 || e[i] != bf16) shim::fail(shim::join("1 and small products give ", d[i], ", ", e[i]));
}

// Every term by itself lies below the bits that a device keeps.
void check_cut_sums()
{
    const std::uint64_t before = shim::ulp_seed;
    shim::ulp_seed = 0;
    CHECK(ends(failure(small_products, 32, 0, 1 + 0x1p-23f, 1 + 0x1p-22f)));
    shim::ulp_seed = 1;
    CHECK(ends(failure(small_products, 32, 0, 1.0f, 1.0f)));
    shim::ulp_seed = before;
}

void check_barriers()
{
    CHECK(ends(failure(block_barrier, 96, 0, none)));
    CHECK(has(failure(block_barrier, 96, 0, ends_early), {"divergent barrier", "the_kernel", "block (0, 0, 0)",
                                                          "thread (0, 0, 0) waits at sync_block (test_shim.cpp:",
                                                          "with 95 threads", "thread (5, 0, 0) has ended"}));
    CHECK(
        has(failure(block_barrier, 96, 0, elsewhere), {"divergent barrier: at test_shim.cpp:", "waits at sync_block"}));
    CHECK(has(failure(block_barrier, 96, 0, kind), {"divergent barrier", "waits at sync_block"}));
    CHECK(ends(failure(block_barrier, 50, 0, none)));  // a block may end within a warp

    CHECK(ends(failure(group_barrier, 128, 0, none)));
    CHECK(has(failure(group_barrier, 128, 0, ends_early),
              {"waits at sync_group 1", "with 32 threads of 64", "has ended"}));
    CHECK(has(failure(group_barrier, 128, 0, count), {"barrier 1 of", "others wait at it for"}));
    CHECK(has(failure(group_barrier, 64, 0, lanes), {"divergent barrier", "sync_group 1", "sync_group 2"}));
    CHECK(has(failure(group_barrier, 128, 0, lanes), {"barrier", "has 16 lanes of warp"}));
    CHECK(has(failure(group_barrier, 128, 0, id), {"barrier 0 is not one of 1..15"}));
    CHECK(has(failure(group_barrier, 128, 0, index), {"barrier 16 is not one of 1..15"}));
    CHECK(has(failure(group_barrier, 128, 0, mask), {"48 threads are not whole warps"}));
    CHECK(has(failure(group_barrier, 32, 0, none), {"64 threads are not whole warps of a block of 32"}));
    CHECK(has(failure(group_barrier, 128, 0, elsewhere), {"divergent barrier", "sync_group"}));

    CHECK(ends(failure(products, 32, 0, none)));
    CHECK(has(failure(products, 32, 0, ends_early), {"waits at multiply_add", "with 31 threads", "has ended"}));
    CHECK(has(failure(products, 32, 0, kind), {"divergent warp", "sync_warp", "multiply_add"}));
    CHECK(ends(failure(shuffles, 64, 0, none)));
    CHECK(
        has(failure(shuffles, 64, 0, ends_early), {"waits at shuffle_xor", "with 31 threads", "(3, 0, 0) has ended"}));
    CHECK(has(failure(shuffles, 64, 0, elsewhere), {"divergent warp"}));
    CHECK(has(failure(shuffles, 64, 0, mask), {"divergent warp", "with mask 1", "with mask 2"}));
    CHECK(has(failure(shuffles, 64, 0, kind), {"divergent warp", "sync_warp", "shuffle_xor"}));
    CHECK(has(failure(shuffles, 64, 0, index), {"mask 32"}));
    CHECK(has(failure(shuffles, 48, 0, none), {"shuffle_xor", "the block ends within this warp, which has 16 lanes"}));
    CHECK(has(failure(partial_sync, 33, 0), {"sync_warp", "which has 1 lanes"}));
    CHECK(ends(failure(partial_sync, 1024, 0)));
}

// ---- bounds and alignment of shared memory, vector accesses --------------------------------------------------------
__global__ void bounds(Fault fault)
{
    auto s = shared<float>(fault == offset ? 8 : 16, fault == count ? 33 : 32);
    s[fault == index ? 32 : fault == negative ? -1 : 3] = 1.0f;
    s.store<4>(fault == vector ? 2 : fault == lanes ? 32 : 4, Vec<float, 4>{1, 2, 3, 4});
    const auto v = s.load<2>(6);
    if (v[0] != 3 || v[1] != 4 || s[3] != 1.0f) shim::fail("not what was stored");
    if (!std::isnan(float{s[31]}) || !std::isnan(to_float(shared<__nv_bfloat16>(16, 64)[63])) ||
        !std::isnan(to_float(shared<__half>(16, 64)[63])))
        shim::fail("memory that nobody wrote to has a value");
    s[3] += 2.0f;
    s[3] *= 3.0f;
    s[2] = s[3];
    s[2] -= 1.0f;
    if (s[2] != 8.0f) shim::fail("arithmetic on an element");
}

__global__ void vectors(const float* from, float* to) { store<4>(to, load<4>(from)); }

void check_bounds()
{
    CHECK(ends(failure(bounds, 1, 144, none)));
    CHECK(has(failure(bounds, 1, 143, none), {"bytes 16 to 144 of 143"}));
    CHECK(has(failure(bounds, 1, 144, count), {"bytes 16 to 148 of 144"}));
    CHECK(has(failure(bounds, 1, 144, offset), {"offset 8 is not a multiple of 16"}));
    CHECK(has(failure(bounds, 1, 144, index), {"index 32 (1 elements) of 32"}));
    CHECK(has(failure(bounds, 1, 144, negative), {"index -1"}));
    CHECK(has(failure(bounds, 1, 144, lanes), {"index 32 (4 elements) of 32"}));
    CHECK(has(failure(bounds, 1, 144, vector), {"vector access to shared memory: address is not a multiple of 16"}));

    float* memory = nullptr;
    CHECK(cudaMalloc(&memory, 64) == cudaSuccess);
    CHECK(ends(failure(vectors, 1, 0, memory, memory + 4)));
    CHECK(has(failure(vectors, 1, 0, memory + 1, memory + 4),
              {"load: address is not a multiple of 16", "test_shim.cpp:"}));
    CHECK(has(failure(vectors, 1, 0, memory, memory + 5), {"store: address is not a multiple of 16"}));
    CHECK(cudaFree(memory) == cudaSuccess);
}

// ---- races ---------------------------------------------------------------------------------------------------------
enum Order { nothing, warp, block, group, shuffle };
__device__ void order(Order by)
{
    if (by == warp) sync_warp();
    if (by == block) sync_block();
    if (by == group) sync_group(1 + static_cast<int>(threadIdx.x / 64), 64);
    if (by == shuffle) shuffle_xor(0, 1);
}

// Thread 0 writes or reads a word, then thread `other` does.
__global__ void two_accesses(Order by, unsigned other, bool first_writes, bool second_writes)
{
    auto s = shared<float>(0, 1);
    const auto access = [&](bool write) { write ? void(s[0] = 1.0f) : void(float{s[0]}); };
    if (threadIdx.x == 0) access(first_writes);
    order(by);
    if (threadIdx.x == other) access(second_writes);
}

// All threads read, then the last one writes.
__global__ void many_readers(Order by)
{
    auto s = shared<float>(0, 2);
    for (int i = 0; i < 3; i++) {
        if (threadIdx.x == 0) s[0] = 1.0f;
        sync_block();
        (void)float{s[0]};
        order(by);
        if (threadIdx.x == blockDim.x - 1) s[0] = 2.0f;
        sync_block();
    }
}

// Warp 0 -> warp 1 by barrier 1, warp 1 -> warp 2 by barrier 2: warp 2 may read what warp 0 wrote; not the other way.
__global__ void chain(bool wrong)
{
    auto s = shared<float>(0, 1);
    const unsigned t = threadIdx.x;
    if (t == (wrong ? 64 : 0)) s[0] = 1.0f;
    if (t < 64) sync_group(1, 64);
    if (t >= 32) sync_group(2, 64);
    if (t == (wrong ? 0 : 64)) (void)float{s[0]};
}

__global__ void halves()
{
    auto s = shared<__nv_bfloat16>(0, 64);
    s[static_cast<int>(threadIdx.x)] = from_float<__nv_bfloat16>(1.0f);
    s[static_cast<int>(threadIdx.x)] += from_float<__nv_bfloat16>(1.0f);
}

// Two lanes read, then one of them writes; before, other warps may have read too, which a barrier ended.
__global__ void two_lanes(bool both_warps)
{
    auto s = shared<float>(0, 1);
    if (both_warps) {
        (void)float{s[0]};
        sync_group(1, 64);
    }
    if (threadIdx.x < 2) (void)float{s[0]};
    if (threadIdx.x == 1) s[0] = 1.0f;
}

// The same memory as floats and as halves of them.
__global__ void two_sizes(Order by)
{
    auto s = shared<float>(0, 2);
    (void)float{s[0]};
    order(by);
    if (threadIdx.x == 63) shared<__half>(0, 4)[1] = from_float<__half>(1.0f);
}
__global__ void copy_then_halves(const float* from)
{
    auto s = shared<float>(0, 2);
    cp_async<4>(s, 0, from, true);
    cp_async_commit();
    shared<__half>(0, 4)[2] = from_float<__half>(1.0f);
    cp_async_wait<0>();
}
__global__ void first_word() { (void)float{shared<float>(0, 2)[0]}; }

// Every warp writes its word twice.
__global__ void own_words()
{
    auto s = shared<float>(0, 8);
    const int w = static_cast<int>(threadIdx.x) / 32;
    for (const unsigned lane : {0u, 1u}) {
        sync_warp();
        if (threadIdx.x % 32 == lane) s[w ^ static_cast<int>(blockDim.x / 32 - 1)] = 1.0f;
    }
}

void check_races()
{
    // what blocks before have done is over, also that of warps that this one does not have
    for (const unsigned threads : {256, 128, 32, 256}) CHECK(ends(failure(own_words, threads, 32)));
    for (const bool both_warps : {false, true}) CHECK(has(failure(two_lanes, 64, 4, both_warps), {"race: "}));
    CHECK(ends(failure(two_sizes, 64, 8, block)));
    CHECK(has(failure(two_sizes, 64, 8, nothing), {"race: "}));
    float* memory = nullptr;
    CHECK(cudaMalloc(&memory, 4) == cudaSuccess);
    CHECK(ends(failure(copy_then_halves, 1, 8, memory)));
    CHECK(ends(failure(first_word, 1, 8)));
    CHECK(cudaFree(memory) == cudaSuccess);
    for (const bool first : {false, true})
        for (const bool second : {false, true}) {
            const bool conflict = first || second;
            // thread 1: of the same warp; 40: of another one
            for (const auto& [by, other, ordered] : {std::tuple{nothing, 1u, false},
                                                     {nothing, 40u, false},
                                                     {shuffle, 1u, false},
                                                     {warp, 1u, true},
                                                     {warp, 40u, false},
                                                     {block, 1u, true},
                                                     {block, 40u, true},
                                                     {group, 40u, true},
                                                     {nothing, 0u, true}}) {
                const std::string said = failure(two_accesses, 64, 4, by, other, first, second);
                if (ordered || !conflict)
                    CHECK(ends(said));
                else
                    CHECK(has(said, {"race: ", "4 bytes at byte 0 of shared memory", "with no barrier between"}));
            }
        }
    CHECK(ends(failure(many_readers, 128, 8, block)));
    for (const Order by : {nothing, warp, group, shuffle})
        CHECK(has(failure(many_readers, 128, 8, by), {"race: ", "at byte 0"}));
    CHECK(ends(failure(many_readers, 32, 8, warp)));
    CHECK(has(failure(many_readers, 32, 8, nothing), {"race: ", "at byte 0"}));
    CHECK(ends(failure(chain, 96, 4, false)));
    CHECK(has(failure(chain, 96, 4, true), {"race: "}));
    CHECK(ends(failure(halves, 64, 128)));
    shim::set_race_checks(false);
    CHECK(ends(failure(two_accesses, 64, 4, nothing, 1u, true, true)));
    shim::set_race_checks(true);
}

// ---- asynchronous copies -------------------------------------------------------------------------------------------
__global__ void copies(const float* from, Fault fault)
{
    auto s = shared<float>(0, 128);
    const int t = static_cast<int>(threadIdx.x);
    const auto expect = [&](int i, float value) {
        if (float{s[i]} != value) shim::fail("the copy brought something else");
    };
    cp_async<4>(s, t, from + t, true);
    if (fault == offset) cp_async<4>(s, t, from + t, true);
    cp_async_commit();
    if (fault == index) (void)float{s[t]};
    cp_async<4>(s, 64 + t, from + t, t % 2 == 0);
    if (fault == lanes) {  // the second group is not committed
        cp_async_wait<0>();
        (void)float{s[64 + t]};
    }
    cp_async_commit();
    cp_async_wait<1>();
    expect(t, static_cast<float>(t));
    if (fault == count) (void)float{s[64 + t]};
    if (fault == negative) s[64 + t] = 1.0f;
    if (fault == ends_early) return;
    cp_async_wait<0>();
    expect(64 + t, t % 2 == 0 ? static_cast<float>(t) : 0.0f);
    if (fault == elsewhere) (void)float{s[t ^ 1]};
    sync_warp();
    expect(t ^ 1, static_cast<float>(t ^ 1));
}

__global__ void vector_copies(const float* from, int to_index, int from_index, int count)
{
    auto s = shared<float>(0, count);
    cp_async<16>(s, to_index, from + from_index, true);
    cp_async_commit();
    cp_async_wait<0>();
    if (float{s[to_index + 3]} != static_cast<float>(from_index + 3)) shim::fail("the copy brought something else");
}

// Without the race checks, what is read too early is poison.
__global__ void early(const float* from)
{
    auto s = shared<float>(0, 1);
    s[0] = 5.0f;
    cp_async<4>(s, 0, from, true);
    cp_async_commit();
    if (!std::isnan(float{s[0]})) shim::fail("no poison");
    cp_async_wait<0>();
    if (float{s[0]} != 0.0f) shim::fail("no copy");
}

void check_copies()
{
    float *memory = nullptr, values[32];
    for (int i = 0; i < 32; i++) values[i] = static_cast<float>(i);
    CHECK(cudaMalloc(&memory, sizeof values) == cudaSuccess);
    CHECK(cudaMemcpy(memory, values, sizeof values, cudaMemcpyHostToDevice) == cudaSuccess);
    CHECK(ends(failure(copies, 32, 512, memory, none)));
    CHECK(has(failure(copies, 32, 512, memory, index), {"copy under way: read of 4 bytes", "has not been waited for"}));
    CHECK(has(failure(copies, 32, 512, memory, lanes), {"copy under way: read"}));
    CHECK(has(failure(copies, 32, 512, memory, count), {"copy under way: read"}));
    CHECK(has(failure(copies, 32, 512, memory, negative), {"copy under way: write"}));
    CHECK(has(failure(copies, 32, 512, memory, offset), {"copy under way: write"}));
    CHECK(has(failure(copies, 32, 512, memory, ends_early), {"ends with copies that it has not waited for"}));
    const std::string neighbour = failure(copies, 32, 512, memory, elsewhere);
    CHECK(neighbour.starts_with("race: ") || neighbour.starts_with("copy under way: read"));
    CHECK(ends(failure(vector_copies, 1, 32, memory, 4, 8, 8)));
    CHECK(has(failure(vector_copies, 1, 32, memory, 2, 8, 8),
              {"cp_async to shared memory: address is not a multiple of 16"}));
    CHECK(has(failure(vector_copies, 1, 32, memory, 4, 9, 8), {"cp_async from global memory"}));
    CHECK(has(failure(vector_copies, 1, 32, memory, 8, 8, 8), {"index 8 (4 elements) of 8"}));
    CHECK(has(failure(vector_copies, 1, 32, memory, 4, 8, 7), {"index 4 (4 elements) of 7"}));
    shim::set_race_checks(false);
    CHECK(ends(failure(early, 1, 4, memory)));
    shim::set_race_checks(true);
    CHECK(cudaFree(memory) == cudaSuccess);
}

// ---- order, numbers, threads ---------------------------------------------------------------------------------------
int arrivals = 0;
__global__ void note_order(int* place)
{
    const unsigned b = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const unsigned t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    place[b * blockDim.x * blockDim.y * blockDim.z + t] = arrivals++;
}

std::vector<int> places(std::uint64_t seed)
{
    std::vector<int> host(6 * 5 * 4 * 4 * 3 * 2, -1);
    int* memory = nullptr;
    const std::size_t bytes = host.size() * sizeof(int);
    CHECK(cudaMalloc(&memory, bytes) == cudaSuccess);
    shim::set_seed(seed);
    arrivals = 0;
    CHECK(start(note_order, {6, 5, 4}, {4, 3, 2}, 0, memory) == cudaSuccess);
    shim::set_seed(1);
    CHECK(cudaMemcpy(host.data(), memory, bytes, cudaMemcpyDeviceToHost) == cudaSuccess);
    CHECK(cudaFree(memory) == cudaSuccess);
    return host;
}

void check_order()
{
    const std::vector<int> natural = places(0), a = places(1), b = places(2);
    bool in_order = true;
    std::vector<int> seen(a.size());
    for (std::size_t i = 0; i < natural.size(); i++) {
        in_order = in_order && natural[i] == static_cast<int>(i);
        seen[static_cast<std::size_t>(a[i])]++;
    }
    CHECK(in_order);
    CHECK(a != natural && b != natural && a != b);
    CHECK(seen == std::vector<int>(a.size(), 1));  // every thread of every block, once
}

__global__ void throws(int) { throw std::out_of_range("of the kernel"); }
__global__ void halve(float* x) { x[threadIdx.x] *= 0.5f; }
__global__ void sums(float* x)
{
    auto s = shared<float>(0, 256);
    const int t = static_cast<int>(threadIdx.x);
    s[t] = static_cast<float>(t);
    for (int n = 128; n > 0; n /= 2) {
        sync_block();
        if (t < n) s[t] += s[t + n];
    }
    if (t == 0) x[blockIdx.x] = s[0];
}

void check_engine()
{
    CHECK_THROWS(start(throws, 2, 33, 0, 1), std::out_of_range);
    float *memory = nullptr, x = 0x1p-126f;
    CHECK(cudaMalloc(&memory, 4) == cudaSuccess);
    CHECK(cudaMemcpy(memory, &x, 4, cudaMemcpyHostToDevice) == cudaSuccess);
#if defined(__x86_64__)
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);  // the host thread flushes subnormals, kernels do not
    CHECK(start(halve, 1, 1, 0, memory) == cudaSuccess);
    CHECK(_mm_getcsr() == (before | 0x8040));
    _mm_setcsr(before);
#else
    CHECK(start(halve, 1, 1, 0, memory) == cudaSuccess);
#endif
    CHECK(cudaMemcpy(&x, memory, 4, cudaMemcpyDeviceToHost) == cudaSuccess);
    CHECK(x == 0x1p-127f);
    CHECK(cudaFree(memory) == cudaSuccess);

    std::vector<std::thread> hosts;
    std::vector<int> right(4);
    for (int h = 0; h < 4; h++)
        hosts.emplace_back([h, &right] {
            float* out = nullptr;
            std::vector<float> values(20);
            if (cudaMalloc(&out, 80) || start(sums, 20, 256, 1024, out)) return;
            if (cudaMemcpy(values.data(), out, 80, cudaMemcpyDeviceToHost) || cudaFree(out)) return;
            right[static_cast<std::size_t>(h)] = values == std::vector<float>(20, 255 * 128.0f);
        });
    for (std::thread& host : hosts) host.join();
    CHECK(right == std::vector<int>(4, 1));
}

}  // namespace

int main()
{
    shim::set_registers(64);  // kernels this small have no more, so that a block may have 1024 threads
    for (const std::uint64_t seed : {1, 0, 2, 3, 4}) {
        shim::set_seed(seed);
        check_barriers();
        check_cut_sums();
        check_bounds();
        check_races();
        check_copies();
    }
    check_order();
    check_engine();
    return check_failures();
}
