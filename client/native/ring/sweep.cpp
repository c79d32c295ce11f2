#include "ring/sweep.h"

#include <algorithm>
#include <iterator>
#include <numeric>
#include <stdexcept>

namespace flashclient {

Sweep::Sweep(Session& session, Layout layout) : session_(session), layout_(std::move(layout)) {
    for (uint32_t layer = 0; layer < layout_.bundles.size(); layer++) cells_ += layout_.cells_in(layer);
    forget();
}

void Sweep::forget() {
    kept_.clear();
    kept_in_.assign(layout_.bundles.size(), 0);
    kept_cells_ = 0;
    refused_at_ = UINT32_MAX;
    used_.clear();
    chunks_.clear();
    in_use_ = 0;
    next_ = ahead_ = {};
    layer_ended_ = false;
    chunk_cells_ = 0;
    depth_.begin(0);
}

// At least two chunks, one in use and one on its way; as large as one read where the share of the session allows it.
void Sweep::choose_chunks() {
    const uint32_t quarter = std::max(1U, session_.share_slots() / 4);
    chunk_cells_ = std::clamp(CHUNK_BYTES / layout_.cell_bytes, 1U, quarter);
    depth_.begin(std::max(1U, std::min(session_.share_slots(), ring::GRANTS) / chunk_cells_));
}

Sweep::~Sweep() {
    try {
        const auto use = session_.use();
        idle();
    } catch (const std::exception&) {  // the session is lost, and its leases are, too
        forget();
    }
}

uint32_t Sweep::cells_at(const Cursor& at) const {
    return std::min(chunk_cells_, layout_.cells_in(at.layer) - at.cell);
}

Sweep::Cursor Sweep::after(const Cursor& at) const {
    const uint32_t cell = at.cell + cells_at(at);
    if (cell < layout_.cells_in(at.layer)) return {at.layer, cell};
    return {(at.layer + 1) % static_cast<uint32_t>(layout_.bundles.size()), 0};
}

uint32_t Sweep::streamed_cells() const {
    const auto add = [](uint32_t sum, const Chunk& chunk) { return sum + chunk.cell_count; };
    return std::accumulate(chunks_.begin(), chunks_.end(), std::accumulate(used_.begin(), used_.end(), 0U, add), add);
}

const Sweep::Bundles* Sweep::next(uint32_t layer) {
    if (layer >= layout_.bundles.size()) throw std::out_of_range("there is no such layer");
    if (chunk_cells_ == 0) choose_chunks();
    const uint32_t limit = session_.lease_limit();
    if (layer_ended_ && next_.layer == 0 && refused_at_ == UINT32_MAX) depth_.turn_ends(layout_.bundles.size());
    depth_.at_most(std::min(limit / AHEAD_PART, ring::GRANTS) / chunk_cells_);
    // What is not kept must have its place.
    const uint32_t streamed = cells_ <= limit ? 0 : depth_.chunks() * chunk_cells_;
    keep_max_ = std::min({cells_, limit - std::min(limit, streamed), refused_at_ - 1});
    finish_chunks_in_use();
    if (layer_ended_) {
        layer_ended_ = false;
        depth_.layer_ends();
        if (kept_cells_ > keep_max_) keep_at_most(keep_max_);
        refill();
        return nullptr;
    }
    if (next_.layer != layer) {
        give_back_streamed();
        next_ = ahead_ = {layer, 0};
        depth_.layer_ends();
    }
    if (kept_cells_ > keep_max_) keep_at_most(keep_max_);
    given_.first_position = next_.cell * layout_.bundles_per_cell;
    given_.addresses.clear();
    if (chunks_.empty() || 2 * used_.size() >= depth_.chunks()) refill();
    if (kept_at(next_) != kept_.end()) {
        give_out_kept();
        return &given_;
    }
    take_answers(false);
    depth_.wants(std::all_of(chunks_.begin(), chunks_.end(), [](const auto& chunk) { return chunk.unanswered == 0; }));
    if (chunks_.front().unanswered > 0) wait_for_first();
    if (chunks_.front().refused) {  // its own share is guaranteed: what is kept or ahead above it took the place
        refused_at_ = std::max(1U, kept_cells_ / 2);
        depth_.at_most(0);
        keep_at_most(0);
        wait_for_first();
    }
    give_out_streamed();
    return &given_;
}

uint32_t Sweep::keep_max(uint32_t layer) const {
    return static_cast<uint32_t>(uint64_t{keep_max_} * layout_.cells_in(layer) / cells_);
}

void Sweep::keep_at_most(uint32_t cells) {
    keep_max_ = cells;
    give_back_streamed();
    for (auto chunk = kept_.end(); chunk != kept_.begin();) {
        const uint32_t layer = (--chunk)->second.at.layer;
        if (kept_in_[layer] <= keep_max(layer)) continue;
        kept_in_[layer] -= chunk->second.cell_count;
        kept_cells_ -= chunk->second.cell_count;
        used_.push_back(std::move(chunk->second));
        chunk = kept_.erase(chunk);
    }
    give_back_used();
}

void Sweep::wait_for_first() {
    depth_.waits();
    refill();
    while (chunks_.front().unanswered > 0) take_answers(true);
}

void Sweep::give_out(const Chunk& chunk) {
    given_.addresses.insert(given_.addresses.end(), chunk.addresses.begin(), chunk.addresses.end());
    next_ = after(chunk.at);
    layer_ended_ = next_.cell == 0;
}

void Sweep::give_out_kept() {
    for (auto chunk = kept_at(next_); chunk != kept_.end() && !layer_ended_; chunk = kept_at(next_)) {
        give_out(chunk->second);
    }
}

void Sweep::give_out_streamed() {
    const uint32_t most = std::max(1U, depth_.chunks() / 2);
    while (in_use_ < std::min<size_t>(most, chunks_.size()) && !layer_ended_) {
        const Chunk& chunk = chunks_[in_use_];
        if (chunk.at.layer != next_.layer || chunk.at.cell != next_.cell || chunk.unanswered > 0) break;
        if (!chunk.failed.empty() && in_use_ > 0) break;
        in_use_++;
        if (!chunk.failed.empty()) {
            leave();
            raise_corrupt(chunk.at.layer, chunk.failed.front(), layout_.bundles_per_cell);
        }
        give_out(chunk);
    }
}

void Sweep::refill() {
    give_back_used();
    look_ahead();
}

void Sweep::look_ahead() {
    uint32_t leased = kept_cells_ + streamed_cells();
    while (used_.size() + chunks_.size() < depth_.chunks() && leased < cells_) {
        while (kept_at(ahead_) != kept_.end()) ahead_ = after(ahead_);
        ask(ahead_);
        leased += chunks_.back().cell_count;
        ahead_ = after(ahead_);
    }
}

void Sweep::ask(const Cursor& at) {
    Chunk chunk;
    chunk.at = at;
    chunk.cell_count = chunk.unanswered = cells_at(at);
    const uint32_t end = at.cell + chunk.cell_count;
    const uint32_t position_end = std::min(end * layout_.bundles_per_cell, layout_.bundles[at.layer]);
    chunk.addresses.resize(position_end - at.cell * layout_.bundles_per_cell);
    const uint32_t range[2] = {at.cell, end};
    session_.acquire(at.layer, ring::RANGES, range, first_tag_ + static_cast<uint32_t>(chunks_.size()));
    chunks_.push_back(std::move(chunk));  // after it was asked for: the grants of every chunk are waited for
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
            chunk->refused = chunk->refused || Session::status(grant) == ring::REFUSED;
        }
    }
}

