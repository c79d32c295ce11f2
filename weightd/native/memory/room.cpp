#include "memory/room.h"

#include <algorithm>
#include <string>

#include "memory/model_cost.h"
#include "memory/user.h"

namespace weightd {
namespace {

std::string mebibytes(uint64_t bytes) {
    const uint64_t tenths = (bytes * 10 + (1U << 20) - 1) >> 20;
    return std::to_string(tenths / 10) + "." + std::to_string(tenths % 10) + " MiB";
}

uint64_t predictors_bytes(const Model& model) {
    return model.predictors == nullptr ? 0 : whole_pages(model.predictors->bytes);
}

uint64_t difference(uint64_t whole, uint64_t part) { return whole - std::min(whole, part); }

}  // namespace

uint64_t Room::kept_for_others_bytes(const Model& asking) const {
    uint64_t kept = 0;
    for (const auto& [waiting, bytes] : kept_bytes_) kept += waiting == &asking ? 0 : bytes;
    return kept;
}

uint64_t Room::free_bytes(const Model& asking) const {
    return difference(memory_.free_bytes(), kept_for_others_bytes(asking));
}

// Resident weights and tables of the models that are in use, and of the asking one. Idle models give theirs up.
uint64_t Room::fixed_bytes(const Model& asking) const {
    uint64_t bytes = memory_.used_bytes(Account::resident) + memory_.used_bytes(Account::tables);
    for (const auto& model : models_) {
        if (model.get() == &asking || model->pool == nullptr || model->users > 0) continue;
        bytes -= activation_bytes(model->spec) + predictors_bytes(*model);
    }
    return bytes;
}

// What the model can have once all that can be taken back has been taken back.
uint64_t Room::obtainable_bytes(const Model& asking) const {
    uint64_t committed_bytes = fixed_bytes(asking);
    for (const auto& model : models_) {
        if (model->pool == nullptr) continue;
        committed_bytes += sessions_.share_slots(*model) * model->spec.cell_bytes;
        if (model.get() != &asking && model->users > 0) committed_bytes += unused_bytes_max(model->spec, memory_);
    }
    return difference(memory_.limit_bytes(), committed_bytes);
}

void Room::require(const Model& asking, uint64_t model_bytes, uint64_t user_bytes, uint64_t has_bytes) const {
    const uint64_t left_bytes = difference(obtainable_bytes(asking), kept_for_others_bytes(asking));
    if (model_bytes <= left_bytes && may_take(has_bytes, user_bytes, left_bytes - model_bytes)) return;
    throw refusal(asking, model_bytes + user_bytes, left_bytes, has_bytes);
}

uint32_t Room::share_for(const Model& asking, uint32_t slots_wanted, uint64_t has_bytes) const {
    const uint64_t cell_bytes = asking.spec.cell_bytes;
    const uint64_t free_bytes = obtainable_bytes(asking);
    const uint64_t left = most_for(has_bytes, free_bytes) / cell_bytes;
    if (left < SHARE_SLOTS_MIN) throw refusal(asking, SHARE_SLOTS_MIN * cell_bytes, free_bytes, has_bytes);
    return share_slots(left, slots_wanted, asking.spec.cell_count());
}

// Everything that cannot be taken from a model while it has its users.
uint64_t Room::in_use_bytes(const Model& model) const {
    const uint64_t extra_users = difference(model.users, SESSIONS_RESERVED);
    return activation_bytes(model.spec) + predictors_bytes(model) + extra_users * session_bytes(model.spec) +
           sessions_.share_slots(model) * model.spec.cell_bytes;
}

// Its text has the numbers as of now, and says what to do.
NoRoom Room::refusal(const Model& asking, uint64_t bytes, uint64_t left_bytes, uint64_t has_bytes) const {
    std::string text = asking.spec.name + ": needs " + mebibytes(bytes) + " of --dram " +
                       mebibytes(memory_.limit_bytes()) + ", of which " + mebibytes(left_bytes) + " is available";
    uint64_t catalogs_bytes = 0;
    bool in_use = false;
    for (const auto& model : models_) {
        if (!model->removed) catalogs_bytes += catalog_bytes(model->spec);
        if (model->pool == nullptr || model->users == 0) continue;
        in_use = true;
        text += "; " + model->spec.name + " has " + mebibytes(in_use_bytes(*model)) + " for " +
                std::to_string(model->users) + (model->users == 1 ? " user" : " users");
    }
    text += "; checksums and hotness of all models take " + mebibytes(catalogs_bytes);
    if (bytes <= left_bytes) {
        return NoRoom(text + ": your sessions have " + mebibytes(has_bytes) +
                      ", and the rest is kept for other users: end a session, or raise --dram");
    }
    const std::string enough = mebibytes(memory_.limit_bytes() + bytes - left_bytes);
    return NoRoom(text + (in_use ? ": end a session, or raise --dram to " : ": raise --dram to ") + enough);
}

}  // namespace weightd
