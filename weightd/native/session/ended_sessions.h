// Sessions that have ended, but of which processes still hold memory. Each counts as a session of its user.
//
// A client may outlive a session that we closed. It then maps resident weights and predictors until it hangs up. After
// a client has ended, another process may still hold its ring (closed_rings.h).
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

    void keep(uint32_t session, EndedSession ended);      // its client lives, and may hang up later
    void keep_ring(SharedMemory ring, const User& user);  // its client has ended
    // Called when the client of a kept session has hung up or ended. Keeps only the ring. Returns the model that the
    // client no longer maps; none if the session is not kept.
    std::optional<uint32_t> forget_client(uint32_t session);
    void forget_released() { closed_rings_.forget_released(); }
    void clear() { kept_.clear(); }

    size_t size() const { return kept_.size() + closed_rings_.size(); }
    size_t of(const User& user) const;
    bool holds_rings() const { return closed_rings_.size() > 0; }
    // By session; its client lives.
    const std::map<uint32_t, EndedSession>& kept() const { return kept_; }

  private:
    Epoll& epoll_;
    std::map<uint32_t, EndedSession> kept_;
    ClosedRings closed_rings_;
};

}  // namespace weightd
