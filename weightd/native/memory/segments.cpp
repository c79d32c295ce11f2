#include "memory/segments.h"

#include <algorithm>
#include <optional>
#include <system_error>

namespace weightd {
namespace {

// None when the system has no descriptor or mapping left: the pool then goes on with the segments that it has.
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

// What is free below the target; above it, only what the shares of the model's sessions still need. What is reserved
// for another model is left to that model.
uint64_t Segments::growth_bytes(const Model& model) const {
    const uint64_t share_slots = sessions_.share_slots(model);
    const uint64_t owed_slots = share_slots - std::min(share_slots, model.pool->slots());
    const uint64_t most_bytes = std::max(pressure_.left_bytes(), owed_slots * model.spec.cell_bytes);
    const uint64_t growth_bytes = std::min(room_.free_bytes(model), most_bytes);
    return reservation_.model == model.index ? growth_bytes : growth_bytes - std::min(growth_bytes, reservation_.bytes);
}

bool Segments::grow(Model& model) {
    if (!model.wants_more_slots()) return false;
    const uint64_t cell_bytes = model.spec.cell_bytes;
    const uint64_t pool_bytes = model.pool->slots() * cell_bytes;
    const uint64_t useful_bytes = model.spec.cell_count() * cell_bytes - pool_bytes;
    const uint64_t wanted_bytes = std::min(std::max(memory_.next_segment_bytes(pool_bytes), cell_bytes), useful_bytes);
    const uint64_t bytes = std::min(wanted_bytes, growth_bytes(model));
    const uint64_t slots = std::min<uint64_t>(bytes / cell_bytes, SEGMENT_SLOTS_MAX);
    if (slots == 0) return false;
    std::optional<SharedMemory> memory = new_segment(slots * cell_bytes);
    if (!memory) return false;
    memory_.take(Account::pool, slots * cell_bytes);
    if (reservation_.model == model.index) reservation_.bytes -= std::min(reservation_.bytes, slots * cell_bytes);
    Segment& segment = model.pool->add_segment(next_number_++, std::move(*memory));
    segment.buffer_index = reader_.register_memory(segment.memory.bytes());
    unpopulated_.emplace(segment.memory.data(), segment.buffer_index);
    populator_.add(segment.memory.bytes());
    return true;
}

void Segments::pin_populated() {
    if (unpopulated_.empty()) return;
    for (const std::span<std::byte> memory : populator_.take_complete()) {
        const auto found = unpopulated_.find(memory.data());
        reader_.pin_memory(found->second);
        unpopulated_.erase(found);
    }
}

uint64_t Segments::spare_slots(const Model& model) const {
    const uint64_t slots = model.pool->slots();
    return model.users == 0 ? slots : slots - std::min(slots, sessions_.share_slots(model));
}

bool Segments::can_spare(const Model& model) const { return model.pool->can_drain(spare_slots(model)); }

bool Segments::drain_surplus(const Model* asking, bool own) {
    Model* chosen = nullptr;
    uint64_t most_bytes = 0;
    for (const auto& model : models_) {
        const bool is_asking = model.get() == asking;
        if (model->pool == nullptr || (is_asking && !own)) continue;
        if (model->pool->draining() > 0) return true;
        if (!can_spare(*model)) continue;
        const uint64_t surplus_bytes = spare_slots(*model) * model->spec.cell_bytes / (is_asking ? 2 : 1);
        if (surplus_bytes > most_bytes) {
            most_bytes = surplus_bytes;
            chosen = model.get();
        }
    }
    if (chosen == nullptr || !chosen->pool->start_draining(spare_slots(*chosen))) return false;
    sessions_.update_limits();
    return true;
}

void Segments::drain_all(Model& model) {
    while (model.pool->start_draining()) retire(model);
}

void Segments::retire(Model& model) {
    const uint32_t draining = model.pool->draining();
    if (draining == 0) return;
    for (auto& segment : model.pool->retire_drained()) drop(model, std::move(segment));
    if (model.pool->draining() < draining) sessions_.update_limits();
}

void Segments::drop(const Model& model, std::unique_ptr<Segment> segment) {
    sessions_.tell_segment_gone(model, segment->number);
    memory_.give(Account::pool, segment->slots.size() * uint64_t{model.spec.cell_bytes});
    if (unpopulated_.erase(segment->memory.data()) > 0) populator_.withdraw(segment->memory.bytes());
    reader_.unregister_memory(segment->buffer_index);
    segment->memory.drain();
}

void Segments::transfer(Model& from, const Model& to) {
    const uint64_t before_bytes = memory_.used_bytes(Account::pool);
    if (!from.pool->start_draining(spare_slots(from), true)) return;
    retire(from);
    reservation_ = {to.index, before_bytes - memory_.used_bytes(Account::pool)};
}

}  // namespace weightd
