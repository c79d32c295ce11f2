// The weights outside the FFNs, and the predictors: sealed, verified segments of a model, shared by its sessions.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

#include "bundle/model.h"
#include "device/shared_memory.h"

namespace weightd {

struct ReaderChoice {
    std::string kind;  // of make_reader
    uint32_t threads;
    uint32_t depth;
    bool allow_buffered;
    // A device that was silent for so long is given up by those who can go without its answer.
    std::chrono::milliseconds answer_within{30'000};
};

struct Unanswered : std::runtime_error {  // by the device, for longer than ReaderChoice::answer_within
    Unanswered(const std::string& model, std::chrono::milliseconds silent);
};

struct PredictorsFile {  // predictors.safetensors of one version of a model's calibration
    std::string path;
    uint64_t bytes = 0;
    uint64_t checksum = 0;  // XXH3-64 of the whole file
    uint32_t version = 0;
};

struct Predictors {  // the same in memory
    uint32_t version;
    uint64_t bytes;  // of the file; the memory is rounded up to pages
    SharedMemory memory;
};

struct CorruptResident : std::runtime_error {  // or cannot be read; names model and tensor, or file
    using std::runtime_error::runtime_error;
};

// Reads the file uncached, checks every tensor, seals the segment. Blocks; throws std::system_error (it cannot be
// opened), CorruptResident (what flash gives is wrong, or nothing). Calls `moved` for each piece that was read or
// checked.
SharedMemory load_resident(const ModelSpec& spec, const ReaderChoice& choice, const std::function<void()>& moved);
// The same for predictors, which have one checksum.
SharedMemory load_predictors(const std::string& model, const PredictorsFile& wanted, const ReaderChoice& choice,
                             const std::function<void()>& moved);

}  // namespace weightd
