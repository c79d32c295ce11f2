// The granularity of memory, and of direct I/O where a store lies.
#pragma once

#include <cstdint>
#include <string>

namespace weightd {

inline constexpr uint32_t PAGE_BYTES = 4096;
inline constexpr uint32_t BLOCK_BYTES_MIN = 4096;  // files are read in blocks of at least this size
inline constexpr uint32_t SECTOR_BYTES_MIN = 512;

constexpr uint64_t whole_pages(uint64_t bytes) { return (bytes + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES; }

// The block size of the file system that holds `path`, a regular file: max(BLOCK_BYTES_MIN, the offset and memory
// alignment that statx reports). Layers and buffers, and cells that are not quantised, are multiples of it. It is never
// below 4096, because STATX_DIOALIGN may report 512 for a device whose physical blocks are 4096. Throws
// std::system_error.
uint32_t block_size_bytes(const std::string& path);

// What direct reads there must be multiples of, and so cells of any kind: max(SECTOR_BYTES_MIN, the alignment that
// statx reports), or BLOCK_BYTES_MIN where it reports none. Throws std::system_error.
uint32_t sector_size_bytes(const std::string& path);

}  // namespace weightd
