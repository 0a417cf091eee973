// SPDX-License-Identifier: Apache-2.0
// Fibers: stacks that one host thread switches between by hand. AddressSanitizer is told of every switch.
#pragma once

#include <cstddef>

#if defined(__x86_64__) || defined(__aarch64__)
#define VIMCORE_SHIM_OWN_SWITCH 1
#else
#define VIMCORE_SHIM_OWN_SWITCH 0
#include <ucontext.h>
#endif

namespace vimcore::shim {

struct Fiber {
#if VIMCORE_SHIM_OWN_SWITCH
    void* stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
    const void* bottom = nullptr;  // of the stack; of the host thread's own stack it is learnt
    std::size_t size = 0;
    void* fake_stack = nullptr;  // AddressSanitizer's
};

inline constexpr int max_fibers = 1024;

// Makes `fiber` start in entry() at the next switch to it; whatever was on its stack is forgotten. index: which stack.
void prepare(Fiber& fiber, int index, void (*entry)());
void switch_fiber(Fiber& from, Fiber& to);
void entered();  // the first call in entry()

}  // namespace vimcore::shim
