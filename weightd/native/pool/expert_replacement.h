// The replacement policy of models with experts: the expert is evicted that is expected to be used last.
//
// The router picks whole experts, so uses are counted, and cells are evicted, by range: the cells of one expert, or all
// cells of an FFN that is not a mixture. A step is one use of a layer by a session: some tokens, and what they picked.
//
// Neither recency nor frequency alone decides well. Which of them tells more differs from model to model, and with the
// size of the pool. So each range has five rates: the share of steps that used it, over about 2, 5, 20, 100 and 500
// steps of its layer. The expected use in the next step is a weighted sum of them. The weights are learned while the
// model is used: after each step, from what the step has used and what was expected of it (normalised least mean
// squares). Measured with this code: weightd/README.md.
//
// Layers are used one after the other. A range whose layer has just been used is not needed for a whole token, so the
// wait until its next use is the way to its layer plus 1 / expected use, in tokens.
//
// A step ends when the next one begins, in whatever layer. One that used more than half of its layer's experts, as that
// of a prompt does, says nothing about which are hot, and is not counted. So the experts that only a prompt has used
// are evicted first.
//
// A range that a session has said it may want soon (awaited()) is evicted only where there is no other, until its layer
// has been used.
//
// Invariants: a pinned cell is never evicted. The cells of one range are evicted before those of another.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "pool/replacement.h"

namespace weightd {

struct ExpertRange {
    uint32_t layer;
    uint32_t cells;
};

class ExpertReplacement final : public Replacement {
  public:
    explicit ExpertReplacement(std::span<const ExpertRange> ranges);  // in the order of their cells; layers ascend
    void seed(std::span<const Hotness> hotness) override;
    void inserted(uint32_t cell, bool contested) override;
    void touched(uint32_t cell) override;
    void pinned(uint32_t cell) override;
    void unpinned(uint32_t cell) override;
    void removed(uint32_t cell) override;
    uint32_t victim() override;
    void write_hotness(std::span<Hotness> hotness) const override;
    void step_begins(uint32_t layer) override;
    void awaited(uint32_t cell) override;

    static uint64_t table_bytes(uint64_t cells, uint64_t ranges);  // bytes of its allocations, at most

  private:
    static constexpr size_t RATES = 5;
    using Rates = std::array<float, RATES>;
    struct Known {  // of one range
        uint32_t layer = 0;
        uint32_t first_cell = 0;
        uint32_t end_cell = 0;
        uint32_t evictable = 0;    // its cells that are in the pool and not pinned
        bool used = false;         // in the step under way
        bool awaited = false;      // in the layer's next step
        Rates rates{};             // of use, until the step under way
        float wait_tokens = 0.0f;  // until its next use, once its layer's turn has come
    };
    struct Layer {
        uint32_t first_range = 0;
        uint32_t end_range = 0;
        uint32_t used = 0;   // ranges used in the step under way
        uint32_t steps = 0;  // that were counted
    };

    void end_step(Layer& layer);
    void learn(const Layer& layer);
    void count(Layer& layer);
    float expected(const Rates& rates) const;
    void update_wait(Known& range) const;
    uint32_t longest_wait() const;

    std::vector<Known> ranges_;
    std::vector<Layer> layers_;
    std::vector<uint32_t> range_of_;  // by cell
    std::vector<bool> evictable_;     // by cell
    Rates weights_;
    uint32_t layer_ = 0;   // of the step under way
    uint32_t chosen_ = 0;  // the range whose cells are evicted first
};

}  // namespace weightd
