#include "engine/warming.h"

#include <algorithm>

namespace weightd {

void Warming::begin() {
    if (activation_ == model_.activations) return;
    activation_ = model_.activations;
    hotness_ = enabled_ ? *std::max_element(model_.hotness.begin(), model_.hotness.end()) : 0;
    next_cell_ = 0;
}

bool Warming::pending() const { return hotness_ > 0 && model_.pool != nullptr && activation_ == model_.activations; }

void Warming::add_hot(Models& models, std::vector<Missing>& missing) {
    const uint64_t batch_cells = std::max<uint64_t>(1, WARM_BYTES_MAX / model_.spec.cell_bytes);
    for (uint32_t examined = 0; examined < WARM_EXAMINED_MAX && missing.size() < batch_cells; examined++) {
        if (next_cell_ == model_.spec.cell_count()) {
            hotness_ -= std::min(hotness_, WARM_HOTNESS_STEP);
            next_cell_ = 0;
            if (hotness_ == 0) return;
        }
        const uint32_t cell = next_cell_++;
        const uint32_t hotness = model_.hotness[cell];
        const bool is_next = hotness <= hotness_ && hotness + WARM_HOTNESS_STEP > hotness_;
        if (hotness == 0 || !is_next || model_.pool->find(cell)) continue;
        if (!model_.pool->has_free() && !models.grow(model_)) {
            hotness_ = 0;
            return;
        }
        const Place place = model_.pool->insert(cell);
        missing.push_back({cell, place, model_.pool->address(place)});
    }
}

}  // namespace weightd
