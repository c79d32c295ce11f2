// Whose requests are served next: in each round every user gets as much done, and his sessions share it.
//
// So whoever asks for much, by however many sessions, keeps another user waiting for no longer than one part. What is
// left of a user's requests comes in the next rounds, in turn.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <vector>

#include "memory/user.h"

namespace weightd {

class Turns {
  public:
    static constexpr uint32_t USER_WORK = 2048;  // in a round: a tenth of a millisecond or two

    struct Waiting {
        User user;
        uint32_t session;
    };

    // One round of those that wait. `serve` does a part of a session's work and tells how much.
    template <typename Serve>
    void round(std::vector<Waiting> waiting, Serve serve) {
        std::map<User, uint32_t> next;
        std::sort(waiting.begin(), waiting.end(), [this](const Waiting& a, const Waiting& b) {
            return a.user != b.user ? a.user < b.user : place(a) < place(b);
        });
        for (auto first = waiting.begin(); first != waiting.end();) {
            const User user = first->user;
            uint32_t left = USER_WORK;
            for (; first != waiting.end() && first->user == user; ++first) {
                if (left == 0) continue;
                left -= std::min(left, serve(first->session));
                next[user] = first->session + 1;
            }
        }
        next_ = std::move(next);
    }

  private:
    // Within its user's: first those whose turn was not reached in the last round.
    uint32_t place(const Waiting& waiting) const {
        const auto next = next_.find(waiting.user);
        return next == next_.end() ? waiting.session : waiting.session - next->second;
    }

    std::map<User, uint32_t> next_;  // session, of who waited in the last round
};

}  // namespace weightd
