// What must be in memory before a session or a fetch can begin, and how a session begins. Runs in the callers' threads.
#include <sys/random.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

#include "memory/model_cost.h"
#include "service/engine_thread.h"

namespace weightd {
namespace {

constexpr std::chrono::seconds ROOM_WITHIN{10};  // how long an opener waits for segments to drain
constexpr std::chrono::milliseconds TURN_CHECK{200};

std::optional<PredictorsFile> missing_predictors(const Model& state) {
    const auto& newest = state.predictors_file;
    const bool there = newest && state.predictors != nullptr && state.predictors->version == newest->version;
    return there ? std::nullopt : newest;
}

}  // namespace

EngineThread::Turn::Turn(EngineThread& service, uint32_t model) : service_(service), model_(model) {
    std::unique_lock guard(service.opening_lock_);
    while (!service.opening_.try_emplace(model, Clock::now()).second) {
        service.opened_.wait_for(guard, TURN_CHECK);
        const auto other = service.opening_.find(model);
        if (other == service.opening_.end()) continue;
        if (service.stopping()) throw Stopping();
        if (Clock::now() - other->second <= service.choice_.answer_within) continue;
        guard.unlock();
        throw Unanswered(service.model(model).spec.name, service.choice_.answer_within);
    }
}

EngineThread::Turn::~Turn() {
    {
        const std::lock_guard guard(service_.opening_lock_);
        service_.opening_.erase(model_);
    }
    service_.opened_.notify_all();
}

void EngineThread::Turn::moved() {
    const std::lock_guard guard(service_.opening_lock_);
    service_.opening_.at(model_) = Clock::now();
}

// Off the loop: the engine's list of models grows there. What openers use of a model never changes or is theirs.
Model& EngineThread::model(uint32_t index) {
    return on_loop([&]() -> Model& { return engine_->model(index); });
}

void EngineThread::ensure_active(uint32_t model, Use use, const User& user) {
    Turn turn(*this, model);
    Model& state = this->model(model);  // its spec never changes, and only openers write `resident`
    wait_for_room(state, [&] {
        return making_way(user, [&] { return engine_->models().activate(model, use, bytes_of(user)); });
    });
    if (state.resident_ready) return;
    try {
        SharedMemory resident = load_resident(state.spec, choice_, [&] { turn.moved(); });
        on_loop([&] {
            state.resident = std::move(resident);
            state.resident_ready = true;
        });
    } catch (...) {
        on_loop([&] { engine_->models().leave(model); });
        throw;
    }
}

// Until `reserve`, on the loop, has found memory.
void EngineThread::wait_for_room(const Model& state, const std::function<bool()>& reserve) {
    const auto give_up = Clock::now() + ROOM_WITHIN;
    while (!on_loop(reserve)) {
        if (Clock::now() > give_up) {
            on_loop([&] { engine_->models().stop_waiting(state); });
            throw NoRoom(state.spec.name +
                         ": the memory that it needs is leased, and none was given back: end a session");
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
}

void EngineThread::set_predictors(uint32_t model, const PredictorsFile& file) {
    on_loop([&] { engine_->model(model).predictors_file = file; });
}

void EngineThread::ensure_predictors(uint32_t model, const User& user) {
    Turn turn(*this, model);
    Model& state = this->model(model);
    while (const auto wanted = on_loop([&] { return missing_predictors(state); })) {
        std::shared_ptr<Predictors> fresh;
        wait_for_room(state, [&] {
            fresh = making_way(user, [&] { return engine_->models().reserve_predictors(model, *wanted); });
            return fresh != nullptr;
        });
        try {
            fresh->memory = load_predictors(state.spec.name, *wanted, choice_, [&] { turn.moved(); });
            on_loop([&] { state.predictors = std::move(fresh); });
        } catch (...) {
            const bool newest = on_loop([&] {
                fresh.reset();
                return state.predictors_file->version == wanted->version;
            });
            if (newest) throw;  // else its file has gone, because a newer one came
        }
    }
}

Opened EngineThread::open_session(uint32_t model, uint32_t slots_wanted, const User& user) {
    on_loop([&] { making_way(user, [&] { count_opening(user); }); });
    try {
        ensure_active(model, Use::session, user);
        try {
            ensure_predictors(model, user);
        } catch (...) {
            on_loop([&] { engine_->models().leave(model); });
            throw;
        }
        return on_loop([&] { return open_active(model, slots_wanted, user); });
    } catch (...) {
        on_loop([&] { count_opened(user); });
        throw;
    }
}

// What a user has of them: sessions, and what clients keep of those that were closed.
uint64_t EngineThread::sessions_of(const User& user) const {
    const auto is_his = [&](const auto& entry) { return entry.second.user == user; };
    const auto is_his_ring = [&](const auto& entry) { return entry.second->user() == user; };
    const auto opening = opening_sessions_.find(user);
    const auto open = std::count_if(rings_.begin(), rings_.end(), is_his_ring);
    const auto remain = std::count_if(remains_.begin(), remains_.end(), is_his);
    return static_cast<uint64_t>(open + remain) + closed_rings_.of(user) +
           (opening == opening_sessions_.end() ? 0 : opening->second);
}

// What a user's sessions have of --dram: their shares, and the tables of those for which none are set aside.
uint64_t EngineThread::bytes_of(const User& user) const {
    uint64_t bytes = 0;
    uint32_t tables_apart = SESSIONS_RESERVED;
    const auto add_tables = [&](const ModelSpec& spec) {
        if (tables_apart > 0) {
            tables_apart--;
        } else {
            bytes += session_bytes(spec);
        }
    };
    for (const auto& [id, ring] : rings_) {
        if (ring->user() != user) continue;
        const ModelSpec& spec = engine_->model(ring->model).spec;
        bytes += uint64_t{ring->share_slots} * spec.cell_bytes;
        add_tables(spec);
    }
    for (const auto& [id, remains] : remains_) {
        if (remains.user == user) add_tables(engine_->model(remains.model).spec);
    }
    return bytes;
}

// Gives up a session that nobody has attached to, of somebody who has more such ones. False: there is none.
bool EngineThread::make_way(const User& user) {
    const auto session = unattached_.take_from_greedier(user);
    if (session) close_session(*session, ring::CLOSED_BY_DAEMON);
    return session.has_value();
}

void EngineThread::count_opening(const User& user) {
    closed_rings_.forget_released();
    uint64_t there = rings_.size() + remains_.size() + closed_rings_.size();
    for (const auto& [whose, count] : opening_sessions_) there += count;
    const uint64_t his = sessions_of(user);
    if (!may_take(his, 1, SESSIONS_MAX - std::min<uint64_t>(there, SESSIONS_MAX))) {
        const std::string kept = there < SESSIONS_MAX ? "; the others are kept for other users" : "";
        throw NoRoom("no session is left: " + std::to_string(there) + " of " + std::to_string(SESSIONS_MAX) +
                     " are open, being opened, or closed while a client keeps their memory, " + std::to_string(his) +
                     " of them yours" + kept + ": end a session");
    }
    opening_sessions_[user]++;
}

void EngineThread::count_opened(const User& user) {
    const auto opening = opening_sessions_.find(user);
    if (--opening->second == 0) opening_sessions_.erase(opening);
}

Opened EngineThread::open_active(uint32_t model, uint32_t slots_wanted, const User& user) {
    try {
        Token token;
        if (::getrandom(token.data(), token.size(), 0) != static_cast<ssize_t>(token.size())) fail("getrandom");
        const uint32_t share =
            making_way(user, [&] { return engine_->models().share_for(model, slots_wanted, bytes_of(user)); });
        Model& state = engine_->model(model);
        auto ring = std::make_unique<RingSession>(model, state.spec.cell_count(), share, token, user, state.predictors);
        RingSession* opened = ring.get();
        engine_->open(std::move(ring));
        rings_[opened->id] = opened;
        state.sessions++;
        count_opened(user);
        const auto given_up = unattached_.begin(opened->id, user, Clock::now());
        if (given_up) close_session(*given_up, ring::CLOSED_BY_DAEMON);  // perhaps this one: its client tries again
        return {token, share};
    } catch (const std::system_error& error) {
        engine_->models().leave(model);
        if (!out_of_descriptors(error.code().value())) throw;
        throw NoRoom("no file descriptor is left for a session: raise LimitNOFILE or ulimit -n, or end a session");
    } catch (...) {
        engine_->models().leave(model);
        throw;
    }
}

}  // namespace weightd
