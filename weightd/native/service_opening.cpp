// What must be in memory before a session or a fetch can begin, and how a session begins. Runs in the callers' threads.
#include <sys/random.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

#include "service.h"

namespace weightd {
namespace {

constexpr std::chrono::seconds ROOM_WITHIN{10};  // how long an opener waits for segments to drain
constexpr std::chrono::milliseconds TURN_CHECK{200};

std::optional<PredictorsFile> missing_predictors(const ModelState& state) {
    const auto& newest = state.predictors_file;
    const bool there = newest && state.predictors != nullptr && state.predictors->version == newest->version;
    return there ? std::nullopt : newest;
}

}  // namespace

Service::Turn::Turn(Service& service, uint32_t model) : service_(service), model_(model) {
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

Service::Turn::~Turn() {
    {
        const std::lock_guard guard(service_.opening_lock_);
        service_.opening_.erase(model_);
    }
    service_.opened_.notify_all();
}

void Service::Turn::moved() {
    const std::lock_guard guard(service_.opening_lock_);
    service_.opening_.at(model_) = Clock::now();
}

// Off the loop: the engine's list of models grows there. What openers use of a model never changes or is theirs.
ModelState& Service::model(uint32_t index) {
    return on_loop([&]() -> ModelState& { return engine_->model(index); });
}

void Service::ensure_active(uint32_t model, Use use) {
    Turn turn(*this, model);
    wait_for_room(model, [&] { return engine_->activate(model, use); });
    ModelState& state = this->model(model);  // its spec never changes, and only openers write `resident`
    if (state.resident_ready) return;
    try {
        SharedMemory resident = load_resident(state.spec, choice_, [&] { turn.moved(); });
        on_loop([&] {
            state.resident = std::move(resident);
            state.resident_ready = true;
        });
    } catch (...) {
        on_loop([&] { engine_->leave(model); });
        throw;
    }
}

// Until `reserve`, on the loop, has found memory.
void Service::wait_for_room(uint32_t model, const std::function<bool()>& reserve) {
    const auto give_up = Clock::now() + ROOM_WITHIN;
    while (!on_loop(reserve)) {
        if (Clock::now() > give_up) {
            on_loop([&] { engine_->stop_waiting(model); });
            throw NoRoom("the pool is leased: no segment became free; end a session");
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
}

void Service::set_predictors(uint32_t model, const PredictorsFile& file) {
    on_loop([&] { engine_->model(model).predictors_file = file; });
}

void Service::ensure_predictors(uint32_t model) {
    Turn turn(*this, model);
    ModelState& state = this->model(model);
    while (const auto wanted = on_loop([&] { return missing_predictors(state); })) {
        std::shared_ptr<Predictors> fresh;
        wait_for_room(model, [&] { return (fresh = engine_->reserve_predictors(model, *wanted)) != nullptr; });
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

Opened Service::open_session(uint32_t model, uint32_t slots_wanted, std::optional<uid_t> user) {
    on_loop([&] { count_opening(); });
    try {
        ensure_active(model, Use::session);
        try {
            ensure_predictors(model);
        } catch (...) {
            on_loop([&] { engine_->leave(model); });
            throw;
        }
        return on_loop([&] { return open_active(model, slots_wanted, user); });
    } catch (...) {
        on_loop([&] { opening_sessions_--; });
        throw;
    }
}

void Service::count_opening() {
    const size_t there = rings_.size() + remains_.size() + opening_sessions_;
    if (there >= SESSIONS_MAX) {
        throw NoRoom("no session is left: " + std::to_string(there) + " are open or being opened, at most " +
                     std::to_string(SESSIONS_MAX) + " can be: end a session");
    }
    opening_sessions_++;
}

Opened Service::open_active(uint32_t model, uint32_t slots_wanted, std::optional<uid_t> user) {
    try {
        Token token;
        if (::getrandom(token.data(), token.size(), 0) != static_cast<ssize_t>(token.size())) fail("getrandom");
        const uint32_t share = engine_->share_for(model, slots_wanted);
        ModelState& state = engine_->model(model);
        auto ring = std::make_unique<RingSession>(model, state.spec.cell_count(), share, token, user, state.predictors);
        RingSession* opened = ring.get();
        engine_->open(std::move(ring));
        rings_[opened->id] = opened;
        state.sessions++;
        opening_sessions_--;
        return {token, share};
    } catch (const std::system_error& error) {
        engine_->leave(model);
        if (!out_of_descriptors(error.code().value())) throw;
        throw NoRoom("no file descriptor is left for a session: raise LimitNOFILE or ulimit -n, or end a session");
    } catch (...) {
        engine_->leave(model);
        throw;
    }
}

}  // namespace weightd
