// Lets an engine do all that it can, the time in which it puts reads off included.
#pragma once

#include "engine/engine.h"

namespace weightd {

inline void settle(Engine& engine) {
    for (Clock::time_point now; engine.step() || engine.reading() || engine.defers_reads();) {
        engine.tell_time(now += std::chrono::milliseconds(100));
    }
}

}  // namespace weightd
