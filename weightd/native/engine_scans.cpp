// Several scans of one model read everything once only if they go together: what the hindmost lacks is read first.
//
// A scan goes through all cells, round and round, and finds of what others have read before it only what lingers
// (replacement.h). So what those lack who are further ahead is put off until the hindmost gets there. They are not
// slower for it in the end: together, each of them has the whole device.
//
// A scan waits for a second at most, and then for an eighth of the time: some are slower than others for good. Nobody
// waits for one that asks for nothing.
#include <algorithm>

#include "engine.h"

namespace weightd {
namespace {

constexpr size_t RUN_MIN = 16;  // cells, if no less fill a request; what predictors foretell is scattered
constexpr std::chrono::milliseconds RESTS_AFTER{500};  // without asking for anything
constexpr uint32_t PATIENCE_DIVISOR = 8;               // of the time

bool is_run(std::span<const uint32_t> cells) {
    const auto jumps = [](uint32_t cell, uint32_t next) { return next != cell + 1; };
    return std::adjacent_find(cells.begin(), cells.end(), jumps) == cells.end();
}

}  // namespace

// A short run says nothing: the last of a layer is one, and predictors may foretell some neighbours alone.
void Engine::note_scan(ModelState& state, Session& session, uint32_t layer, std::span<const uint32_t> cells) {
    const size_t request_cells = std::max<size_t>(2, READ_BYTES_MAX / state.spec.cell_bytes);
    if (!is_run(cells)) {
        set_scans(state, session, false);
    } else if (cells.size() >= std::min(RUN_MIN, request_cells)) {
        set_scans(state, session, true);
    }
    if (!session.scans || cells.empty()) return;
    session.scan.cell = state.spec.layers[layer].first_cell + cells.back();
    session.scan.asked_at = now_;
}

void Engine::set_scans(ModelState& state, Session& session, bool scans) {
    if (session.scans == scans) return;
    session.scans = scans;
    state.scans += scans ? 1 : -1;
    state.pool->linger(state.scans > 1);
}

// The scan that has the longest way behind it without another.
Engine::Hindmost Engine::hindmost(const ModelState& state) const {
    std::vector<uint32_t> cells;
    for (const auto& [id, session] : sessions_) {
        if (models_[session->model].get() != &state || !session->scans) continue;
        if (session->scan.waits || now_ - session->scan.asked_at < RESTS_AFTER) cells.push_back(session->scan.cell);
    }
    if (cells.empty()) return {};
    std::sort(cells.begin(), cells.end());
    const uint32_t count = state.spec.cell_count();
    uint32_t longest = cells.front() + count - cells.back();
    uint32_t found = cells.front();
    for (size_t i = 1; i < cells.size(); i++) {
        if (cells[i] - cells[i - 1] <= longest) continue;
        longest = cells[i] - cells[i - 1];
        found = cells[i];
    }
    return {found, count - longest};
}

bool Engine::is_ahead(const ModelState& state, Hindmost last, const ModelState::PutOff& one) const {
    const uint32_t count = state.spec.cell_count();
    const uint32_t cells = (one.missing.cell + count - last.cell) % count;
    return cells > state.pool->linger_count() / 2 && cells <= last.to_first;  // beyond, it is behind the hindmost
}

void Engine::note_patience(const ModelState& state) {
    for (const auto& [id, session] : sessions_) {
        if (models_[session->model].get() != &state) continue;
        Scan& scan = session->scan;
        const Clock::duration passed = now_ - scan.noted_at;
        scan.patience = scan.waits ? scan.patience - passed
                                   : std::min<Clock::duration>(PATIENCE_MAX, scan.patience + passed / PATIENCE_DIVISOR);
        scan.noted_at = now_;
        scan.waits = false;
    }
}

void Engine::choose_for_scans(ModelState& state) {
    const Hindmost last = hindmost(state);
    note_patience(state);
    std::erase_if(state.put_off, [&](const ModelState::PutOff& one) {
        Session* session = find(one.session);
        if (session != nullptr && session->scan.patience > Clock::duration{0} && is_ahead(state, last, one)) {
            session->scan.waits = true;
            return false;
        }
        state.missing.push_back(one.missing);
        return true;
    });
}

bool Engine::puts_off() const {
    return std::any_of(models_.begin(), models_.end(), [](const auto& state) { return !state->put_off.empty(); });
}

// Somebody else waits for it, too, who does not scan.
void Engine::hurry(ModelState& state, uint32_t cell) {
    std::erase_if(state.put_off, [&](const ModelState::PutOff& one) {
        if (one.missing.cell != cell) return false;
        state.missing.push_back(one.missing);
        return true;
    });
}

}  // namespace weightd