void Sweep::place(Chunk& chunk, const ring::Grant& grant) {
    const auto address = reinterpret_cast<uint64_t>(session_.address(grant, layout_.cell_bytes));
    const uint32_t first = (grant.cell - chunk.at.cell) * layout_.bundles_per_cell;
    for (uint32_t i = 0; i < layout_.bundles_per_cell && first + i < chunk.addresses.size(); i++) {
        chunk.addresses[first + i] = address + uint64_t{i} * layout_.stride_bytes;
    }
}

void Sweep::finish_chunks_in_use() {
    for (; in_use_ > 0; in_use_--) finish_first();
}

void Sweep::finish_first() {
    Chunk chunk = std::move(chunks_.front());
    chunks_.pop_front();
    first_tag_++;
    const uint32_t layer = chunk.at.layer;
    if (chunk.failed.empty() && kept_in_[layer] + chunk.cell_count <= keep_max(layer)) {
        kept_in_[layer] += chunk.cell_count;
        kept_cells_ += chunk.cell_count;
        kept_.emplace(std::pair{chunk.at.layer, chunk.at.cell}, std::move(chunk));
    } else {
        used_.push_back(std::move(chunk));
    }
}

// One message for successive chunks of a layer: the ranges of cells between those that failed. Chunks leave used_ only
// after the message was posted.
void Sweep::give_back_used() {
    while (!used_.empty()) {
        const uint32_t layer = used_.front().at.layer;
        const auto end =
            std::find_if(used_.begin(), used_.end(), [&](const Chunk& chunk) { return chunk.at.layer != layer; });
        std::vector<uint32_t> borders;
        for (auto chunk = used_.begin(); chunk != end; chunk++) {
            std::sort(chunk->failed.begin(), chunk->failed.end(),
                      [](const auto& a, const auto& b) { return a.cell < b.cell; });
            borders.push_back(chunk->at.cell);
            for (const ring::Grant& failed : chunk->failed) {
                borders.push_back(failed.cell);
                borders.push_back(failed.cell + 1);
            }
            borders.push_back(chunk->at.cell + chunk->cell_count);
        }
        session_.release(layer, ring::RANGES, borders);
        used_.erase(used_.begin(), end);
    }
}

void Sweep::give_back_streamed() {
    finish_chunks_in_use();
    while (!chunks_.empty()) {
        while (chunks_.front().unanswered > 0) take_answers(true);  // only what was granted may be given back
        finish_first();
    }
    give_back_used();
    ahead_ = next_;
}

void Sweep::leave() {
    next_.layer = NO_LAYER;
    layer_ended_ = false;
}

void Sweep::idle() {
    keep_at_most(0);
    refused_at_ = UINT32_MAX;
    next_ = ahead_ = {};
    layer_ended_ = false;
}

}  // namespace flashclient
