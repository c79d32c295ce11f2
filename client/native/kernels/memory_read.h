// Reads memory and does nothing with it: the speed that kernels are compared with.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/workers.h"

namespace flashclient {

// The exclusive or of all 64-bit words of `bytes` at `data`; bytes beyond the last whole 64 are left out.
std::uint64_t read_memory(Workers& workers, const void* data, std::size_t bytes);

}  // namespace flashclient
