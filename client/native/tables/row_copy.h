// Rows of a table, copied out of leased cells.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "experts/cell_walk.h"

namespace flashclient {

// Copies each row of `rows`, in any order and as often as it is named, to `out`: rows.size() times `row_bytes`. Each
// cell is asked for once. `walk` is of the table. Throws what the walk throws, and std::invalid_argument for a cell
// outside of readable memory (kernels/readable_memory.h).
void copy_rows(CellWalk& walk, std::span<const uint32_t> rows, size_t row_bytes, std::byte* out);

}  // namespace flashclient
