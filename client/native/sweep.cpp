#include "sweep.h"

#include <algorithm>
#include <cassert>
#include <chrono>

namespace flashclient {

Sweep::Sweep(Session& session, Layout layout) : session_(session), layout_(std::move(layout)) { forget(); }

void Sweep::forget() {
    chunks_.clear();
    in_use_ = layer_ended_ = false;
    // At least two chunks, one in use and one on its way; as large as a read where the share allows it.
    const uint32_t quarter = std::max(1U, session_.share_slots() / 4);
    chunk_cells_ = std::clamp(CHUNK_BYTES / layout_.cell_bytes, 1U, quarter);
    chunks_max_ = std::max(1U, std::min(session_.share_slots(), ring::GRANTS) / chunk_cells_);
}

Sweep::~Sweep() {
    try {
        idle();
    } catch (const std::exception&) {  // the session is lost, and its leases with it
        forget();
    }
}

uint32_t Sweep::cells_in(uint32_t layer) const {
    return (layout_.neurons[layer] + layout_.bundles_per_cell - 1) / layout_.bundles_per_cell;
}

const Sweep::Chunk* Sweep::next(uint32_t layer) {
    finish_chunk_in_use();
    if (layer_ended_) {
        layer_ended_ = false;
        look_ahead();
        return nullptr;
    }
    if (chunks_.empty() || chunks_.front().layer != layer) {
        idle();
        next_layer_ = layer;
        next_cell_ = 0;
    }
    look_ahead();
    take_answers(false);
    if (chunks_.front().unanswered > 0) {
        const auto start = std::chrono::steady_clock::now();
        while (chunks_.front().unanswered > 0) take_answers(true);
        times_.wait_s += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }
    in_use_ = true;
    const Chunk& chunk = chunks_.front();
    if (!chunk.failed.empty()) raise_refusal(chunk.layer, chunk.failed.front(), layout_.bundles_per_cell);
    layer_ended_ = chunk.first_cell + chunk.cell_count == cells_in(layer);
    return &chunk;
}

void Sweep::look_ahead() {
    while (chunks_.size() < chunks_max_) {
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
        chunks_.push_back(std::move(chunk));
        session_.acquire(next_layer_, ring::RANGES, range, tag);
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
    for (const ring::Grant& grant : grants_) {
        Chunk& chunk = chunks_.at(grant.tag - first_tag_);
        chunk.unanswered--;
        if (Session::status(grant) == ring::GRANTED) {
            place(chunk, grant);
        } else {
            chunk.failed.push_back(grant);
        }
    }
    times_.cells += grants_.size();
}

void Sweep::place(Chunk& chunk, const ring::Grant& grant) {
    const auto address = reinterpret_cast<uint64_t>(session_.address(grant, layout_.cell_bytes));
    const uint32_t first = (grant.cell - chunk.first_cell) * layout_.bundles_per_cell;
    for (uint32_t i = 0; i < layout_.bundles_per_cell && first + i < chunk.addresses.size(); i++) {
        chunk.addresses[first + i] = address + uint64_t{i} * layout_.stride_bytes;
    }
}

void Sweep::finish_chunk_in_use() {
    if (!in_use_) return;
    in_use_ = false;
    give_back(chunks_.front());
    chunks_.pop_front();
    first_tag_++;
}

void Sweep::give_back(Chunk& chunk) {
    std::sort(chunk.failed.begin(), chunk.failed.end(), [](const auto& a, const auto& b) { return a.cell < b.cell; });
    std::vector<uint32_t> borders{chunk.first_cell};
    for (const ring::Grant& failed : chunk.failed) {
        borders.push_back(failed.cell);
        borders.push_back(failed.cell + 1);
    }
    borders.push_back(chunk.first_cell + chunk.cell_count);
    session_.release(chunk.layer, ring::RANGES, borders);
}

void Sweep::idle() {
    finish_chunk_in_use();
    while (!chunks_.empty()) {
        while (chunks_.front().unanswered > 0) take_answers(true);  // only what was granted may be given back
        give_back(chunks_.front());
        chunks_.pop_front();
        first_tag_++;
    }
    layer_ended_ = false;
}

}  // namespace flashclient
