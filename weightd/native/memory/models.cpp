#include "memory/models.h"

#include <algorithm>
#include <cassert>
#include <stdexcept>
#include <string>

#include "pool/expert_replacement.h"

namespace weightd {
namespace {

std::unique_ptr<Pool> new_pool(const ModelSpec& spec) {
    if (!spec.has_experts()) return std::make_unique<Pool>(spec.cell_count(), spec.cell_bytes);
    std::vector<ExpertRange> ranges;
    for (uint32_t layer = 0; layer < spec.layers.size(); layer++) {
        const uint32_t count = std::max(1U, spec.layers[layer].experts);
        ranges.insert(ranges.end(), count, {layer, spec.layers[layer].cells / count});
    }
    return std::make_unique<Pool>(spec.cell_count(), spec.cell_bytes, std::make_unique<ExpertReplacement>(ranges));
}

}  // namespace

Models::Models(uint64_t dram_bytes, Reader& reader)
    : memory_(dram_bytes),
      pressure_(memory_),
      sessions_(models_, memory_, pressure_),
      room_(models_, memory_, sessions_),
      segments_(models_, memory_, pressure_, reader, sessions_, room_),
      reader_(reader) {}

std::optional<uint32_t> Models::add(std::unique_ptr<Model>& opened) {
    const uint64_t bytes = catalog_bytes(opened->spec);
    room_.stop_keeping(*opened);
    room_.require(*opened, bytes, 0, 0);
    if (!make_room(*opened, bytes)) return std::nullopt;
    memory_.take(Account::tables, bytes);
    opened->index = static_cast<uint32_t>(models_.size());
    opened->hotness.resize(opened->spec.cell_count());
    opened->file_index = reader_.register_file(*opened->file);
    models_.push_back(std::move(opened));
    sessions_.update_limits();
    return models_.back()->index;
}

bool Models::remove(uint32_t index) {
    Model& model = *models_.at(index);
    if (model.removed) return true;
    if (model.users > 0 || model.fetched || (model.pool != nullptr && model.pool->busy() > 0)) return false;
    if (model.pool != nullptr) deactivate(model);
    room_.stop_keeping(model);
    memory_.give(Account::tables, catalog_bytes(model.spec));
    sessions_.update_limits();
    reader_.unregister_file(model.file_index);
    model.file.reset();
    model.hotness = {};
    model.spec.checksums = {};
    model.removed = true;
    return true;
}

void Models::seed(uint32_t index, std::span<const Hotness> hotness) {
    Model& model = *models_.at(index);
    if (hotness.size() != model.hotness.size()) {
        throw std::invalid_argument(model.spec.name + ": hotness is given for " + std::to_string(hotness.size()) +
                                    " cells, but the model has " + std::to_string(model.hotness.size()));
    }
    std::copy(hotness.begin(), hotness.end(), model.hotness.begin());
    if (model.pool != nullptr) model.pool->seed(hotness);
}

std::vector<Hotness> Models::hotness(uint32_t index) const {
    const Model& model = *models_.at(index);
    std::vector<Hotness> hotness = model.hotness;
    if (model.pool != nullptr) model.pool->write_hotness(hotness);
    return hotness;
}

// ---- activation ----

bool Models::activate(uint32_t index, Use use, uint64_t has_bytes) {
    Model& model = *models_.at(index);
    if (model.removed) throw ModelRemoved(model.spec.name);
    const bool active = model.pool != nullptr;
    const uint64_t user_bytes = model.users >= SESSIONS_RESERVED ? session_bytes(model.spec) : 0;
    const uint64_t share_bytes = SHARE_SLOTS_MIN * uint64_t{model.spec.cell_bytes};
    const uint64_t model_bytes = active ? 0 : activation_bytes(model.spec) + 2 * share_bytes;
    const bool wants_share = active && use != Use::resident;
    const auto& newest = model.predictors_file;
    const bool loaded = model.predictors != nullptr && newest && model.predictors->version == newest->version;
    const uint64_t predictors_bytes = use == Use::session && newest && !loaded ? whole_pages(newest->bytes) : 0;
    room_.stop_keeping(model);
    room_.require(model, model_bytes + predictors_bytes, user_bytes + (wants_share ? share_bytes : 0), has_bytes);
    if (!make_room(model, model_bytes + user_bytes)) return false;
    memory_.take(Account::tables, user_bytes);
    model.users++;
    model.idle_rebalances = 0;
    if (active) return true;
    const uint64_t resident_bytes = whole_pages(model.spec.resident_bytes);
    memory_.take(Account::resident, resident_bytes);
    memory_.take(Account::tables, activation_bytes(model.spec) - resident_bytes);
    sessions_.update_limits();
    model.pool = new_pool(model.spec);
    model.pool->seed(model.hotness);
    model.activations++;
    return true;
}

void Models::leave(uint32_t index) {
    Model& model = *models_.at(index);
    assert(model.users > 0);
    if (model.users > SESSIONS_RESERVED) memory_.give(Account::tables, session_bytes(model.spec));
    model.users--;
}

std::shared_ptr<LoadedPredictors> Models::reserve_predictors(uint32_t index, const PredictorsFile& wanted) {
    const uint64_t bytes = whole_pages(wanted.bytes);
    if (!make_room(*models_.at(index), bytes)) return nullptr;
    memory_.take(Account::resident, bytes);
    sessions_.update_limits();
    return {new LoadedPredictors{wanted.version, wanted.bytes, {}}, [this, bytes](LoadedPredictors* predictors) {
                if (!ending_) predictors->memory.drain();
                memory_.give(Account::resident, bytes);
                delete predictors;
            }};
}

// True when `bytes` are free. False: something drains, and what it frees is kept for this model. Throws NoRoom.
bool Models::make_room(const Model& asking, uint64_t bytes) {
    room_.stop_keeping(asking);
    while (room_.free_bytes(asking) < bytes) {
        if (deactivate_idle(&asking, 0)) continue;
        if (!segments_.drain_surplus(&asking, true)) {
            throw room_.refusal(asking, bytes, room_.free_bytes(asking), 0);
        }
        room_.keep(asking, bytes);
        return false;
    }
    return true;
}

bool Models::deactivate_idle(const Model* except, uint32_t idle_rebalances_min) {
    for (const auto& model : models_) {
        if (model.get() == except || model->pool == nullptr || model->users > 0 || model->pool->busy() > 0) continue;
        if (model->idle_rebalances < idle_rebalances_min) continue;
        deactivate(*model);
        return true;
    }
    return false;
}

void Models::deactivate(Model& model) {
    model.pool->write_hotness(model.hotness);
    segments_.drain_all(model);
    memory_.give(Account::tables, activation_bytes(model.spec) - whole_pages(model.spec.resident_bytes));
    memory_.give(Account::resident, whole_pages(model.spec.resident_bytes));
    model.resident.drain();
    model.resident = {};
    model.resident_ready = false;
    model.predictors.reset();
    model.counts.evictions += model.pool->evictions();
    model.pool.reset();
    demand_.forget(model);
}

// ---- growth and giving back ----

Place Models::place_for(Model& model, uint32_t cell) {
    while (!model.pool->has_free() && !segments_.grow(model)) {
        if (!model.wants_more_slots() || !deactivate_idle(&model, IDLE_REBALANCES_MIN)) break;
    }
    const Place place = model.pool->insert(cell);
    if (place && place.index == 0) segments_.grow(model);  // the next one, which gets its pages while this one fills
    return place;
}

void Models::claim_slots(const Model& model) {
    if (model.pool->slots() >= sessions_.owed_slots(model)) return;
    if (!deactivate_idle(&model, 0)) segments_.drain_surplus(&model, false);
}

void Models::rebalance() {
    for (const auto& model : models_) {
        model->idle_rebalances = model->users > 0 ? 0 : model->idle_rebalances + 1;
        if (model->idle_rebalances >= IDLE_REBALANCES_MIN) model->fetched = false;
        if (model->pool != nullptr) demand_.note(*model);
    }
    segments_.end_reservation();
    if (room_.keeps()) return;
    const auto found = demand_.transfer(models_, [this](const Model& model) { return segments_.can_spare(model); });
    if (found) segments_.transfer(*found->from, *found->to);
}

void Models::raise_dram(uint64_t dram_bytes, uint64_t floor_bytes) {
    if (dram_bytes <= memory_.limit_bytes()) return;
    pressure_.limit_raised(dram_bytes - memory_.limit_bytes());
    memory_.raise_limit(dram_bytes);
    pressure_.set_floor(floor_bytes);
    sessions_.update_limits();
}

void Models::press() {
    pressure_.press();
    sessions_.update_limits();
    shrink_to_target();
}

void Models::relieve() {
    pressure_.relieve();
    sessions_.update_limits();
}

// A segment with leases stays until they end; the engine calls this again at each step.
bool Models::shrink_to_target() {
    bool any = false;
    while (pressure_.exceeded()) {
        if (deactivate_idle(nullptr, IDLE_REBALANCES_MIN)) {
            any = true;
            continue;
        }
        if (!segments_.drain_surplus(nullptr, true)) break;
        const uint64_t free_bytes = memory_.free_bytes();
        for (const auto& model : models_) {
            if (model->pool != nullptr) segments_.retire(*model);
        }
        if (memory_.free_bytes() == free_bytes) break;
        any = true;
    }
    return any;
}

}  // namespace weightd
