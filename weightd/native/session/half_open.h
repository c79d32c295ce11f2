// What users have begun and not finished: connections without a Hello, sessions that nobody has attached to.
//
// There is room for a number of them. Where one more comes, the user who has the most loses the oldest of his, so that
// whoever has few keeps them whatever others do. What is not finished in time is given up, too.
#pragma once

#include <chrono>
#include <cstdint>
#include <vector>

#include "memory/user.h"

namespace weightd {

class HalfOpen {
  public:
    using Time = std::chrono::steady_clock::time_point;

    HalfOpen(size_t room, std::chrono::seconds within) : room_(room), within_(within) {}

    // Takes in `id` of `user`. Which must go for it, if any: perhaps `id` itself. It is no longer here then.
    std::optional<uint32_t> begin(uint32_t id, const User& user, Time now);
    void end(uint32_t id);  // finished, or gone; it need not be here
    // The oldest of the user who has the most, if that is more than one, and more than `user` would have with one more.
    std::optional<uint32_t> take_from_greedier(const User& user);
    std::vector<uint32_t> take_expired(Time now);
    bool empty() const { return begun_.empty(); }

  private:
    struct Begun {
        uint32_t id;
        User user;
        Time at;
    };
    size_t count(const User& user) const;
    User greediest(const User& first) const;
    std::optional<uint32_t> take_oldest(const User& user);

    size_t room_;
    std::chrono::seconds within_;
    std::vector<Begun> begun_;  // the oldest first
};

}  // namespace weightd
