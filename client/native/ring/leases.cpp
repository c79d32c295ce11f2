#include "ring/leases.h"

#include <algorithm>
#include <utility>

namespace flashclient {

Leases::Leases(Session& session, Sweep& sweep, uint32_t bundles_per_cell, uint32_t cell_bytes)
    : session_(session), sweep_(sweep), bundles_per_cell_(bundles_per_cell), cell_bytes_(cell_bytes) {}

uint32_t Leases::lease_limit() {
    const auto use = session_.use();
    return session_.lease_limit();
}

void Leases::exchange(uint32_t layer, const std::vector<uint32_t>& acquire, const std::vector<uint32_t>& release) {
    const auto use = session_.use();
    sweep_.idle();
    settle();
    layer_ = layer;
    if (acquire.empty() || acquire.size() + release.size() > ring::WORDS) {
        session_.release(layer, ring::CELLS, release);
        waiting_.assign(acquire.rbegin(), acquire.rend());
        return ask_more();
    }
    unanswered_ += static_cast<uint32_t>(acquire.size());
    session_.exchange(layer, acquire, release, 0);
}

// As many as the ring has room for grants.
void Leases::ask_more() {
    const size_t count = std::min<size_t>(waiting_.size(), ring::GRANTS - unanswered_);
    if (count == 0) return;
    const std::vector<uint32_t> part(waiting_.rbegin(), waiting_.rbegin() + static_cast<ptrdiff_t>(count));
    waiting_.resize(waiting_.size() - count);
    unanswered_ += static_cast<uint32_t>(count);
    session_.acquire(layer_, ring::CELLS, part, 0);
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
    if (!granted.empty()) session_.release(layer_, ring::CELLS, granted);
    failed_.reset();
}

void Leases::forget() {
    unanswered_ = 0;
    waiting_.clear();
    arrived_.clear();
    failed_.reset();
}

}  // namespace flashclient
