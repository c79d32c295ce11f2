// Lets an engine do everything that it can do, and lets the time pass in which it defers reads.
#pragma once

#include "engine/engine.h"

namespace weightd {

inline void settle(Engine& engine) {
    for (Clock::time_point now; engine.step() || engine.reading() || engine.defers_reads();) {
        engine.set_time(now += std::chrono::milliseconds(100));
    }
}

}  // namespace weightd
