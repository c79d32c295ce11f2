#include "session/ended_sessions.h"

#include <algorithm>

namespace weightd {

void EndedSessions::keep(uint32_t session, EndedSession ended) { kept_.emplace(session, std::move(ended)); }

void EndedSessions::keep_ring(SharedMemory ring, const User& user) { closed_rings_.add(std::move(ring), user); }

std::optional<uint32_t> EndedSessions::forget_client(uint32_t session) {
    const auto found = kept_.find(session);
    if (found == kept_.end()) return std::nullopt;  // an earlier event of the same batch has done it
    EndedSession& ended = found->second;
    const uint32_t model = ended.model;
    epoll_.unwatch(ended.socket.get());
    epoll_.unwatch(ended.process.get());
    keep_ring(std::move(ended.ring), ended.user);
    kept_.erase(found);
    return model;
}

size_t EndedSessions::of(const User& user) const {
    const auto is_theirs = [&](const auto& entry) { return entry.second.user == user; };
    return closed_rings_.of(user) + static_cast<size_t>(std::count_if(kept_.begin(), kept_.end(), is_theirs));
}

}  // namespace weightd
