// The granularity of direct I/O where a store lies.
#pragma once

#include <cstdint>
#include <string>

namespace weightd {

// max(4096, the offset and memory alignment that statx reports for the file): what every cell, extent and buffer is
// a multiple of. STATX_DIOALIGN may say 512 where the physical block is 4096, so it is never less than that.
// std::system_error when `path`, a regular file, cannot be asked.
std::uint32_t block_size_bytes(const std::string& path);

}  // namespace weightd
