// Who gets which part of --dram: activation of models, growth of pools, and giving back.
#include <algorithm>
#include <cassert>
#include <system_error>

#include "engine/engine.h"

namespace weightd {
namespace {

uint64_t pages(uint64_t bytes) { return (bytes + 4095) / 4096 * 4096; }

std::string mebibytes(uint64_t bytes) {
    const uint64_t tenths = (bytes * 10 + (1U << 20) - 1) >> 20;
    return std::to_string(tenths / 10) + "." + std::to_string(tenths % 10) + " MiB";
}

uint64_t opened_bytes(const ModelSpec& spec) {
    const uint64_t bundles = uint64_t{spec.layers.back().first_checksum} + spec.layers.back().neurons;
    return bundles * sizeof(uint64_t) + spec.cell_count() * sizeof(Hotness);
}

uint64_t activation_bytes(const ModelSpec& spec) {
    return pages(spec.resident_bytes) + Pool::table_bytes(spec.cell_count(), spec.cell_count()) +
           SESSIONS_RESERVED * Engine::session_bytes(spec);
}

bool wants_more(const Model& state) { return state.pool->slots() < state.spec.cell_count(); }

// None when the system has no descriptor or mapping left: the pool then lives with the segments it has.
std::optional<SharedMemory> new_segment(uint64_t bytes) {
    try {
        SharedMemory memory("weightd-pool", bytes);
        memory.seal();
        return memory;
    } catch (const std::system_error&) {
        return std::nullopt;
    }
}

}  // namespace

uint64_t Engine::session_bytes(const ModelSpec& spec) {
    return Session::table_bytes(spec.cell_count()) + pages(sizeof(ring::Ring));
}

uint64_t Engine::minimum_dram_bytes(const ModelSpec& spec) {
    const uint64_t slots = 2 * SHARE_SLOTS_MIN + SHARE_SLOTS_MIN;  // a session gets half of what is left; and a fetch
    return pages(activation_bytes(spec) + opened_bytes(spec)) + slots * spec.cell_bytes;
}

std::unique_ptr<Model> open_model(ModelSpec spec, bool allow_buffered) {
    spec.require_sound();
    auto state = std::make_unique<Model>();
    state->file = std::make_unique<DirectFile>(spec.bundles_path, allow_buffered);
    for (const LayerSpec& layer : spec.layers) {
        if (state->file->size_bytes() >= layer.offset_bytes + uint64_t{layer.cells} * spec.cell_bytes) continue;
        throw std::invalid_argument(spec.bundles_path + ": shorter than the catalog says (import the model again)");
    }
    state->spec = std::move(spec);
    return state;
}

std::optional<uint32_t> Engine::add_model(std::unique_ptr<Model>& opened) {
    const uint64_t bytes = opened_bytes(opened->spec);
    kept_bytes_.erase(opened.get());
    require_room(*opened, bytes, 0, 0);
    if (!make_room(*opened, bytes)) return std::nullopt;
    memory_.take(Account::tables, bytes);
    opened->index = static_cast<uint32_t>(models_.size());
    opened->hotness.resize(opened->spec.cell_count());
    opened->file_index = reader_.register_file(*opened->file);
    models_.push_back(std::move(opened));
    update_limits();
    return models_.back()->index;
}

uint64_t Engine::kept_for_others_bytes(const Model& state) const {
    uint64_t kept = 0;
    for (const auto& [waiting, bytes] : kept_bytes_) kept += waiting == &state ? 0 : bytes;
    return kept;
}

uint64_t Engine::free_bytes(const Model& state) const {
    return memory_.free_bytes() - std::min(memory_.free_bytes(), kept_for_others_bytes(state));
}

// True when `bytes` are free. False: something drains, ask again; what it frees is kept for this model. Throws NoRoom.
bool Engine::make_room(const Model& state, uint64_t bytes) {
    kept_bytes_.erase(&state);
    while (free_bytes(state) < bytes) {
        if (deactivate_idle(&state, 0)) continue;
        if (!drain_surplus(&state, true)) throw no_room(state, bytes, free_bytes(state), 0);
        kept_bytes_[&state] = bytes;
        return false;
    }
    return true;
}

// Throws NoRoom unless both are there when all that can be taken back has been: what the model needs for all its users,
// and what this user needs, who has some already.
void Engine::require_room(const Model& state, uint64_t model_bytes, uint64_t user_bytes, uint64_t has_bytes) const {
    const uint64_t kept_bytes = kept_for_others_bytes(state);
    const uint64_t left_bytes = pool_bytes_free(state) - std::min(pool_bytes_free(state), kept_bytes);
    if (model_bytes <= left_bytes && may_take(has_bytes, user_bytes, left_bytes - model_bytes)) return;
    throw no_room(state, model_bytes + user_bytes, left_bytes, has_bytes);
}

// What it says is true at this moment, and what to do about it.
NoRoom Engine::no_room(const Model& state, uint64_t bytes, uint64_t left_bytes, uint64_t has_bytes) const {
    std::string text = state.spec.name + ": needs " + mebibytes(bytes) + " of --dram " +
                       mebibytes(memory_.limit_bytes()) + ", of which " + mebibytes(left_bytes) + " can be had";
    uint64_t opened = 0;
    bool in_use = false;
    for (const auto& other : models_) {
        opened += opened_bytes(other->spec);
        if (other->pool == nullptr || other->users == 0) continue;
        in_use = true;
        uint64_t used_bytes = activation_bytes(other->spec) + other->guaranteed_slots * other->spec.cell_bytes;
        if (other->users > SESSIONS_RESERVED) {
            used_bytes += (other->users - SESSIONS_RESERVED) * session_bytes(other->spec);
        }
        if (other->predictors != nullptr) used_bytes += pages(other->predictors->bytes);
        text += ", " + other->spec.name + " with its " + std::to_string(other->users) + " users has " +
                mebibytes(used_bytes);
    }
    text += ", checksums and records of what is hot take " + mebibytes(opened);
    if (bytes <= left_bytes) {
        return NoRoom(text + ": your sessions have " + mebibytes(has_bytes) +
                      ", and the rest is kept for other users: end a session, or raise --dram");
    }
    const std::string enough = mebibytes(memory_.limit_bytes() + bytes - left_bytes);
    return NoRoom(text + (in_use ? ": end a session, or raise --dram to " : ": raise --dram to ") + enough);
}

bool Engine::activate(uint32_t model, Use use, uint64_t has_bytes) {
    Model& state = *models_.at(model);
    const bool active = state.pool != nullptr;
    const uint64_t user_bytes = state.users >= SESSIONS_RESERVED ? session_bytes(state.spec) : 0;
    const uint64_t share_bytes = SHARE_SLOTS_MIN * uint64_t{state.spec.cell_bytes};
    const uint64_t model_bytes = active ? 0 : activation_bytes(state.spec) + 2 * share_bytes;
    const bool wants_share = active && use != Use::resident;
    const auto& newest = state.predictors_file;
    const bool loaded = state.predictors != nullptr && newest && state.predictors->version == newest->version;
    const uint64_t predictors_bytes = use == Use::session && newest && !loaded ? pages(newest->bytes) : 0;
    kept_bytes_.erase(&state);
    require_room(state, model_bytes + predictors_bytes, user_bytes + (wants_share ? share_bytes : 0), has_bytes);
    if (!make_room(state, model_bytes + user_bytes)) return false;
    memory_.take(Account::tables, user_bytes);
    state.users++;
    state.idle_rebalances = 0;
    if (active) return true;
    const uint64_t resident_bytes = pages(state.spec.resident_bytes);
    memory_.take(Account::resident, resident_bytes);
    memory_.take(Account::tables, activation_bytes(state.spec) - resident_bytes);
    update_limits();
    state.pool = std::make_unique<Pool>(state.spec.cell_count(), state.spec.cell_bytes);
    state.pool->seed(state.hotness);
    return true;
}

std::shared_ptr<Predictors> Engine::reserve_predictors(uint32_t model, const PredictorsFile& wanted) {
    const uint64_t bytes = pages(wanted.bytes);
    if (!make_room(*models_.at(model), bytes)) return nullptr;
    memory_.take(Account::resident, bytes);
    update_limits();
    return {new Predictors{wanted.version, wanted.bytes, {}}, [this, bytes](Predictors* predictors) {
                if (!ending_) predictors->memory.drain();
                memory_.give(Account::resident, bytes);
                delete predictors;
            }};
}

void Engine::leave(uint32_t model) {
    Model& state = *models_.at(model);
    assert(state.users > 0);
    if (state.users > SESSIONS_RESERVED) memory_.give(Account::tables, session_bytes(state.spec));
    state.users--;
}

// Resident weights and tables that cannot be taken back for a model: idle ones give theirs up.
uint64_t Engine::fixed_bytes(const Model& asks) const {
    uint64_t bytes = memory_.used_bytes(Account::resident) + memory_.used_bytes(Account::tables);
    for (const auto& state : models_) {
        if (state.get() == &asks || state->pool == nullptr || state->users > 0) continue;
        bytes -= activation_bytes(state->spec);
        if (state->predictors != nullptr) bytes -= pages(state->predictors->bytes);
    }
    return bytes;
}

uint64_t Engine::pool_bytes_free(const Model& asks) const {
    uint64_t spoken_for = fixed_bytes(asks);
    for (const auto& state : models_) {
        if (state->pool == nullptr) continue;
        spoken_for += state->guaranteed_slots * state->spec.cell_bytes;
        if (state.get() != &asks && state->users > 0) spoken_for += segment_bytes_;  // what its last may leave unused
    }
    return memory_.limit_bytes() - std::min(memory_.limit_bytes(), spoken_for);
}

// Half of what the user may still take, at most: whoever comes next finds something too.
uint32_t Engine::share_for(uint32_t model, uint32_t slots_wanted, uint64_t has_bytes) const {
    const Model& state = *models_.at(model);
    const uint64_t cell_bytes = state.spec.cell_bytes;
    const uint64_t free_bytes = pool_bytes_free(state);
    const uint64_t left = most_for(has_bytes, free_bytes) / cell_bytes;
    if (left < SHARE_SLOTS_MIN) throw no_room(state, SHARE_SLOTS_MIN * cell_bytes, free_bytes, has_bytes);
    const uint64_t most = std::min<uint64_t>(std::max<uint64_t>(SHARE_SLOTS_MIN, left / 2), state.spec.cell_count());
    const uint64_t share = slots_wanted == 0 ? most : std::min<uint64_t>(slots_wanted, most);
    return static_cast<uint32_t>(std::max<uint64_t>(share, SHARE_SLOTS_MIN));
}

// What is neither guaranteed to a session nor kept for fetches and reads in flight.
uint64_t Engine::lendable_bytes() const {
    const uint64_t fixed_bytes = memory_.used_bytes(Account::resident) + memory_.used_bytes(Account::tables);
    const uint64_t pool_bytes = target_bytes_ - std::min(target_bytes_, fixed_bytes);
    uint64_t kept_bytes = 0;
    uint32_t models_in_use = 0;
    for (const auto& state : models_) {
        if (state->pool == nullptr || state->users == 0) continue;
        const uint64_t cell_bytes = state->spec.cell_bytes;
        const uint64_t never_slots =
            std::clamp<uint64_t>(pool_bytes / cell_bytes / LENT_NEVER_DIVISOR, SHARE_SLOTS_MIN, FETCH_SLOTS_MAX);
        const uint64_t shares_slots = state->guaranteed_slots - state->fetching_slots;
        kept_bytes += (shares_slots + std::max(state->fetching_slots, never_slots)) * cell_bytes;
        if (models_in_use++ > 0) kept_bytes += segment_bytes_;  // as in pool_bytes_free
    }
    return pool_bytes - std::min(pool_bytes, kept_bytes);
}

// Equal parts: nobody can hold all that is lent, and an idle session loses nothing by what others lease, because what
// nobody leases stays in the pool as long as what is leased.
void Engine::update_limits() {
    const auto borrowers =
        std::count_if(sessions_.begin(), sessions_.end(), [](const auto& entry) { return entry.second->borrows; });
    const uint64_t part_bytes = borrowers > 0 ? lendable_bytes() / static_cast<uint64_t>(borrowers) : 0;
    for (const auto& [id, session] : sessions_) {
        if (!session->borrows) continue;
        const Model& state = *models_[session->model];
        const uint64_t limit = session->share_slots + part_bytes / state.spec.cell_bytes;
        const uint64_t most = std::max(session->share_slots, state.spec.cell_count());
        session->lease_limit = static_cast<uint32_t>(std::min<uint64_t>(limit, most));
        // A segment is empty sooner when windows shrink; what is in it may be anybody's.
        session->limit_changed(state.pool->draining() > 0 ? SHARE_SLOTS_MIN : session->lease_limit);
    }
}

uint64_t Engine::evictions(const Model& state) const {
    return state.counts.evictions + (state.pool ? state.pool->evictions() : 0);
}

bool Engine::waiting() const {
    return std::any_of(models_.begin(), models_.end(), [](const auto& state) {
        return state->pool != nullptr && (!state->stalled.empty() || state->pool->draining() > 0);
    });
}

bool Engine::blocks_others(const Session& session) const {
    const Model& state = *models_[session.model];
    if (!state.stalled.empty() && session.held_cells > session.lease_limit) return true;
    const std::vector<uint32_t> leased = state.pool->leased_in_draining();
    return std::any_of(leased.begin(), leased.end(), [&](uint32_t cell) { return session.holds[cell].granted > 0; });
}

Place Engine::place_for(Model& state, uint32_t cell) {
    while (!state.pool->has_free() && !grow(state)) {
        if (!wants_more(state) || !deactivate_idle(&state, IDLE_REBALANCES_MIN)) break;
    }
    return state.pool->insert(cell);
}

bool Engine::grow(Model& state) {
    const uint64_t cell_bytes = state.spec.cell_bytes;
    if (!wants_more(state)) return false;
    const uint64_t useful_bytes = (state.spec.cell_count() - state.pool->slots()) * cell_bytes;
    const uint64_t wanted_bytes = std::min(std::max(segment_bytes_, cell_bytes), useful_bytes);
    const uint64_t promised_bytes = promise_.model == state.index ? 0 : promise_.bytes;
    const uint64_t left_bytes = growth_bytes(state) - std::min(growth_bytes(state), promised_bytes);
    const uint64_t slots = std::min<uint64_t>(std::min(wanted_bytes, left_bytes) / cell_bytes, SEGMENT_SLOTS_MAX);
    if (slots == 0) return false;
    std::optional<SharedMemory> memory = new_segment(slots * cell_bytes);
    if (!memory) return false;
    memory_.take(Account::pool, slots * cell_bytes);
    if (promise_.model == state.index) promise_ = {};
    Segment& segment = state.pool->add_segment(next_segment_++, std::move(*memory));
    segment.buffer_index = reader_.register_memory(segment.memory.bytes());
    return true;
}

// Somebody waits for a slot that is his: what another model has too much of is taken back.
void Engine::claim_slots(Model& state) {
    uint64_t owed_slots = 0;
    for (const auto& [id, session] : sessions_) {
        if (session->model != state.index) continue;
        owed_slots += std::max(session->share_slots, std::min(session->held_cells, session->lease_limit));
    }
    if (state.pool->slots() >= owed_slots) return;
    if (!deactivate_idle(&state, 0)) drain_surplus(&state, false);
}

// True when a segment that some model can spare is on its way out; one of `asks` itself only if `own`, and rather not.
bool Engine::drain_surplus(const Model* asks, bool own) {
    Model* chosen = nullptr;
    uint64_t most_bytes = 0;
    for (const auto& state : models_) {
        const bool asking = state.get() == asks;
        if (state->pool == nullptr || (asking && !own)) continue;
        if (state->pool->draining() > 0) return true;
        if (!can_spare_segment(*state)) continue;
        const uint64_t slots = state->pool->slots();
        const uint64_t surplus_bytes = (slots - state->guaranteed_slots) * state->spec.cell_bytes / (asking ? 2 : 1);
        if (surplus_bytes > most_bytes) {
            most_bytes = surplus_bytes;
            chosen = state.get();
        }
    }
    if (chosen == nullptr || !chosen->pool->start_draining()) return false;
    update_limits();
    return true;
}

void Engine::retire(Model& state) {
    const uint32_t draining = state.pool->draining();
    for (auto& segment : state.pool->retire_drained()) drop_segment(state, std::move(segment));
    if (state.pool->draining() < draining) update_limits();
}

void Engine::drop_segment(Model& state, std::unique_ptr<Segment> segment) {
    for (const auto& [id, session] : sessions_) {
        if (models_[session->model].get() == &state) session->segment_gone(segment->number);
    }
    memory_.give(Account::pool, segment->slots.size() * uint64_t{state.spec.cell_bytes});
    reader_.unregister_memory(segment->buffer_index);
    segment->memory.drain();
}

bool Engine::deactivate_idle(const Model* except, uint32_t rebalances_min) {
    for (const auto& state : models_) {
        if (state.get() == except || state->pool == nullptr || state->users > 0 || state->pool->busy() > 0) continue;
        if (state->idle_rebalances < rebalances_min) continue;
        deactivate(*state);
        return true;
    }
    return false;
}

void Engine::deactivate(Model& state) {
    state.pool->write_hotness(state.hotness);
    while (state.pool->start_draining()) retire(state);
    memory_.give(Account::tables, activation_bytes(state.spec) - pages(state.spec.resident_bytes));
    memory_.give(Account::resident, pages(state.spec.resident_bytes));
    state.resident.drain();
    state.resident = {};
    state.resident_ready = false;
    state.predictors.reset();
    state.counts.evictions += state.pool->evictions();
    state.pool.reset();
    state.warming = {};
    state.demand = {};
}

}  // namespace weightd
