#include "kernels/predictor.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <memory>
#include <mutex>
#include <utility>

namespace flashclient {
namespace {

constexpr size_t NEURONS_PER_ITEM = 128;

// Neurons of which blocks are judged by several threads. A block keeps its own side by side, where they are few.
class Judged {
  public:
    explicit Judged(size_t neurons) : positions_(new uint32_t[neurons]), row_masks_(new uint16_t[neurons]) {}

    // mask_of(neuron): the rows that want it. Without a branch, because no processor predicts which neurons are wanted.
    template <typename MaskOf>
    void add_block(size_t first, size_t count, const MaskOf& mask_of) {
        size_t wanted = first;
        for (size_t neuron = first; neuron < first + count; neuron++) {
            const auto mask = static_cast<uint16_t>(mask_of(neuron));
            positions_[wanted] = static_cast<uint32_t>(neuron);
            row_masks_[wanted] = mask;
            wanted += mask != 0;
        }
        const std::lock_guard lock(mutex_);
        blocks_.emplace_back(first, wanted);
    }

    Prediction all() {
        std::sort(blocks_.begin(), blocks_.end());
        Prediction prediction;
        for (const auto& [first, end] : blocks_) {
            const auto add = [first = first, end = end](auto& all, const auto& from) {
                all.insert(all.end(), from.get() + first, from.get() + end);
            };
            add(prediction.positions, positions_);
            add(prediction.row_masks, row_masks_);
        }
        return prediction;
    }

  private:
    std::unique_ptr<uint32_t[]> positions_;
    std::unique_ptr<uint16_t[]> row_masks_;
    std::mutex mutex_;                               // guards blocks_
    std::vector<std::pair<size_t, size_t>> blocks_;  // first neuron, and the end of those that are wanted
};

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
    Judged judged(output_.rows);
    decode_.for_blocks(output_, code.data(), tokens, [&](const Linear::Dots& dots) {
        judged.add_block(dots.first, dots.count, [&](size_t neuron) {
            const float scale = scale_ != nullptr ? scale_[neuron] : 1.0f;
            const float* of_neuron = dots.values + (neuron - dots.first) * tokens;
            const auto wants = [&](size_t t) { return unsigned{scale * of_neuron[t] + bias_[neuron] > 0.0f}; };
            if (tokens == 1) return wants(0);
            unsigned mask = 0;
            for (size_t t = 0; t < tokens; t++) mask |= wants(t) << t;
            return mask;
        });
    });
    return judged.all();
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
    Judged judged(gate_.rows);
    product_.for_blocks(gate_, x, tokens, [&](const Linear::Dots& dots) {
        judged.add_block(dots.first, dots.count, [&](size_t neuron) {
            unsigned mask = 0;
            for (size_t t = 0; t < tokens; t++) {
                const float dot = dots.values[(neuron - dots.first) * tokens + t];
                const float gate = scale_[neuron] * dot + bias_[neuron];
                const bool small = std::abs(activate(activation_, gate)) < threshold_[neuron];
                mask |= static_cast<unsigned>(!small) << t;
            }
            return mask;
        });
    });
    return judged.all();
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
    Judged judged(neurons_);
    workers_.run(divide_up(neurons_, NEURONS_PER_ITEM), [&](size_t item) {
        const size_t first = item * NEURONS_PER_ITEM;
        judged.add_block(first, std::min(NEURONS_PER_ITEM, neurons_ - first), [&](size_t neuron) {
            unsigned mask = 0;
            for (size_t t = 0; t < tokens; t++) {
                const uint8_t* of_token = bits.data() + t * row_bytes_;
                const auto differ =
                    static_cast<int64_t>(kernels_.differing_bits(signs_ + neuron * row_bytes_, of_token, row_bytes_));
                mask |= (static_cast<int64_t>(hidden_) - 2 * differ > margin_[neuron]) << t;
            }
            return mask;
        });
    });
    return judged.all();
}

}  // namespace flashclient
