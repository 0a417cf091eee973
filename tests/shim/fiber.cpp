// SPDX-License-Identifier: Apache-2.0
// Switching stacks: the registers that a call preserves go onto the old stack and come back from the new one.
#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
asm(R"(
.text
.globl vimcore_shim_switch
.type vimcore_shim_switch, @function
vimcore_shim_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    pop %rcx
    jmp *%rcx  # not ret: it goes elsewhere than the call that the processor remembers
.size vimcore_shim_switch, .-vimcore_shim_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl vimcore_shim_switch
.type vimcore_shim_switch, %function
vimcore_shim_switch:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size vimcore_shim_switch, .-vimcore_shim_switch
)");
#endif
#if VIMCORE_SHIM_OWN_SWITCH
extern "C" void vimcore_shim_switch(void** save, void* to);
#endif

namespace vimcore::shim {
namespace {

constexpr std::size_t page = 64 * 1024;  // a multiple of every page size in use
constexpr std::size_t stack_size = 4 * page;

#if defined(__SANITIZE_ADDRESS__)
Fiber* leaving = nullptr;  // the fiber that the switch under way leaves: its stack's bounds are learnt on arrival
#endif

// Stacks of all fibers, with an untouchable page below each. Pages that are never used cost nothing.
char* stack_of(int index)
{
    static char* const stacks = [] {
        void* memory = mmap(nullptr, (stack_size + page) * max_fibers, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        for (int i = 0; i < max_fibers; i++)
            if (mprotect(static_cast<char*>(memory) + (stack_size + page) * i, page, PROT_NONE)) throw std::bad_alloc();
        return static_cast<char*>(memory);
    }();
    return stacks + (stack_size + page) * index + page;
}

}  // namespace

void prepare(Fiber& fiber, int index, void (*entry)())
{
    char* const stack = stack_of(index);
    fiber = Fiber{};
    fiber.bottom = stack;
    fiber.size = stack_size;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack, stack_size);
#endif
#if defined(__x86_64__)
    auto* top = reinterpret_cast<std::uintptr_t*>(stack + stack_size - 64);
    *--top = 0;  // the return address of entry(), which never returns
    *--top = reinterpret_cast<std::uintptr_t>(entry);
    for (int i = 0; i < 6; i++) *--top = 0;
    fiber.stack_pointer = top;
#elif defined(__aarch64__)
    auto* top = reinterpret_cast<std::uintptr_t*>(stack + stack_size - 64) - 20;
    for (int i = 0; i < 20; i++) top[i] = 0;
    top[11] = reinterpret_cast<std::uintptr_t>(entry);  // x30
    fiber.stack_pointer = top;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = stack_size;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
#endif
}

void switch_fiber(Fiber& from, Fiber& to)
{
#if defined(__SANITIZE_ADDRESS__)
    leaving = &from;
    __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.size);
#endif
#if VIMCORE_SHIM_OWN_SWITCH
    vimcore_shim_switch(&from.stack_pointer, to.stack_pointer);
#else
    swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(from.fake_stack, &leaving->bottom, &leaving->size);
#endif
}

void entered()
{
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &leaving->bottom, &leaving->size);
#endif
}

}  // namespace vimcore::shim
