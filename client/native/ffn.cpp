#include "ffn.h"

#include <algorithm>
#include <cassert>
#include <cmath>

namespace flashclient {
namespace {

constexpr std::size_t kNeuronsPerItem = 4;     // of the first phase: some microseconds of work
constexpr std::size_t kElementsPerItem = 256;  // of the second phase, at least: eight cache lines of each bf16 row
constexpr std::size_t kElementsMax = 2048;     // of y at a time, so that 16 tokens of it stay in the second-level cache

// In fp32; erf and tanh forms of gelu as torch.nn.functional.gelu has them.
float activate(Activation activation, float v) {
    switch (activation) {
        case Activation::relu:
            return v < 0.0f ? 0.0f : v;
        case Activation::silu:
            return v / (1.0f + std::exp(-v));
        case Activation::gelu:
            return 0.5f * v * (1.0f + std::erf(v * 0.70710678118654752f));
        case Activation::gelu_tanh:
            return 0.5f * v * (1.0f + std::tanh(0.79788456080286536f * (v + 0.044715f * v * v * v)));
    }
    return v;
}

bool all_zero(const float* values, std::size_t count) {
    return std::all_of(values, values + count, [](float value) { return value == 0.0f; });
}

std::size_t divide_up(std::size_t value, std::size_t by) { return (value + by - 1) / by; }

}  // namespace

Ffn::Ffn(FfnShape shape, std::size_t threads, const char* instruction_set)
    : shape_(shape), kernels_(kernels_for(shape.dtype, instruction_set)), workers_(threads) {}

const char* Ffn::row(std::uint64_t bundle, std::size_t part) const {
    return reinterpret_cast<const char*>(bundle) + part * shape_.hidden * bytes_of(shape_.dtype);
}

void Ffn::fire(std::uint64_t bundle, const float* bias, const float* x, std::size_t tokens, float* h) const {
    kernels_.dots(row(bundle, 0), x, shape_.hidden, tokens, h);
    for (std::size_t t = 0; t < tokens; ++t) h[t] = activate(shape_.activation, h[t] + (bias ? *bias : 0.0f));
    if (!shape_.gated || all_zero(h, tokens)) return;
    float up[kTokensMax];
    kernels_.dots(row(bundle, 1), x, shape_.hidden, tokens, up);
    for (std::size_t t = 0; t < tokens; ++t) h[t] *= up[t];
}

// A zero that is multiplied and added changes no finite sum, so leaving it out is a matter of bytes, not of bits.
std::size_t Ffn::keep_fired(const std::uint64_t* bundles, std::size_t count, std::size_t tokens) {
    std::size_t kept = 0;
    for (std::size_t i = 0; i < count; ++i) {
        const float* h = h_.data() + i * tokens;
        if (all_zero(h, tokens)) continue;
        std::copy_n(h, tokens, h_.data() + kept * tokens);
        down_rows_[kept++] = row(bundles[i], parts() - 1);
    }
    return kept;
}

void Ffn::add_rows(const std::uint64_t* bundles, std::size_t count, const float* bias, const float* x,
                   std::size_t tokens, float* y) {
    assert(tokens <= kTokensMax);
    if (h_.size() < count * tokens) h_.resize(count * tokens);
    if (down_rows_.size() < count) down_rows_.resize(count);
    workers_.run(divide_up(count, kNeuronsPerItem), [&](std::size_t item) {
        const std::size_t end = std::min(count, (item + 1) * kNeuronsPerItem);
        for (std::size_t i = item * kNeuronsPerItem; i < end; ++i)
            fire(bundles[i], bias ? bias + i : nullptr, x, tokens, h_.data() + i * tokens);
    });
    const std::size_t fired = keep_fired(bundles, count, tokens);
    // Each element of y is one thread's, and takes the neurons in order. A slice is as long as the threads allow.
    const std::size_t share = divide_up(shape_.hidden, workers_.threads());
    const std::size_t rounded = divide_up(share, kElementsPerItem) * kElementsPerItem;
    const std::size_t slice = std::clamp(rounded, kElementsPerItem, kElementsMax);
    workers_.run(divide_up(shape_.hidden, slice), [&](std::size_t item) {
        kernels_.accumulate(down_rows_.data(), h_.data(), fired, tokens, shape_.hidden, item * slice,
                            std::min(shape_.hidden, (item + 1) * slice), y);
    });
}

void Ffn::gather(const std::uint64_t* bundles, std::size_t count, std::size_t first, std::size_t capacity, float* out) {
    assert(first + count <= capacity);
    workers_.run(divide_up(count, kNeuronsPerItem), [&](std::size_t item) {
        const std::size_t end = std::min(count, (item + 1) * kNeuronsPerItem);
        for (std::size_t i = item * kNeuronsPerItem; i < end; ++i)
            for (std::size_t part = 0; part < parts(); ++part)
                kernels_.upcast(row(bundles[i], part), shape_.hidden,
                                out + (part * capacity + first + i) * shape_.hidden);
    });
}

}  // namespace flashclient
