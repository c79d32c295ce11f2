#include "kernels/norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace flashclient {
namespace {

constexpr size_t CHAINS = 16;               // sums side by side, which compilers keep in vectors
constexpr size_t ELEMENTS_OF_ITEM = 32768;  // of rows that one thread computes: some microseconds

template <typename Term>
float sum_of(size_t count, Term&& term) {
    float sums[CHAINS] = {};
    size_t i = 0;
    for (; i + CHAINS <= count; i += CHAINS) {
        for (size_t chain = 0; chain < CHAINS; chain++) sums[chain] += term(i + chain);
    }
    for (size_t chain = 0; i < count; i++, chain++) sums[chain] += term(i);
    for (size_t half = CHAINS / 2; half > 0; half /= 2) {
        for (size_t chain = 0; chain < half; chain++) sums[chain] += sums[chain + half];
    }
    return sums[0];
}

struct Scratch {
    std::vector<float> x, weight, bias;

    void resize(size_t width) {
        for (std::vector<float>* values : {&x, &weight, &bias}) values->resize(width);
    }
};

}  // namespace

void Norms::apply(const Norm& norm, const void* x, size_t rows, void* y) const {
    const size_t row_bytes = norm.width * bytes_of(dtype_);
    const size_t together = std::max<size_t>(1, ELEMENTS_OF_ITEM / std::max<size_t>(norm.width, 1));
    const auto some = [&](size_t item) {
        for (size_t row = item * together; row < std::min(rows, (item + 1) * together); row++) {
            apply_to_row(norm, static_cast<const char*>(x) + row * row_bytes, static_cast<char*>(y) + row * row_bytes);
        }
    };
    if (rows <= together) return some(0);
    workers_.run(divide_up(rows, together), some);
}

void Norms::apply_to_row(const Norm& norm, const void* x, void* y) const {
    static thread_local Scratch scratch;
    const size_t width = norm.width;
    scratch.resize(width);
    float* values = scratch.x.data();
    float* weight = scratch.weight.data();
    kernels_.upcast(x, width, values);
    if (norm.weight != nullptr) {
        kernels_.upcast(norm.weight, width, weight);
    } else {
        std::fill_n(weight, width, 1.0f);
    }
    const float count = static_cast<float>(width);
    if (norm.kind == NormKind::layer) {
        float* bias = scratch.bias.data();
        if (norm.bias != nullptr) {
            kernels_.upcast(norm.bias, width, bias);
        } else {
            std::fill_n(bias, width, 0.0f);
        }
        const float mean = sum_of(width, [&](size_t i) { return values[i]; }) / count;
        for (size_t i = 0; i < width; i++) values[i] -= mean;
        const float variance = sum_of(width, [&](size_t i) { return values[i] * values[i]; }) / count;
        const float factor = 1.0f / std::sqrt(variance + norm.eps);
        for (size_t i = 0; i < width; i++) values[i] = values[i] * factor * weight[i] + bias[i];
        return kernels_.downcast(values, width, y);
    }
    const float mean_square = sum_of(width, [&](size_t i) { return values[i] * values[i]; }) / count;
    const float factor = 1.0f / std::sqrt(mean_square + norm.eps);
    if (norm.kind == NormKind::scaled_rms) {
        for (size_t i = 0; i < width; i++) values[i] = values[i] * factor * (norm.offset + weight[i]);
        return kernels_.downcast(values, width, y);
    }
    for (size_t i = 0; i < width; i++) values[i] *= factor;
    if (dtype_ != Dtype::f32) {
        kernels_.downcast(values, width, y);
        kernels_.upcast(y, width, values);
    }
    for (size_t i = 0; i < width; i++) values[i] *= weight[i];
    kernels_.downcast(values, width, y);
}

}  // namespace flashclient
