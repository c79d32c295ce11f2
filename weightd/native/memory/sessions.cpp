#include "memory/sessions.h"

#include <algorithm>

#include "memory/model_cost.h"

namespace weightd {

Session& Sessions::add(std::unique_ptr<Session> session) {
    session->id = next_id_++;
    Shares& shares = shares_[session->model];
    shares.slots += session->share_slots;
    if (!session->borrows) shares.fetching_slots += session->share_slots;
    return *(sessions_[session->id] = std::move(session));
}

std::unique_ptr<Session> Sessions::remove(uint32_t session) {
    auto entry = sessions_.extract(session);
    if (entry.empty()) return nullptr;
    const Session& removed = *entry.mapped();
    Shares& shares = shares_[removed.model];
    shares.slots -= removed.share_slots;
    if (!removed.borrows) shares.fetching_slots -= removed.share_slots;
    return std::move(entry.mapped());
}

Session* Sessions::find(uint32_t session) const {
    const auto found = sessions_.find(session);
    return found == sessions_.end() ? nullptr : found->second.get();
}

std::vector<const Session*> Sessions::in_order() const {
    std::vector<const Session*> ordered;
    for (const auto& [id, session] : sessions_) ordered.push_back(session.get());
    std::sort(ordered.begin(), ordered.end(), [](const Session* a, const Session* b) { return a->id < b->id; });
    return ordered;
}

Sessions::Shares Sessions::shares_of(const Model& model) const {
    const auto found = shares_.find(model.index);
    return found == shares_.end() ? Shares{} : found->second;
}

uint64_t Sessions::share_slots(const Model& model) const { return shares_of(model).slots; }

uint64_t Sessions::owed_slots(const Model& model) const {
    uint64_t slots = 0;
    for (const auto& [id, session] : sessions_) {
        if (session->model != model.index) continue;
        slots += std::max(session->share_slots, std::min(session->held_cells, session->lease_limit));
    }
    return slots;
}

// What is neither part of a share nor kept for fetches and reads in flight.
uint64_t Sessions::lendable_bytes() const {
    const uint64_t fixed_bytes = memory_.used_bytes(Account::resident) + memory_.used_bytes(Account::tables);
    const uint64_t pool_bytes = pressure_.target_bytes() - std::min(pressure_.target_bytes(), fixed_bytes);
    uint64_t kept_bytes = 0;
    uint32_t models_in_use = 0;
    for (const auto& model : models_) {
        if (model->pool == nullptr || model->users == 0) continue;
        const uint64_t cell_bytes = model->spec.cell_bytes;
        const uint64_t never_slots =
            std::clamp<uint64_t>(pool_bytes / cell_bytes / LENT_NEVER_DIVISOR, SHARE_SLOTS_MIN, FETCH_SLOTS_MAX);
        const Shares shares = shares_of(*model);
        const uint64_t borrowers_slots = shares.slots - shares.fetching_slots;
        kept_bytes += (borrowers_slots + std::max(shares.fetching_slots, never_slots)) * cell_bytes;
        if (models_in_use++ > 0) kept_bytes += unused_bytes_max(model->spec, memory_);
    }
    return pool_bytes - std::min(pool_bytes, kept_bytes);
}

// The parts are equal, so that no session can hold all that is lent; what a session cannot use is left to the others.
// An idle session loses nothing by what others lease: a cell that nobody leases stays in the pool as long as a leased
// one.
void Sessions::update_limits() {
    struct Borrower {
        Session* session;
        uint64_t cell_bytes;
        uint64_t usable_bytes;  // above its share
    };
    std::vector<Borrower> borrowers;
    for (const auto& [id, session] : sessions_) {
        if (!session->borrows) continue;
        const ModelSpec& spec = models_[session->model]->spec;
        const uint64_t cells = std::max<uint64_t>(session->share_slots, spec.cell_count());
        const uint64_t usable_bytes = (cells - session->share_slots) * spec.cell_bytes;
        borrowers.push_back({session.get(), spec.cell_bytes,
                             spec.is_table ? std::min(usable_bytes, TABLE_LENT_BYTES_MAX) : usable_bytes});
    }
    std::stable_sort(borrowers.begin(), borrowers.end(),
                     [](const Borrower& a, const Borrower& b) { return a.usable_bytes < b.usable_bytes; });
    uint64_t left_bytes = lendable_bytes();
    for (size_t i = 0; i < borrowers.size(); i++) {
        const auto& [session, cell_bytes, usable_bytes] = borrowers[i];
        const uint64_t part_bytes = std::min(usable_bytes, left_bytes / (borrowers.size() - i));
        left_bytes -= part_bytes;
        session->lease_limit = session->share_slots + static_cast<uint32_t>(part_bytes / cell_bytes);
        // A draining segment, whose cells may be leased by any session, is empty sooner when all windows shrink.
        const bool draining = models_[session->model]->pool->draining() > 0;
        session->limit_changed(draining ? SHARE_SLOTS_MIN : session->lease_limit);
    }
}

void Sessions::tell_segment_gone(const Model& model, uint32_t segment) const {
    for (const auto& [id, session] : sessions_) {
        if (session->model == model.index) session->segment_gone(segment);
    }
}

}  // namespace weightd
