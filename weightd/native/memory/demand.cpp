#include "memory/demand.h"

#include <algorithm>

namespace weightd {
namespace {

constexpr double KEPT_PER_NOTE = 0.875;  // part of a use's weight: the last few seconds decide, not the last token

// A use of a cell is a use of each of its bytes, so slots of different sizes compare.
double uses_per_slot(const Model& model, double recent_uses) {
    return recent_uses / static_cast<double>(std::max<uint64_t>(1, model.pool->slots()));
}

}  // namespace

void Demand::note(const Model& model) {
    Use& use = by_model_[model.index];
    const uint64_t uses = model.counts.hits + model.counts.misses;
    const uint64_t evictions = model.pool->evictions();
    use.recent_uses = KEPT_PER_NOTE * use.recent_uses + static_cast<double>(uses - use.uses);
    use.evicted = evictions > use.evictions;
    use.uses = uses;
    use.evictions = evictions;
}

Demand::Use Demand::use_of(const Model& model) const {
    const auto found = by_model_.find(model.index);
    return found == by_model_.end() ? Use{} : found->second;
}

std::optional<Demand::Transfer> Demand::transfer(const ModelList& models,
                                                 const std::function<bool(const Model&)>& can_spare) const {
    Transfer found{nullptr, nullptr};
    double least = 0;
    double most = 0;
    for (const auto& model : models) {
        if (model->pool == nullptr) continue;
        if (model->pool->draining() > 0) return std::nullopt;
        const Use use = use_of(*model);
        const double uses = uses_per_slot(*model, use.recent_uses);
        if (use.evicted && (found.to == nullptr || uses > most)) {
            found.to = model.get();
            most = uses;
        }
        if (can_spare(*model) && (found.from == nullptr || uses < least)) {
            found.from = model.get();
            least = uses;
        }
    }
    if (found.to == nullptr || found.from == nullptr || most <= USE_RATIO_MIN * least) return std::nullopt;
    return found;
}

}  // namespace weightd
