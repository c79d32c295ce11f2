// The daemon's statistics, from which Python builds proto/weightd.proto's StatsResponse. Counters count from the
// daemon's start. each_field() gives every value the name of its field in the message; no code in between names it
// again.
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
    uint64_t slots_leased = 0;
    uint64_t leases = 0;
    uint64_t share_slots = 0;  // sum of the shares of all its sessions
    uint64_t pool_bytes = 0;
    ModelCounts counts;
    DeviceUse device;

    template <typename Visit>
    void each_field(Visit visit) const {
        visit("name", name);
        visit("sessions", sessions);
        visit("slots", slots);
        visit("slots_filled", slots_filled);
        visit("slots_leased", slots_leased);
        visit("leases", leases);
        visit("share_slots", share_slots);
        visit("pool_bytes", pool_bytes);
        counts.each_field(visit);
        visit("reading_s", device.reading.seconds());
        visit("read_latency_counts", device.latencies.counts());
        visit("read_latency_sum_s", device.latencies.sum_s());
        visit("region_reads", device.region_reads);
    }
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

    template <typename Visit>
    void each_field(Visit visit) const {
        visit("session", session);
        visit("model", model);
        visit("pid", pid);
        visit("uid", uid);
        visit("share_slots", share_slots);
        visit("lease_limit", lease_limit);
        visit("leased_cells", leased_cells);
        visit("age_s", age_s);
        visit("requests", requests);
        visit("hits", hits);
        visit("misses", misses);
        visit("read_bytes", read_bytes);
    }
};

struct PressureReport {
    bool pressed = false;
    uint64_t dram_target_bytes = 0;
    uint64_t dram_floor_bytes = 0;
    uint64_t signals = 0;

    template <typename Visit>
    void each_field(Visit visit) const {
        visit("pressed", pressed);
        visit("dram_target_bytes", dram_target_bytes);
        visit("dram_floor_bytes", dram_floor_bytes);
        visit("signals", signals);
    }
};

struct Report {
    uint64_t dram_limit_bytes = 0;
    uint64_t dram_pool_bytes = 0;
    uint64_t dram_resident_bytes = 0;
    uint64_t dram_tables_bytes = 0;
    uint32_t sessions = 0;
    double uptime_s = 0;
    ReadQueue read_queue;
    PressureReport memory_pressure;
    std::vector<ModelReport> models;
    std::vector<SessionReport> attached;

    template <typename Visit>
    void each_field(Visit visit) const {
        visit("dram_limit_bytes", dram_limit_bytes);
        visit("dram_pool_bytes", dram_pool_bytes);
        visit("dram_resident_bytes", dram_resident_bytes);
        visit("dram_tables_bytes", dram_tables_bytes);
        visit("sessions", sessions);
        visit("uptime_s", uptime_s);
        visit("read_queue", read_queue);
        visit("memory_pressure", memory_pressure);
        visit("models", models);
        visit("attached", attached);
    }
};

// The report as of now. Call it on the engine's thread.
Report report_of(const Engine& engine, const RingSessions& sessions, const PressureSignals& signals,
                 Clock::duration uptime);

}  // namespace weightd
