#include "session/closed_rings.h"

#include <algorithm>

namespace weightd {

void ClosedRings::add(SharedMemory ring, const User& user) { held_.push_back({std::move(ring), user}); }

void ClosedRings::forget_released() {
    std::erase_if(held_, [](const Held& held) { return !held.ring.held_by_others(); });
}

size_t ClosedRings::of(const User& user) const {
    return static_cast<size_t>(
        std::count_if(held_.begin(), held_.end(), [&](const Held& held) { return held.user == user; }));
}

}  // namespace weightd
