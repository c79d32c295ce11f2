#include "experts/cell_walk.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace flashclient {
namespace {

constexpr size_t PARTS = 4;  // of what may be leased: one part is computed while the others are here or on their way
constexpr uint32_t SHARES_READ_ON = 8;  // a share is 8 MiB: what a device reads in tens of milliseconds

}  // namespace

void CellWalk::begin(uint32_t layer, std::vector<uint32_t> cells, bool far) {
    if (unfinished_) clear();
    forget_walk();
    unfinished_ = true;
    const uint32_t limit = source_.lease_limit();  // less than the share while weightd empties a segment
    keeps_ = lent_enough_ && limit >= cells_of_model_;
    if (!keeps_) give_kept_back();
    layer_ = layer;
    cells_ = std::move(cells);
    states_.assign(cells_.size(), State::wanted);
    addresses_.assign(cells_.size(), 0);
    next_ = 0;
    wanted_ = cells_.size();
    limit_ = std::max(1U, far ? limit : std::min(limit, source_.share_slots()));
    exchanged_ = false;
    if (keeps_) find_kept();
    if (wanted_ > 0) ask();
}

void CellWalk::done(size_t first, size_t count) {
    for (size_t i = first; i < first + count; i++) {
        states_[i] = State::done;
        if (keeps_) {
            keep(i);
        } else {
            done_.push_back(cells_[i]);
        }
    }
    if (wanted_ > 0 && limit_ + done_.size() >= asked_ + held_ + part()) ask();
}

size_t CellWalk::part() const { return wanted_ == 0 ? cells_.size() : std::max<size_t>(1, limit_ / PARTS); }

// Asks for as many of the next wanted cells as may be leased, and gives back those that are done.
void CellWalk::ask() {
    const std::vector<uint32_t> release = take_done();
    const size_t room = limit_ - std::min(limit_, asked_ + held_);
    std::vector<uint32_t> acquire;
    std::vector<size_t> indices;
    for (; next_ < cells_.size() && acquire.size() < room; next_++) {
        if (states_[next_] != State::wanted) continue;
        acquire.push_back(cells_[next_]);
        indices.push_back(next_);
    }
    exchange(acquire, release);
    for (const size_t index : indices) states_[index] = State::asked;
    wanted_ -= indices.size();
    asked_ += indices.size();
}

void CellWalk::exchange(const std::vector<uint32_t>& acquire, const std::vector<uint32_t>& release) {
    if (acquire.empty() && release.empty()) return;
    if (std::exchange(exchanged_, true)) {
        source_.extend(acquire, release);
    } else {
        source_.exchange(layer_, acquire, release);
    }
}

std::vector<uint32_t> CellWalk::take_done() {
    held_ -= done_.size();
    return std::exchange(done_, {});
}

void CellWalk::wait() {
    if (refused_) hold_less();
    if (asked_ == 0) ask();
    if (asked_ == 0) throw std::logic_error("no cell of the walk is on its way");
    take(source_.arrived());
}

// ---- cells that are kept ----

void CellWalk::find_kept() {
    const auto found = kept_.find(layer_);
    if (found == kept_.end()) return;
    const std::vector<uint64_t>& addresses = found->second;
    for (size_t i = 0; i < cells_.size(); i++) {
        if (cells_[i] >= addresses.size() || addresses[cells_[i]] == 0) continue;
        addresses_[i] = addresses[cells_[i]];
        states_[i] = State::here;
        wanted_--;
    }
}

void CellWalk::keep(size_t index) {
    std::vector<uint64_t>& addresses = kept_[layer_];
    const uint32_t cell = cells_[index];
    if (cell >= addresses.size()) addresses.resize(cell + size_t{1});
    if (addresses[cell] == 0) held_--;
    addresses[cell] = addresses_[index];
}

// Cells of the walk that are kept and not done are held like others from now on; all others are given back.
void CellWalk::count_kept() {
    const auto found = kept_.find(layer_);
    for (size_t i = 0; found != kept_.end() && i < cells_.size(); i++) {
        if (states_[i] != State::here || cells_[i] >= found->second.size()) continue;
        if (std::exchange(found->second[cells_[i]], 0) != 0) held_++;
    }
    keeps_ = false;
    give_kept_back();
}

// Cells leave kept_ before the source gets them, because the source answers for them even if it throws.
void CellWalk::give_kept_back() {
    while (!kept_.empty()) {
        const auto [layer, addresses] = std::move(*kept_.begin());
        kept_.erase(kept_.begin());
        std::vector<uint32_t> release;
        for (uint32_t cell = 0; cell < addresses.size(); cell++) {
            if (addresses[cell] != 0) release.push_back(cell);
        }
        exchanged_ = false;
        if (!release.empty()) source_.exchange(layer, {}, release);
    }
}

void CellWalk::prefetch(uint32_t layer, std::vector<CellRange> ranges) {
    if (const auto found = kept_.find(layer); found != kept_.end()) {
        const std::vector<uint64_t>& addresses = found->second;
        std::erase_if(ranges, [&](const CellRange& range) {
            const auto is_kept = [&](uint64_t address) { return address != 0; };
            return range.second <= addresses.size() &&
                   std::all_of(addresses.begin() + range.first, addresses.begin() + range.second, is_kept);
        });
    }
    if (!ranges.empty()) source_.prefetch(layer, ranges);
}

void CellWalk::read_on(uint32_t layer, uint32_t cells) {
    const uint32_t most = std::min(source_.lease_limit(), SHARES_READ_ON * source_.share_slots());
    if (most > 0) prefetch(layer, {{0, std::min(cells, most)}});
}

// ---- what arrives ----

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
    refused_ = lent_enough_ = false;
    count_kept();
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
    exchange({}, release);
}

void CellWalk::end() {
    exchange({}, take_done());
    unfinished_ = false;
}

void CellWalk::clear() {
    lent_enough_ = true;
    if (!unfinished_ && kept_.empty()) return;
    unfinished_ = true;
    source_.cancel();
    count_kept();
    std::vector<uint32_t> release = take_done();
    for (size_t i = 0; i < cells_.size(); i++) {
        if (states_[i] == State::here) release.push_back(cells_[i]);
    }
    forget_walk();
    unfinished_ = true;
    if (!release.empty()) source_.exchange(layer_, {}, release);
    unfinished_ = false;
}

void CellWalk::forget() {
    kept_.clear();
    lent_enough_ = true;
    forget_walk();
}

void CellWalk::forget_walk() {
    cells_.clear();
    states_.clear();
    addresses_.clear();
    done_.clear();
    next_ = wanted_ = asked_ = held_ = 0;
    refused_ = exchanged_ = unfinished_ = false;
}

}  // namespace flashclient
