// What users have begun and not finished: connections without a Hello, sessions without a client.
//
// The number of entries is limited. When the limit is exceeded, the oldest entry of the user with the most entries is
// removed. So a user with few entries keeps them, whatever other users do. Entries that are not finished in time are
// removed as well.
#pragma once

#include <chrono>
#include <cstdint>
#include <vector>

#include "device/clock.h"
#include "memory/user.h"

namespace weightd {

class HalfOpen {
  public:
    HalfOpen(size_t room, std::chrono::seconds within) : room_(room), within_(within) {}

    // Adds the entry `id` of `user`. Returns the entry that this removed, if any; it may be `id` itself.
    std::optional<uint32_t> begin(uint32_t id, const User& user, Clock::time_point now);
    void end(uint32_t id);  // removes the entry, if it is there
    // Removes the oldest entry of the user with the most entries, and returns it. None unless that user has at least
    // two more than `user`.
    std::optional<uint32_t> remove_from_user_with_most(const User& user);
    std::vector<uint32_t> remove_expired(Clock::time_point now);
    bool empty() const { return begun_.empty(); }

  private:
    struct Begun {
        uint32_t id;
        User user;
        Clock::time_point at;
    };
    size_t count(const User& user) const;
    User user_with_most(const User& first) const;
    std::optional<uint32_t> remove_oldest(const User& user);

    size_t room_;
    std::chrono::seconds within_;
    std::vector<Begun> begun_;  // the oldest first
};

}  // namespace weightd
