#include "ring/leases.h"

#include <algorithm>
#include <string>
#include <system_error>
#include <utility>

namespace flashclient {

void raise_refusal(uint32_t layer, const ring::Grant& grant, uint32_t bundles_per_cell) {
    const std::string where = "layer " + std::to_string(layer);
    const uint32_t first = grant.cell * bundles_per_cell;
    switch (Session::status(grant)) {
        case ring::UNREADABLE:
            throw CorruptBundle(where + ", neuron at position " + std::to_string(first) +
                                " cannot be read: " + std::generic_category().message(static_cast<int>(grant.slot)) +
                                "; look after the device, or import the model again");
        case ring::CORRUPT:
            throw CorruptBundle(where + ", neuron at position " + std::to_string(first + grant.slot) +
                                " differs from its checksum: import the model again");
        default:
            throw LeaseRefused(where + ", cell " + std::to_string(grant.cell) + " is beyond the session's lease limit");
    }
}

Leases::Leases(Session& session, uint32_t bundles_per_cell, uint32_t cell_bytes, const std::vector<uint32_t>& cells)
    : session_(session), bundles_per_cell_(bundles_per_cell), cell_bytes_(cell_bytes) {
    for (const uint32_t count : cells) tables_.emplace_back(count);
}

void Leases::exchange(uint32_t layer, std::span<const uint32_t> acquire, std::span<const uint32_t> release) {
    std::vector<uint64_t>& table = tables_.at(layer);
    for (const std::span<const uint32_t> cells : {acquire, release}) {
        for (const uint32_t cell : cells) static_cast<void>(table.at(cell));
    }
    settle();
    std::vector<uint32_t> held;
    for (const uint32_t cell : release) {
        if (std::exchange(table.at(cell), 0) != 0) held.push_back(cell);
    }
    held_ -= static_cast<uint32_t>(held.size());
    layer_ = layer;
    for (size_t i = acquire.size(); i > 0; i--) {
        if (table.at(acquire[i - 1]) == 0) waiting_.push_back(acquire[i - 1]);
    }
    const bool one_message = waiting_.size() + held.size() <= ring::WORDS && !waiting_.empty();
    if (!one_message) {
        session_.release(layer, ring::CELLS, held);
        return ask_more();
    }
    const std::vector<uint32_t> asked(waiting_.rbegin(), waiting_.rend());
    waiting_.clear();
    unanswered_ += static_cast<uint32_t>(asked.size());
    session_.exchange(layer, asked, held, 0);
}

// As much as the ring's grants can answer.
void Leases::ask_more() {
    const size_t count = std::min<size_t>(waiting_.size(), ring::GRANTS - unanswered_);
    if (count == 0) return;
    const std::vector<uint32_t> part(waiting_.rbegin(), waiting_.rbegin() + static_cast<ptrdiff_t>(count));
    waiting_.resize(waiting_.size() - count);
    unanswered_ += static_cast<uint32_t>(count);
    session_.acquire(layer_, ring::CELLS, part, 0);
}

void Leases::take(bool block) {
    grants_.clear();
    session_.take_grants(grants_, block);
    for (const ring::Grant& grant : grants_) {
        unanswered_--;
        if (Session::status(grant) != ring::GRANTED) {
            failed_.push_back(grant);
            continue;
        }
        tables_[layer_].at(grant.cell) = reinterpret_cast<uint64_t>(session_.address(grant, cell_bytes_));
        held_++;
    }
    ask_more();
}

uint32_t Leases::arrived() {
    if (unanswered_ > 0) take(true);
    if (!failed_.empty()) {
        const ring::Grant first = failed_.front();
        settle();
        raise_refusal(layer_, first, bundles_per_cell_);
    }
    return unanswered_ + static_cast<uint32_t>(waiting_.size());
}

// After a step that ended early: only what was granted may be given back.
void Leases::settle() {
    waiting_.clear();
    while (unanswered_ > 0) take(true);
    failed_.clear();
}

void Leases::release_all() {
    settle();
    std::vector<uint32_t> held;
    for (uint32_t layer = 0; layer < tables_.size() && held_ > 0; layer++) {
        held.clear();
        for (uint32_t cell = 0; cell < tables_[layer].size(); cell++) {
            if (std::exchange(tables_[layer][cell], 0) != 0) held.push_back(cell);
        }
        session_.release(layer, ring::CELLS, held);
        held_ -= static_cast<uint32_t>(held.size());
    }
}

void Leases::forget() {
    for (auto& table : tables_) std::fill(table.begin(), table.end(), 0);
    unanswered_ = held_ = 0;
    waiting_.clear();
    failed_.clear();
}

}  // namespace flashclient
