// Want, missing, read, place, answer: the daemon's data work, without threads, sockets or a clock of its own.
//
// The engine belongs to one thread. Invariants: every cell that a session asks for is answered once, by granted() or
// failed(). A granted cell stays in its slot until its last lease ends. Within its share a session waits for a slot,
// and gets it as soon as sessions above their limits give back. Above its share a session never waits: it gets a slot
// at once, and only while nobody waits, or it is refused. So no waiting session waits for another waiting session. The
// one exception: reads of scans may be deferred for a while (scans.h).
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "engine/loader.h"
#include "engine/prefetches.h"
#include "engine/scans.h"
#include "engine/stalled_wants.h"
#include "engine/waiters.h"
#include "engine/warming.h"
#include "memory/models.h"
#include "memory/session.h"

namespace weightd {

class Engine {
  public:
    // `warms`: whether a model's hot cells are read after its activation (warming.h).
    Engine(uint64_t dram_bytes, Reader& reader, Verifier& verifier, bool warms = true);

    // The models and their memory.
    Models& models() { return models_; }
    const Models& models() const { return models_; }
    Model& model(uint32_t index) { return models_.at(index); }
    const Scans& scans(uint32_t model) const { return queues_.at(model)->scans; }

    Session& open(std::unique_ptr<Session> session);  // of a model that its opener has activated
    void close(uint32_t session);

    // Requests of a session. Cells are numbered within `layer`. False: the session broke a rule and must be closed.
    bool acquire(Session& session, uint32_t layer, std::span<const uint32_t> cells, uint32_t tag);
    bool release(Session& session, uint32_t layer, std::span<const uint32_t> cells);
    bool prefetch(Session& session, uint32_t layer, std::span<const uint32_t> cells, uint32_t hint);

    // Takes in what was read, starts to read what is missing, and flushes the sessions that were answered.
    // True when anything happened.
    bool step();
    void set_time(Clock::time_point now) { now_ = now; }
    bool reading() const { return loader_.busy(); }
    bool defers_reads() const;  // step() must then be called again soon, even if nothing happens
    const DeviceUse& device_use(uint32_t model) const { return loader_.device_use(model); }
    ReadQueue read_queue() const { return reader_.queue(); }

    // Whether somebody cannot go on before others give back: a session that lacks a slot, or a model that needs memory.
    bool waiting() const;
    // Whether this session must give back: it is above its limit, or it leases cells of a draining segment.
    bool blocks_others(const Session& session) const;

  private:
    struct Queues {  // what the sessions of one model have asked for, and what of it is not read yet
        Queues(Model& model, bool warms)
            : model(model), picks_experts(model.spec.has_experts()), scans(model), warming(model, warms) {}
        Model& model;
        const bool picks_experts;  // no session scans, and the pool learns from steps (pool/expert_replacement.h)
        StalledWants stalled;
        Prefetches prefetches;
        std::vector<Missing> missing;  // have a place, and are read at the next submit()
        Scans scans;
        Warming warming;
    };

    bool names_cells(const Session& session, uint32_t layer, std::span<const uint32_t> cells) const;
    static void begin_step(Queues& queues, Session& session, uint32_t layer);
    static std::vector<uint32_t> present_first(const Model& model, uint32_t layer, std::span<const uint32_t> cells);
    void lease(Queues& queues, Session& session, uint32_t layer, std::span<const uint32_t> cells, uint32_t tag);
    void want(Queues& queues, Session& session, uint32_t cell, uint32_t tag);
    bool borrow(Queues& queues, Session& session, uint32_t cell, uint32_t tag);
    bool serve(Queues& queues, Session& session, uint32_t cell, uint32_t tag);
    std::optional<Missing> place_missing(Model& model, Session& session, uint32_t cell);
    void serve_stalled(Queues& queues);
    bool submit(Queues& queues);
    bool read_ahead(Queues& queues);
    bool warm(Queues& queues);
    void take_in(const Loaded& loaded);
    void grant(const Model& model, Session& session, uint32_t cell, uint32_t tag, Place place);
    void fail(const Model& model, Session& session, const Loaded& loaded, uint32_t tag);
    void flush_answered();

    Clock::time_point now_;
    Reader& reader_;
    Loader loader_;
    const bool warms_;
    Models models_;
    std::vector<std::unique_ptr<Queues>> queues_;  // by model, up to the last that was opened
    Waiters waiters_;
    std::vector<uint32_t> answered_;  // sessions to flush
    std::vector<Loaded> loaded_;
};

}  // namespace weightd
