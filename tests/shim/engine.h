// SPDX-License-Identifier: Apache-2.0
// Runs a kernel on the host, thread by thread, and checks what a GPU does not: barriers that not everyone reaches,
// shuffles without all lanes, shared memory out of bounds, conflicting accesses that no barrier orders, copies read too
// early. What is wrong ends the launch with a Failure that names kernel, block and thread.
//
// Threads are fibers of one host thread, and blocks run one after the other, both in an order drawn from
// VIMCORE_SHIM_SEED (0: the natural order). VIMCORE_SHIM_RACE=0 switches the race checks off. VIMCORE_SHIM_LATE and
// VIMCORE_SHIM_ULP make it less kind: see streams.cpp and below.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <sstream>
#include <stdexcept>
#include <string>

#include "cuda_runtime.h"

namespace vimcore::shim {

using Where = std::source_location;  // the line of the kernel that calls

class Failure : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

struct Launch {
    std::string kernel;
    dim3 grid, block;
    std::size_t shared = 0;        // bytes of dynamic shared memory
    std::function<void()> thread;  // what every thread runs
};
void run(const Launch& launch);

void set_seed(std::uint64_t seed);
void set_race_checks(bool on);
void set_running(bool on);  // off: launches and fills do nothing and memory has no end, for tests of sizes
bool running();

template <class... T>
std::string join(const T&... parts)
{
    std::ostringstream out;
    (out << ... << parts);
    return out.str();
}

// ---- called by threads of the running kernel -----------------------------------------------------------------------
[[noreturn]] void fail(const std::string& what);
std::string at(const Where& where);

void block_barrier(const Where& where);
void group_barrier(int id, int count, const Where& where);
void warp_barrier(const Where& where);
float shuffle_xor(float value, int mask, const Where& where);
// The values of all 32 lanes, until the warp meets again twice.
inline constexpr int warp_values = 6;
const float (*exchange(const float (&values)[warp_values], const Where& where))[warp_values];
int lane();  // of the calling thread in its warp

// Shared memory of the block; what was never written is made of signalling NaNs.
std::byte* shared_memory(int offset, std::int64_t bytes, const Where& where);
extern bool race_checks;
void check_read(const void* address, std::size_t bytes);
void check_write(const void* address, std::size_t bytes);
inline void read_shared(const void* address, std::size_t bytes)  // an access is about to happen
{
    if (race_checks) check_read(address, bytes);
}
inline void write_shared(const void* address, std::size_t bytes)
{
    if (race_checks) check_write(address, bytes);
}

// A copy to shared memory that happens when its group is waited for. from null: zeros.
void start_copy(void* to, const void* from, std::size_t bytes);
void commit_copies();
void wait_copies(std::size_t pending);

[[noreturn]] void fail_index(int index, int elements, int count);
[[noreturn]] void fail_alignment(std::size_t bytes, const char* what, const Where& where);
inline void check_alignment(const void* address, std::size_t bytes, const char* what, const Where& where)
{
    if (reinterpret_cast<std::uintptr_t>(address) % bytes != 0) [[unlikely]]
        fail_alignment(bytes, what, where);
}

// Special functions of a device err by up to 2 ulp, always alike for an argument: VIMCORE_SHIM_ULP draws by how much
// (0: not at all). Every third seed errs to both sides, the next ones only upwards and only downwards.
// Products of matrices lose bits with every seed.
extern std::uint64_t ulp_seed;
float off_by_ulps(float argument, float exact);

inline constexpr unsigned char poison[4] = {0xa0, 0x7f, 0xa0, 0x7f};  // a signalling NaN in float and in bfloat16
void fill_poison(void* memory, std::size_t bytes);

}  // namespace vimcore::shim
