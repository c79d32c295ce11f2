// The FFN of predict mode: each row computes the neurons that its own prediction wants, and no others.
//
// A step of one layer: predict, slide the window, fire the neurons that are present, fire others as they arrive,
// accumulate in order. Which bundles arrive first changes only the order in which neurons fire: the h of each neuron is
// its own dot product, and the down columns are added afterwards in rising order of position. So the result of a row
// depends neither on window, pool and transport nor on the other rows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "ffn/ffn.h"
#include "kernels/predictor.h"
#include "predict/step_times.h"
#include "predict/window.h"

namespace flashclient {

// The rows of one step; for past_tokens and columns see Wanted.
struct StepRows {
    uint32_t past_tokens;
    uint32_t columns;
    uint16_t wanting;      // bit t: row t wants anything
    const float* bias;     // [neurons], by position; null: none
    const float* up_bias;  // likewise (ffn.h)
    const float* x;        // [tokens, hidden]
    size_t tokens;         // at most TOKENS_MAX
};

class PredictStep {
  public:
    // One predictor for each layer. All must outlive this.
    PredictStep(const Ffn& ffn, Window& window, std::vector<const Predictor*> predictors);

    // y [tokens, hidden] = the sum over the neurons of each row. One thread at a time, which holds window().use().
    // Throws what the window's source throws; y holds no result then.
    StepTimes run(uint32_t layer, const StepRows& rows, float* y);

    const Predictor& predictor(uint32_t layer) const { return *predictors_.at(layer); }
    Window& window() const { return window_; }
    const FfnShape& shape() const { return ffn_.shape(); }
    size_t parts() const { return shape().parts.size(); }  // of a bundle

  private:
    void predict(uint32_t layer, const StepRows& rows);
    bool add(const StepRows& rows, size_t first, size_t count, StepTimer& timer, float* y);

    const Ffn& ffn_;
    Window& window_;
    std::vector<const Predictor*> predictors_;
    // The list of neurons of the step, kept from call to call because allocating takes long.
    Prediction wanted_;
    std::vector<float> bias_;
    std::vector<float> up_bias_;
    std::vector<uint64_t> addresses_;
    std::vector<uint32_t> found_;
    std::vector<float> h_;
};

}  // namespace flashclient
