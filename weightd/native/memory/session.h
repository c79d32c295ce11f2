// One attached process as the engine sees it: its share, the cells that it holds, and where its grants go.
#pragma once

#include <cstdint>
#include <vector>

#include "device/clock.h"
#include "pool/pool.h"
#include "ring.h"

namespace weightd {

inline constexpr uint32_t NO_LAYER = UINT32_MAX;

class Session {
  public:
    Session(uint32_t model, uint32_t cells, uint32_t share_slots, bool borrows = false)
        : model(model), share_slots(share_slots), borrows(borrows), lease_limit(share_slots), holds_(cells) {}
    virtual ~Session() = default;
    virtual void granted(uint32_t tag, uint32_t cell, Place place, const Pool& pool) = 0;  // cell within its layer
    virtual void failed(uint32_t tag, uint32_t cell, ring::Status status, uint32_t detail) = 0;
    virtual void flush() = 0;  // after each batch of granted() and failed()
    virtual void segment_gone(uint32_t /*segment*/) {}
    virtual void limit_changed(uint32_t /*limit*/) {}  // the limit to obey from now on, at most lease_limit

    // The ledger of what it holds. Cells are counted in the model's numbering.
    bool holds(uint32_t cell) const { return holds_[cell].granted + holds_[cell].pending > 0; }
    uint32_t granted_leases(uint32_t cell) const { return holds_[cell].granted; }
    bool is_within_share(uint32_t cell) const;  // whether its share covers one more lease on the cell
    void ask(uint32_t cell);                    // one more lease, which is pending
    void withdraw(uint32_t cell);               // a pending lease ends without a grant
    void grant(uint32_t cell);                  // a pending lease is granted
    void give_back(uint32_t cell);              // a granted lease ends
    uint32_t cell_count() const { return static_cast<uint32_t>(holds_.size()); }
    uint32_t leases(uint32_t cell) const { return uint32_t{holds_[cell].granted} + holds_[cell].pending; }

    static uint64_t table_bytes(uint32_t cells) { return uint64_t{cells} * sizeof(Hold); }

    uint32_t id = 0;            // given by Sessions
    uint32_t slots_wanted = 0;  // it asked for such a share and may have got a smaller one; 0: it had no preference
    const uint32_t model;
    const uint32_t share_slots;      // guaranteed to it
    const bool borrows;              // may hold more than its share while nobody waits for a slot
    uint32_t lease_limit;            // share and what may be borrowed; held_cells exceeds it only after it fell
    uint32_t held_cells = 0;         // distinct cells with a lease, granted or pending
    uint32_t unanswered = 0;         // pending leases
    Clock::time_point active_at;     // when it last asked for a cell or was granted one
    uint32_t step_layer = NO_LAYER;  // of its step under way; NO_LAYER once it has given everything back
    uint64_t hits = 0;               // of the cells that it asked for
    uint64_t misses = 0;
    uint64_t read_bytes = 0;  // read from flash for it
    uint32_t prefetches = 0;  // cells of prefetch_layer that it may want soon, and that are not read yet
    uint32_t prefetch_layer = NO_LAYER;
    uint32_t prefetch_hint = 0;    // the tag of its last ring::PREFETCH
    uint64_t prefetched = 0;       // cells that were read because it said so
    uint64_t prefetched_used = 0;  // such cells that it asked for, when nobody had before

  private:
    struct Hold {  // leases on one cell
        uint16_t granted = 0;
        uint16_t pending = 0;
    };

    void end_if_last(uint32_t cell) { held_cells -= holds(cell) ? 0 : 1; }

    std::vector<Hold> holds_;  // by cell
};

inline bool Session::is_within_share(uint32_t cell) const {
    const uint32_t count = leases(cell);
    return count == 0 ? held_cells < share_slots : count < UINT16_MAX;
}

inline void Session::ask(uint32_t cell) {
    if (!holds(cell)) held_cells++;
    holds_[cell].pending++;
    unanswered++;
}

inline void Session::withdraw(uint32_t cell) {
    holds_[cell].pending--;
    unanswered--;
    end_if_last(cell);
}

inline void Session::grant(uint32_t cell) {
    holds_[cell].pending--;
    holds_[cell].granted++;
    unanswered--;
}

inline void Session::give_back(uint32_t cell) {
    holds_[cell].granted--;
    end_if_last(cell);
}

}  // namespace weightd
