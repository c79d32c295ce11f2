#include "session/ring_sessions.h"

#include <algorithm>

#include "device/system_error.h"
#include "memory/model_cost.h"

namespace weightd {
namespace {

constexpr uint32_t UNATTACHED_MAX = 64;  // sessions
constexpr std::chrono::seconds ATTACH_WITHIN{10};

constexpr uint32_t SESSION_WORK = 1024;  // cells in a turn, as many as a request names; longer ranges come in parts
constexpr uint32_t REQUEST_WORK = 16;    // taking a request costs as much as so many cells

bool has_work(const RingSession& session) { return session.attached() && (session.has_requests() || session.broken()); }

}  // namespace

RingSessions::RingSessions(Engine& engine, Epoll& epoll)
    : engine_(engine), epoll_(epoll), unattached_(UNATTACHED_MAX, ATTACH_WITHIN), ended_(epoll) {}

// ---- opening ----

void RingSessions::reserve_session(const User& user) {
    ended_.forget_released();
    uint64_t taken = open_.size() + ended_.size();
    for (const auto& [whose, count] : reserved_) taken += count;
    const uint64_t theirs = count_of(user);
    if (!may_take(theirs, 1, SESSIONS_MAX - std::min<uint64_t>(taken, SESSIONS_MAX))) {
        const std::string kept = taken < SESSIONS_MAX ? "; the others are kept for other users" : "";
        throw NoRoom("no session is left: " + std::to_string(taken) + " of " + std::to_string(SESSIONS_MAX) +
                     " are open, being opened, or closed while a client keeps their memory, " + std::to_string(theirs) +
                     " of them yours" + kept +
                     "; a client has one, and one more for each table of its model: end a client");
    }
    reserved_[user]++;
}

void RingSessions::cancel_reservation(const User& user) {
    const auto reserved = reserved_.find(user);
    if (--reserved->second == 0) reserved_.erase(reserved);
}

void RingSessions::open(std::unique_ptr<RingSession> session) {
    RingSession& opened = *session;
    engine_.open(std::move(session));
    open_[opened.id] = &opened;
    cancel_reservation(opened.user());
    const auto given_up = unattached_.begin(opened.id, opened.user(), Clock::now());
    if (given_up) close(*given_up, ring::CLOSED_BY_DAEMON);
}

uint64_t RingSessions::count_of(const User& user) const {
    const auto is_theirs = [&](const auto& entry) { return entry.second->user() == user; };
    const auto reserved = reserved_.find(user);
    return static_cast<uint64_t>(std::count_if(open_.begin(), open_.end(), is_theirs)) + ended_.of(user) +
           (reserved == reserved_.end() ? 0 : reserved->second);
}

uint32_t RingSessions::count_of(uint32_t model) const {
    const auto is_of = [&](const auto& entry) { return entry.second->model == model; };
    return static_cast<uint32_t>(std::count_if(open_.begin(), open_.end(), is_of));
}

uint64_t RingSessions::bytes_of(const User& user) const {
    uint64_t bytes = 0;
    uint32_t tables_set_aside = SESSIONS_RESERVED;
    const auto add_tables = [&](const ModelSpec& spec) {
        if (tables_set_aside > 0) {
            tables_set_aside--;
        } else {
            bytes += session_bytes(spec);
        }
    };
    for (const auto& [id, session] : open_) {
        if (session->user() != user) continue;
        const ModelSpec& spec = engine_.model(session->model).spec;
        bytes += uint64_t{session->share_slots} * spec.cell_bytes;
        add_tables(spec);
    }
    for (const auto& [id, ended] : ended_.kept()) {
        if (ended.user == user) add_tables(engine_.model(ended.model).spec);
    }
    return bytes;
}

bool RingSessions::close_unattached_for(const User& user) {
    const auto session = unattached_.remove_from_user_with_most(user);
    if (session) close(*session, ring::CLOSED_BY_DAEMON);
    return session.has_value();
}

// ---- attaching ----

RingSession* RingSessions::find(const Token& token) {
    const auto same = [&](const auto& entry) { return !entry.second->attached() && entry.second->token() == token; };
    const auto found = std::find_if(open_.begin(), open_.end(), same);
    return found == open_.end() ? nullptr : found->second;
}

int RingSessions::attach(Descriptor& socket, RingSession& session) {
    const auto peer = peer_of(socket.get());
    if (!peer || !session.is_for(peer->uid)) return EPERM;
    Descriptor process = process_of(socket.get(), *peer);
    if (process.get() < 0 && out_of_descriptors(errno)) return errno;
    try {
        watch(session, socket.get(), process.get());
    } catch (const std::system_error& error) {
        return error.code().value();
    }
    const Model& model = engine_.model(session.model);
    unattached_.end(session.id);
    if (!session.attach(std::move(socket), std::move(process), *peer, model.spec.resident_bytes,
                        model.resident.shared_fd())) {
        close(session.id, ring::CLOSED_BY_DAEMON);
    }
    return 0;
}

void RingSessions::watch(const RingSession& session, int socket, int process) {
    // The client sends nothing after Hello. An unread message could hold this very connection open, as one of the
    // descriptors that it carries.
    epoll_.watch(socket, Watched::session, session.id, EPOLLIN | EPOLLRDHUP | EPOLLHUP);
    // A forked child of the client keeps the socket open, so the socket alone does not show that the client has ended.
    if (process >= 0) epoll_.watch(process, Watched::session, session.id, EPOLLIN);
    // Edge-triggered and never read: a client that fills it or clears O_NONBLOCK hurts only itself.
    epoll_.watch(session.doorbell_fd(), Watched::wake_only, 0, EPOLLIN | EPOLLET);
}

// ---- serving ----

bool RingSessions::serve() {
    std::vector<Rounds::Waiting> waiting;
    for (const auto& [id, session] : open_) {
        if (has_work(*session)) waiting.push_back({session->user(), id});
    }
    const bool any = !waiting.empty();
    rounds_.round(std::move(waiting), [this](uint32_t id) {
        RingSession& session = *open_.at(id);
        const uint32_t work = serve(session);
        if (session.broken()) close(id, ring::CLOSED_FOR_A_BROKEN_RULE);
        return work;
    });
    return any;
}

// A part of what the session asks for. Returns how much that was.
uint32_t RingSessions::serve(RingSession& session) {
    uint32_t work = 0;
    while (work < SESSION_WORK && !session.broken()) {
        const auto taken = session.take(SESSION_WORK);
        if (!taken) break;
        work += REQUEST_WORK + static_cast<uint32_t>(taken->cells.size() + taken->released.size());
        bool kept = false;
        switch (taken->op) {
            case ring::ACQUIRE:
                kept = engine_.release(session, taken->layer, taken->released) &&
                       engine_.acquire(session, taken->layer, taken->cells, taken->tag);
                break;
            case ring::RELEASE:
                kept = engine_.release(session, taken->layer, taken->cells);
                break;
            case ring::PREFETCH:
                kept = engine_.prefetch(session, taken->layer, taken->cells, taken->tag);
                break;
        }
        if (!kept) session.break_rule();
    }
    return work;
}

bool RingSessions::announce_sleep() {
    bool any = false;
    for (const auto& [id, session] : open_) {
        session->announce_sleep(true);
        any = any || has_work(*session);
    }
    return any;
}

void RingSessions::announce_waking() {
    for (const auto& [id, session] : open_) session->announce_sleep(false);
}

// ---- ending ----

void RingSessions::close(uint32_t id, ring::State state) {
    const auto found = open_.find(id);
    if (found == open_.end()) {
        if (const auto model = ended_.forget_client(id)) engine_.models().leave(*model);
        return;
    }
    RingSession& session = *found->second;
    const bool client_stays = state == ring::CLOSED_FOR_A_BROKEN_RULE;
    if (!client_stays) epoll_.unwatch(session.socket_fd());
    if (!client_stays) epoll_.unwatch(session.process_fd());
    epoll_.unwatch(session.doorbell_fd());  // the client holds it too: it would stay watched after we close it
    session.close(state);
    unattached_.end(id);
    const uint32_t model = session.model;
    const bool was_attached = session.attached();
    EndedSession ended = session.end();
    if (client_stays) {
        ended_.keep(id, std::move(ended));
    } else if (was_attached) {
        ended_.keep_ring(std::move(ended.ring), ended.user);
    }
    open_.erase(found);
    engine_.close(id);
    if (!client_stays) engine_.models().leave(model);
}

void RingSessions::close_late() {
    // A client that is stopped, or paused by its user, must not make others wait for ever. It can attach again.
    for (auto next = open_.begin(); next != open_.end();) {
        const auto [id, session] = *next++;
        if (session->blocks_for_long(engine_.blocks_others(*session))) close(id, ring::CLOSED_FOR_A_BROKEN_RULE);
    }
    for (const uint32_t id : unattached_.remove_expired(Clock::now())) close(id, ring::CLOSED_BY_DAEMON);
    ended_.forget_released();
}

void RingSessions::close_all() {
    while (!open_.empty()) close(open_.begin()->first, ring::CLOSED_BY_DAEMON);
    ended_.clear();
}

}  // namespace weightd
