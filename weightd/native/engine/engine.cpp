#include "engine/engine.h"

#include <algorithm>
#include <cassert>
#include <utility>

namespace weightd {
namespace {

uint64_t segment_bytes_of(uint64_t dram_bytes) {
    return std::clamp<uint64_t>(dram_bytes / 16, 4096, SEGMENT_BYTES_MAX);
}

}  // namespace

Engine::Engine(uint64_t dram_bytes, Reader& reader, Verifier& verifier, bool warms)
    : memory_(dram_bytes),
      reader_(reader),
      loader_(reader, verifier),
      warms_(warms),
      target_bytes_(dram_bytes),
      floor_bytes_(dram_bytes / 2) {
    segment_bytes_ = segment_bytes_of(dram_bytes);
}

void Engine::raise_dram(uint64_t dram_bytes, uint64_t floor_bytes) {
    if (dram_bytes <= memory_.limit_bytes()) return;
    target_bytes_ += dram_bytes - memory_.limit_bytes();
    memory_.raise_limit(dram_bytes);
    segment_bytes_ = segment_bytes_of(dram_bytes);
    set_floor(floor_bytes);
    update_limits();
}

Engine::~Engine() = default;

Session* Engine::find(uint32_t session) const {
    const auto found = sessions_.find(session);
    return found == sessions_.end() ? nullptr : found->second.get();
}

// ---- requests ----

bool Engine::names_cells(const Session& session, uint32_t layer, std::span<const uint32_t> cells) const {
    const std::vector<LayerSpec>& layers = models_[session.model]->spec.layers;
    if (layer >= layers.size()) return false;
    return std::all_of(cells.begin(), cells.end(), [&](uint32_t cell) { return cell < layers[layer].cells; });
}

bool Engine::within_share(const Session& session, uint32_t cell) const {
    const Hold& hold = session.holds[cell];
    const uint32_t count = uint32_t{hold.granted} + hold.pending;
    return count == 0 ? session.held_cells < session.share_slots : count < UINT16_MAX;
}

bool Engine::borrow(Model& state, Session& session, uint32_t cell, uint32_t tag) {
    Hold& hold = session.holds[cell];
    if (hold.granted + hold.pending > 0 || session.held_cells >= session.lease_limit) return false;
    if (!state.stalled.empty()) return false;
    hold.pending++;
    session.held_cells++;
    session.unanswered++;
    if (serve(state, session, cell, tag)) return true;
    hold.pending--;
    session.held_cells--;
    session.unanswered--;
    return false;
}

bool Engine::acquire(Session& session, uint32_t layer, std::span<const uint32_t> cells, uint32_t tag) {
    if (!names_cells(session, layer, cells)) return false;
    Model& state = *models_[session.model];
    note_scan(state, session, layer, cells);
    for (const uint32_t cell : cells) {
        const uint32_t number = state.spec.layers[layer].first_cell + cell;
        if (within_share(session, number)) {
            want(state, session, number, tag);
        } else if (!borrow(state, session, number, tag)) {
            session.failed(tag, cell, ring::REFUSED, 0);
        }
    }
    answered_.push_back(session.id);
    return true;
}

void Engine::want(Model& state, Session& session, uint32_t cell, uint32_t tag) {
    Hold& hold = session.holds[cell];
    if (hold.granted + hold.pending == 0) session.held_cells++;
    hold.pending++;
    session.unanswered++;
    const bool others_first = !state.stalled.empty() && !state.pool->find(cell);
    if (others_first || !serve(state, session, cell, tag)) state.stalled.push_back({session.id, cell, tag});
}

bool Engine::serve(Model& state, Session& session, uint32_t cell, uint32_t tag) {
    Place place = state.pool->find(cell);
    if (place) {
        state.counts.hits++;
        session.hits++;
        if (!session.scans) place.slot().deferred = false;
    } else {
        place = place_for(state, cell);
        if (!place) return false;
        state.counts.misses++;
        session.misses++;
        session.read_bytes += state.spec.cell_bytes;
        const Missing missing{cell, place, state.pool->address(place), session.id};
        if (state.scans > 1 && session.scans) {
            place.slot().deferred = true;
            state.deferred.push_back({session.id, missing});
        } else {
            state.missing.push_back(missing);
        }
    }
    state.pool->lease(place);
    state.pool->touched(cell);
    if (place.slot().reading) {
        wait_for(place, session.id, tag);
    } else {
        grant(state, session, cell, tag, place);
    }
    return true;
}

void Engine::wait_for(Place place, uint32_t session, uint32_t tag) {
    uint32_t index = free_waiter_;
    if (index == NO_WAITER) {
        index = static_cast<uint32_t>(waiters_.size());
        waiters_.emplace_back();
    } else {
        free_waiter_ = waiters_[index].next;
    }
    waiters_[index] = {session, tag, place.slot().first_waiter};
    place.slot().first_waiter = index;
}

void Engine::grant(Model& state, Session& session, uint32_t cell, uint32_t tag, Place place) {
    Hold& hold = session.holds[cell];
    hold.pending--;
    hold.granted++;
    session.unanswered--;
    session.scan.awake_at = now_;
    session.granted(tag, cell - state.spec.layers[state.spec.layer_of(cell)].first_cell, place, *state.pool);
}

void Engine::fail(Model& state, Session& session, uint32_t cell, uint32_t tag, const Loaded& loaded) {
    give_back(state, session, cell, &Hold::pending);
    session.unanswered--;
    const uint32_t local = cell - state.spec.layers[state.spec.layer_of(cell)].first_cell;
    if (loaded.error != 0) {
        session.failed(tag, local, ring::UNREADABLE, static_cast<uint32_t>(loaded.error));
    } else {
        session.failed(tag, local, ring::CORRUPT, static_cast<uint32_t>(loaded.wrong_bundle));
    }
}

void Engine::give_back(Model& state, Session& session, uint32_t cell, uint16_t Hold::*count) {
    Hold& hold = session.holds[cell];
    hold.*count -= 1;
    if (hold.granted + hold.pending == 0) session.held_cells--;
    state.pool->unlease(state.pool->find(cell));
}

bool Engine::release(Session& session, uint32_t layer, std::span<const uint32_t> cells) {
    if (!names_cells(session, layer, cells)) return false;
    Model& state = *models_[session.model];
    for (const uint32_t cell : cells) {
        const uint32_t number = state.spec.layers[layer].first_cell + cell;
        if (session.holds[number].granted == 0) return false;
        give_back(state, session, number, &Hold::granted);
    }
    if (session.held_cells == 0) set_scans(state, session, false);  // idle, for all we know
    serve_stalled(state);
    return true;
}

bool Engine::prefetch(Session& session, uint32_t layer, std::span<const uint32_t> cells) {
    if (!names_cells(session, layer, cells)) return false;
    Model& state = *models_[session.model];
    for (const uint32_t cell : cells) {
        const uint32_t number = state.spec.layers[layer].first_cell + cell;
        Place place = state.pool->find(number);
        if (place) place.slot().deferred = false;
        if (place || !state.stalled.empty()) continue;
        place = place_for(state, number);
        if (!place) return true;  // a hint only: there is no room
        state.counts.misses++;
        session.read_bytes += state.spec.cell_bytes;
        state.missing.push_back({number, place, state.pool->address(place), session.id});
    }
    return true;
}

void Engine::serve_stalled(Model& state) {
    while (!state.stalled.empty()) {
        const Model::Stalled next = state.stalled.front();
        Session* session = find(next.session);  // a closed one has left the queue
        assert(session != nullptr);
        if (!serve(state, *session, next.cell, next.tag)) return;
        state.stalled.pop_front();
        answered_.push_back(session->id);
    }
}

// ---- reads ----

bool Engine::step() {
    loaded_.clear();
    loader_.reap(loaded_);
    for (const Loaded& loaded : loaded_) take_in(loaded);
    bool any = !loaded_.empty() || !answered_.empty();
    for (const auto& state : models_) {
        if (state->pool == nullptr) continue;
        if (state->pool->draining() > 0) retire(*state);
        if (!state->stalled.empty()) serve_stalled(*state);
        if (!state->stalled.empty()) claim_slots(*state);
        any = submit(*state) || any;
    }
    for (const auto& state : models_) any = warm(*state) || any;
    any = shrink_to_target() || any;
    std::sort(answered_.begin(), answered_.end());
    answered_.erase(std::unique(answered_.begin(), answered_.end()), answered_.end());
    for (const uint32_t id : answered_) {
        if (Session* session = find(id)) session->flush();
    }
    answered_.clear();
    return any;
}

bool Engine::submit(Model& state) {
    if (!state.deferred.empty()) choose_for_scans(state);
    if (state.missing.empty()) return false;
    Session* first = find(state.missing.front().session);
    const uint64_t cells_bytes = state.missing.size() * uint64_t{state.spec.cell_bytes};
    const LoadCounts counts =
        loader_.load({state.index, &state.spec, state.file.get(), state.file_index}, std::move(state.missing));
    state.missing.clear();
    state.counts.reads += counts.reads;
    state.counts.read_bytes += counts.read_bytes;
    if (first != nullptr) first->read_bytes += counts.read_bytes - cells_bytes;  // gaps: mostly all are of one session
    return true;
}

void Engine::take_in(const Loaded& loaded) {
    Model& state = *models_[loaded.model];
    const bool good = loaded.error == 0 && loaded.wrong_bundle < 0;
    uint32_t waiter = std::exchange(loaded.place.slot().first_waiter, NO_WAITER);
    if (good) {
        state.pool->loaded(loaded.place);
    } else {
        (loaded.error != 0 ? state.counts.read_errors : state.counts.verify_errors)++;
    }
    while (waiter != NO_WAITER) {
        const Waiter now = waiters_[waiter];
        waiters_[waiter].next = free_waiter_;
        free_waiter_ = waiter;
        waiter = now.next;
        Session* session = find(now.session);
        if (session == nullptr) continue;  // its leases went when it closed
        answered_.push_back(session->id);
        if (good) {
            grant(state, *session, loaded.cell, now.tag, loaded.place);
        } else {
            fail(state, *session, loaded.cell, now.tag, loaded);
        }
    }
    if (!good) state.pool->drop(loaded.place);
}

// ---- sessions ----

Session& Engine::open(std::unique_ptr<Session> session) {
    Model& state = *models_[session->model];
    session->id = next_session_++;
    state.guaranteed_slots += session->share_slots;
    if (!session->borrows) state.fetching_slots += session->share_slots;
    Session& opened = *(sessions_[session->id] = std::move(session));
    update_limits();
    if (!state.warming.begun) start_warming(state);
    return opened;
}

void Engine::close(uint32_t id) {
    const auto found = sessions_.find(id);
    if (found == sessions_.end()) return;
    std::unique_ptr<Session> session = std::move(found->second);
    sessions_.erase(found);
    Model& state = *models_[session->model];
    set_scans(state, *session, false);  // what it put off goes on
    std::erase_if(state.stalled, [&](const Model::Stalled& stalled) {
        if (stalled.session != id) return false;
        session->holds[stalled.cell].pending--;  // it waited for a slot, so it leases none
        return true;
    });
    for (uint32_t cell = 0; cell < session->holds.size(); cell++) {
        Hold& hold = session->holds[cell];
        for (; hold.granted > 0; hold.granted--) state.pool->unlease(state.pool->find(cell));
        for (; hold.pending > 0; hold.pending--) state.pool->unlease(state.pool->find(cell));
    }
    state.guaranteed_slots -= session->share_slots;
    if (!session->borrows) state.fetching_slots -= session->share_slots;
    session.reset();
    update_limits();
    serve_stalled(state);
}

}  // namespace weightd
