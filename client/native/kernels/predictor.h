// Which neurons of a layer rows of its input are likely to fire, for at most TOKENS_MAX rows at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/linear.h"

namespace flashclient {

// Neurons, by position, that some row wants; a row's wishes depend on that row alone, bit for bit.
struct Prediction {
    std::vector<uint32_t> positions;  // rising
    std::vector<uint16_t> row_masks;  // bit t: row t wants it; never 0
};

// wanted iff scale * (output . (input . x)) + bias > 0, in fp32: the low-rank predictor of LLM in a flash (arXiv
// 2312.11514, section 3.1; after Deja Vu, arXiv 2310.17157) with its sigmoid and threshold folded into the bias. Safe
// to call from several threads; the matrices are read where they lie and must outlive it.
class LowRankPredictor {
  public:
    // input: [rank, hidden], output: [neurons, rank], bias: [neurons]. `scale`: [neurons] where `output` is of int8,
    // else null, which is 1.
    LowRankPredictor(Workers& workers, Dtype dtype, Matrix input, Matrix output, const float* bias,
                     const float* scale = nullptr, const char* instruction_set = nullptr);
    // x: [tokens, hidden] fp32, at most TOKENS_MAX tokens.
    Prediction predict(const float* x, size_t tokens) const;
    size_t hidden() const { return input_.columns; }

  private:
    Linear encode_;
    Linear decode_;
    Matrix input_;
    Matrix output_;
    const float* bias_;
    const float* scale_;
};

// wanted iff more than margin[neuron] coordinates have the same sign in weight row and x than have different ones:
// SparseInfer (arXiv 2411.12692, section 3), which needs no training. Sign bits as IEEE has them, so -0 is negative.
class SignPredictor {
  public:
    // signs: [neurons, ceil(hidden / 8)]; bit j % 8 of byte j / 8 is the sign bit of coordinate j, and the bits beyond
    // the last coordinate are 0. margin: [neurons].
    SignPredictor(Workers& workers, const uint8_t* signs, size_t neurons, size_t row_bytes, const int32_t* margin,
                  const char* instruction_set = nullptr);
    // x: [tokens, hidden] fp32, ceil(hidden / 8) = row_bytes.
    Prediction predict(const float* x, size_t hidden, size_t tokens) const;
    size_t row_bytes() const { return row_bytes_; }

  private:
    Workers& workers_;
    const Kernels& kernels_;
    const uint8_t* signs_;
    size_t neurons_;
    size_t row_bytes_;
    const int32_t* margin_;
};

}  // namespace flashclient
