// SPDX-License-Identifier: Apache-2.0
// A whole file in memory, see posix.h.
#pragma once

#include <cstddef>

#define PROT_READ 1
#define MAP_PRIVATE 2
#define MAP_FAILED (reinterpret_cast<void*>(-1))

void* mmap(void* address, std::size_t bytes, int protection, int flags, int descriptor, long long offset);
int munmap(void* address, std::size_t bytes);
