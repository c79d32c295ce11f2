// One attached process as the engine sees it: its share, what it holds, and where its grants go.
#pragma once

#include <chrono>
#include <cstdint>
#include <span>
#include <vector>

#include "pool/pool.h"
#include "ring.h"

namespace weightd {

using Clock = std::chrono::steady_clock;

struct Scan {                    // through all cells of a model, round and round
    uint32_t cell = 0;           // the last that was asked for
    Clock::time_point awake_at;  // when it asked for something or got it
};

struct Hold {  // of one cell by one session
    uint16_t granted = 0;
    uint16_t pending = 0;  // asked for, not yet answered
};

class Session {
  public:
    Session(uint32_t model, uint32_t cells, uint32_t share_slots, bool borrows = false)
        : model(model), share_slots(share_slots), borrows(borrows), lease_limit(share_slots), holds(cells) {}
    virtual ~Session() = default;
    virtual void granted(uint32_t tag, uint32_t cell, Place place, const Pool& pool) = 0;  // cell within its layer
    virtual void failed(uint32_t tag, uint32_t cell, ring::Status status, uint32_t detail) = 0;
    virtual void flush() = 0;  // after every batch of the two above
    virtual void segment_gone(uint32_t /*segment*/) {}
    virtual void limit_changed(uint32_t /*obey*/) {}  // what it should keep to from now on, at most lease_limit

    static uint64_t table_bytes(uint32_t cells) { return uint64_t{cells} * sizeof(Hold); }

    uint32_t id = 0;  // given by the engine
    const uint32_t model;
    const uint32_t share_slots;  // guaranteed
    const bool borrows;          // may hold more than its share, while nobody waits for a slot
    uint32_t lease_limit;        // its share and what it may borrow; held_cells can be above it only after it fell
    uint32_t held_cells = 0;     // distinct ones
    bool scans = false;          // it asks for runs of cells, as in exact mode, and holds some
    Scan scan;                   // while it scans
    uint32_t unanswered = 0;     // cells that it asked for
    uint64_t hits = 0;           // of the cells that it asked for
    uint64_t misses = 0;
    uint64_t read_bytes = 0;  // from flash for it
    std::vector<Hold> holds;  // by cell of the model's numbering
};

}  // namespace weightd
