// The slots of one model: segments of shared memory, what each slot holds, and how often it is leased.
//
// Invariants: a cell is in at most one slot, which find() names. A slot is free or holds one cell; it is `reading`
// until the cell's bytes are verified. Only a slot that is neither leased nor reading is evicted. A draining segment
// takes no new cell, and retires when its last slot is free. Segment numbers are never used twice.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "device/shared_memory.h"
#include "pool/replacement.h"

namespace weightd {

inline constexpr uint32_t SEGMENT_SLOTS_MAX = 1U << 16;
inline constexpr uint32_t NO_SLOT = UINT32_MAX;
inline constexpr uint32_t NO_WAITER = UINT32_MAX;

struct Slot {
    uint32_t cell = NO_CELL;
    uint32_t leases = 0;
    uint32_t first_waiter = NO_WAITER;  // of the engine's Waiters for the read
    bool reading = false;
    bool deferred = false;    // its read has not begun, and may wait (engine/scans.h)
    bool prefetched = false;  // read before anybody asked for it, and nobody has yet (engine/prefetches.h)
};

struct Segment {
    uint32_t number = 0;  // unique in the daemon's life
    uint32_t index = 0;   // in its pool
    SharedMemory memory;
    int buffer_index = -1;  // the reader's registration
    bool draining = false;
    std::vector<Slot> slots;
    std::vector<uint32_t> free;  // the lowest last, so that neighbours on flash often become neighbours in memory
    uint32_t busy = 0;           // slots that are leased or reading
};

struct Place {  // where a slot is; or none
    Segment* segment = nullptr;
    uint32_t index = 0;
    explicit operator bool() const { return segment != nullptr; }
    Slot& slot() const { return segment->slots[index]; }
};

class Pool {
  public:
    Pool(uint32_t cells, uint32_t cell_bytes);  // with the policy of cell_replacement.h
    Pool(uint32_t cells, uint32_t cell_bytes, std::unique_ptr<Replacement> replacement);

    Place find(uint32_t cell) const;
    // Gives `cell` a free slot, or evicts a cell for it. The slot is `reading` and has no leases. None when all are
    // busy.
    Place insert(uint32_t cell);
    bool has_free() const { return free_ > 0; }
    void loaded(Place place);  // its bytes are verified
    void drop(Place place);    // the cell, which is not leased, leaves the pool
    void lease(Place place);
    void unlease(Place place);
    void touched(uint32_t cell) { replacement_->touched(cell); }
    void awaited(uint32_t cell) { replacement_->awaited(cell); }
    void step_begins(uint32_t layer) { replacement_->step_begins(layer); }
    void retain_probationary(bool retain) { replacement_->retain_probationary(retain); }
    uint32_t retained_max() const { return replacement_->retained_max(); }
    void seed(std::span<const Hotness> hotness) { replacement_->seed(hotness); }
    void write_hotness(std::span<Hotness> hotness) const;  // of each cell

    Segment& add_segment(uint32_t number, SharedMemory memory);
    // Takes the largest segment of at most `slots_max` out of use, if there is one; of equal ones, that with the fewest
    // busy slots. So the small segments last, and a pool can give up nearly all that it can spare. retire_drained()
    // returns the segment once it is empty. `idle_only`: only a segment without busy slots.
    bool start_draining(uint64_t slots_max = UINT64_MAX, bool idle_only = false);
    bool can_drain(uint64_t slots_max) const { return to_drain(slots_max, false) != nullptr; }
    std::vector<std::unique_ptr<Segment>> retire_drained();
    uint32_t draining() const { return draining_; }
    std::vector<uint32_t> leased_in_draining() const;  // cells that keep segments from retiring

    uint32_t cell_bytes() const { return cell_bytes_; }
    std::byte* address(Place place) const;
    uint64_t slots() const { return slots_; }
    uint64_t filled() const { return filled_; }
    uint64_t busy() const;
    uint64_t evictions() const { return evictions_; }
    uint64_t leases() const { return leases_; }

    static uint64_t table_bytes(uint32_t cells, uint64_t slots_max);  // without those of the policy

  private:
    Place take_free();
    void update_busy(Place place, bool was_busy);
    void empty(Place place);
    uint32_t free_index() const;
    Segment* to_drain(uint64_t slots_max, bool idle_only) const;

    uint32_t cell_bytes_;
    std::vector<uint32_t> slot_of_;                   // by cell: index of the segment << 16 | index in it, or NO_SLOT
    std::vector<std::unique_ptr<Segment>> segments_;  // by index; null where one has retired
    std::unique_ptr<Replacement> replacement_;
    uint64_t slots_ = 0;   // in segments that do not drain
    uint64_t free_ = 0;    // free ones of those
    uint64_t filled_ = 0;  // in all segments
    uint32_t draining_ = 0;
    uint32_t next_free_ = 0;  // index of the segment that gave the last free slot
    uint64_t evictions_ = 0;
    uint64_t leases_ = 0;  // on all slots together
};

}  // namespace weightd
