#include "pool/pool.h"

#include <algorithm>
#include <cassert>
#include <utility>

#include "pool/cell_replacement.h"

namespace weightd {
namespace {

bool is_busy(const Slot& slot) { return slot.reading || slot.leases > 0; }

}  // namespace

Pool::Pool(uint32_t cells, uint32_t cell_bytes) : Pool(cells, cell_bytes, std::make_unique<CellReplacement>(cells)) {}

Pool::Pool(uint32_t cells, uint32_t cell_bytes, std::unique_ptr<Replacement> replacement)
    : cell_bytes_(cell_bytes), slot_of_(cells, NO_SLOT), replacement_(std::move(replacement)) {}

uint64_t Pool::table_bytes(uint32_t cells, uint64_t slots_max) {
    return uint64_t{cells} * sizeof(uint32_t) + slots_max * (sizeof(Slot) + sizeof(uint32_t));
}

void Pool::write_hotness(std::span<Hotness> hotness) const {
    replacement_->write_hotness(hotness);
    for (uint32_t cell = 0; cell < slot_of_.size(); cell++) {
        if (slot_of_[cell] != NO_SLOT) hotness[cell] |= HOTNESS_IN_POOL;
    }
}

Place Pool::find(uint32_t cell) const {
    const uint32_t slot = slot_of_[cell];
    if (slot == NO_SLOT) return {};
    return {segments_[slot >> 16].get(), slot & 0xffff};
}

std::byte* Pool::address(Place place) const {
    return place.segment->memory.data() + uint64_t{place.index} * cell_bytes_;
}

Place Pool::insert(uint32_t cell) {
    assert(slot_of_[cell] == NO_SLOT);
    const bool contested = free_ == 0;
    while (free_ == 0) {
        const uint32_t victim = replacement_->victim();
        if (victim == NO_CELL) return {};
        evictions_++;
        empty(find(victim));  // in a draining segment this frees no usable slot, and another must be evicted
    }
    const Place place = take_free();
    place.slot() = {cell, 0, NO_WAITER, true};
    place.segment->busy++;
    filled_++;
    slot_of_[cell] = place.segment->index << 16 | place.index;
    replacement_->inserted(cell, contested);
    return place;
}

Place Pool::take_free() {
    for (size_t i = 0; i < segments_.size(); i++) {
        Segment* segment = segments_[next_free_].get();
        if (segment != nullptr && !segment->draining && !segment->free.empty()) {
            const uint32_t index = segment->free.back();
            segment->free.pop_back();
            free_--;
            return {segment, index};
        }
        next_free_ = (next_free_ + 1) % static_cast<uint32_t>(segments_.size());
    }
    assert(false && "free_ counts the free slots of segments that do not drain");
    return {};
}

void Pool::empty(Place place) {
    Slot& slot = place.slot();
    assert(!is_busy(slot));
    slot_of_[slot.cell] = NO_SLOT;
    slot = {};
    filled_--;
    place.segment->free.push_back(place.index);
    if (!place.segment->draining) free_++;
}

void Pool::update_busy(Place place, bool was_busy) {
    const bool busy = is_busy(place.slot());
    if (busy == was_busy) return;
    if (busy) {
        place.segment->busy++;
        replacement_->pinned(place.slot().cell);
    } else {
        place.segment->busy--;
        replacement_->unpinned(place.slot().cell);
        if (place.segment->draining) drop(place);
    }
}

void Pool::loaded(Place place) {
    place.slot().reading = false;
    update_busy(place, true);
}

void Pool::drop(Place place) {
    Slot& slot = place.slot();
    assert(slot.leases == 0);
    if (slot.reading) place.segment->busy--;
    slot.reading = false;
    replacement_->removed(slot.cell);
    empty(place);
}

void Pool::lease(Place place) {
    const bool was_busy = is_busy(place.slot());
    place.slot().leases++;
    leases_++;
    update_busy(place, was_busy);
}

void Pool::unlease(Place place) {
    assert(place.slot().leases > 0);
    place.slot().leases--;
    leases_--;
    update_busy(place, true);
}

uint32_t Pool::free_index() const {
    for (uint32_t i = 0; i < segments_.size(); i++) {
        if (segments_[i] == nullptr) return i;
    }
    return static_cast<uint32_t>(segments_.size());
}

Segment& Pool::add_segment(uint32_t number, SharedMemory memory) {
    auto segment = std::make_unique<Segment>();
    const auto count = static_cast<uint32_t>(memory.bytes().size() / cell_bytes_);
    assert(count > 0 && count <= SEGMENT_SLOTS_MAX);
    segment->number = number;
    segment->index = free_index();
    segment->memory = std::move(memory);
    segment->slots.resize(count);
    for (uint32_t i = count; i > 0; i--) segment->free.push_back(i - 1);
    if (segment->index == segments_.size()) segments_.emplace_back();
    slots_ += count;
    free_ += count;
    return *(segments_[segment->index] = std::move(segment));
}

Segment* Pool::to_drain(uint64_t slots_max, bool idle_only) const {
    Segment* chosen = nullptr;
    for (const auto& segment : segments_) {
        if (segment == nullptr || segment->draining || (idle_only && segment->busy > 0)) continue;
        const size_t slots = segment->slots.size();
        if (slots > slots_max || (chosen != nullptr && slots < chosen->slots.size())) continue;
        if (chosen == nullptr || slots > chosen->slots.size() || segment->busy < chosen->busy) chosen = segment.get();
    }
    return chosen;
}

bool Pool::start_draining(uint64_t slots_max, bool idle_only) {
    Segment* const chosen = to_drain(slots_max, idle_only);
    if (chosen == nullptr) return false;
    chosen->draining = true;
    draining_++;
    slots_ -= chosen->slots.size();
    free_ -= chosen->free.size();
    for (uint32_t i = 0; i < chosen->slots.size(); i++) {
        const Place place{chosen, i};
        if (place.slot().cell != NO_CELL && !is_busy(place.slot())) drop(place);
    }
    return true;
}

std::vector<std::unique_ptr<Segment>> Pool::retire_drained() {
    std::vector<std::unique_ptr<Segment>> gone;
    for (auto& segment : segments_) {
        if (segment == nullptr || !segment->draining || segment->free.size() < segment->slots.size()) continue;
        gone.push_back(std::move(segment));
        draining_--;
    }
    return gone;
}

std::vector<uint32_t> Pool::leased_in_draining() const {
    std::vector<uint32_t> cells;
    for (const auto& segment : segments_) {
        if (segment == nullptr || !segment->draining) continue;
        for (const Slot& slot : segment->slots) {
            if (slot.leases > 0) cells.push_back(slot.cell);
        }
    }
    return cells;
}

uint64_t Pool::busy() const {
    uint64_t count = 0;
    for (const auto& segment : segments_) count += segment == nullptr ? 0 : segment->busy;
    return count;
}

}  // namespace weightd
