// Rings of sessions that have ended: a client can keep one for as long as it likes.
//
// All but the header's page goes back to the system at once, and whoever touches it again pays for it: memory cgroups
// charge a page of shared memory to the process that makes it. What is left counts as a session of its user until
// nobody holds it.
#pragma once

#include <vector>

#include "device/shared_memory.h"
#include "memory/user.h"

namespace weightd {

class ClosedRings {
  public:
    void add(SharedMemory ring, const User& user);
    void forget_released();  // those that nobody holds any more
    size_t size() const { return held_.size(); }
    size_t of(const User& user) const;

  private:
    struct Held {
        SharedMemory ring;
        User user;
    };
    std::vector<Held> held_;
};

}  // namespace weightd
