// How sessions end: because their client does, or because we close them.
#include <sys/epoll.h>

#include "service/engine_thread.h"

namespace weightd {

void EngineThread::close_session(uint32_t id, ring::State state) {
    const auto found = rings_.find(id);
    if (found == rings_.end()) return let_go(id);
    RingSession& session = *found->second;
    const bool client_stays = state == ring::CLOSED_FOR_A_BROKEN_RULE;
    if (!client_stays) unwatch(session.socket_fd());
    if (!client_stays) unwatch(session.process_fd());
    unwatch(session.doorbell_fd());  // the client holds it too: closing our descriptor would leave it in the epoll set
    session.close(state);
    unattached_.end(id);
    const uint32_t model = session.model;
    const bool was_attached = session.attached();
    Remains remains = session.remains();
    if (client_stays) {
        remains_.emplace(id, std::move(remains));
    } else if (was_attached) {
        closed_rings_.add(std::move(remains.ring), remains.user);
    }
    rings_.erase(found);
    engine_->model(model).sessions--;
    engine_->close(id);
    if (!client_stays) engine_->models().leave(model);
}

// The client of a session that we closed has hung up, too, or has ended.
void EngineThread::let_go(uint32_t id) {
    const auto found = remains_.find(id);
    if (found == remains_.end()) return;  // another event of this batch has told it
    unwatch(found->second.socket.get());
    unwatch(found->second.process.get());
    engine_->models().leave(found->second.model);
    closed_rings_.add(std::move(found->second.ring), found->second.user);
    remains_.erase(found);
}

// A client that is stopped, or paused by its user, must not keep others waiting for good. It can attach again.
void EngineThread::close_blocking() {
    for (auto next = rings_.begin(); next != rings_.end();) {
        const auto [id, ring] = *next++;
        if (ring->blocks_for_long(engine_->blocks_others(*ring))) close_session(id, ring::CLOSED_FOR_A_BROKEN_RULE);
    }
}

void EngineThread::close_expired() {
    for (const uint32_t fd : silent_.take_expired(Clock::now())) connections_.erase(static_cast<int>(fd));
    for (const uint32_t id : unattached_.take_expired(Clock::now())) close_session(id, ring::CLOSED_BY_DAEMON);
    closed_rings_.forget_released();
}

}  // namespace weightd
