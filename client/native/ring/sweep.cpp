#include "ring/sweep.h"

#include <algorithm>
#include <stdexcept>

namespace flashclient {

Sweep::Sweep(Session& session, Layout layout) : session_(session), layout_(std::move(layout)) { forget(); }

void Sweep::forget() {
    used_.clear();
    chunks_.clear();
    in_use_ = 0;
    layer_ended_ = false;
    // At least two chunks, one in use and one on its way; as large as one read where the share allows it.
    const uint32_t quarter = std::max(1U, session_.share_slots() / 4);
    chunk_cells_ = std::clamp(CHUNK_BYTES / layout_.cell_bytes, 1U, quarter);
    chunks_max_ = std::max(1U, std::min(session_.share_slots(), ring::GRANTS) / chunk_cells_);
}

Sweep::~Sweep() {
    try {
        const auto use = session_.use();
        idle();
    } catch (const std::exception&) {  // the session is lost, and its leases are, too
        forget();
    }
}

uint32_t Sweep::cells_in(uint32_t layer) const {
    return (layout_.neurons[layer] + layout_.bundles_per_cell - 1) / layout_.bundles_per_cell;
}

const Sweep::Bundles* Sweep::next(uint32_t layer) {
    if (layer >= layout_.neurons.size()) throw std::out_of_range("there is no such layer");
    finish_chunks_in_use();
    if (layer_ended_) {
        layer_ended_ = false;
        refill();
        return nullptr;
    }
    if (chunks_.empty() || chunks_.front().layer != layer) {
        idle();
        next_layer_ = layer;
        next_cell_ = 0;
    }
    if (chunks_.empty() || 2 * used_.size() >= chunks_max_) refill();
    take_answers(false);
    if (chunks_.front().unanswered > 0) wait_for_first();
    give_out();
    return &given_;
}

void Sweep::wait_for_first() {
    refill();
    while (chunks_.front().unanswered > 0) take_answers(true);
}

void Sweep::give_out() {
    given_.first_position = chunks_.front().first_position;
    given_.addresses.clear();
    const uint32_t layer = chunks_.front().layer;
    const uint32_t most = std::max(1U, chunks_max_ / 2);
    while (in_use_ < std::min<size_t>(most, chunks_.size())) {
        const Chunk& chunk = chunks_[in_use_];
        if (chunk.layer != layer || layer_ended_ || chunk.unanswered > 0) break;
        if (!chunk.failed.empty() && in_use_ > 0) break;
        in_use_++;
        if (!chunk.failed.empty()) raise_corrupt(layer, chunk.failed.front(), layout_.bundles_per_cell);
        given_.addresses.insert(given_.addresses.end(), chunk.addresses.begin(), chunk.addresses.end());
        layer_ended_ = chunk.first_cell + chunk.cell_count == cells_in(layer);
    }
}

void Sweep::refill() {
    give_back_used();
    look_ahead();
}

void Sweep::look_ahead() {
    while (used_.size() + chunks_.size() < chunks_max_) {
        Chunk chunk;
        chunk.layer = next_layer_;
        chunk.first_cell = next_cell_;
        chunk.cell_count = std::min(chunk_cells_, cells_in(next_layer_) - next_cell_);
        chunk.unanswered = chunk.cell_count;
        chunk.first_position = chunk.first_cell * layout_.bundles_per_cell;
        const uint32_t end = chunk.first_cell + chunk.cell_count;
        const uint32_t position_end = std::min(end * layout_.bundles_per_cell, layout_.neurons[chunk.layer]);
        chunk.addresses.resize(position_end - chunk.first_position);
        const uint32_t range[2] = {chunk.first_cell, end};
        const auto tag = first_tag_ + static_cast<uint32_t>(chunks_.size());
        session_.acquire(next_layer_, ring::RANGES, range, tag);
        chunks_.push_back(std::move(chunk));  // after it was asked for: idle() waits for the grants of every chunk
        next_cell_ = end;
        if (end == cells_in(next_layer_)) {
            next_cell_ = 0;
            next_layer_ = (next_layer_ + 1) % static_cast<uint32_t>(layout_.neurons.size());
        }
    }
}

void Sweep::take_answers(bool block) {
    grants_.clear();
    session_.take_grants(grants_, block);
    Chunk* chunk = nullptr;  // of the last grant
    uint32_t tag = 0;
    for (const ring::Grant& grant : grants_) {
        if (chunk == nullptr || grant.tag != tag) {
            tag = grant.tag;
            chunk = &chunks_.at(tag - first_tag_);
        }
        chunk->unanswered--;
        if (Session::status(grant) == ring::GRANTED) {
            place(*chunk, grant);
        } else {
            chunk->failed.push_back(grant);
        }
    }
}

void Sweep::place(Chunk& chunk, const ring::Grant& grant) {
    const auto address = reinterpret_cast<uint64_t>(session_.address(grant, layout_.cell_bytes));
    const uint32_t first = (grant.cell - chunk.first_cell) * layout_.bundles_per_cell;
    for (uint32_t i = 0; i < layout_.bundles_per_cell && first + i < chunk.addresses.size(); i++) {
        chunk.addresses[first + i] = address + uint64_t{i} * layout_.stride_bytes;
    }
}

void Sweep::finish_chunks_in_use() {
    for (; in_use_ > 0; in_use_--) finish_first();
}

void Sweep::finish_first() {
    used_.push_back(std::move(chunks_.front()));
    chunks_.pop_front();
    first_tag_++;
}

// One message for neighbouring chunks of a layer: the ranges of cells between those that failed. Chunks leave used_
// only after the message was posted.
void Sweep::give_back_used() {
    while (!used_.empty()) {
        const uint32_t layer = used_.front().layer;
        const auto end =
            std::find_if(used_.begin(), used_.end(), [&](const Chunk& chunk) { return chunk.layer != layer; });
        std::vector<uint32_t> borders;
        for (auto chunk = used_.begin(); chunk != end; chunk++) {
            std::sort(chunk->failed.begin(), chunk->failed.end(),
                      [](const auto& a, const auto& b) { return a.cell < b.cell; });
            borders.push_back(chunk->first_cell);
            for (const ring::Grant& failed : chunk->failed) {
                borders.push_back(failed.cell);
                borders.push_back(failed.cell + 1);
            }
            borders.push_back(chunk->first_cell + chunk->cell_count);
        }
        session_.release(layer, ring::RANGES, borders);
        used_.erase(used_.begin(), end);
    }
}

void Sweep::idle() {
    finish_chunks_in_use();
    while (!chunks_.empty()) {
        while (chunks_.front().unanswered > 0) take_answers(true);  // only what was granted may be given back
        finish_first();
    }
    give_back_used();
    layer_ended_ = false;
}

}  // namespace flashclient
