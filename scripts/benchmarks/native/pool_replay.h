// The pool's own code on a trace of cells, without reads.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace weightd {

// `steps` has rows of `width` cells, which are leased together; a cell that follows itself in a row counts once.
// Returns 1 for each use that was a hit, 0 for one that was not, 2 where the row repeats a cell. The pool has `slots`
// slots and is empty at first; `cells` is the number of cells of the model. `experts`: of a layer, each one cell, and
// each row is a step of one layer; 0: there are no experts.
std::vector<uint8_t> replay(std::span<const uint32_t> steps, uint32_t width, uint32_t cells, uint32_t slots,
                            uint32_t experts);

}  // namespace weightd
