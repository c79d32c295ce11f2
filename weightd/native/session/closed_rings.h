// The rings of ended sessions, which clients may keep mapped for as long as they like.
//
// All pages but the header's are freed when the session ends. A process that touches them again pays for them: memory
// cgroups charge a page of shared memory to the process that allocates it. The ring counts as a session of its user
// until no process holds it.
#pragma once

#include <vector>

#include "device/shared_memory.h"
#include "memory/user.h"

namespace weightd {

class ClosedRings {
  public:
    void add(SharedMemory ring, const User& user);
    void forget_released();  // the rings that no process holds any longer
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
