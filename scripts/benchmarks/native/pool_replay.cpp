#include "pool_replay.h"

#include <algorithm>
#include <memory>

#include "pool/cell_replacement.h"
#include "pool/expert_replacement.h"
#include "pool/pool.h"

namespace weightd {
namespace {

constexpr uint32_t CELL_BYTES = 64;  // nothing is stored in them
constexpr uint8_t REPEATED = 2;

bool use(Pool& pool, uint32_t cell, std::vector<Place>& leased) {
    Place place = pool.find(cell);
    const bool hit = static_cast<bool>(place);
    if (!hit) place = pool.insert(cell);
    if (!place) return false;  // the row's other cells take all slots
    pool.lease(place);
    pool.touched(cell);
    leased.push_back(place);
    return hit;
}

std::unique_ptr<Replacement> policy(uint32_t cells, uint32_t experts) {
    if (experts == 0) return std::make_unique<CellReplacement>(cells);
    std::vector<ExpertRange> ranges;
    for (uint32_t cell = 0; cell < cells; cell++) ranges.push_back({cell / experts, 1});
    return std::make_unique<ExpertReplacement>(ranges);
}

}  // namespace

std::vector<uint8_t> replay(std::span<const uint32_t> steps, uint32_t width, uint32_t cells, uint32_t slots,
                            uint32_t experts) {
    Pool pool(cells, CELL_BYTES, policy(cells, experts));
    for (uint32_t made = 0, number = 0; made < slots; number++) {
        const uint32_t count = std::min(slots - made, SEGMENT_SLOTS_MAX);
        pool.add_segment(number, SharedMemory("weightd-replay", uint64_t{count} * CELL_BYTES));
        made += count;
    }
    std::vector<uint8_t> hits;
    hits.reserve(steps.size());
    std::vector<Place> leased;
    for (size_t row = 0; row < steps.size(); row += width) {
        if (experts > 0) pool.step_begins(steps[row] / experts);
        for (size_t i = row; i < row + width; i++) {
            const bool repeated = i > row && steps[i] == steps[i - 1];
            hits.push_back(repeated ? REPEATED : static_cast<uint8_t>(use(pool, steps[i], leased)));
        }
        for (const Place place : leased) {
            if (place.slot().reading) pool.loaded(place);
            pool.unlease(place);
        }
        leased.clear();
    }
    return hits;
}

}  // namespace weightd
