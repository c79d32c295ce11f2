#include "engine/scans.h"

#include <algorithm>
#include <utility>

namespace weightd {
namespace {

constexpr size_t RUN_MIN = 16;  // cells, unless fewer fill a request; cells that predictors choose are scattered
constexpr std::chrono::milliseconds RESTS_AFTER{500};  // of silence, if it has got all that it asked for
constexpr uint32_t PATIENCE_DIVISOR = 8;  // after SCANS_WAIT_MAX, reads may be deferred for this part of the time
constexpr uint32_t NEAR_DIVISOR = 2;      // a scan within this part of the retained cells is not far ahead

bool is_run(std::span<const uint32_t> cells) {
    const auto jumps = [](uint32_t cell, uint32_t next) { return next != cell + 1; };
    return std::adjacent_find(cells.begin(), cells.end(), jumps) == cells.end();
}

}  // namespace

// A short run decides nothing: the last run of a layer is short, and predictors may choose a few neighbours alone.
void Scans::note(Session& session, uint32_t layer, std::span<const uint32_t> cells, Clock::time_point now) {
    const size_t request_cells = std::max<size_t>(2, READ_BYTES_MAX / model_.spec.cell_bytes);
    if (!is_run(cells)) {
        end(session);
    } else if (cells.size() >= std::min(RUN_MIN, request_cells)) {
        start(session);
    }
    if (cells.empty()) return;
    session.active_at = now;
    for (Scan& scan : scans_) {
        if (scan.session == &session) scan.cell = model_.spec.layers[layer].first_cell + cells.back();
    }
}

bool Scans::scanning(const Session& session) const {
    return std::any_of(scans_.begin(), scans_.end(), [&](const Scan& scan) { return scan.session == &session; });
}

void Scans::start(Session& session) {
    if (scanning(session)) return;
    scans_.push_back({&session});
    model_.pool->retain_probationary(scans_.size() > 1);
}

void Scans::end(const Session& session) {
    if (std::erase_if(scans_, [&](const Scan& scan) { return scan.session == &session; }) == 0) return;
    model_.pool->retain_probationary(scans_.size() > 1);
    for (const Missing& wanted : deferred_) {
        if (wanted.session == session.id) wanted.place.slot().deferred = false;
    }
}

void Scans::defer(const Missing& missing) {
    missing.place.slot().deferred = true;
    deferred_.push_back(missing);
}

// The scan with the longest way behind it on which there is no other scan.
Scans::Laggard Scans::laggard(Clock::time_point now) const {
    std::vector<std::pair<uint32_t, uint32_t>> scans;  // cell, session
    for (const Scan& scan : scans_) {
        const bool rests = scan.session->unanswered == 0 && now - scan.session->active_at >= RESTS_AFTER;
        if (!rests) scans.emplace_back(scan.cell, scan.session->id);
    }
    if (scans.empty()) return {};
    std::sort(scans.begin(), scans.end());
    const uint32_t count = model_.spec.cell_count();
    uint32_t longest = scans.front().first + count - scans.back().first;
    auto found = scans.front();
    for (size_t i = 1; i < scans.size(); i++) {
        if (scans[i].first - scans[i - 1].first <= longest) continue;
        longest = scans[i].first - scans[i - 1].first;
        found = scans[i];
    }
    return {found.second, found.first, count - longest};
}

bool Scans::is_ahead(const Laggard& laggard, const Missing& wanted) const {
    const uint32_t count = model_.spec.cell_count();
    const uint32_t distance = (wanted.cell + count - laggard.cell) % count;
    const bool near = distance <= model_.pool->retained_max() / NEAR_DIVISOR;
    const bool behind = distance > laggard.first_distance;
    return wanted.session != laggard.session && !near && !behind;
}

bool Scans::has_patience(Clock::time_point now) {
    const Clock::duration passed = now - patience_.noted_at;
    const Clock::duration left = patience_.left + (patience_.used ? -passed : passed / PATIENCE_DIVISOR);
    patience_ = {std::clamp<Clock::duration>(left, -SCANS_WAIT_MAX, SCANS_WAIT_MAX), now};
    return patience_.left > Clock::duration{0};
}

void Scans::take_due(std::vector<Missing>& missing, Clock::time_point now) {
    if (deferred_.empty()) return;
    const Laggard last = has_patience(now) ? laggard(now) : Laggard{};
    std::erase_if(deferred_, [&](const Missing& wanted) {
        Slot& slot = wanted.place.slot();
        if (slot.deferred && is_ahead(last, wanted)) return false;
        slot.deferred = false;
        missing.push_back(wanted);
        return true;
    });
    patience_.used = !deferred_.empty();
}

}  // namespace weightd
