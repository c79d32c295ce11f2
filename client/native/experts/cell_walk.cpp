#include "experts/cell_walk.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace flashclient {
namespace {

constexpr size_t PARTS = 4;  // of what may be leased: one part is computed while the others are here or on their way

}  // namespace

void CellWalk::begin(uint32_t layer, std::vector<uint32_t> cells, bool far) {
    clear();
    layer_ = layer;
    cells_ = std::move(cells);
    states_.assign(cells_.size(), State::wanted);
    addresses_.assign(cells_.size(), 0);
    next_ = 0;
    wanted_ = cells_.size();
    const uint32_t limit = source_.lease_limit();  // less than the share while weightd empties a segment
    limit_ = std::max(1U, far ? limit : std::min(limit, source_.share_slots()));
    unfinished_ = true;
    ask(true);
}

void CellWalk::done(size_t first, size_t count) {
    for (size_t i = first; i < first + count; i++) {
        states_[i] = State::done;
        done_.push_back(cells_[i]);
    }
    if (wanted_ > 0 && limit_ + done_.size() >= asked_ + held_ + part()) ask(false);
}

size_t CellWalk::part() const { return wanted_ == 0 ? cells_.size() : std::max<size_t>(1, limit_ / PARTS); }

// Asks for as many of the next wanted cells as may be leased, and gives back those that are done.
void CellWalk::ask(bool begins) {
    const std::vector<uint32_t> release = take_done();
    const size_t room = limit_ - std::min(limit_, asked_ + held_);
    std::vector<uint32_t> acquire;
    std::vector<size_t> indices;
    for (; next_ < cells_.size() && acquire.size() < room; next_++) {
        if (states_[next_] != State::wanted) continue;
        acquire.push_back(cells_[next_]);
        indices.push_back(next_);
    }
    if (begins) {
        source_.exchange(layer_, acquire, release);
    } else if (!acquire.empty() || !release.empty()) {
        source_.extend(acquire, release);
    }
    for (const size_t index : indices) states_[index] = State::asked;
    wanted_ -= indices.size();
    asked_ += indices.size();
}

std::vector<uint32_t> CellWalk::take_done() {
    held_ -= done_.size();
    return std::exchange(done_, {});
}

void CellWalk::wait() {
    if (refused_) hold_less();
    if (asked_ == 0) ask(false);
    if (asked_ == 0) throw std::logic_error("no cell of the walk is on its way");
    take(source_.arrived());
}

void CellWalk::take(const std::vector<Arrival>& arrivals) {
    if (arrivals.empty()) throw std::logic_error("a source lost cells that it was asked for");
    for (const auto& [cell, address] : arrivals) {
        const auto index = static_cast<size_t>(std::lower_bound(cells_.begin(), cells_.end(), cell) - cells_.begin());
        if (index == cells_.size() || cells_[index] != cell || states_[index] != State::asked) {
            throw std::logic_error("a source returned a cell that it was not asked for");
        }
        asked_--;
        if (address != 0) {
            states_[index] = State::here;
            addresses_[index] = address;
            held_++;
        } else {
            states_[index] = State::wanted;
            wanted_++;
            next_ = std::min(next_, index);
            refused_ = true;
        }
    }
}

// After a refusal only the share is certain, and a step needs the first cells first. So what exceeds the share, or is
// the last of it, is given back from the end, and the first that is wanted is asked for next.
void CellWalk::hold_less() {
    const size_t share = source_.share_slots();
    limit_ = std::max<size_t>(1, std::min<size_t>(limit_, share));
    while (asked_ > 0) take(source_.arrived());
    refused_ = false;
    std::vector<uint32_t> release = take_done();
    for (size_t i = cells_.size(); i > 0 && held_ >= limit_; i--) {
        if (states_[i - 1] != State::here) continue;
        states_[i - 1] = State::wanted;
        addresses_[i - 1] = 0;
        release.push_back(cells_[i - 1]);
        held_--;
        wanted_++;
        next_ = std::min(next_, i - 1);
    }
    if (!release.empty()) source_.extend({}, release);
}

void CellWalk::end() {
    const std::vector<uint32_t> release = take_done();
    if (!release.empty()) source_.extend({}, release);
    unfinished_ = false;
}

void CellWalk::clear() {
    if (!unfinished_) return;
    source_.cancel();
    std::vector<uint32_t> release = take_done();
    for (size_t i = 0; i < cells_.size(); i++) {
        if (states_[i] == State::here) release.push_back(cells_[i]);
    }
    const uint32_t layer = layer_;
    forget();
    unfinished_ = true;
    if (!release.empty()) source_.exchange(layer, {}, release);
    unfinished_ = false;
}

void CellWalk::forget() {
    cells_.clear();
    states_.clear();
    addresses_.clear();
    done_.clear();
    next_ = wanted_ = asked_ = held_ = 0;
    refused_ = unfinished_ = false;
}

}  // namespace flashclient
