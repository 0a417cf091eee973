// SPDX-License-Identifier: Apache-2.0
// One parallel loop. Chunks are claimed one by one and the caller works too, so a core that is taken away costs little.
#pragma once

#include <cstdint>
#include <type_traits>

namespace vimcore::cpu {

// Calls body(context, i) for every i in [0, count) on up to `threads` threads. Never allocates after warm-up.
// After fork() the child runs serially: its worker threads do not exist. The body computes with subnormals as zero.
void parallel_run(int threads, std::int64_t count, void (*body)(void* context, std::int64_t index), void* context);

template <class F>
void parallel_for(int threads, std::int64_t count, F&& f)
{
    using Body = std::remove_reference_t<F>;
    parallel_run(
        threads, count, [](void* context, std::int64_t index) { (*static_cast<Body*>(context))(index); },
        const_cast<void*>(static_cast<const void*>(&f)));
}

// Runs a program of many loops. With OpenMP it is one parallel region, whose threads wait for the program's loops.
void program_run(int threads, void (*program)(void* context), void* context);

int core_count();  // cores this process may use

}  // namespace vimcore::cpu
