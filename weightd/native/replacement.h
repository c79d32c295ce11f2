// Which cell gives way when the pool is full.
//
// The engine tells it what happens to each cell of one model; it answers with a victim. Cells are numbered through
// all layers. A pinned cell (leased, or being read) is never the victim.
#pragma once

#include <cstdint>
#include <memory>

namespace weightd {

inline constexpr uint32_t NO_CELL = UINT32_MAX;

class Replacement {
  public:
    virtual ~Replacement() = default;
    virtual void resize(uint32_t slots) = 0;   // the pool has grown or shrunk to this many
    virtual void touched(uint32_t cell) = 0;   // asked for, and in the pool
    virtual void inserted(uint32_t cell) = 0;  // comes into the pool, pinned
    virtual void pinned(uint32_t cell) = 0;
    virtual void unpinned(uint32_t cell) = 0;
    virtual void removed(uint32_t cell) = 0;      // left the pool for another reason than victim()
    virtual uint32_t victim() = 0;                // takes one out, or NO_CELL when all are pinned
    static uint64_t table_bytes(uint32_t cells);  // what it allocates, once
};

// LIRS (Jiang and Zhang, SIGMETRICS 2002): cells whose last two uses lie close together stay (LIR), all others pass
// through a short queue (HIR). A single scan cannot flush the LIR cells, and a cyclic scan over twice the pool finds
// half of its cells there, where LRU finds none.
std::unique_ptr<Replacement> make_lirs(uint32_t cells);

}  // namespace weightd
