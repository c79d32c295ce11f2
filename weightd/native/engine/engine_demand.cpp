// Models in use share the pool by demand: memory goes where a byte of it is used more.
#include <algorithm>

#include "engine/engine.h"

namespace weightd {
namespace {

constexpr double KEPT_PER_REBALANCE = 0.875;  // a few seconds decide, not the last token

}  // namespace

void Engine::rebalance() {
    for (const auto& state : models_) {
        state->idle_rebalances = state->users > 0 ? 0 : state->idle_rebalances + 1;
        if (state->pool != nullptr) note_demand(*state);
    }
    share_by_demand();
}

void Engine::note_demand(Model& state) {
    Model::Demand& demand = state.demand;
    const uint64_t uses = state.counts.hits + state.counts.misses;
    const uint64_t evictions = state.pool->evictions();
    demand.aged_uses = KEPT_PER_REBALANCE * demand.aged_uses + static_cast<double>(uses - demand.uses);
    demand.lacks = evictions > demand.evictions;
    demand.uses = uses;
    demand.evictions = evictions;
}

double Engine::uses_per_byte(const Model& state) const {
    // a use of a cell is one of each of its bytes, so that slots of any size compare
    return state.demand.aged_uses / static_cast<double>(std::max<uint64_t>(1, state.pool->slots()));
}

bool Engine::can_spare_segment(const Model& state) const {
    const uint64_t slots = state.pool->slots();
    const uint64_t segment_slots = segment_bytes_ / state.spec.cell_bytes;
    return slots > 0 && (state.users == 0 || slots >= state.guaranteed_slots + segment_slots);
}

// One segment at a time, of which nothing is leased: nobody is made to give back what he holds for this.
void Engine::share_by_demand() {
    promise_ = {};
    Model* busiest = nullptr;
    Model* idlest = nullptr;
    for (const auto& state : models_) {
        if (state->pool == nullptr) continue;
        if (state->pool->draining() > 0) return;
        if (state->demand.lacks && (!busiest || uses_per_byte(*state) > uses_per_byte(*busiest))) busiest = state.get();
        if (can_spare_segment(*state) && (!idlest || uses_per_byte(*state) < uses_per_byte(*idlest))) {
            idlest = state.get();
        }
    }
    if (busiest == nullptr || idlest == nullptr || !kept_bytes_.empty()) return;
    if (uses_per_byte(*busiest) <= BUSIER_MIN * uses_per_byte(*idlest)) return;
    const uint64_t before_bytes = memory_.used_bytes(Account::pool);
    if (!idlest->pool->start_draining(true)) return;
    retire(*idlest);
    promise_ = {busiest->index, before_bytes - memory_.used_bytes(Account::pool)};
}

}  // namespace weightd
