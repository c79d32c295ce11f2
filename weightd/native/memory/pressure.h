// How much of --dram may be used now: less than all of it while the system lacks memory.
//
// Invariants: the target and the floor never exceed --dram. A press lowers the target, but not below the floor; a
// relief raises it. The target limits what pools take; what sessions are guaranteed and hold is never touched, so the
// memory in use may exceed the target for a while.
#pragma once

#include <cstdint>

#include "memory/memory.h"

namespace weightd {

// A press takes 1/8 of --dram or one segment, whichever is larger. Under pressure the kernel sends a signal every 2 s,
// so half of --dram is taken in about ten seconds.
inline constexpr uint32_t PRESS_DIVISOR = 8;
inline constexpr uint32_t RELIEF_DIVISOR = 32;  // a relief gives back 1/32 of --dram

class Pressure {
  public:
    explicit Pressure(const Memory& memory)
        : memory_(memory), target_bytes_(memory.limit_bytes()), floor_bytes_(memory.limit_bytes() / 2) {}

    void limit_raised(uint64_t by_bytes) { target_bytes_ += by_bytes; }
    void set_floor(uint64_t floor_bytes);
    void press();
    void relieve();
    bool pressed() const { return target_bytes_ < memory_.limit_bytes(); }
    uint64_t target_bytes() const { return target_bytes_; }
    uint64_t floor_bytes() const { return floor_bytes_; }
    uint64_t left_bytes() const;  // unused below the target
    bool exceeded() const { return memory_.used_bytes() > target_bytes_; }

  private:
    const Memory& memory_;
    uint64_t target_bytes_;
    uint64_t floor_bytes_;
};

// Whether less than an eighth of this machine's memory is available. False where /proc does not tell.
bool machine_is_short();

}  // namespace weightd
