// The weights outside the FFNs: one sealed, verified segment per model, shared by all its sessions.
#pragma once

#include <stdexcept>
#include <string>

#include "memory.h"
#include "model.h"

namespace weightd {

struct ReaderChoice {
    std::string kind;  // of make_reader
    uint32_t threads;
    uint32_t depth;
    bool allow_buffered;
};

struct CorruptResident : std::runtime_error {  // names model and tensor
    using std::runtime_error::runtime_error;
};

// Reads the file uncached, checks every tensor, seals the segment. Blocks; throws std::system_error, CorruptResident.
SharedMemory load_resident(const ModelSpec& spec, const ReaderChoice& choice);

}  // namespace weightd
