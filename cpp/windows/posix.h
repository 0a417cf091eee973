// SPDX-License-Identifier: Apache-2.0
// What the sources use of POSIX, for Windows by MinGW-w64: included before every source there. Compiled and tried under
// Wine by tests/package/windows.sh; names of files are in the system's code page.
#pragma once

#include <fcntl.h>
#include <io.h>
#include <malloc.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstddef>
#include <cstdlib>

#define O_CLOEXEC _O_NOINHERIT
#define O_NONBLOCK 0
#undef X_OK
#define X_OK 0  // Windows has no such right, and ends programs that ask for it
#define _SC_PHYS_PAGES 1
#define _SC_PAGE_SIZE 2

// Files hold the bytes that are written, also where a program was not asked.
int fsync(int descriptor);
int fchmod(int descriptor, int mode);  // keeps what the folder gives
long long sysconf(int name);
ssize_t pread(int descriptor, void* out, std::size_t bytes, long long at);
int replace_file(const char* from, const char* to);  // rename of POSIX, which may replace

namespace std {
inline void* aligned_alloc(std::size_t alignment, std::size_t bytes) { return ::_aligned_malloc(bytes, alignment); }
}  // namespace std
