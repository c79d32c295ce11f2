// What is hot is read in the background when a model comes into use, so that a restart costs the first tokens little.
//
// It takes only slots and memory that are free, nothing while anybody waits for a slot or for memory, and begins no
// read while another is in flight. What it has read gives way like any other cell.
#include <algorithm>

#include "engine/engine.h"

namespace weightd {

void Engine::seed(uint32_t model, std::span<const Hotness> hotness) {
    Model& state = *models_.at(model);
    if (hotness.size() != state.hotness.size()) {
        throw std::invalid_argument(state.spec.name + ": " + std::to_string(hotness.size()) + " cells foretold of " +
                                    std::to_string(state.hotness.size()));
    }
    std::copy(hotness.begin(), hotness.end(), state.hotness.begin());
    if (state.pool != nullptr) state.pool->seed(hotness);
}

std::vector<Hotness> Engine::hotness(uint32_t model) const {
    const Model& state = *models_.at(model);
    std::vector<Hotness> hotness = state.hotness;
    if (state.pool != nullptr) state.pool->write_hotness(hotness);
    return hotness;
}

void Engine::start_warming(Model& state) {
    const uint32_t hottest = *std::max_element(state.hotness.begin(), state.hotness.end());
    state.warming = {true, warms_ ? hottest : 0, 0};
}

// True when there is more to look for right now.
bool Engine::warm(Model& state) {
    if (state.pool == nullptr || state.warming.hotness == 0 || loader_.busy()) return false;
    if (!kept_bytes_.empty() || waiting()) return false;
    find_hot(state);
    return submit(state) || state.warming.hotness > 0;
}

void Engine::find_hot(Model& state) {
    Model::Warming& warming = state.warming;
    const uint32_t cells = state.spec.cell_count();
    const uint64_t batch_cells = std::max<uint64_t>(1, WARM_BYTES_MAX / state.spec.cell_bytes);
    for (uint32_t look = 0; look < WARM_EXAMINED_MAX && state.missing.size() < batch_cells; look++) {
        if (warming.next_cell == cells) {
            warming.hotness -= std::min(warming.hotness, WARM_HOTNESS_STEP);
            warming.next_cell = 0;
            if (warming.hotness == 0) return;
        }
        const uint32_t cell = warming.next_cell++;
        const uint32_t hotness = state.hotness[cell];
        const bool now = hotness <= warming.hotness && hotness + WARM_HOTNESS_STEP > warming.hotness;
        if (hotness == 0 || !now || state.pool->find(cell)) continue;
        if (!state.pool->has_free() && !grow(state)) {
            warming.hotness = 0;
            return;
        }
        const Place place = state.pool->insert(cell);
        state.missing.push_back({cell, place, state.pool->address(place)});
    }
}

}  // namespace weightd
