#include "memory/pressure.h"

#include <algorithm>

namespace weightd {

void Pressure::set_floor(uint64_t floor_bytes) { floor_bytes_ = std::min(floor_bytes, memory_.limit_bytes()); }

void Pressure::press() {
    const uint64_t step_bytes = std::max(memory_.limit_bytes() / PRESS_DIVISOR, memory_.segment_bytes());
    const uint64_t from_bytes = std::min(target_bytes_, memory_.used_bytes());  // to take unused memory helps nobody
    target_bytes_ = std::max(floor_bytes_, from_bytes - std::min(from_bytes, step_bytes));
}

void Pressure::relieve() {
    const uint64_t missing_bytes = memory_.limit_bytes() - target_bytes_;
    target_bytes_ += std::min(missing_bytes, memory_.limit_bytes() / RELIEF_DIVISOR + 1);
}

uint64_t Pressure::left_bytes() const { return target_bytes_ - std::min(target_bytes_, memory_.used_bytes()); }

}  // namespace weightd
