// How a session or a fetch begins: what it needs is loaded into memory, and a session is opened.
//
// Runs in the callers' threads, because reading resident weights may take minutes. Whatever touches the engine is a
// command. Openers use only fields of a model that never change, or that are written only by an opener in its turn.
#pragma once

#include <functional>

#include "engine/engine.h"
#include "memory/resident.h"
#include "service/commands.h"
#include "service/opener_turns.h"
#include "session/ring_sessions.h"

namespace weightd {

struct Opened {
    Token token;
    uint32_t share_slots;
};

class Openings {
  public:
    Openings(Commands& commands, Engine& engine, RingSessions& sessions, const ReaderChoice& choice);

    // Adds a model. Throws std::system_error, std::invalid_argument, NoRoom, Stopping.
    uint32_t add_model(ModelSpec spec);
    // Only a process of `user` can attach to the session; of any user, if there is none. Throws NoRoom,
    // std::system_error, CorruptResident, Unanswered, Stopping.
    // `predicts`: it gets the newest predictors, if there are any.
    Opened open_session(uint32_t model, uint32_t slots_wanted, const User& user, bool predicts);
    // Loads what the use needs, and keeps it in memory until leave(). Throws what open_session() throws.
    Model& activate(uint32_t model, Use use, const User& user);
    void leave(uint32_t model);

  private:
    Model& model(uint32_t index);
    void load_newest_predictors(uint32_t model, const User& user);
    void wait_for_room(const Model& model, const std::function<bool()>& reserve);
    Opened open_active(uint32_t model, uint32_t slots_wanted, const User& user, bool predicts);

    Commands& commands_;
    Engine& engine_;
    RingSessions& sessions_;
    const ReaderChoice& choice_;
    OpenerTurns turns_;
};

}  // namespace weightd
