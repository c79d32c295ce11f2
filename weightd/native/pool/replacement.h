// Which cell gives way when the pool is full: the one that is used least often, where recent uses count for more.
//
// LRFU (Lee et al., IEEE Transactions on Computers 50(12), 2001): a use counts for 1 at first and for half of that
// after each half-life, and a cell's score is the sum over all its uses, also of those while it was not in the pool.
// All scores fall at the same rate, so their order changes only where something is used. Here a half-life is the time
// in which every cell is used twice on average. Cells are numbered through all layers of one model. A pinned cell
// (leased, or being read) is never the victim.
//
// A newcomer stays only if the uses before the one that it was read for outweigh all uses of the cell that would give
// way to it; otherwise it is passing, and gives way first. So a cyclic scan finds in each turn what it found in the
// last, and a single scan flushes nothing. That a passing cell is used again while it is there says only that somebody
// follows: what is used often stays when it comes the next time.
//
// Several scans at once read everything once only if they stay together. So then what passes lingers, in as many
// slots as a twentieth of the cells that are not there, at most half of all: who falls behind a little finds it,
// catches up, and all wait for the same reads. Who falls behind by more: engine_scans.cpp.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace weightd {

inline constexpr uint32_t NO_CELL = UINT32_MAX;

// How often a cell is used, in one byte: HOTNESS_MEAN + 8 log2(its uses / the mean of all cells), from 1 to 127; 0 for
// never. And whether it was in the pool, in the highest bit: those come first when a pool is filled again. It outlives
// pools: calibration foretells it, a pool learns it.
using Hotness = uint8_t;
inline constexpr Hotness HOTNESS_MEAN = 64;
inline constexpr Hotness HOTNESS_MAX = 127;
inline constexpr Hotness HOTNESS_IN_POOL = 128;

class Replacement {
  public:
    explicit Replacement(uint32_t cells);
    void seed(std::span<const Hotness> hotness);   // of each cell: in the place of what was seen until now
    void inserted(uint32_t cell, bool contested);  // comes into the pool, pinned; contested: for want of a free slot
    void touched(uint32_t cell);                   // is used: it was in the pool, or has just come for that
    void pinned(uint32_t cell);
    void unpinned(uint32_t cell);
    void removed(uint32_t cell);                                  // left the pool for another reason than victim()
    uint32_t victim();                                            // takes one out, or NO_CELL when all are pinned
    void retain_probationary(bool retain) { retains_ = retain; }  // several scans are under way
    uint32_t retained_max() const;                                // cells that may linger
    bool probationary(uint32_t cell) const { return probationary_[cell] != 0; }  // of one in the pool

    void write_hotness(std::span<Hotness> hotness) const;  // of each cell, as seen until now; no HOTNESS_IN_POOL

    static uint64_t table_bytes(uint32_t cells);  // what it allocates, once

  private:
    using Score = uint16_t;  // log2 of the sum, counted from a moving zero, in STEPS_PER_OCTAVE
    struct Link {            // of a circular list; a cell that is in none is linked to itself
        uint32_t previous;
        uint32_t next;
    };

    void advance();
    void forget_zero();
    uint32_t list_of(uint32_t level) const;
    uint32_t probationary_list() const;
    uint32_t level_of(Score score) const;
    uint32_t level_min() const;
    uint32_t level_max() const;
    void put(uint32_t cell);
    void take(uint32_t cell);
    uint32_t first_to_go();
    bool admits(uint32_t cell);
    void find_lowest();
    void append(uint32_t target, uint32_t source);

    uint32_t cells_;
    uint32_t touches_per_step_;  // of time
    uint32_t touches_ = 0;       // since the last step
    uint32_t now_;               // the score of one use at this moment
    uint32_t lowest_;            // no unpinned cell of the pool is at a lower level
    bool retains_ = false;
    uint32_t probationary_count_ = 0;  // unpinned ones
    uint32_t kept_count_ = 0;          // likewise
    std::vector<Score> scores_;
    std::vector<uint8_t> probationary_;  // of cells in the pool: 1 or 0
    std::vector<Link> links_;            // of cells, then of the lists: a ring of levels, and those that are passing
};

}  // namespace weightd
