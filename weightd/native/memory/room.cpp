#include "memory/room.h"

#include <algorithm>
#include <set>
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

// Whether `bytes` and then a share could be had with so much --dram, if all sessions opened again in their order. They
// take more of more: a session gets up to half of what is left.
bool Room::would_fit(uint64_t dram_bytes, const Model& asking, uint64_t bytes, uint64_t has_bytes) const {
    const Memory memory(dram_bytes);
    const auto model_bytes = [](const Model& model) { return activation_bytes(model.spec) + predictors_bytes(model); };
    uint64_t fixed_bytes = memory_.used_bytes(Account::resident) + memory_.used_bytes(Account::tables);
    for (const auto& model : models_) {
        if (model->pool == nullptr) continue;
        fixed_bytes = difference(fixed_bytes, model_bytes(*model));
    }
    std::set<const Model*> there;
    uint64_t shares_bytes = 0;
    uint64_t grown_bytes = 0;
    const auto left_bytes = [&](const Model& model) {
        if (model.pool != nullptr && there.insert(&model).second) fixed_bytes += model_bytes(model);
        uint64_t unused_bytes = 0;
        for (const Model* other : there) unused_bytes += other == &model ? 0 : unused_bytes_max(other->spec, memory);
        return difference(dram_bytes, fixed_bytes + shares_bytes + unused_bytes);
    };
    for (const Session* session : sessions_.in_order()) {
        const ModelSpec& spec = models_[session->model]->spec;
        const uint64_t slots = left_bytes(*models_[session->model]) / spec.cell_bytes;
        const uint32_t larger = session->borrows ? share_slots(slots, session->slots_wanted, spec.cell_count()) : 0;
        const uint32_t share = std::max(session->share_slots, larger);
        shares_bytes += uint64_t{share} * spec.cell_bytes;
        grown_bytes += uint64_t{share - session->share_slots} * spec.cell_bytes;
    }
    for (const auto& model : models_) {
        if (model->users > 0) left_bytes(*model);
    }
    const uint64_t left = left_bytes(asking);
    const uint64_t user_bytes = session_bytes(asking.spec) + SHARE_SLOTS_MIN * uint64_t{asking.spec.cell_bytes};
    const uint64_t then_has_bytes = has_bytes == 0 ? 0 : has_bytes + grown_bytes;
    return bytes <= left && may_take(then_has_bytes, user_bytes, left - bytes + user_bytes);
}

// The least --dram with which it would have been granted.
uint64_t Room::enough_bytes(const Model& asking, uint64_t bytes, uint64_t has_bytes) const {
    uint64_t less = memory_.limit_bytes();
    uint64_t enough = less + bytes;
    while (!would_fit(enough, asking, bytes, has_bytes)) enough *= 2;
    while (enough - less > PAGE_BYTES) {
        const uint64_t middle = less + (enough - less) / 2;
        (would_fit(middle, asking, bytes, has_bytes) ? enough : less) = middle;
    }
    return enough;
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
        text += ": your sessions have " + mebibytes(has_bytes) + ", and the rest is kept for other users";
    }
    const std::string enough = mebibytes(enough_bytes(asking, bytes, has_bytes));
    return NoRoom(text + (in_use ? ": end a session, or raise --dram to " : ": raise --dram to ") + enough);
}

}  // namespace weightd
