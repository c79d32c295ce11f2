// The cells of one model that sessions may have, but for which no slot was free, in the order of the requests.
//
// Invariants: a session stalls only within its share, and everything in the queue belongs to an open session.
#pragma once

#include <cstdint>
#include <deque>

#include "memory/session.h"

namespace weightd {

struct StalledWant {
    uint32_t session;
    uint32_t cell;  // of the model's numbering
    uint32_t tag;
};

class StalledWants {
  public:
    bool empty() const { return wants_.empty(); }
    const StalledWant& front() const { return wants_.front(); }
    void push(StalledWant want) { wants_.push_back(want); }
    void pop() { wants_.pop_front(); }
    // Takes the session's wants out. They lease no slot, so nothing else is to be undone.
    void withdraw(Session& session) {
        std::erase_if(wants_, [&](const StalledWant& want) {
            if (want.session != session.id) return false;
            session.withdraw(want.cell);
            return true;
        });
    }

  private:
    std::deque<StalledWant> wants_;
};

}  // namespace weightd
