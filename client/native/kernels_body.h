// The loops of kernels.h, written once. Included by one file per instruction set, which defines first
//   KERNEL  the attributes of a function (its target), so that no function leaks into another file's code
//   Lane    a vector of fp32: kWidth, kTokensMax, load<dtype>(row), load_some<dtype>(row, n), store, store_some, fused
//           multiply-add, and sum
// All of it has internal linkage: the same names exist once per instruction set.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace flashclient {
namespace {

template <Dtype dtype>
struct Element {
    using type = std::uint16_t;
};
template <>
struct Element<Dtype::f32> {
    using type = float;
};

// Four accumulators hide the latency of the multiply-add; their sum is taken in pairs.
constexpr std::size_t kAccumulators = 4;

// `tokens` dots at once: each weight is widened once for all of them.
template <Dtype dtype, std::size_t tokens>
KERNEL void dots_of(const typename Element<dtype>::type* row, const float* x, std::size_t hidden, float* dots) {
    constexpr std::size_t width = Lane::kWidth;
    Lane sums[tokens][kAccumulators];
    for (auto& sum : sums)
        for (Lane& lane : sum) lane = Lane::zero();
    std::size_t j = 0;
    for (; j + kAccumulators * width <= hidden; j += kAccumulators * width) {
        for (std::size_t a = 0; a < kAccumulators; ++a) {
            const Lane weight = Lane::template load<dtype>(row + j + a * width);
            for (std::size_t t = 0; t < tokens; ++t)
                sums[t][a] = fma(weight, Lane::template load<Dtype::f32>(x + t * hidden + j + a * width), sums[t][a]);
        }
    }
    for (std::size_t a = 0; j < hidden; ++a, j += width) {
        const std::size_t some = std::min(width, hidden - j);
        const Lane weight = Lane::template load_some<dtype>(row + j, some);
        for (std::size_t t = 0; t < tokens; ++t)
            sums[t][a] = fma(weight, Lane::template load_some<Dtype::f32>(x + t * hidden + j, some), sums[t][a]);
    }
    for (std::size_t t = 0; t < tokens; ++t) dots[t] = sum((sums[t][0] + sums[t][1]) + (sums[t][2] + sums[t][3]));
}

template <Dtype dtype>
KERNEL void dots(const void* row, const float* x, std::size_t hidden, std::size_t tokens, float* dots) {
    const auto* weights = static_cast<const typename Element<dtype>::type*>(row);
    std::size_t t = 0;
    for (; t + Lane::kTokensMax <= tokens; t += Lane::kTokensMax)
        dots_of<dtype, Lane::kTokensMax>(weights, x + t * hidden, hidden, dots + t);
    for (; t < tokens; ++t) dots_of<dtype, 1>(weights, x + t * hidden, hidden, dots + t);
}

// y += h * row for `rows` rows, so that y is loaded and stored once for all of them; `ahead` are the rows that come
// next.
template <Dtype dtype, std::size_t rows>
KERNEL void accumulate_rows(const void* const* row_of, const float* h, std::size_t tokens, std::size_t hidden,
                            std::size_t begin, std::size_t end, float* y, const void* const* ahead) {
    using Weight = typename Element<dtype>::type;
    for (std::size_t j = begin; j < end; j += Lane::kWidth) {
        const std::size_t some = std::min(Lane::kWidth, end - j);
        const bool whole = some == Lane::kWidth;
        Lane weights[rows];
        for (std::size_t k = 0; k < rows; ++k) {
            const auto* row = static_cast<const Weight*>(row_of[k]);
            __builtin_prefetch(static_cast<const Weight*>(ahead[k]) + j);
            weights[k] = whole ? Lane::template load<dtype>(row + j) : Lane::template load_some<dtype>(row + j, some);
        }
        for (std::size_t t = 0; t < tokens; ++t) {
            float* out = y + t * hidden + j;
            Lane sum = whole ? Lane::template load<Dtype::f32>(out) : Lane::template load_some<Dtype::f32>(out, some);
            for (std::size_t k = 0; k < rows; ++k) sum = fma(weights[k], Lane::all(h[k * tokens + t]), sum);
            if (whole)
                sum.store(out);
            else
                sum.store_some(out, some);
        }
    }
}

template <Dtype dtype>
KERNEL void accumulate(const void* const* rows, const float* h, std::size_t row_count, std::size_t tokens,
                       std::size_t hidden, std::size_t begin, std::size_t end, float* y) {
    constexpr std::size_t step = 4;
    std::size_t k = 0;
    for (; k + step <= row_count; k += step) {
        const void* const* ahead = rows + (k + 2 * step <= row_count ? k + step : k);
        accumulate_rows<dtype, step>(rows + k, h + k * tokens, tokens, hidden, begin, end, y, ahead);
    }
    for (; k < row_count; ++k)
        accumulate_rows<dtype, 1>(rows + k, h + k * tokens, tokens, hidden, begin, end, y, rows + k);
}

template <Dtype dtype>
KERNEL void upcast(const void* row, std::size_t hidden, float* out) {
    const auto* weights = static_cast<const typename Element<dtype>::type*>(row);
    std::size_t j = 0;
    for (; j + Lane::kWidth <= hidden; j += Lane::kWidth) Lane::template load<dtype>(weights + j).store(out + j);
    if (j < hidden) Lane::template load_some<dtype>(weights + j, hidden - j).store_some(out + j, hidden - j);
}

template <Dtype dtype>
const Kernels* table(const char* instruction_set) {
    static const Kernels kernels{instruction_set, dots<dtype>, accumulate<dtype>, upcast<dtype>};
    return &kernels;
}

const Kernels* table_for(Dtype dtype, const char* instruction_set) {
    switch (dtype) {
        case Dtype::f32:
            return table<Dtype::f32>(instruction_set);
        case Dtype::bf16:
            return table<Dtype::bf16>(instruction_set);
        case Dtype::f16:
            return table<Dtype::f16>(instruction_set);
    }
    return nullptr;
}

}  // namespace
}  // namespace flashclient
