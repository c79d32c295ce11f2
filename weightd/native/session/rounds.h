// The order of requests: in each round every user gets the same work done, and the sessions of a user share it.
//
// So a user that asks for much, in any number of sessions, delays another user by the work of one round at most. The
// rest of its requests follows in the next rounds, in which its sessions take turns.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <vector>

#include "memory/user.h"

namespace weightd {

class Rounds {
  public:
    static constexpr uint32_t USER_WORK = 2048;  // in a round: one or two tenths of a millisecond

    struct Waiting {
        User user;
        uint32_t session;
    };

    // One round. `serve` does a part of a session's work and returns how much that was.
    template <typename Serve>
    void round(std::vector<Waiting> waiting, Serve serve) {
        std::map<User, uint32_t> next;
        std::sort(waiting.begin(), waiting.end(), [this](const Waiting& a, const Waiting& b) {
            return a.user != b.user ? a.user < b.user : place(a) < place(b);
        });
        for (auto first = waiting.begin(); first != waiting.end();) {
            const User user = first->user;
            uint32_t left = USER_WORK;
            for (; first != waiting.end() && first->user == user; first++) {
                if (left == 0) continue;
                left -= std::min(left, serve(first->session));
                next[user] = first->session + 1;
            }
        }
        next_ = std::move(next);
    }

  private:
    // The rank among the sessions of its user: sessions that the last round did not reach come first.
    uint32_t place(const Waiting& waiting) const {
        const auto next = next_.find(waiting.user);
        return next == next_.end() ? waiting.session : waiting.session - next->second;
    }

    std::map<User, uint32_t> next_;  // session, of each user of the last round
};

}  // namespace weightd
