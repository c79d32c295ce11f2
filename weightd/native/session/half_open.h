// What users have begun and not finished: connections without a Hello, sessions without a client.
//
// The number of entries is limited. One entry too many removes the oldest entry of the user that has most of them, so a
// user with few entries keeps them, whatever other users do. Entries that are not finished in time are removed, too.
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

    // Adds the entry `id` of `user`. Returns the entry that it removed for lack of room, if any: perhaps `id` itself.
    std::optional<uint32_t> begin(uint32_t id, const User& user, Time now);
    void end(uint32_t id);  // removes the entry, if it is there
    // Removes the oldest entry of the user with most entries, if those are several, and more than `user` has plus one.
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
