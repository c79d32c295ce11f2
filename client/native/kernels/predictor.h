// Which neurons of a layer rows of its input are likely to fire, for at most TOKENS_MAX rows at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/activation.h"
#include "kernels/linear.h"

namespace flashclient {

// The neurons that some row wants. What a row wants depends on that row alone, bit for bit.
struct Prediction {
    std::vector<uint32_t> positions;  // rising
    std::vector<uint16_t> row_masks;  // bit t: row t wants it; never 0
};

// The predictor of one layer. Safe to call from several threads. It reads its matrices in place; they must outlive it.
class Predictor {
  public:
    virtual ~Predictor() = default;
    // x: [tokens, hidden()] fp32, at most TOKENS_MAX tokens.
    virtual Prediction predict(const float* x, size_t tokens) const = 0;
    virtual size_t hidden() const = 0;
    virtual size_t neurons() const = 0;
};

// A neuron is wanted iff scale * (output . (input . x)) + bias > 0, in fp32: the low-rank predictor of LLM in a flash
// (arXiv 2312.11514, section 3.1; after Deja Vu, arXiv 2310.17157) with its sigmoid and threshold folded into the bias.
class LowRankPredictor : public Predictor {
  public:
    // input: [rank, hidden], output: [neurons, rank], bias: [neurons]. `scale`: [neurons] where `output` is of int8,
    // else null, which is 1.
    LowRankPredictor(Workers& workers, Dtype dtype, Matrix input, Matrix output, const float* bias,
                     const float* scale = nullptr, const char* instruction_set = nullptr);
    Prediction predict(const float* x, size_t tokens) const override;
    size_t hidden() const override { return input_.columns; }
    size_t neurons() const override { return output_.rows; }

  private:
    Linear encode_;
    Linear decode_;
    Matrix input_;
    Matrix output_;
    const float* bias_;
    const float* scale_;
};

// A neuron is wanted unless |activate(scale * (gate . x) + bias)| < threshold[neuron]: the gate rows themselves
// predict, rounded to int8 (CATS, arXiv 2404.08763, and TEAL, arXiv 2408.14690, which compare the exact gate). A
// threshold of 0 wants every neuron, and a NaN is wanted.
class GatePredictor : public Predictor {
  public:
    // gate: [neurons, hidden] of int8, the up rows where there is no gate; scale, bias and threshold: [neurons].
    GatePredictor(Workers& workers, Matrix gate, const float* scale, const float* bias, const float* threshold,
                  Activation activation, const char* instruction_set = nullptr);
    Prediction predict(const float* x, size_t tokens) const override;
    size_t hidden() const override { return gate_.columns; }
    size_t neurons() const override { return gate_.rows; }

  private:
    Linear product_;
    Matrix gate_;
    const float* scale_;
    const float* bias_;
    const float* threshold_;
    Activation activation_;
};

// A neuron is wanted iff (coordinates whose sign is the same in the weight row and in x) - (the others) >
// margin[neuron]: SparseInfer (arXiv 2411.12692, section 3), which needs no training. -0 is negative, as in IEEE 754.
class SignPredictor : public Predictor {
  public:
    // signs: [neurons, ceil(hidden / 8)]; bit j % 8 of byte j / 8 is the sign bit of coordinate j, and the bits beyond
    // the last coordinate are 0. margin: [neurons].
    SignPredictor(Workers& workers, const uint8_t* signs, size_t neurons, size_t hidden, const int32_t* margin,
                  const char* instruction_set = nullptr);
    Prediction predict(const float* x, size_t tokens) const override;
    size_t hidden() const override { return hidden_; }
    size_t neurons() const override { return neurons_; }

  private:
    Workers& workers_;
    const Kernels& kernels_;
    const uint8_t* signs_;
    size_t neurons_;
    size_t hidden_;
    size_t row_bytes_;
    const int32_t* margin_;
};

}  // namespace flashclient
