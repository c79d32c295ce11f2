// The clock of every timeout and measurement.
#pragma once

#include <chrono>

namespace weightd {

using Clock = std::chrono::steady_clock;

inline double seconds(Clock::duration time) { return std::chrono::duration<double>(time).count(); }

}  // namespace weightd
