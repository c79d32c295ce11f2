#include "tables/row_copy.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "kernels/readable_memory.h"

namespace flashclient {
namespace {

constexpr uint32_t LAYER = 0;  // a table has one

// The places in `rows`, by row, and where those of each cell begin; at the end, where the last ones end.
struct ByCell {
    std::vector<size_t> places;
    std::vector<uint32_t> cells;
    std::vector<size_t> begins;
};

ByCell by_cell(std::span<const uint32_t> rows, uint32_t rows_per_cell) {
    ByCell sorted{std::vector<size_t>(rows.size()), {}, {}};
    std::iota(sorted.places.begin(), sorted.places.end(), size_t{0});
    std::sort(sorted.places.begin(), sorted.places.end(), [&](size_t a, size_t b) { return rows[a] < rows[b]; });
    for (size_t i = 0; i < rows.size(); i++) {
        const uint32_t cell = rows[sorted.places[i]] / rows_per_cell;
        if (!sorted.cells.empty() && sorted.cells.back() == cell) continue;
        sorted.cells.push_back(cell);
        sorted.begins.push_back(i);
    }
    sorted.begins.push_back(rows.size());
    return sorted;
}

}  // namespace

void copy_rows(CellWalk& walk, std::span<const uint32_t> rows, size_t row_bytes, std::byte* out) {
    const BundlesOfCell cell = walk.cell();
    const ByCell sorted = by_cell(rows, cell.bundles);
    const auto copy = [&](size_t index) {
        Reading reading(row_bytes, 1);
        for (size_t i = sorted.begins[index]; i < sorted.begins[index + 1]; i++) {
            const size_t place = sorted.places[i];
            const uint64_t address = walk.address(index) + uint64_t{rows[place] % cell.bundles} * cell.stride_bytes;
            const auto checked = reading.checked(std::span(&address, 1));
            std::memcpy(out + place * row_bytes, reinterpret_cast<const void*>(checked.front()), row_bytes);
        }
        walk.done(index, 1);
    };
    std::vector<size_t> left(sorted.cells.size());
    std::iota(left.begin(), left.end(), size_t{0});
    walk.begin(LAYER, sorted.cells, true);
    while (true) {
        std::erase_if(left, [&](size_t index) {
            if (walk.address(index) == 0) return false;
            copy(index);
            return true;
        });
        if (left.empty()) break;
        walk.wait();
    }
    walk.end();
}

}  // namespace flashclient
