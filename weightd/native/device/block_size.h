// The granularity of memory, and of direct I/O where a store lies.
#pragma once

#include <cstdint>
#include <string>

namespace weightd {

inline constexpr std::uint32_t PAGE_BYTES = 4096;
inline constexpr std::uint32_t BLOCK_BYTES_MIN = 4096;  // files are read in blocks of at least this size

constexpr std::uint64_t whole_pages(std::uint64_t bytes) { return (bytes + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES; }

// max(BLOCK_BYTES_MIN, the offset and memory alignment that statx reports for the file): what every cell, extent and
// buffer is a multiple of. STATX_DIOALIGN may say 512 where the physical block is 4096, so it is never less than that.
// std::system_error when `path`, a regular file, cannot be asked.
std::uint32_t block_size_bytes(const std::string& path);

}  // namespace weightd
