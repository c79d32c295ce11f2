#include "service/opener_turns.h"

#include "memory/resident.h"
#include "service/commands.h"

namespace weightd {
namespace {

constexpr std::chrono::milliseconds TURN_CHECK{200};

}  // namespace

OpenerTurns::Turn::Turn(OpenerTurns& turns, uint32_t model, const std::string& name) : turns_(turns), model_(model) {
    std::unique_lock guard(turns.lock_);
    while (!turns.answered_.try_emplace(model, Clock::now()).second) {
        turns.ended_.wait_for(guard, TURN_CHECK);
        const auto other = turns.answered_.find(model);
        if (other == turns.answered_.end()) continue;
        if (turns.stopping_()) throw Stopping();
        if (Clock::now() - other->second > turns.answer_within_) throw Unanswered(name, turns.answer_within_);
    }
}

OpenerTurns::Turn::~Turn() {
    {
        const std::lock_guard guard(turns_.lock_);
        turns_.answered_.erase(model_);
    }
    turns_.ended_.notify_all();
}

void OpenerTurns::Turn::note_progress() {
    const std::lock_guard guard(turns_.lock_);
    turns_.answered_.at(model_) = Clock::now();
}

}  // namespace weightd
