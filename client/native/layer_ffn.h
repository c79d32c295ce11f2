// The FFN of one layer, as a native decoder layer of Python calls it.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "array_arguments.h"
#include "ffn/ffn.h"
#include "predict/step_times.h"

namespace flashclient {

class LayerFfn {
  public:
    using Biases = std::optional<Array<const float, 2>>;      // [parts of a bundle but down, neurons], by position
    using OutputBias = std::optional<Array<const float, 1>>;  // [hidden], added to the sum

    LayerFfn(const FfnShape& shape, uint32_t layer, size_t neurons, const Biases& biases, const OutputBias& output_bias)
        : layer_(layer), hidden_(shape.hidden), neurons_(neurons), biases_(biases), output_bias_(output_bias) {
        const size_t rows = shape.parts.size() - 1;
        require(!biases || (aligned(*biases, "biases").shape(0) == rows && biases->shape(1) == neurons),
                "biases must be [parts of a bundle but down, neurons]");
        require(!output_bias || aligned(*output_bias, "the output's bias").shape(0) == hidden_,
                "the output's bias must be [hidden_size]");
    }
    virtual ~LayerFfn() = default;

    size_t hidden() const { return hidden_; }

    // Whether it can use an input in `dtype` that is nearly complete, before the layer's attention has added to it.
    virtual bool expects(Dtype /*dtype*/) const { return false; }
    // The next run() will be of an input like x [tokens, hidden]. Called as run() is.
    virtual void expect(const void* /*x*/, size_t /*tokens*/) {}

    // y = the FFN of x, both [tokens, hidden]. One thread at a time. Called without the GIL.
    StepTimes run(const float* x, size_t tokens, float* y) {
        const StepTimes times = sum(x, tokens, y);
        for (size_t row = 0; output_bias_ && row < tokens; row++) {
            for (size_t i = 0; i < hidden_; i++) y[row * hidden_ + i] += output_bias_->data()[i];
        }
        return times;
    }

  protected:
    virtual StepTimes sum(const float* x, size_t tokens, float* y) = 0;

    uint32_t layer() const { return layer_; }
    const float* bias() const { return biases_ ? biases_->data() : nullptr; }
    const float* up_bias() const { return biases_ && biases_->shape(0) > 1 ? biases_->data() + neurons_ : nullptr; }

  private:
    uint32_t layer_;
    size_t hidden_;
    size_t neurons_;
    Biases biases_;
    OutputBias output_bias_;
};

}  // namespace flashclient
