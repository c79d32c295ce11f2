#include "kernels/predictor.h"

#include <algorithm>
#include <cassert>
#include <cmath>

namespace flashclient {
namespace {

constexpr size_t NEURONS_PER_ITEM = 128;

// Without a branch, because no processor predicts which neurons are wanted.
Prediction wanted_by_some(const std::vector<uint16_t>& row_masks) {
    Prediction prediction{std::vector<uint32_t>(row_masks.size()), std::vector<uint16_t>(row_masks.size())};
    size_t count = 0;
    for (size_t neuron = 0; neuron < row_masks.size(); neuron++) {
        prediction.positions[count] = static_cast<uint32_t>(neuron);
        prediction.row_masks[count] = row_masks[neuron];
        count += row_masks[neuron] != 0;
    }
    prediction.positions.resize(count);
    prediction.row_masks.resize(count);
    return prediction;
}

std::vector<uint8_t> sign_bits(const float* x, size_t hidden, size_t tokens, size_t row_bytes) {
    std::vector<uint8_t> bits(tokens * row_bytes, 0);
    for (size_t t = 0; t < tokens; t++) {
        for (size_t j = 0; j < hidden; j++) {
            if (std::signbit(x[t * hidden + j])) bits[t * row_bytes + j / 8] |= static_cast<uint8_t>(1U << j % 8);
        }
    }
    return bits;
}

}  // namespace

LowRankPredictor::LowRankPredictor(Workers& workers, Dtype dtype, Matrix input, Matrix output, const float* bias,
                                   const float* scale, const char* instruction_set)
    : encode_(workers, dtype, instruction_set),
      decode_(workers, scale != nullptr ? Dtype::i8 : dtype, instruction_set),
      input_(input),
      output_(output),
      bias_(bias),
      scale_(scale) {}

Prediction LowRankPredictor::predict(const float* x, size_t tokens) const {
    assert(tokens <= TOKENS_MAX);
    std::vector<float> code(tokens * input_.rows);
    encode_.multiply(input_, x, tokens, code.data());
    std::vector<uint16_t> row_masks(output_.rows);
    decode_.for_blocks(output_, code.data(), tokens, [&](const Linear::Dots& dots) {
        for (size_t i = 0; i < dots.count; i++) {
            unsigned mask = 0;
            const size_t neuron = dots.first + i;
            const float scale = scale_ != nullptr ? scale_[neuron] : 1.0f;
            for (size_t t = 0; t < tokens; t++) {
                mask |= (scale * dots.values[i * tokens + t] + bias_[neuron] > 0.0f) << t;
            }
            row_masks[neuron] = static_cast<uint16_t>(mask);
        }
    });
    return wanted_by_some(row_masks);
}

GatePredictor::GatePredictor(Workers& workers, Matrix gate, const float* scale, const float* bias,
                             const float* threshold, Activation activation, const char* instruction_set)
    : product_(workers, Dtype::i8, instruction_set),
      gate_(gate),
      scale_(scale),
      bias_(bias),
      threshold_(threshold),
      activation_(activation) {}

Prediction GatePredictor::predict(const float* x, size_t tokens) const {
    assert(tokens <= TOKENS_MAX);
    std::vector<uint16_t> row_masks(gate_.rows);
    product_.for_blocks(gate_, x, tokens, [&](const Linear::Dots& dots) {
        for (size_t i = 0; i < dots.count; i++) {
            unsigned mask = 0;
            const size_t neuron = dots.first + i;
            for (size_t t = 0; t < tokens; t++) {
                const float gate = scale_[neuron] * dots.values[i * tokens + t] + bias_[neuron];
                const bool small = std::abs(activate(activation_, gate)) < threshold_[neuron];
                mask |= static_cast<unsigned>(!small) << t;
            }
            row_masks[neuron] = static_cast<uint16_t>(mask);
        }
    });
    return wanted_by_some(row_masks);
}

SignPredictor::SignPredictor(Workers& workers, const uint8_t* signs, size_t neurons, size_t hidden,
                             const int32_t* margin, const char* instruction_set)
    : workers_(workers),
      kernels_(kernels_for(Dtype::f32, instruction_set)),
      signs_(signs),
      neurons_(neurons),
      hidden_(hidden),
      row_bytes_((hidden + 7) / 8),
      margin_(margin) {}

Prediction SignPredictor::predict(const float* x, size_t tokens) const {
    assert(tokens <= TOKENS_MAX);
    const std::vector<uint8_t> bits = sign_bits(x, hidden_, tokens, row_bytes_);
    std::vector<uint16_t> row_masks(neurons_);
    workers_.run((neurons_ + NEURONS_PER_ITEM - 1) / NEURONS_PER_ITEM, [&](size_t item) {
        const size_t end = std::min(neurons_, (item + 1) * NEURONS_PER_ITEM);
        for (size_t i = item * NEURONS_PER_ITEM; i < end; i++) {
            unsigned mask = 0;
            for (size_t t = 0; t < tokens; t++) {
                const uint8_t* of_token = bits.data() + t * row_bytes_;
                const auto differ =
                    static_cast<int64_t>(kernels_.differing_bits(signs_ + i * row_bytes_, of_token, row_bytes_));
                mask |= (static_cast<int64_t>(hidden_) - 2 * differ > margin_[i]) << t;
            }
            row_masks[i] = static_cast<uint16_t>(mask);
        }
    });
    return wanted_by_some(row_masks);
}

}  // namespace flashclient
