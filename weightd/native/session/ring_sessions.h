// The sessions of other processes: how many a user may have, which requests are served next, and how sessions end.
//
// Belongs to the engine's thread. A session is reserved when its opening begins, and is open until its client or the
// daemon closes it. After that, its client may still hold memory of it (ended_sessions.h). How many sessions a user may
// have is in user.h.
#pragma once

#include <map>
#include <memory>

#include "engine/engine.h"
#include "session/ended_sessions.h"
#include "session/epoll.h"
#include "session/half_open.h"
#include "session/ring_session.h"
#include "session/rounds.h"

namespace weightd {

// A session takes three file descriptors, and a fourth when its client has attached. A segment of the pool takes two.
inline constexpr uint32_t SESSIONS_MAX = 256;

class RingSessions {
  public:
    RingSessions(Engine& engine, Epoll& epoll);

    // Reserves a session for `user`. Throws NoRoom.
    void reserve_session(const User& user);
    void cancel_reservation(const User& user);
    // Opens a session, which uses up a reservation of its user. If too many sessions wait for their clients, closes one
    // of those, perhaps this one: its client tries again.
    void open(std::unique_ptr<RingSession> session);
    // Returns what `reserve` returns. As long as that throws NoRoom, closes a session that has no client, of a user
    // with more of those than `user` has, and tries again.
    template <typename F>
    auto reserve_for(const User& user, F reserve) -> decltype(reserve()) {
        while (true) {
            try {
                return reserve();
            } catch (const NoRoom&) {
                if (!close_unattached_for(user)) throw;
            }
        }
    }
    // The part of --dram that the user's sessions have: their shares, and the tables that are not paid for already
    // (SESSIONS_RESERVED).
    uint64_t bytes_of(const User& user) const;

    RingSession* find(const Token& token);  // the session with this token; null if there is none or it has a client
    // Connects a session with its client, and takes the socket. Returns 0, or the errno of a refusal: the socket is
    // still the caller's then.
    int attach(Descriptor& socket, RingSession& session);

    bool serve();            // one round of the sessions that have requests; false: none has
    bool announce_sleep();   // tells clients to ring the doorbell after a request; true: there is a request already
    void announce_waking();  // tells clients not to ring it
    bool has_deadlines() const {  // whether close_late() may find something later
        return !unattached_.empty() || ended_.holds_rings();
    }

    void close(uint32_t session, ring::State state);  // closes an open session, or one whose client lives
    void close_late();                                // closes sessions that block others, or got no client in time
    void close_all();

    const std::map<uint32_t, RingSession*>& open_sessions() const { return open_; }  // by number
    uint32_t count_of(uint32_t model) const;

  private:
    bool close_unattached_for(const User& user);
    uint64_t count_of(const User& user) const;
    uint32_t serve(RingSession& session);
    void watch(const RingSession& session, int socket, int process);

    Engine& engine_;
    Epoll& epoll_;
    std::map<User, uint32_t> reserved_;      // number of sessions that are not open yet
    std::map<uint32_t, RingSession*> open_;  // by number, attached or not
    HalfOpen unattached_;                    // sessions of open_ without a client
    Rounds rounds_;                          // the order in which those of open_ are served
    EndedSessions ended_;
};

}  // namespace weightd
