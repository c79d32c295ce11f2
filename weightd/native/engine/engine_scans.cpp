// Several scans of one model read everything once only if they go together: what the laggard lacks is read first.
//
// A scan goes through all cells, round and round, and finds of what others have read before it only what lingers
// (replacement.h). So what those lack who are further ahead is put off until the laggard gets there. They are not
// slower for it in the end: together, each of them has the whole device.
//
// The scans of a model wait for a second at most, all together, and then for an eighth of the time: some are slower
// than others for good. Nobody waits for one that has got what it asked for and is silent for half a second.
#include <algorithm>

#include "engine/engine.h"

namespace weightd {
namespace {

constexpr size_t RUN_MIN = 16;  // cells, if no less fill a request; what predictors foretell is scattered
constexpr std::chrono::milliseconds RESTS_AFTER{500};  // with all that it asked for
constexpr uint32_t PATIENCE_DIVISOR = 8;               // of the time: what they wait later
constexpr uint32_t TOGETHER_DIVISOR = 2;               // of what lingers: nobody is far behind who is so near

bool is_run(std::span<const uint32_t> cells) {
    const auto jumps = [](uint32_t cell, uint32_t next) { return next != cell + 1; };
    return std::adjacent_find(cells.begin(), cells.end(), jumps) == cells.end();
}

}  // namespace

// A short run says nothing: the last of a layer is one, and predictors may foretell some neighbours alone.
void Engine::note_scan(Model& state, Session& session, uint32_t layer, std::span<const uint32_t> cells) {
    const size_t request_cells = std::max<size_t>(2, READ_BYTES_MAX / state.spec.cell_bytes);
    if (!is_run(cells)) {
        set_scans(state, session, false);
    } else if (cells.size() >= std::min(RUN_MIN, request_cells)) {
        set_scans(state, session, true);
    }
    if (!session.scans || cells.empty()) return;
    session.scan = {state.spec.layers[layer].first_cell + cells.back(), now_};
}

void Engine::set_scans(Model& state, Session& session, bool scans) {
    if (session.scans == scans) return;
    session.scans = scans;
    state.scans += scans ? 1 : -1;
    state.pool->retain_probationary(state.scans > 1);
    if (scans) return;
    for (const Model::Deferred& wanted : state.deferred) {
        if (wanted.session == session.id) wanted.missing.place.slot().deferred = false;
    }
}

// The scan that has the longest way behind it without another.
Engine::Laggard Engine::laggard(const Model& state) const {
    std::vector<std::pair<uint32_t, uint32_t>> scans;  // cell, session
    for (const auto& [id, session] : sessions_) {
        if (models_[session->model].get() != &state || !session->scans) continue;
        const bool rests = session->unanswered == 0 && now_ - session->scan.awake_at >= RESTS_AFTER;
        if (!rests) scans.emplace_back(session->scan.cell, id);
    }
    if (scans.empty()) return {};
    std::sort(scans.begin(), scans.end());
    const uint32_t count = state.spec.cell_count();
    uint32_t longest = scans.front().first + count - scans.back().first;
    auto found = scans.front();
    for (size_t i = 1; i < scans.size(); i++) {
        if (scans[i].first - scans[i - 1].first <= longest) continue;
        longest = scans[i].first - scans[i - 1].first;
        found = scans[i];
    }
    return {found.second, found.first, count - longest};
}

bool Engine::is_ahead(const Model& state, const Laggard& last, const Model::Deferred& wanted) {
    const uint32_t count = state.spec.cell_count();
    const uint32_t cells = (wanted.missing.cell + count - last.cell) % count;
    const bool near = cells <= state.pool->retained_max() / TOGETHER_DIVISOR;
    return wanted.session != last.session && !near && cells <= last.to_first;  // beyond, it is behind the laggard
}

bool Engine::has_patience(Model& state) const {
    Model::Patience& patience = state.patience;
    const Clock::duration passed = now_ - patience.noted_at;
    const Clock::duration left = patience.left + (patience.used ? -passed : passed / PATIENCE_DIVISOR);
    patience = {std::clamp<Clock::duration>(left, -SCANS_WAIT_MAX, SCANS_WAIT_MAX), now_};
    return patience.left > Clock::duration{0};
}

void Engine::choose_for_scans(Model& state) {
    const Laggard last = has_patience(state) ? laggard(state) : Laggard{};
    std::erase_if(state.deferred, [&](const Model::Deferred& wanted) {
        Slot& slot = wanted.missing.place.slot();
        if (slot.deferred && is_ahead(state, last, wanted)) return false;
        slot.deferred = false;
        state.missing.push_back(wanted.missing);
        return true;
    });
    state.patience.used = !state.deferred.empty();
}

bool Engine::defers_reads() const {
    return std::any_of(models_.begin(), models_.end(), [](const auto& state) { return !state->deferred.empty(); });
}

}  // namespace weightd
