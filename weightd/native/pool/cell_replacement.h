// The replacement policy of models whose neurons are used one by one, or all in order.
//
// The least used cell is evicted, where recent uses count for more.
//
// LRFU (Lee et al., IEEE Transactions on Computers 50(12), 2001): a use counts for 1 at first, and for half as much
// after each half-life. A cell's score is the sum over all its uses, including those while it was not in the pool. All
// scores fall at the same rate, so their order changes only when a cell is used. A half-life is the time in which every
// cell is used twice on average. Cells are numbered through all layers of one model.
//
// Admission: a cell that enters a full pool is admitted only if its score, without the use that it is read for, is
// above the score of the cell that would be evicted for it. Otherwise it is probationary. So a cyclic scan finds in
// each turn what it found in the last one, and a single scan evicts nothing of value. A use of a probationary cell does
// not admit it, because it only shows that another session follows the first. A cell that is used often is admitted
// when it is read the next time.
//
// Invariants: a pinned cell (leased, or being read) is never evicted. Probationary cells are evicted before admitted
// ones. While several scans are under way, some probationary cells are retained: a twentieth of the number of cells
// outside the pool, and at most half of the pool. A scan that is a little behind finds those and catches up; from then
// on, all scans wait for the same reads. engine/scans.h says what happens to a scan that is further behind.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "pool/replacement.h"

namespace weightd {

class CellReplacement final : public Replacement {
  public:
    explicit CellReplacement(uint32_t cells);
    void seed(std::span<const Hotness> hotness) override;
    void inserted(uint32_t cell, bool contested) override;
    void touched(uint32_t cell) override;
    void pinned(uint32_t cell) override;
    void unpinned(uint32_t cell) override;
    void removed(uint32_t cell) override;
    uint32_t victim() override;
    void retain_probationary(bool retain) override { retains_ = retain; }
    uint32_t retained_max() const override;
    bool probationary(uint32_t cell) const { return probationary_[cell] != 0; }  // `cell` is in the pool
    void write_hotness(std::span<Hotness> hotness) const override;

    static uint64_t table_bytes(uint32_t cells);  // bytes of all its allocations

  private:
    using Score = uint16_t;  // log2 of the sum of uses, above a moving zero, in STEPS_PER_OCTAVE
    struct Link {            // in a circular list; a cell that is in no list is linked to itself
        uint32_t previous;
        uint32_t next;
    };

    void advance();
    void move_zero();
    uint32_t list_of(uint32_t level) const;
    uint32_t probationary_list() const;
    uint32_t level_of(Score score) const;
    uint32_t level_min() const;
    uint32_t level_max() const;
    void put(uint32_t cell);
    void take(uint32_t cell);
    uint32_t next_victim();
    bool admits(uint32_t cell);
    void find_lowest();
    void append(uint32_t target, uint32_t source);

    uint32_t cells_;
    uint32_t touches_per_step_;  // touches that move time by one step
    uint32_t touches_ = 0;       // touches since the last step
    uint32_t now_;               // the score of one use now
    uint32_t lowest_;            // level below which the pool has no unpinned admitted cell
    bool retains_ = false;
    uint32_t probationary_count_ = 0;  // unpinned cells on probation in the pool
    uint32_t admitted_count_ = 0;      // unpinned admitted cells in the pool
    std::vector<Score> scores_;
    std::vector<uint8_t> probationary_;  // by cell: 1 or 0; only cells in the pool count
    std::vector<Link> links_;            // cells, then heads of the lists: one per level, and the probationary list
};

}  // namespace weightd
