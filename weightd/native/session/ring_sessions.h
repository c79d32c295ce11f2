// The sessions of other processes: whose they are, which requests are served next, and how sessions end.
//
// Belongs to the engine's thread. A session takes a place when its opening begins, is open until its client or we close
// it, and may leave something behind (ended_sessions.h). No user takes the places that others need (user.h).
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

// Each takes three descriptors, four once it is attached, two more for each segment of the pool beside them.
inline constexpr uint32_t SESSIONS_MAX = 256;

class RingSessions {
  public:
    RingSessions(Engine& engine, Epoll& epoll);

    // A place for a session that `user` opens. Throws NoRoom.
    void take_place(const User& user);
    void give_up_place(const User& user);
    // Opens a session in a place that its user has taken. Closes another one where too many wait for their clients,
    // perhaps this one: its client tries again.
    void open(std::unique_ptr<RingSession> session);
    // What `reserve` returns. While it throws NoRoom, sessions without a client end, of users who have more of them.
    template <typename F>
    auto making_way(const User& user, F reserve) -> decltype(reserve()) {
        while (true) {
            try {
                return reserve();
            } catch (const NoRoom&) {
                if (!make_way(user)) throw;
            }
        }
    }
    // What the user's sessions have of --dram: their shares, and the tables of those for which none are set aside.
    uint64_t bytes_of(const User& user) const;

    RingSession* find(const Token& token);  // the session with this token; null if there is none or it has a client
    // Connects a session with its client, and takes the socket. Returns 0, or the errno of a refusal, for which the
    // socket is left to the caller.
    int attach(Descriptor& socket, RingSession& session);

    bool serve();            // serves one round of the sessions that have requests; false: none has
    bool announce_sleep();   // tells clients to ring the doorbell for a request; true: one has made a request meanwhile
    void announce_waking();  // tells clients that ringing is not needed
    bool waits_for_time() const {  // whether close_late() may find something
        return !unattached_.empty() || ended_.holds_rings();
    }

    void close(uint32_t session, ring::State state);  // closes an open session, or one whose client lives
    void close_late();                                // closes sessions that block others, or got no client in time
    void close_all();

    const std::map<uint32_t, RingSession*>& open_sessions() const { return open_; }  // by number
    uint32_t count_of(uint32_t model) const;

  private:
    bool make_way(const User& user);
    uint64_t count_of(const User& user) const;
    uint32_t serve(RingSession& session);
    void watch(const RingSession& session, int socket, int process);

    Engine& engine_;
    Epoll& epoll_;
    std::map<User, uint32_t> places_;        // number of places taken by sessions that are not open yet
    std::map<uint32_t, RingSession*> open_;  // by number, attached or not
    HalfOpen unattached_;                    // sessions of open_ without a client
    Rounds rounds_;                          // the order in which those of open_ are served
    EndedSessions ended_;
};

}  // namespace weightd
