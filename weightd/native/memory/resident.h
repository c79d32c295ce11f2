// Resident weights (those outside the FFNs) and predictors: verified, sealed shared memory of a model, which all its
// sessions map.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

#include "bundle/model_spec.h"
#include "device/shared_memory.h"

namespace weightd {

struct ReaderChoice {
    std::string kind;  // of make_reader()
    uint32_t threads;
    uint32_t depth;
    bool allow_buffered;
    // Openers and fetches give up when the device has not answered for so long.
    std::chrono::milliseconds answer_within{30'000};
};

struct Unanswered : std::runtime_error {  // the device was silent for longer than ReaderChoice::answer_within
    Unanswered(const std::string& model, std::chrono::milliseconds silent);
};

struct PredictorsFile {  // predictors.safetensors of one version of a model's calibration
    std::string path;
    uint64_t bytes = 0;
    uint64_t checksum = 0;  // XXH3-64 of the whole file
    uint32_t version = 0;
};

struct LoadedPredictors {  // such a file in memory
    uint32_t version;
    uint64_t bytes;  // of the file; the memory is rounded up to pages
    SharedMemory memory;
};

struct CorruptResident : std::runtime_error {  // a checksum differs, or a file cannot be read; the text names it
    using std::runtime_error::runtime_error;
};

// Reads the file uncached, checks every tensor and seals the memory. Blocks. Calls `on_progress` after each piece that
// was read or checked. Throws std::system_error (the file cannot be opened), CorruptResident.
SharedMemory load_resident(const ModelSpec& spec, const ReaderChoice& choice, const std::function<void()>& on_progress);
// The same for predictors, whose file has one checksum.
SharedMemory load_predictors(const std::string& model, const PredictorsFile& wanted, const ReaderChoice& choice,
                             const std::function<void()>& on_progress);

}  // namespace weightd
