#include "engine/engine.h"

#include <algorithm>
#include <cassert>
#include <utility>

namespace weightd {

Engine::Engine(uint64_t dram_bytes, Reader& reader, Verifier& verifier, bool warms)
    : reader_(reader), loader_(reader, verifier), warms_(warms), models_(dram_bytes, reader) {}

// ---- sessions ----

Session& Engine::open(std::unique_ptr<Session> session) {
    Session& opened = models_.sessions().add(std::move(session));
    models_.sessions().update_limits();
    for (auto index = static_cast<uint32_t>(queues_.size()); index <= opened.model; index++) {
        queues_.push_back(std::make_unique<Queues>(models_.at(index), warms_));
    }
    queues_[opened.model]->warming.begin();
    return opened;
}

void Engine::close(uint32_t id) {
    std::unique_ptr<Session> session = models_.sessions().remove(id);
    if (session == nullptr) return;
    Queues& queues = *queues_[session->model];
    Pool& pool = *queues.model.pool;
    queues.scans.end(*session);
    queues.stalled.withdraw(*session);
    queues.prefetches.forget(*session);
    for (uint32_t cell = 0; cell < session->cell_count(); cell++) {
        for (uint32_t leases = session->leases(cell); leases > 0; leases--) pool.unlease(pool.find(cell));
    }
    session.reset();
    models_.sessions().update_limits();
    serve_stalled(queues);
}

// ---- requests ----

bool Engine::names_cells(const Session& session, uint32_t layer, std::span<const uint32_t> cells) const {
    const std::vector<LayerSpec>& layers = queues_[session.model]->model.spec.layers;
    if (layer >= layers.size()) return false;
    return std::all_of(cells.begin(), cells.end(), [&](uint32_t cell) { return cell < layers[layer].cells; });
}

bool Engine::acquire(Session& session, uint32_t layer, std::span<const uint32_t> cells, uint32_t tag) {
    if (!names_cells(session, layer, cells)) return false;
    Queues& queues = *queues_[session.model];
    if (queues.picks_experts) {
        begin_step(queues, session, layer);
        lease(queues, session, layer, present_first(queues.model, layer, cells), tag);
    } else {
        queues.scans.note(session, layer, cells, now_);
        lease(queues, session, layer, cells, tag);
    }
    answered_.push_back(session.id);
    return true;
}

void Engine::begin_step(Queues& queues, Session& session, uint32_t layer) {
    if (session.step_layer == layer) return;
    if (session.prefetch_layer == layer) queues.prefetches.forget(session);
    session.step_layer = layer;
    queues.model.pool->step_begins(layer);
}

// A missing expert must not be read in the place of one that the same request names.
std::vector<uint32_t> Engine::present_first(const Model& model, uint32_t layer, std::span<const uint32_t> cells) {
    const uint32_t first_cell = model.spec.layers[layer].first_cell;
    std::vector<uint32_t> ordered(cells.begin(), cells.end());
    std::stable_partition(ordered.begin(), ordered.end(),
                          [&](uint32_t cell) { return static_cast<bool>(model.pool->find(first_cell + cell)); });
    return ordered;
}

void Engine::lease(Queues& queues, Session& session, uint32_t layer, std::span<const uint32_t> cells, uint32_t tag) {
    const uint32_t first_cell = queues.model.spec.layers[layer].first_cell;
    for (const uint32_t cell : cells) {
        const uint32_t number = first_cell + cell;
        if (session.is_within_share(number)) {
            want(queues, session, number, tag);
        } else if (!borrow(queues, session, number, tag)) {
            session.failed(tag, cell, ring::REFUSED, 0);
        }
    }
}

void Engine::want(Queues& queues, Session& session, uint32_t cell, uint32_t tag) {
    session.ask(cell);
    const bool others_first = !queues.stalled.empty() && !queues.model.pool->find(cell);
    if (others_first || !serve(queues, session, cell, tag)) queues.stalled.push({session.id, cell, tag});
}

bool Engine::borrow(Queues& queues, Session& session, uint32_t cell, uint32_t tag) {
    if (session.holds(cell) || session.held_cells >= session.lease_limit || !queues.stalled.empty()) return false;
    session.ask(cell);
    if (serve(queues, session, cell, tag)) return true;
    session.withdraw(cell);
    return false;
}

bool Engine::serve(Queues& queues, Session& session, uint32_t cell, uint32_t tag) {
    Model& model = queues.model;
    Place place = model.pool->find(cell);
    if (place) {
        model.counts.hits++;
        session.hits++;
        if (place.slot().deferred && !queues.scans.scanning(session)) place.slot().deferred = false;
        if (std::exchange(place.slot().prefetched, false)) {
            model.counts.prefetched_used++;
            session.prefetched_used++;
        }
    } else {
        const std::optional<Missing> missing = place_missing(model, session, cell);
        if (!missing) return false;
        session.misses++;
        place = missing->place;
        if (queues.scans.defers(session)) {
            queues.scans.defer(*missing);
        } else {
            queues.missing.push_back(*missing);
        }
    }
    model.pool->lease(place);
    model.pool->touched(cell);
    if (place.slot().reading) {
        waiters_.add(place.slot(), session.id, tag);
    } else {
        grant(model, session, cell, tag, place);
    }
    return true;
}

std::optional<Missing> Engine::place_missing(Model& model, Session& session, uint32_t cell) {
    const Place place = models_.place_for(model, cell);
    if (!place) return std::nullopt;
    model.counts.misses++;
    session.read_bytes += model.spec.cell_bytes;
    return Missing{cell, place, model.pool->address(place), session.id};
}

bool Engine::release(Session& session, uint32_t layer, std::span<const uint32_t> cells) {
    if (!names_cells(session, layer, cells)) return false;
    Queues& queues = *queues_[session.model];
    Pool& pool = *queues.model.pool;
    const uint32_t first_cell = queues.model.spec.layers[layer].first_cell;
    for (const uint32_t cell : cells) {
        const uint32_t number = first_cell + cell;
        if (session.granted_leases(number) == 0) return false;
        session.give_back(number);
        pool.unlease(pool.find(number));
    }
    if (session.held_cells == 0) {  // it may be idle from now on
        queues.scans.end(session);
        session.step_layer = NO_LAYER;
    }
    serve_stalled(queues);
    return true;
}

bool Engine::prefetch(Session& session, uint32_t layer, std::span<const uint32_t> cells, uint32_t hint) {
    if (!names_cells(session, layer, cells)) return false;
    Queues& queues = *queues_[session.model];
    Pool& pool = *queues.model.pool;
    const uint32_t first_cell = queues.model.spec.layers[layer].first_cell;
    queues.prefetches.begin(session, layer, hint);
    for (const uint32_t cell : cells) {
        const uint32_t number = first_cell + cell;
        pool.awaited(number);
        if (const Place place = pool.find(number)) {
            place.slot().deferred = false;
        } else {
            queues.prefetches.add(session, number);
        }
    }
    return true;
}

void Engine::serve_stalled(Queues& queues) {
    while (!queues.stalled.empty()) {
        const StalledWant next = queues.stalled.front();
        Session* session = models_.sessions().find(next.session);
        assert(session != nullptr);
        if (!serve(queues, *session, next.cell, next.tag)) return;
        queues.stalled.pop();
        answered_.push_back(session->id);
    }
}

// ---- reads ----

bool Engine::step() {
    loaded_.clear();
    loader_.reap(loaded_);
    for (const Loaded& loaded : loaded_) take_in(loaded);
    bool any = !loaded_.empty() || !answered_.empty();
    models_.pin_populated();
    for (const auto& queues : queues_) {
        if (queues->model.pool == nullptr) continue;
        models_.retire_drained(queues->model);
        if (!queues->stalled.empty()) serve_stalled(*queues);
        if (!queues->stalled.empty()) models_.claim_slots(queues->model);
        any = submit(*queues) || any;
    }
    for (const auto& queues : queues_) any = read_ahead(*queues) || any;
    for (const auto& queues : queues_) any = warm(*queues) || any;
    any = models_.shrink_to_target() || any;
    flush_answered();
    return any;
}

bool Engine::submit(Queues& queues) {
    Model& model = queues.model;
    queues.scans.take_due(queues.missing, now_);
    if (queues.missing.empty()) return false;
    Session* first = models_.sessions().find(queues.missing.front().session);
    const uint64_t cells_bytes = queues.missing.size() * uint64_t{model.spec.cell_bytes};
    const Source source{model.index, &model.spec, model.file.get(), model.file_index};
    const LoadCounts counts = loader_.load(source, std::exchange(queues.missing, {}));
    model.counts.reads += counts.reads;
    model.counts.read_bytes += counts.read_bytes;
    // Gaps between cells count for one session, which asked for most of the cells as a rule.
    if (first != nullptr) first->read_bytes += counts.read_bytes - cells_bytes;
    return true;
}

// Reads what sessions may want soon. True when anything was read.
bool Engine::read_ahead(Queues& queues) {
    Model& model = queues.model;
    const uint64_t read_cells = std::max<uint64_t>(1, READ_BYTES_MAX / model.spec.cell_bytes);
    while (!queues.prefetches.empty() && queues.stalled.empty() &&
           loader_.reads() + queues.missing.size() / read_cells < PREFETCH_READS_MAX) {
        const uint32_t cell = queues.prefetches.front().cell;
        Session& session = *models_.sessions().find(queues.prefetches.front().session);
        queues.prefetches.pop(session);
        if (model.pool->find(cell)) continue;
        const Place place = models_.place_for(model, cell);
        if (!place) {  // there is no room, and this was only a hint
            queues.prefetches.forget(session);
            continue;
        }
        place.slot().prefetched = true;
        model.counts.prefetched++;
        session.prefetched++;
        session.read_bytes += model.spec.cell_bytes;
        queues.missing.push_back({cell, place, model.pool->address(place), session.id});
    }
    return submit(queues);
}

// True when there is more to do right now.
bool Engine::warm(Queues& queues) {
    if (!queues.warming.pending() || loader_.busy() || models_.openers_wait() || waiting()) return false;
    queues.warming.add_hot(models_, queues.missing);
    return submit(queues) || queues.warming.pending();
}

void Engine::take_in(const Loaded& loaded) {
    Model& model = models_.at(loaded.model);
    const bool good = loaded.error == 0 && loaded.wrong_bundle < 0;
    if (good) {
        model.pool->loaded(loaded.place);
    } else {
        (loaded.error != 0 ? model.counts.read_errors : model.counts.verify_errors)++;
    }
    waiters_.take_all(loaded.place.slot(), [&](uint32_t id, uint32_t tag) {
        Session* session = models_.sessions().find(id);
        if (session == nullptr) return;  // its leases ended when it closed
        answered_.push_back(id);
        if (good) {
            grant(model, *session, loaded.cell, tag, loaded.place);
        } else {
            fail(model, *session, loaded, tag);
        }
    });
    if (!good) model.pool->drop(loaded.place);
}

// ---- answers ----

void Engine::grant(const Model& model, Session& session, uint32_t cell, uint32_t tag, Place place) {
    session.grant(cell);
    session.active_at = now_;
    session.granted(tag, cell - model.spec.layers[model.spec.layer_of(cell)].first_cell, place, *model.pool);
}

void Engine::fail(const Model& model, Session& session, const Loaded& loaded, uint32_t tag) {
    session.withdraw(loaded.cell);
    model.pool->unlease(loaded.place);
    const uint32_t cell = loaded.cell - model.spec.layers[model.spec.layer_of(loaded.cell)].first_cell;
    if (loaded.error != 0) {
        session.failed(tag, cell, ring::UNREADABLE, static_cast<uint32_t>(loaded.error));
    } else {
        session.failed(tag, cell, ring::CORRUPT, static_cast<uint32_t>(loaded.wrong_bundle));
    }
}

void Engine::flush_answered() {
    std::sort(answered_.begin(), answered_.end());
    answered_.erase(std::unique(answered_.begin(), answered_.end()), answered_.end());
    for (const uint32_t id : answered_) {
        if (Session* session = models_.sessions().find(id)) session->flush();
    }
    answered_.clear();
}

bool Engine::defers_reads() const {
    return std::any_of(queues_.begin(), queues_.end(), [](const auto& queues) { return queues->scans.deferred() > 0; });
}

bool Engine::waiting() const {
    return std::any_of(queues_.begin(), queues_.end(), [](const auto& queues) {
        const Pool* pool = queues->model.pool.get();
        return pool != nullptr && (!queues->stalled.empty() || pool->draining() > 0);
    });
}

bool Engine::blocks_others(const Session& session) const {
    const Queues& queues = *queues_[session.model];
    if (!queues.stalled.empty() && session.held_cells > session.lease_limit) return true;
    const std::vector<uint32_t> leased = queues.model.pool->leased_in_draining();
    return std::any_of(leased.begin(), leased.end(), [&](uint32_t cell) { return session.granted_leases(cell) > 0; });
}

}  // namespace weightd
