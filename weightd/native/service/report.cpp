#include "service/report.h"

#include <set>
#include <string_view>

namespace weightd {
namespace {

SessionReport report_of(const RingSession& session, const ModelSpec& spec) {
    return {session.id,          spec.name,           session.peer().pid, session.peer().uid,
            session.share_slots, session.lease_limit, session.held_cells, seconds(Clock::now() - session.opened_at()),
            session.requests(),  session.hits,        session.misses,     session.read_bytes};
}

ModelReport report_of(const Engine& engine, const RingSessions& sessions, const Model& model) {
    ModelReport report;
    report.name = model.spec.name;
    report.sessions = sessions.count_of(model.index);
    report.share_slots = engine.models().sessions().share_slots(model);
    report.counts = model.counts;
    report.counts.evictions = model.evictions();
    report.device = engine.device_use(model.index);
    if (model.pool == nullptr) return report;
    report.slots = model.pool->slots();
    report.slots_filled = model.pool->filled();
    report.slots_leased = model.pool->busy();
    report.leases = model.pool->leases();
    report.pool_bytes = report.slots * model.spec.cell_bytes;
    return report;
}

}  // namespace

Report report_of(const Engine& engine, const RingSessions& sessions, const PressureSignals& signals,
                 Clock::duration uptime) {
    const Memory& memory = engine.models().memory();
    const Pressure& pressure = engine.models().pressure();
    Report report;
    report.dram_limit_bytes = memory.limit_bytes();
    report.dram_pool_bytes = memory.used_bytes(Account::pool);
    report.dram_resident_bytes = memory.used_bytes(Account::resident);
    report.dram_tables_bytes = memory.used_bytes(Account::tables);
    report.sessions = static_cast<uint32_t>(sessions.open_sessions().size());
    report.uptime_s = seconds(uptime);
    report.read_queue = engine.read_queue();
    report.memory_pressure = {pressure.pressed(), pressure.target_bytes(), pressure.floor_bytes(), signals.count()};
    std::set<std::string_view> served;
    for (const auto& model : engine.models().all()) {
        if (!model->removed) served.insert(model->spec.name);
    }
    for (const auto& model : engine.models().all()) {  // counters of a name do not fall when an import is replaced
        if (served.contains(model->spec.name)) report.models.push_back(report_of(engine, sessions, *model));
    }
    for (const auto& [id, session] : sessions.open_sessions()) {
        report.attached.push_back(report_of(*session, engine.models().all()[session->model]->spec));
    }
    return report;
}

}  // namespace weightd
