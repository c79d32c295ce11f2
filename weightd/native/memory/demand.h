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

inline constexpr double USE_RATIO_MIN = 2;  // of the uses of a slot here and there: less is not worth moving memory

class Demand {
  public:
    void note(const Model& model);  // an active one, about once a second
    void forget(const Model& model) { by_model_.erase(model.index); }

    struct Transfer {  // of one segment
        Model* from;
        Model* to;
    };
    // Between active models. None while a segment drains somewhere, or where nothing is worth moving.
    std::optional<Transfer> transfer(const ModelList& models, const std::function<bool(const Model&)>& can_spare) const;

  private:
    struct Use {
        uint64_t uses = 0;  // of cells, since the daemon's start
        uint64_t evictions = 0;
        double recent_uses = 0;  // weighted by age
        bool evicted = false;    // since the note before
    };

    Use use_of(const Model& model) const;

    std::unordered_map<uint32_t, Use> by_model_;
};

}  // namespace weightd
