#include "predict/predict_step.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace flashclient {
namespace {

// Leaves `gathered` as it is where there is no bias.
void gather(const float* bias, std::span<const uint32_t> positions, std::vector<float>& gathered) {
    if (bias == nullptr) return;
    gathered.resize(positions.size());
    for (size_t i = 0; i < positions.size(); i++) gathered[i] = bias[positions[i]];
}

}  // namespace

PredictStep::PredictStep(const Ffn& ffn, Window& window, std::vector<const Predictor*> predictors)
    : ffn_(ffn), window_(window), predictors_(std::move(predictors)) {}

StepTimes PredictStep::run(uint32_t layer, const StepRows& rows, float* y) {
    StepTimer timer;
    std::fill_n(y, rows.tokens * ffn_.shape().hidden, 0.0f);
    predict(layer, rows);
    timer.lap(timer.times.predict_s);
    const bool fits = window_.slide(layer, {rows.past_tokens, rows.columns, wanted_.positions, wanted_.row_masks});
    timer.lap(timer.times.acquire_s);
    if (fits && add(rows, 0, wanted_.positions.size(), timer, y)) {
        window_.end_step();
        timer.lap(timer.times.acquire_s);
        return timer.times;
    }
    // The step wants more cells than may be leased at once: one part after the other, with the same bits.
    for (size_t first = 0; first < wanted_.positions.size();) {
        const size_t count = window_.lease_first(layer, std::span(wanted_.positions).subspan(first));
        timer.lap(timer.times.acquire_s);
        if (!add(rows, first, count, timer, y)) throw std::logic_error("a cell within the session's share was refused");
        window_.clear();
        first += count;
    }
    return timer.times;
}

void PredictStep::predict(uint32_t layer, const StepRows& rows) {
    wanted_ = predictor(layer).predict(rows.x, rows.tokens);
    auto& [positions, masks] = wanted_;
    size_t count = 0;
    for (size_t i = 0; i < positions.size(); i++) {  // without a branch, as in the predictors
        positions[count] = positions[i];
        masks[count] = masks[i] & rows.wanting;
        count += masks[count] != 0;
    }
    positions.resize(count);
    masks.resize(count);
    gather(rows.bias, positions, bias_);
    gather(rows.up_bias, positions, up_bias_);
}

// Adds entries [first, first + count) of the list to y. Returns false, with y unchanged, where a lease was refused.
bool PredictStep::add(const StepRows& rows, size_t first, size_t count, StepTimer& timer, float* y) {
    const auto positions = std::span<const uint32_t>(wanted_.positions).subspan(first, count);
    addresses_.assign(count, 0);
    h_.resize(std::max(h_.size(), count * rows.tokens));
    const Neurons list{addresses_, rows.bias == nullptr ? nullptr : bias_.data() + first,
                       rows.up_bias == nullptr ? nullptr : up_bias_.data() + first, wanted_.row_masks.data() + first};
    for (size_t missing = count; missing > 0;) {
        found_.clear();
        window_.locate(positions, addresses_, found_);
        if (!found_.empty()) ffn_.fire(list, found_, rows.x, rows.tokens, h_.data());
        timer.lap(timer.times.compute_s);
        missing -= found_.size();
        if (missing == 0) break;
        const bool leased = window_.wait();
        timer.lap(timer.times.wait_s);
        if (!leased) return false;
    }
    ffn_.accumulate(addresses_, h_.data(), rows.tokens, y);
    timer.lap(timer.times.compute_s);
    return true;
}

}  // namespace flashclient
