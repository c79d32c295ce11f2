// What the engine keeps of --dram while the system lacks memory.
#include <algorithm>

#include "engine/engine.h"

namespace weightd {
void Engine::press() {
    const uint64_t used_bytes = memory_.limit_bytes() - memory_.free_bytes();
    const uint64_t step_bytes = std::max(memory_.limit_bytes() / PRESS_DIVISOR, segment_bytes_);
    const uint64_t from_bytes = std::min(target_bytes_, used_bytes);  // memory that is not used helps nobody
    target_bytes_ = std::max(floor_bytes_, from_bytes - std::min(from_bytes, step_bytes));
    update_limits();
    shrink_to_target();
}

void Engine::relieve() {
    const uint64_t missing_bytes = memory_.limit_bytes() - target_bytes_;
    target_bytes_ += std::min(missing_bytes, memory_.limit_bytes() / RELIEF_DIVISOR + 1);
    update_limits();
}

// True when something was given back. What is leased keeps its segment, and the loop comes here again.
bool Engine::shrink_to_target() {
    bool any = false;
    while (memory_.limit_bytes() - memory_.free_bytes() > target_bytes_) {
        if (deactivate_idle(nullptr, IDLE_REBALANCES_MIN)) {
            any = true;
            continue;
        }
        if (!drain_surplus(nullptr, true)) break;
        const uint64_t free_bytes = memory_.free_bytes();
        for (const auto& state : models_) {
            if (state->pool != nullptr) retire(*state);
        }
        if (memory_.free_bytes() == free_bytes) break;
        any = true;
    }
    return any;
}

// What a pool may still take: of what is free below the target, and above it only what its sessions are owed.
uint64_t Engine::growth_bytes(const Model& state) const {
    const uint64_t used_bytes = memory_.limit_bytes() - memory_.free_bytes();
    const uint64_t below_bytes = target_bytes_ - std::min(target_bytes_, used_bytes);
    const uint64_t owed_slots = state.guaranteed_slots - std::min(state.guaranteed_slots, state.pool->slots());
    return std::min(free_bytes(state), std::max(below_bytes, owed_slots * state.spec.cell_bytes));
}

}  // namespace weightd
