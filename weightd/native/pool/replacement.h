// Which cell is evicted when the pool is full. Cells are numbered through all layers of one model.
//
// There are two policies: cell_replacement.h, and expert_replacement.h for models with experts.
#pragma once

#include <cstdint>
#include <span>

namespace weightd {

inline constexpr uint32_t NO_CELL = UINT32_MAX;

// How often a cell is used, in one byte: HOTNESS_MEAN + 8 log2(its uses / the mean of all cells), from 1 to 127; 0 for
// never. The highest bit says that the cell was in the pool: such cells come first when a pool is filled again. Hotness
// outlives pools: calibration predicts it, and a pool learns it.
using Hotness = uint8_t;
inline constexpr Hotness HOTNESS_MEAN = 64;
inline constexpr Hotness HOTNESS_MAX = 127;
inline constexpr Hotness HOTNESS_IN_POOL = 128;
inline constexpr uint32_t HOTNESS_PER_OCTAVE = 8;

class Replacement {
  public:
    virtual ~Replacement() = default;
    virtual void seed(std::span<const Hotness> hotness) = 0;   // replaces what was learned; `hotness` is by cell
    virtual void inserted(uint32_t cell, bool contested) = 0;  // enters the pool, pinned; contested: no slot was free
    virtual void touched(uint32_t cell) = 0;                   // it is used; it is in the pool
    virtual void pinned(uint32_t cell) = 0;
    virtual void unpinned(uint32_t cell) = 0;
    virtual void removed(uint32_t cell) = 0;  // it leaves the pool for another reason than victim()
    virtual uint32_t victim() = 0;            // takes a cell out; NO_CELL when all are pinned
    virtual void write_hotness(std::span<Hotness> hotness) const = 0;  // by cell; without HOTNESS_IN_POOL

    // Of scans (engine/scans.h): whether probationary cells are retained, and how many are now.
    virtual void retain_probationary(bool /*retain*/) {}
    virtual uint32_t retained_max() const { return 0; }
    // Of mixtures: a session begins to use a layer. What it uses of the layer until the next step belongs together.
    virtual void step_begins(uint32_t /*layer*/) {}
    // The layer's next step may use the cell, which may or may not be in the pool.
    virtual void awaited(uint32_t /*cell*/) {}
};

}  // namespace weightd
