// How much each active model uses its pool, and which model should give a segment to which.
//
// Invariant: memory moves only to a model that had to evict, from one whose slots are used much less.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <unordered_map>

#include "memory/model.h"

namespace weightd {

// A segment moves only if the receiver uses each of its slots more than this many times as often as the giver does. A
// smaller difference is not worth moving memory.
inline constexpr double USE_RATIO_MIN = 2;

class Demand {
  public:
    void note(const Model& model);  // records the use of an active model; called about once a second
    void forget(const Model& model) { by_model_.erase(model.index); }

    struct Transfer {  // one segment is to move
        Model* from;
        Model* to;
    };
    // The next transfer between active models. None while any segment drains, or if no transfer is worth it.
    std::optional<Transfer> transfer(const ModelList& models, const std::function<bool(const Model&)>& can_spare) const;

  private:
    struct Use {
        uint64_t uses = 0;       // uses of cells at the last note(), counted since the daemon's start
        uint64_t evictions = 0;  // evictions by the model's pool at the last note()
        double recent_uses = 0;  // uses of cells, weighted by age
        bool evicted = false;    // cells were evicted between the last two calls of note()
    };

    Use use_of(const Model& model) const;

    std::unordered_map<uint32_t, Use> by_model_;
};

}  // namespace weightd
