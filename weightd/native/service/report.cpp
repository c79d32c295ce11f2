#include "service/report.h"

#include "service/engine_thread.h"

namespace weightd {
namespace {

double seconds_since(Clock::time_point then) { return std::chrono::duration<double>(Clock::now() - then).count(); }

SessionReport report_of(const RingSession& session, const ModelSpec& spec) {
    return {session.id,          spec.name,           session.peer().pid, session.peer().uid,
            session.share_slots, session.lease_limit, session.held_cells, seconds_since(session.opened_at()),
            session.requests(),  session.hits,        session.misses,     session.read_bytes};
}

}  // namespace

ModelReport report_of(const Engine& engine, const Model& state) {
    ModelReport report;
    report.name = state.spec.name;
    report.sessions = state.sessions;
    report.share_slots = engine.models().sessions().share_slots(state);
    report.counts = state.counts;
    report.counts.evictions = state.evictions();
    report.device = engine.device_use(state.index);
    if (state.pool == nullptr) return report;
    report.slots = state.pool->slots();
    report.slots_filled = state.pool->filled();
    report.slots_leased = state.pool->busy();
    report.leases = state.pool->leases();
    report.pool_bytes = report.slots * state.spec.cell_bytes;
    return report;
}

Report EngineThread::report() {
    return on_loop([&] {
        const Memory& memory = engine_->models().memory();
        Report report;
        report.dram_limit_bytes = memory.limit_bytes();
        report.dram_pool_bytes = memory.used_bytes(Account::pool);
        report.dram_resident_bytes = memory.used_bytes(Account::resident);
        report.dram_tables_bytes = memory.used_bytes(Account::tables);
        report.sessions = static_cast<uint32_t>(rings_.size());
        report.uptime_s = seconds_since(started_);
        report.read_queue = engine_->read_queue();
        const Pressure& pressure = engine_->models().pressure();
        report.memory_pressure = {pressure.pressed(), pressure.target_bytes(), pressure.floor_bytes(),
                                  pressure_signals_};
        for (const auto& state : engine_->models().all()) report.models.push_back(report_of(*engine_, *state));
        for (const auto& [id, ring] : rings_) {
            report.attached.push_back(report_of(*ring, engine_->model(ring->model).spec));
        }
        return report;
    });
}

}  // namespace weightd
