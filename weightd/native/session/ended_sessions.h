// Sessions that have ended while their clients still hold something of them. Each counts as a session of its user.
//
// A client whose session we closed may live on, and maps resident weights and predictors until it hangs up. A client
// that has gone may have left a process behind that keeps the ring (closed_rings.h).
#pragma once

#include <map>
#include <optional>

#include "session/closed_rings.h"
#include "session/epoll.h"
#include "session/ring_session.h"

namespace weightd {

class EndedSessions {
  public:
    explicit EndedSessions(Epoll& epoll) : epoll_(epoll) {}

    void keep(uint32_t session, Remains remains);         // its client lives, and may hang up later
    void keep_ring(SharedMemory ring, const User& user);  // its client has gone
    // The client of a kept session has hung up or has ended. The model that it no longer maps; none if the session is
    // not kept.
    std::optional<uint32_t> hung_up(uint32_t session);
    void forget_released() { closed_rings_.forget_released(); }
    void clear() { kept_.clear(); }

    size_t size() const { return kept_.size() + closed_rings_.size(); }
    size_t of(const User& user) const;
    bool holds_rings() const { return closed_rings_.size() > 0; }
    // By session whose client lives.
    const std::map<uint32_t, Remains>& kept() const { return kept_; }

  private:
    Epoll& epoll_;
    std::map<uint32_t, Remains> kept_;
    ClosedRings closed_rings_;
};

}  // namespace weightd
