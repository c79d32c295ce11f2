// Memory pressure: turns signals of the kernel's triggers into presses and reliefs of the pool.
//
// Belongs to the engine's thread.
#pragma once

#include <cstdint>

#include "engine/engine.h"
#include "session/epoll.h"

namespace weightd {

struct PressureChoice {
    uint64_t floor_bytes = UINT64_MAX;  // pressure takes no memory below it; at most --dram
    // Triggers of pressure stall information (PSI), set already: EPOLLPRI reports pressure.
    Descriptor machine{};  // counts only while the machine is short of memory: it reports any container at its limit
    Descriptor cgroup{};   // of our own cgroup
};

class PressureSignals {
  public:
    PressureSignals(PressureChoice choice, Epoll& epoll, Engine& engine);

    void handle(int fd, uint32_t events);  // a trigger is ready
    void relieve_when_quiet();             // gives memory back to the pool once there has been no signal for a while
    uint64_t count() const { return count_; }

  private:
    const PressureChoice choice_;
    Epoll& epoll_;
    Engine& engine_;
    uint64_t count_ = 0;
    Clock::time_point relieve_at_;
};

}  // namespace weightd
