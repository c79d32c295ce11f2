// The account of --dram: resident weights, pool segments, tables and rings are all paid from it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace weightd {

enum class Account { pool, resident, tables };

class Memory {
  public:
    explicit Memory(uint64_t limit_bytes) : limit_bytes_(limit_bytes) {}
    bool take(Account account, uint64_t bytes);  // false when it does not fit; nothing is taken then
    void give(Account account, uint64_t bytes);
    void raise_limit(uint64_t limit_bytes) { limit_bytes_ = std::max(limit_bytes_, limit_bytes); }
    uint64_t limit_bytes() const { return limit_bytes_; }
    uint64_t used_bytes(Account account) const { return used_bytes_[static_cast<size_t>(account)]; }
    uint64_t free_bytes() const { return limit_bytes_ - used_bytes_[0] - used_bytes_[1] - used_bytes_[2]; }

  private:
    uint64_t limit_bytes_;
    uint64_t used_bytes_[3] = {0, 0, 0};
};

// Whether less than an eighth of this machine's memory is available. False where /proc does not tell.
bool machine_is_short();

}  // namespace weightd
