// The rings of ended sessions. A client can keep a ring mapped for as long as it likes.
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
    void forget_released();  // those that no process holds any more
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
