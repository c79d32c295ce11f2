// The account of --dram: resident weights, pool segments and tables are all paid from it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "device/block_size.h"

namespace weightd {

inline constexpr uint64_t SEGMENT_BYTES_MIN = 2U << 20;   // a huge page
inline constexpr uint64_t SEGMENT_BYTES_MAX = 64U << 20;  // registering a larger one would stall the engine's thread

enum class Account { pool, resident, tables };

class Memory {
  public:
    explicit Memory(uint64_t limit_bytes) : limit_bytes_(limit_bytes) {}
    bool take(Account account, uint64_t bytes);  // false when it does not fit; nothing is taken then
    void give(Account account, uint64_t bytes);
    void raise_limit(uint64_t limit_bytes) { limit_bytes_ = std::max(limit_bytes_, limit_bytes); }
    uint64_t limit_bytes() const { return limit_bytes_; }
    uint64_t used_bytes() const { return used_bytes_[0] + used_bytes_[1] + used_bytes_[2]; }
    uint64_t used_bytes(Account account) const { return used_bytes_[static_cast<size_t>(account)]; }
    uint64_t free_bytes() const { return limit_bytes_ - used_bytes(); }
    // The size of the segments of a pool that has grown.
    uint64_t segment_bytes() const { return std::clamp<uint64_t>(limit_bytes_ / 16, PAGE_BYTES, SEGMENT_BYTES_MAX); }
    // The size of the next segment of a pool. Pools double until their segments have the usual size: a table of which a
    // few rows are used takes little, and a large pool has few segments.
    uint64_t next_segment_bytes(uint64_t pool_bytes) const {
        return std::min(segment_bytes(), std::max(pool_bytes, SEGMENT_BYTES_MIN));
    }

  private:
    uint64_t limit_bytes_;
    uint64_t used_bytes_[3] = {0, 0, 0};
};

}  // namespace weightd
