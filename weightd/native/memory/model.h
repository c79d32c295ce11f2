// One model that the daemon serves: its files and, while it is active, its pool and its resident weights.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "bundle/model.h"
#include "device/direct_file.h"
#include "device/shared_memory.h"
#include "memory/resident.h"
#include "pool/pool.h"

namespace weightd {

// Counted since the daemon's start. proto's ModelStats has a field of the same name for each, and says what it means.
struct ModelCounts {
    uint64_t hits = 0;
    uint64_t misses = 0;
    uint64_t reads = 0;
    uint64_t read_bytes = 0;
    uint64_t verify_errors = 0;
    uint64_t read_errors = 0;
    uint64_t evictions = 0;  // by earlier pools of the model

    template <typename Visit>
    void each_field(Visit visit) const {
        visit("hits", hits);
        visit("misses", misses);
        visit("reads", reads);
        visit("read_bytes", read_bytes);
        visit("verify_errors", verify_errors);
        visit("read_errors", read_errors);
        visit("evictions", evictions);
    }
};

struct Model {
    uint32_t index = 0;  // in Models
    ModelSpec spec;
    std::unique_ptr<DirectFile> file;               // bundles.bin
    int file_index = -1;                            // the reader's registration
    std::vector<Hotness> hotness;                   // by cell, as it was at the last activation
    std::optional<PredictorsFile> predictors_file;  // of the newest calibration
    ModelCounts counts;
    uint32_t users = 0;            // sessions, fetches and openings under way; without any, an active model is idle
    uint32_t idle_rebalances = 0;  // consecutive rebalances that found it idle
    uint32_t activations = 0;      // tells the pool of one activation from that of the next

    // While the model is active:
    std::unique_ptr<Pool> pool;
    SharedMemory resident;
    bool resident_ready = false;
    std::shared_ptr<const LoadedPredictors>
        predictors;  // for the next session; each session keeps the ones it was given

    uint64_t evictions() const { return counts.evictions + (pool == nullptr ? 0 : pool->evictions()); }
    bool wants_more_slots() const { return pool->slots() < spec.cell_count(); }
};

using ModelList = std::vector<std::unique_ptr<Model>>;  // by index

// Opens the model's files. May block as long as the device does, so it is called outside the engine's thread. Throws
// std::system_error, std::invalid_argument.
std::unique_ptr<Model> open_model(ModelSpec spec, bool allow_buffered);

}  // namespace weightd
