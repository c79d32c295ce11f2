// One model that the daemon serves: its files and, while it is active, its pool and its resident weights.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "bundle/model_spec.h"
#include "device/direct_file.h"
#include "device/shared_memory.h"
#include "memory/resident.h"
#include "pool/pool.h"

namespace weightd {

// Counted since the daemon's start. proto's ModelStats has a field of the same name for each, and says what it means.
struct ModelCounts {
    uint64_t hits = 0;
    uint64_t misses = 0;
    uint64_t prefetched = 0;
    uint64_t prefetched_used = 0;
    uint64_t reads = 0;
    uint64_t read_bytes = 0;
    uint64_t verify_errors = 0;
    uint64_t read_errors = 0;
    uint64_t evictions = 0;  // those of the model's earlier pools; evictions() adds the present pool's

    template <typename Visit>
    void each_field(Visit visit) const {
        visit("hits", hits);
        visit("misses", misses);
        visit("prefetched", prefetched);
        visit("prefetched_used", prefetched_used);
        visit("reads", reads);
        visit("read_bytes", read_bytes);
        visit("verify_errors", verify_errors);
        visit("read_errors", read_errors);
        visit("evictions", evictions);
    }
};

struct Model {
    uint32_t index = 0;  // number in Models
    ModelSpec spec;
    std::unique_ptr<DirectFile> file;               // bundles.bin
    int file_index = -1;                            // index of `file` in the reader; -1: not registered
    std::vector<Hotness> hotness;                   // by cell, as it was at the last activation
    std::optional<PredictorsFile> predictors_file;  // predictors of the newest calibration
    ModelCounts counts;
    uint32_t users = 0;            // number of sessions, fetches and openings under way; if 0, an active model is idle
    uint32_t idle_rebalances = 0;  // number of consecutive rebalances that found the model idle
    bool fetched = false;          // by a remote client, which may come back: until it has been idle for a while
    bool removed = false;          // from the store: it has no files and is never active again, but keeps its index
    uint32_t activations = 0;      // number of activations; tells one activation's pool from the next one's

    // While the model is active:
    std::unique_ptr<Pool> pool;
    SharedMemory resident;
    bool resident_ready = false;
    // Those for the next session. Each session keeps what it was given.
    std::shared_ptr<const LoadedPredictors> predictors;
    // Those that are being loaded. They stay here, because only the engine's thread may give their memory back.
    std::shared_ptr<LoadedPredictors> next_predictors;

    uint64_t evictions() const { return counts.evictions + (pool == nullptr ? 0 : pool->evictions()); }
    bool wants_more_slots() const { return pool->slots() < spec.cell_count(); }
};

using ModelList = std::vector<std::unique_ptr<Model>>;  // by index

// Opens the model's files. May block as long as the device does, so it is called outside the engine's thread. Throws
// std::system_error, std::invalid_argument.
std::unique_ptr<Model> open_model(ModelSpec spec, bool allow_buffered);

}  // namespace weightd
