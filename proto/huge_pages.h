// Mappings of memfds that huge pages fit into.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>

namespace weightd {

inline constexpr size_t HUGE_PAGE_BYTES = 2U << 20;

// mmap() of the first `bytes` of a file, as shared memory. Begins where a huge page can begin, if there is a whole one:
// elsewhere each of its small pages takes an entry of the page table. Returns MAP_FAILED and sets errno as mmap() does.
inline void* map_for_huge_pages(size_t bytes, int protection, int flags, int fd) {
    if (bytes < HUGE_PAGE_BYTES) return ::mmap(nullptr, bytes, protection, flags, fd, 0);
    const size_t reserved_bytes = bytes + HUGE_PAGE_BYTES;
    void* reserved = ::mmap(nullptr, reserved_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED) return MAP_FAILED;
    auto* begin = static_cast<char*>(reserved);
    const size_t before = -reinterpret_cast<uintptr_t>(begin) % HUGE_PAGE_BYTES;
    if (::mmap(begin + before, bytes, protection, flags | MAP_FIXED, fd, 0) == MAP_FAILED) {
        ::munmap(reserved, reserved_bytes);
        return MAP_FAILED;
    }
    const auto page_bytes = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
    const size_t end = (before + bytes + page_bytes - 1) / page_bytes * page_bytes;
    if (before > 0) ::munmap(begin, before);
    if (end < reserved_bytes) ::munmap(begin + end, reserved_bytes - end);
    return begin + before;
}

}  // namespace weightd
