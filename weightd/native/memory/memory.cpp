#include "memory/memory.h"

#include <cassert>

namespace weightd {

bool Memory::take(Account account, uint64_t bytes) {
    if (bytes > free_bytes()) return false;
    used_bytes_[static_cast<size_t>(account)] += bytes;
    return true;
}

void Memory::give(Account account, uint64_t bytes) {
    assert(used_bytes_[static_cast<size_t>(account)] >= bytes);
    used_bytes_[static_cast<size_t>(account)] -= bytes;
}

}  // namespace weightd
