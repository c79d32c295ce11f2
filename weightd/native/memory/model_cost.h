// What a model costs of --dram, computed from its description.
#pragma once

#include <cstdint>

#include "bundle/model_spec.h"
#include "memory/memory.h"

namespace weightd {

inline constexpr uint32_t SHARE_SLOTS_MIN = 2;    // one slot in use, one being read
inline constexpr uint32_t SESSIONS_RESERVED = 4;  // the tables of so many sessions are paid when a model is activated

// From the time when the model is added: checksums, and a record of how hot each cell is.
uint64_t catalog_bytes(const ModelSpec& spec);
// While the model is active: resident weights, tables of the pool and of SESSIONS_RESERVED sessions.
uint64_t activation_bytes(const ModelSpec& spec);
// Tables and ring of one session.
uint64_t session_bytes(const ModelSpec& spec);
// A model in use may leave part of its last segment unused, at most this much.
uint64_t unused_bytes_max(const ModelSpec& spec, const Memory& memory);
// The least --dram that serves the model to one session and to fetches.
uint64_t minimum_dram_bytes(const ModelSpec& spec);

}  // namespace weightd
