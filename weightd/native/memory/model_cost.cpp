#include "memory/model_cost.h"

#include <algorithm>

#include "device/block_size.h"
#include "memory/session.h"
#include "pool/cell_replacement.h"
#include "pool/expert_replacement.h"
#include "pool/pool.h"
#include "ring.h"

namespace weightd {
namespace {

uint64_t replacement_bytes(const ModelSpec& spec) {
    return spec.has_experts() ? ExpertReplacement::table_bytes(spec.cell_count(), spec.ranges())
                              : CellReplacement::table_bytes(spec.cell_count());
}

}  // namespace

uint64_t catalog_bytes(const ModelSpec& spec) {
    const uint64_t bundles = uint64_t{spec.layers.back().first_checksum} + spec.layers.back().neurons;
    return bundles * sizeof(uint64_t) + spec.cell_count() * sizeof(Hotness);
}

uint64_t activation_bytes(const ModelSpec& spec) {
    return whole_pages(spec.resident_bytes) + Pool::table_bytes(spec.cell_count(), spec.cell_count()) +
           replacement_bytes(spec) + SESSIONS_RESERVED * session_bytes(spec);
}

uint64_t session_bytes(const ModelSpec& spec) {
    return Session::table_bytes(spec.cell_count()) + whole_pages(sizeof(ring::Ring));
}

uint64_t unused_bytes_max(const ModelSpec& spec, const Memory& memory) {
    return std::min(memory.segment_bytes(), uint64_t{spec.cell_count()} * spec.cell_bytes);
}

uint64_t minimum_dram_bytes(const ModelSpec& spec) {
    const uint64_t slots = 2 * SHARE_SLOTS_MIN + SHARE_SLOTS_MIN;  // a session gets half of what is left; and a fetch
    return whole_pages(activation_bytes(spec) + catalog_bytes(spec)) + slots * spec.cell_bytes;
}

}  // namespace weightd
