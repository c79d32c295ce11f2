// Whose a client is, and how much of what is shared by all one user may have.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <optional>

namespace weightd {

// As the kernel names it, of a process that may be many. None: of those who do not show it, together.
using User = std::optional<uid_t>;

inline constexpr uint64_t OF_WHAT_IS_LEFT_MAX = 7;  // times: one user alone gets seven eighths

// Whether a user who has `has` may take `more` of the `free`. Who has nothing may take it all; nobody gets to more than
// a multiple of what is left then, so that whoever comes next finds something, and who comes after him, too.
inline bool may_take(uint64_t has, uint64_t more, uint64_t free) {
    return more <= free && (has == 0 || has + more <= OF_WHAT_IS_LEFT_MAX * (free - more));
}

// The most that he may take.
inline uint64_t most_for(uint64_t has, uint64_t free) {
    if (has == 0) return free;
    const uint64_t parts = OF_WHAT_IS_LEFT_MAX * free;
    return parts > has ? (parts - has) / (OF_WHAT_IS_LEFT_MAX + 1) : 0;
}

}  // namespace weightd
