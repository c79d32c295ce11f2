// What the daemon tells of itself: proto/weightd.proto's StatsResponse before it is one. Counters count from the start.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "service/pressure_signals.h"
#include "session/ring_sessions.h"

namespace weightd {

struct ModelReport {
    std::string name;
    uint32_t sessions = 0;
    uint64_t slots = 0;
    uint64_t slots_filled = 0;
    uint64_t slots_busy = 0;
    uint64_t leases = 0;
    uint64_t share_slots = 0;  // of all its sessions together
    uint64_t pool_bytes = 0;
    uint64_t evictions = 0;
    ModelCounts counts;
    DeviceUse device;
};

struct SessionReport {
    uint32_t session;
    std::string model;
    pid_t pid;
    uid_t uid;
    uint32_t share_slots;
    uint32_t lease_limit;
    uint32_t leased_cells;
    double age_s;
    uint64_t requests;
    uint64_t hits;
    uint64_t misses;
    uint64_t read_bytes;
};

struct PressureReport {
    bool pressed = false;
    uint64_t target_bytes = 0;
    uint64_t floor_bytes = 0;
    uint64_t signals = 0;
};

struct Report {
    uint64_t limit_bytes = 0;
    uint64_t pool_bytes = 0;
    uint64_t resident_bytes = 0;
    uint64_t tables_bytes = 0;
    uint32_t sessions = 0;
    double uptime_s = 0;
    ReadQueue read_queue;
    PressureReport pressure;
    std::vector<ModelReport> models;
    std::vector<SessionReport> attached;
};

// As it is now; on the engine's thread.
Report report_of(const Engine& engine, const RingSessions& sessions, const PressureSignals& signals,
                 Clock::duration uptime);

}  // namespace weightd
