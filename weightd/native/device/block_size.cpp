#include "device/block_size.h"

#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>

#include "device/system_error.h"

namespace weightd {
namespace {

constexpr unsigned STATX_DIOALIGN_BIT = 0x2000;  // STATX_DIOALIGN of Linux 6.1, which older headers lack

// struct statx as of Linux 6.1; the C library's may lack the last two fields.
struct StatxWithAlignment {
    uint32_t mask;
    uint8_t unused[148];
    uint32_t dio_memory_align;  // at byte 152
    uint32_t dio_offset_align;
    uint64_t reserved[12];
};

// What statx reports, or `unknown` where it reports nothing.
uint32_t alignment_bytes(const std::string& path, uint32_t unknown) {
    StatxWithAlignment status{};
    static_assert(offsetof(StatxWithAlignment, dio_memory_align) == 152 && sizeof(status) == 256);
    if (::syscall(SYS_statx, AT_FDCWD, path.c_str(), 0, STATX_DIOALIGN_BIT, &status) != 0) fail(path);
    const uint32_t reported = std::max(status.dio_memory_align, status.dio_offset_align);
    return (status.mask & STATX_DIOALIGN_BIT) == 0 || reported == 0 ? unknown : reported;
}

}  // namespace

uint32_t block_size_bytes(const std::string& path) {
    return std::max(BLOCK_BYTES_MIN, alignment_bytes(path, BLOCK_BYTES_MIN));
}

uint32_t sector_size_bytes(const std::string& path) {
    return std::max(SECTOR_BYTES_MIN, alignment_bytes(path, BLOCK_BYTES_MIN));
}

}  // namespace weightd
