#include "pool/expert_replacement.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <numeric>

namespace weightd {
namespace {

constexpr std::array<float, 5> GAINS = {0.5f, 0.2f, 0.05f, 0.01f, 0.002f};  // of a step, once many were counted
constexpr float LEARNING_RATE = 0.02f;
constexpr float EXPECTED_MIN = 1e-4f;    // of use in a step: less is never waited for
constexpr float SEEDED_MEAN = 0.0625f;   // mean rate of use of a seeded pool; only ratios count
constexpr uint32_t SEEDED_STEPS = 50;    // what a seed weighs against steps that are counted later
constexpr uint32_t WIDE_DIVISOR = 2;     // a step that uses more than this part of a layer's ranges is not counted
constexpr float AWAITED_TOKENS = -1.0f;  // the wait until an awaited range is used: less than any other's
constexpr uint32_t NO_RANGE = UINT32_MAX;

}  // namespace

ExpertReplacement::ExpertReplacement(std::span<const ExpertRange> ranges) : chosen_(NO_RANGE) {
    weights_.fill(1.0f / RATES);
    uint32_t cell = 0;
    for (const ExpertRange& range : ranges) {
        const auto index = static_cast<uint32_t>(ranges_.size());
        if (layers_.size() <= range.layer) layers_.resize(range.layer + 1, {index, index});
        layers_[range.layer].end_range = index + 1;
        Known known;
        known.layer = range.layer;
        known.first_cell = cell;
        known.end_cell = cell += range.cells;
        update_wait(known);
        ranges_.push_back(known);
        range_of_.insert(range_of_.end(), range.cells, index);
    }
    evictable_.resize(cell);
}

uint64_t ExpertReplacement::table_bytes(uint64_t cells, uint64_t ranges) {
    return cells * sizeof(uint32_t) + cells / 8 + sizeof(uint64_t) + ranges * (sizeof(Known) + sizeof(Layer));
}

void ExpertReplacement::seed(std::span<const Hotness> hotness) {
    assert(hotness.size() == range_of_.size());
    for (Known& range : ranges_) {
        const int code = hotness[range.first_cell] & HOTNESS_MAX;
        const float octaves = static_cast<float>(code - HOTNESS_MEAN) / HOTNESS_PER_OCTAVE;
        range.rates.fill(code > 0 ? std::min(1.0f, SEEDED_MEAN * std::exp2(octaves)) : 0.0f);
        update_wait(range);
    }
    for (Layer& layer : layers_) layer.steps = SEEDED_STEPS;
    chosen_ = NO_RANGE;
}

void ExpertReplacement::write_hotness(std::span<Hotness> hotness) const {
    assert(hotness.size() == range_of_.size());
    double sum = 0;  // over cells
    for (const Known& range : ranges_) sum += double{range.rates.back()} * (range.end_cell - range.first_cell);
    const double mean = sum / static_cast<double>(hotness.size());
    for (const Known& range : ranges_) {
        const double octaves = range.rates.back() > 0 ? std::log2(range.rates.back() / mean) : -HOTNESS_MAX;
        const long hot = HOTNESS_MEAN + std::lround(HOTNESS_PER_OCTAVE * octaves);
        const auto code = static_cast<Hotness>(range.rates.back() > 0 ? std::clamp<long>(hot, 1, HOTNESS_MAX) : 0);
        std::fill(hotness.begin() + range.first_cell, hotness.begin() + range.end_cell, code);
    }
}

// ---- what is in the pool ----

void ExpertReplacement::inserted(uint32_t, bool) {}  // pinned, so it cannot be evicted yet

void ExpertReplacement::pinned(uint32_t cell) {
    if (!evictable_[cell]) return;
    evictable_[cell] = false;
    ranges_[range_of_[cell]].evictable--;
}

void ExpertReplacement::unpinned(uint32_t cell) {
    if (evictable_[cell]) return;
    evictable_[cell] = true;
    ranges_[range_of_[cell]].evictable++;
}

void ExpertReplacement::removed(uint32_t cell) { pinned(cell); }

// The last cells of a range go first: a step computes with the first ones while the others are read.
uint32_t ExpertReplacement::victim() {
    if (chosen_ == NO_RANGE || ranges_[chosen_].evictable == 0) chosen_ = longest_wait();
    if (chosen_ == NO_RANGE) return NO_CELL;
    uint32_t cell = ranges_[chosen_].end_cell - 1;
    while (!evictable_[cell]) cell--;
    pinned(cell);
    return cell;
}

uint32_t ExpertReplacement::longest_wait() const {
    const auto count = static_cast<uint32_t>(layers_.size());
    uint32_t found = NO_RANGE;
    float longest = 2 * AWAITED_TOKENS;
    for (uint32_t layer = 0; layer < count; layer++) {
        const float turn_tokens = static_cast<float>((layer + count - layer_ - 1) % count) / static_cast<float>(count);
        for (uint32_t i = layers_[layer].first_range; i < layers_[layer].end_range; i++) {
            const float wait_tokens = ranges_[i].awaited ? AWAITED_TOKENS : turn_tokens + ranges_[i].wait_tokens;
            if (ranges_[i].evictable == 0 || wait_tokens <= longest) continue;
            longest = wait_tokens;
            found = i;
        }
    }
    return found;
}

// ---- what is expected ----

void ExpertReplacement::touched(uint32_t cell) {
    Known& range = ranges_[range_of_[cell]];
    if (!range.used) layers_[range.layer].used++;
    range.used = true;
}

void ExpertReplacement::awaited(uint32_t cell) {
    ranges_[range_of_[cell]].awaited = true;
    if (chosen_ == range_of_[cell]) chosen_ = NO_RANGE;
}

void ExpertReplacement::step_begins(uint32_t layer) {
    end_step(layers_[layer_]);
    layer_ = layer;
    chosen_ = NO_RANGE;
}

void ExpertReplacement::end_step(Layer& layer) {
    const uint32_t ranges = layer.end_range - layer.first_range;
    if (layer.used > 0 && (ranges == 1 || layer.used <= ranges / WIDE_DIVISOR)) {
        learn(layer);
        count(layer);
    }
    layer.used = 0;
    for (uint32_t r = layer.first_range; r < layer.end_range; r++) ranges_[r].used = ranges_[r].awaited = false;
}

void ExpertReplacement::learn(const Layer& layer) {
    Rates correction{};
    float norm = 1e-9f;
    for (uint32_t r = layer.first_range; r < layer.end_range; r++) {
        const Known& range = ranges_[r];
        const float error = (range.used ? 1.0f : 0.0f) - expected(range.rates);
        for (size_t i = 0; i < RATES; i++) {
            correction[i] += error * range.rates[i];
            norm += range.rates[i] * range.rates[i];
        }
    }
    for (size_t i = 0; i < RATES; i++) weights_[i] += LEARNING_RATE * correction[i] / norm;
}

// Each rate is the mean of all steps, until there are so many that the latest count more.
void ExpertReplacement::count(Layer& layer) {
    Rates gains;
    for (size_t i = 0; i < RATES; i++) gains[i] = std::max(GAINS[i], 1.0f / static_cast<float>(layer.steps + 2));
    for (uint32_t r = layer.first_range; r < layer.end_range; r++) {
        Known& range = ranges_[r];
        for (size_t i = 0; i < RATES; i++) range.rates[i] += gains[i] * ((range.used ? 1.0f : 0.0f) - range.rates[i]);
        update_wait(range);
    }
    layer.steps++;
}

float ExpertReplacement::expected(const Rates& rates) const {
    return std::inner_product(rates.begin(), rates.end(), weights_.begin(), 0.0f);
}

void ExpertReplacement::update_wait(Known& range) const {
    range.wait_tokens = 1.0f / std::max(EXPECTED_MIN, expected(range.rates));
}

}  // namespace weightd
