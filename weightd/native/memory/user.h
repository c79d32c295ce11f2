// The user that a client belongs to, and how much of what all users share one user may have.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <optional>

namespace weightd {

// A user as the kernel names it; one user may run many processes. None: all processes whose user is unknown, together.
using User = std::optional<uid_t>;

inline constexpr uint64_t LEFT_MULTIPLE_MAX = 7;  // times what is left: a user may hold up to 7/8

// Whether a user that has `has` may take `more` of the `free`. A user that has nothing may take all of it. Any other
// user may have at most LEFT_MULTIPLE_MAX times what is left afterwards, so that the next user finds something.
inline bool may_take(uint64_t has, uint64_t more, uint64_t free) {
    return more <= free && (has == 0 || has + more <= LEFT_MULTIPLE_MAX * (free - more));
}

// The most that a user that has `has` may take of the `free`.
inline uint64_t most_for(uint64_t has, uint64_t free) {
    if (has == 0) return free;
    const uint64_t parts = LEFT_MULTIPLE_MAX * free;
    return parts > has ? (parts - has) / (LEFT_MULTIPLE_MAX + 1) : 0;
}

}  // namespace weightd
