// The loops of kernels.h, written once. Included by one file per instruction set, which defines first
//   KERNEL  the attributes of a function (its target), so that no function leaks into another file's code
//   Lane    a vector of fp32: kWidth, kTileRows, kTileTokens, load<dtype>(row), load_some<dtype>(row, n), store,
//   store_some, fused
//           multiply-add, and sum
// All of it has internal linkage: the same names exist once per instruction set.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

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
template <>
struct Element<Dtype::i8> {
    using type = std::int8_t;
};

constexpr std::size_t kLineBytes = 64;

// rows x tokens dots at once. A dot is one chain of vectors, so that the shape of the tile changes no bit of it; the
// tile's many chains hide the latency of the multiply-add. `ahead` are the rows of the next tile.
template <Dtype dtype, std::size_t rows, std::size_t tokens>
KERNEL void dots_of_tile(const typename Element<dtype>::type* const* row, const void* const* ahead,
                         const float* const* x, std::size_t hidden, float (&dots)[rows][tokens]) {
    constexpr std::size_t width = Lane::kWidth;
    constexpr std::size_t line = kLineBytes / bytes_of(dtype);
    constexpr int cache = tokens == 1 ? 3 : 2;  // the first, unless x needs it
    Lane sums[rows][tokens];
    for (auto& of_row : sums)
        for (Lane& lane : of_row) lane = Lane::zero();
    std::size_t j = 0;
    for (; j + line <= hidden; j += line) {
        for (std::size_t r = 0; r < rows; ++r)
            __builtin_prefetch(static_cast<const char*>(ahead[r]) + j * bytes_of(dtype), 0, cache);
        for (std::size_t k = j; k < j + line; k += width) {
            Lane weights[rows];
            for (std::size_t r = 0; r < rows; ++r) weights[r] = Lane::template load<dtype>(row[r] + k);
            for (std::size_t t = 0; t < tokens; ++t) {
                const Lane value = Lane::template load<Dtype::f32>(x[t] + k);
                for (std::size_t r = 0; r < rows; ++r) sums[r][t] = fma(weights[r], value, sums[r][t]);
            }
        }
    }
    for (; j < hidden; j += width) {
        const std::size_t some = std::min(width, hidden - j);
        for (std::size_t r = 0; r < rows; ++r) {
            const Lane weight = Lane::template load_some<dtype>(row[r] + j, some);
            for (std::size_t t = 0; t < tokens; ++t)
                sums[r][t] = fma(weight, Lane::template load_some<Dtype::f32>(x[t] + j, some), sums[r][t]);
        }
    }
    for (std::size_t r = 0; r < rows; ++r)
        for (std::size_t t = 0; t < tokens; ++t) dots[r][t] = sum(sums[r][t]);
}

// Tiles at the edges repeat their last row or token: it is in the cache, and the code stays one.
template <Dtype dtype, std::size_t tile_rows, std::size_t tile_tokens>
KERNEL void dots_in_tiles(const void* const* rows, std::size_t row_count, const float* x, std::size_t hidden,
                          std::size_t tokens, float* dots) {
    const typename Element<dtype>::type* row[tile_rows];
    const void* ahead[tile_rows];
    const float* of_token[tile_tokens];
    float tile[tile_rows][tile_tokens];
    for (std::size_t i = 0; i < row_count; i += tile_rows) {
        for (std::size_t r = 0; r < tile_rows; ++r) {
            row[r] = static_cast<const typename Element<dtype>::type*>(rows[std::min(i + r, row_count - 1)]);
            ahead[r] = rows[std::min(i + tile_rows + r, row_count - 1)];
        }
        for (std::size_t t = 0; t < tokens; t += tile_tokens) {
            for (std::size_t c = 0; c < tile_tokens; ++c) of_token[c] = x + std::min(t + c, tokens - 1) * hidden;
            dots_of_tile<dtype, tile_rows, tile_tokens>(row, ahead, of_token, hidden, tile);
            for (std::size_t r = 0; r < std::min(tile_rows, row_count - i); ++r)
                std::copy_n(tile[r], std::min(tile_tokens, tokens - t), dots + (i + r) * tokens + t);
        }
    }
}

template <Dtype dtype>
KERNEL void dots(const void* const* rows, std::size_t row_count, const float* x, std::size_t hidden, std::size_t tokens,
                 float* dots) {
    if (tokens == 1)
        dots_in_tiles<dtype, 8, 1>(rows, row_count, x, hidden, tokens, dots);
    else
        dots_in_tiles<dtype, Lane::kTileRows, Lane::kTileTokens>(rows, row_count, x, hidden, tokens, dots);
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
    constexpr std::size_t step = 8;
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

KERNEL std::size_t differing_bits(const std::uint8_t* a, const std::uint8_t* b, std::size_t bytes) {
    std::size_t differing = 0;
    for (std::size_t j = 0; j < bytes; j += sizeof(std::uint64_t)) {
        const std::size_t some = std::min(sizeof(std::uint64_t), bytes - j);
        std::uint64_t left = 0, right = 0;
        std::memcpy(&left, a + j, some);
        std::memcpy(&right, b + j, some);
        differing += static_cast<std::size_t>(__builtin_popcountll(left ^ right));
    }
    return differing;
}

template <Dtype dtype>
const Kernels* table(const char* instruction_set) {
    static const Kernels kernels{instruction_set, dots<dtype>, accumulate<dtype>, upcast<dtype>, differing_bits};
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
        case Dtype::i8:
            return table<Dtype::i8>(instruction_set);
    }
    return nullptr;
}

}  // namespace
}  // namespace flashclient
