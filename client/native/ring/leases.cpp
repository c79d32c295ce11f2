#include "ring/leases.h"

#include <algorithm>
#include <utility>

namespace flashclient {

Leases::Leases(Session& session, Sweep& sweep, uint32_t bundles_per_cell, uint32_t cell_bytes)
    : session_(session), sweep_(sweep), bundles_per_cell_(bundles_per_cell), cell_bytes_(cell_bytes) {}

uint32_t Leases::share_slots() {
    const auto use = session_.use();
    return session_.share_slots();
}

uint32_t Leases::lease_limit() {
    const auto use = session_.use();
    return session_.lease_limit();
}

void Leases::exchange(uint32_t layer, const std::vector<uint32_t>& acquire, const std::vector<uint32_t>& release) {
    const auto use = session_.use();
    try {
        sweep_.idle();
        settle();
    } catch (const NoAnswer&) {
        owed_.emplace_back(layer, release);
        throw;
    }
    layer_ = layer;
    send(acquire, release);
}

void Leases::extend(const std::vector<uint32_t>& acquire, const std::vector<uint32_t>& release) {
    const auto use = session_.use();
    send(acquire, release);
}

void Leases::prefetch(uint32_t layer, const std::vector<CellRange>& ranges) {
    const auto use = session_.use();
    std::vector<uint32_t> words;
    words.reserve(2 * ranges.size());
    for (const auto& [begin, end] : ranges) words.insert(words.end(), {begin, end});
    session_.prefetch(layer, words);
}

void Leases::send(const std::vector<uint32_t>& acquire, const std::vector<uint32_t>& release) {
    const size_t words = acquire.size() + release.size();
    if (acquire.empty() || words > ring::WORDS || !waiting_.empty() || unanswered_ + acquire.size() > ring::GRANTS) {
        give_back(layer_, release);
        waiting_.insert(waiting_.begin(), acquire.rbegin(), acquire.rend());
        ask_more();
        return;
    }
    try {
        session_.exchange(layer_, acquire, release, 0);
    } catch (const NoAnswer&) {
        owed_.emplace_back(layer_, release);
        throw;
    }
    unanswered_ += static_cast<uint32_t>(acquire.size());
}

// In requests of one message each: after NoAnswer it is known which were posted. The other cells stay owed.
void Leases::give_back(uint32_t layer, std::span<const uint32_t> cells) {
    try {
        while (!cells.empty()) {
            const size_t count = std::min<size_t>(cells.size(), ring::WORDS);
            session_.release(layer, ring::CELLS, cells.first(count));
            cells = cells.subspan(count);
        }
    } catch (const NoAnswer&) {
        owed_.emplace_back(layer, std::vector<uint32_t>(cells.begin(), cells.end()));
        throw;
    }
}

// Asks for as many cells as the ring has room for grants. Only cells whose request was posted count as unanswered.
void Leases::ask_more() {
    while (!waiting_.empty() && unanswered_ < ring::GRANTS) {
        const size_t count = std::min<size_t>({waiting_.size(), ring::GRANTS - unanswered_, ring::WORDS});
        const std::vector<uint32_t> part(waiting_.rbegin(), waiting_.rbegin() + static_cast<ptrdiff_t>(count));
        session_.acquire(layer_, ring::CELLS, part, 0);
        unanswered_ += static_cast<uint32_t>(count);
        waiting_.resize(waiting_.size() - count);
    }
}

void Leases::take() {
    grants_.clear();
    session_.take_grants(grants_, true);
    for (const ring::Grant& grant : grants_) {
        unanswered_--;
        switch (Session::status(grant)) {
            case ring::GRANTED:
                arrived_.emplace_back(grant.cell, reinterpret_cast<uint64_t>(session_.address(grant, cell_bytes_)));
                break;
            case ring::REFUSED:
                arrived_.emplace_back(grant.cell, 0);
                break;
            default:
                failed_ = grant;
        }
    }
    ask_more();
}

std::vector<Arrival> Leases::arrived() {
    const auto use = session_.use();
    while (arrived_.empty() && (unanswered_ > 0 || failed_)) {
        if (failed_) raise_corrupt(layer_, *failed_, bundles_per_cell_);
        take();
    }
    return std::exchange(arrived_, {});
}

void Leases::cancel() {
    const auto use = session_.use();
    settle();
}

// Waits for cells that are on their way, because only granted cells may be given back.
void Leases::settle() {
    waiting_.clear();
    while (unanswered_ > 0) take();
    std::vector<uint32_t> granted;
    for (const auto& [cell, address] : std::exchange(arrived_, {})) {
        if (address != 0) granted.push_back(cell);
    }
    give_back(layer_, granted);
    while (!owed_.empty()) {
        const auto [layer, cells] = std::move(owed_.back());
        owed_.pop_back();
        give_back(layer, cells);
    }
    failed_.reset();
}

void Leases::forget() {
    const auto use = session_.use();
    unanswered_ = 0;
    waiting_.clear();
    arrived_.clear();
    owed_.clear();
    failed_.reset();
}

}  // namespace flashclient
