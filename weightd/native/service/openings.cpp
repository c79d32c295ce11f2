#include "service/openings.h"

#include <sys/random.h>

#include <thread>

#include "device/system_error.h"

namespace weightd {
namespace {

constexpr std::chrono::seconds ROOM_WITHIN{10};  // how long an opener waits for segments to drain
constexpr std::chrono::milliseconds ROOM_CHECK{2};

std::optional<PredictorsFile> missing_predictors(const Model& model) {
    const auto& newest = model.predictors_file;
    const bool there = newest && model.predictors != nullptr && model.predictors->version == newest->version;
    return there ? std::nullopt : newest;
}

Token random_token() {
    Token token;
    if (::getrandom(token.data(), token.size(), 0) != static_cast<ssize_t>(token.size())) fail("getrandom");
    return token;
}

}  // namespace

Openings::Openings(Commands& commands, Engine& engine, RingSessions& sessions, const ReaderChoice& choice)
    : commands_(commands),
      engine_(engine),
      sessions_(sessions),
      choice_(choice),
      turns_(choice.answer_within, [&commands] { return commands.stopping(); }) {}

Model& Openings::model(uint32_t index) {
    return commands_.on_loop([&]() -> Model& { return engine_.model(index); });
}

void Openings::leave(uint32_t model) {
    commands_.on_loop([&] { engine_.models().leave(model); });
}

uint32_t Openings::add_model(ModelSpec spec) {
    auto opened = open_model(std::move(spec), choice_.allow_buffered);
    const Model& model = *opened;
    std::optional<uint32_t> index;
    wait_for_room(model, [&] {
        index = sessions_.reserve_for(std::nullopt, [&] { return engine_.models().add(opened); });
        return index.has_value();
    });
    return *index;
}

Opened Openings::open_session(uint32_t model, uint32_t slots_wanted, const User& user, bool predicts) {
    commands_.on_loop([&] { sessions_.reserve_for(user, [&] { sessions_.reserve_session(user); }); });
    try {
        activate(model, predicts ? Use::session : Use::cells, user);
        try {
            if (predicts) load_newest_predictors(model, user);
        } catch (...) {
            leave(model);
            throw;
        }
        return commands_.on_loop([&] { return open_active(model, slots_wanted, user, predicts); });
    } catch (...) {
        commands_.on_loop([&] { sessions_.cancel_reservation(user); });
        throw;
    }
}

Model& Openings::activate(uint32_t index, Use use, const User& user) {
    Model& model = this->model(index);
    OpenerTurns::Turn turn(turns_, index, model.spec.name);
    wait_for_room(model, [&] {
        return sessions_.reserve_for(user,
                                     [&] { return engine_.models().activate(index, use, sessions_.bytes_of(user)); });
    });
    if (model.resident_ready) return model;
    try {
        SharedMemory resident = load_resident(model.spec, choice_, [&] { turn.note_progress(); });
        commands_.on_loop([&] {
            model.resident = std::move(resident);
            model.resident_ready = true;
        });
    } catch (...) {
        leave(index);
        throw;
    }
    return model;
}

void Openings::load_newest_predictors(uint32_t index, const User& user) {
    Model& model = this->model(index);
    OpenerTurns::Turn turn(turns_, index, model.spec.name);
    while (const auto wanted = commands_.on_loop([&] { return missing_predictors(model); })) {
        wait_for_room(model, [&] {
            return sessions_.reserve_for(user, [&] {
                model.next_predictors = engine_.models().reserve_predictors(index, *wanted);
                return model.next_predictors != nullptr;
            });
        });
        try {
            SharedMemory memory = load_predictors(model.spec.name, *wanted, choice_, [&] { turn.note_progress(); });
            commands_.on_loop([&] {
                model.next_predictors->memory = std::move(memory);
                model.predictors = std::move(model.next_predictors);
            });
        } catch (...) {
            const bool newest = commands_.on_loop([&] {
                model.next_predictors.reset();
                return model.predictors_file->version == wanted->version;
            });
            if (newest) throw;  // else a newer calibration has replaced the file
        }
    }
}

// Repeats `reserve` on the engine's thread until it returns true.
void Openings::wait_for_room(const Model& model, const std::function<bool()>& reserve) {
    const auto give_up = Clock::now() + ROOM_WITHIN;
    while (!commands_.on_loop(reserve)) {
        if (Clock::now() > give_up) {
            commands_.on_loop([&] { engine_.models().stop_waiting(model); });
            throw NoRoom(model.spec.name +
                         ": the memory that it needs is leased, and none was given back: end a session");
        }
        std::this_thread::sleep_for(ROOM_CHECK);
    }
}

// On the engine's thread.
Opened Openings::open_active(uint32_t index, uint32_t slots_wanted, const User& user, bool predicts) {
    try {
        const Token token = random_token();
        const uint32_t share = sessions_.reserve_for(
            user, [&] { return engine_.models().share_for(index, slots_wanted, sessions_.bytes_of(user)); });
        const Model& model = engine_.model(index);
        auto predictors = predicts ? model.predictors : nullptr;
        const uint32_t cells = model.spec.cell_count();
        auto session = std::make_unique<RingSession>(index, cells, share, token, user, predictors);
        session->slots_wanted = slots_wanted;
        sessions_.open(std::move(session));
        return {token, share};
    } catch (const std::system_error& error) {
        engine_.models().leave(index);
        if (!out_of_descriptors(error.code().value())) throw;
        throw NoRoom("no file descriptor is left for a session: raise LimitNOFILE or ulimit -n, or end a session");
    } catch (...) {
        engine_.models().leave(index);
        throw;
    }
}

}  // namespace weightd
