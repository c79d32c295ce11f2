#include "session/half_open.h"

#include <algorithm>

namespace weightd {

size_t HalfOpen::count(const User& user) const {
    return static_cast<size_t>(
        std::count_if(begun_.begin(), begun_.end(), [&](const Begun& begun) { return begun.user == user; }));
}

// The user with the most entries; `first` if no other user has more.
User HalfOpen::user_with_most(const User& first) const {
    User found = first;
    size_t most = count(first);
    for (const Begun& begun : begun_) {
        const size_t has = count(begun.user);
        if (has > most) {
            most = has;
            found = begun.user;
        }
    }
    return found;
}

std::optional<uint32_t> HalfOpen::remove_oldest(const User& user) {
    const auto oldest =
        std::find_if(begun_.begin(), begun_.end(), [&](const Begun& begun) { return begun.user == user; });
    if (oldest == begun_.end()) return std::nullopt;
    const uint32_t id = oldest->id;
    begun_.erase(oldest);
    return id;
}

std::optional<uint32_t> HalfOpen::begin(uint32_t id, const User& user, Clock::time_point now) {
    begun_.push_back({id, user, now});
    if (begun_.size() <= room_) return std::nullopt;
    return remove_oldest(user_with_most(user));
}

void HalfOpen::end(uint32_t id) {
    std::erase_if(begun_, [&](const Begun& begun) { return begun.id == id; });
}

std::optional<uint32_t> HalfOpen::remove_from_user_with_most(const User& user) {
    const User most = user_with_most(user);
    const bool has_more = most != user && count(most) > std::max<size_t>(1, count(user) + 1);
    return has_more ? remove_oldest(most) : std::nullopt;
}

std::vector<uint32_t> HalfOpen::remove_expired(Clock::time_point now) {
    std::vector<uint32_t> expired;
    for (const Begun& begun : begun_) {
        if (now - begun.at > within_) expired.push_back(begun.id);
    }
    for (const uint32_t id : expired) end(id);
    return expired;
}

}  // namespace weightd
