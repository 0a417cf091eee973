// SPDX-License-Identifier: Apache-2.0
#include "posix.h"

#define NOMINMAX
#define WIN32_LEAN_AND_MEAN
#include <windows.h>

#include <cerrno>
#include <initializer_list>

#include "glob.h"
#include "sys/mman.h"

namespace {

// Lines end as everywhere else, and pictures on standard input are not text.
[[maybe_unused]] const bool binary = [] {
    _fmode = _O_BINARY;
    for (const int descriptor : {0, 1, 2}) ::_setmode(descriptor, _O_BINARY);
    return true;
}();

HANDLE handle_of(int descriptor) { return reinterpret_cast<HANDLE>(::_get_osfhandle(descriptor)); }

int failed()
{
    errno = ::GetLastError() == ERROR_ACCESS_DENIED ? EACCES : EIO;
    return -1;
}

}  // namespace

int fsync(int descriptor) { return ::_commit(descriptor); }

int fchmod(int, int) { return 0; }

long long sysconf(int name)
{
    SYSTEM_INFO system;
    ::GetSystemInfo(&system);
    if (name == _SC_PAGE_SIZE) return system.dwPageSize;
    MEMORYSTATUSEX memory{};
    memory.dwLength = sizeof memory;
    return ::GlobalMemoryStatusEx(&memory) ? static_cast<long long>(memory.ullTotalPhys / system.dwPageSize) : -1;
}

ssize_t pread(int descriptor, void* out, std::size_t bytes, long long at)
{
    OVERLAPPED place{};
    place.Offset = static_cast<DWORD>(at);
    place.OffsetHigh = static_cast<DWORD>(at >> 32);
    DWORD done = 0;
    if (::ReadFile(handle_of(descriptor), out, static_cast<DWORD>(bytes), &done, &place)) return done;
    return ::GetLastError() == ERROR_HANDLE_EOF ? 0 : failed();
}

int replace_file(const char* from, const char* to)
{
    return ::MoveFileExA(from, to, MOVEFILE_REPLACE_EXISTING | MOVEFILE_WRITE_THROUGH) ? 0 : failed();
}

void* mmap(void*, std::size_t, int, int, int descriptor, long long)
{
    HANDLE mapping = ::CreateFileMappingA(handle_of(descriptor), nullptr, PAGE_WRITECOPY, 0, 0, nullptr);
    void* address = mapping ? ::MapViewOfFile(mapping, FILE_MAP_COPY, 0, 0, 0) : nullptr;
    if (!address) failed();
    if (mapping) ::CloseHandle(mapping);  // the view keeps it
    return address ? address : MAP_FAILED;
}

int munmap(void* address, std::size_t) { return ::UnmapViewOfFile(address) ? 0 : failed(); }
