// The loops of kernels.h, written once. Included by one file per instruction set, which defines first
//   KERNEL  the attributes of a function (its target), so that no function leaks into another file's code
//   LANE    the same, and always inline
//   Lane    a vector of fp32: kWidth, kTileRows, kTileTokens, load<dtype>(row), load_some<dtype>(row, n), store,
//   store_some, fma (a * b + c), max, sum, and power_of_two (2^n of the low bits of fp32, bias included)
// All of it has internal linkage: the same names exist once per instruction set.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/kernels.h"

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
constexpr std::size_t kBlockRows = 96;
constexpr std::size_t kBlockElements = 4096;  // of x, those of a tile together: half of a first cache
constexpr std::size_t kStripRows = 128;       // of down columns, three lines of each: less than a first cache
static_assert(kBlockElements / kTokensMax % kLineBytes == 0);

// Adds elements [begin, end) to rows x tokens dots at once. A dot is one chain of vectors, which rests in `sums`
// between two calls, so that neither the shape of a tile nor where a chain rests changes a bit of it; the tile's many
// chains hide the latency of the multiply-add. `ahead` are the rows of the next tile. begin is a multiple of a line.
template <Dtype dtype, std::size_t rows, std::size_t tokens>
LANE void dots_of_tile(const typename Element<dtype>::type* const* row, const void* const* ahead, const float* const* x,
                       std::size_t begin, std::size_t end, Lane (&sums)[rows][tokens]) {
    constexpr std::size_t width = Lane::kWidth;
    constexpr std::size_t line = kLineBytes / bytes_of(dtype);
    constexpr int cache = tokens == 1 ? 3 : 2;  // the first, unless x needs it
    Lane chain[rows][tokens];
    for (std::size_t r = 0; r < rows; ++r)
        for (std::size_t t = 0; t < tokens; ++t) chain[r][t] = begin == 0 ? Lane::zero() : sums[r][t];
    std::size_t j = begin;
    for (; j + line <= end; j += line) {
        for (std::size_t r = 0; r < rows; ++r)
            __builtin_prefetch(static_cast<const char*>(ahead[r]) + j * bytes_of(dtype), 0, cache);
        for (std::size_t k = j; k < j + line; k += width) {
            Lane weights[rows];
            for (std::size_t r = 0; r < rows; ++r) weights[r] = Lane::template load<dtype>(row[r] + k);
            for (std::size_t t = 0; t < tokens; ++t) {
                const Lane value = Lane::template load<Dtype::f32>(x[t] + k);
                for (std::size_t r = 0; r < rows; ++r) chain[r][t] = fma(weights[r], value, chain[r][t]);
            }
        }
    }
    for (; j < end; j += width) {
        const std::size_t some = std::min(width, end - j);
        for (std::size_t r = 0; r < rows; ++r) {
            const Lane weight = Lane::template load_some<dtype>(row[r] + j, some);
            for (std::size_t t = 0; t < tokens; ++t)
                chain[r][t] = fma(weight, Lane::template load_some<Dtype::f32>(x[t] + j, some), chain[r][t]);
        }
    }
    for (std::size_t r = 0; r < rows; ++r)
        for (std::size_t t = 0; t < tokens; ++t) sums[r][t] = chain[r][t];
}

// The rows of a tile and of the next. Tiles at the edge repeat their last row: it is in the cache, and the code stays
// one.
template <Dtype dtype, std::size_t tile_rows>
struct Tile {
    const typename Element<dtype>::type* row[tile_rows];
    const void* ahead[tile_rows];

    KERNEL Tile(const void* const* rows, std::size_t row_count, std::size_t first) {
        for (std::size_t r = 0; r < tile_rows; ++r) {
            row[r] = static_cast<const typename Element<dtype>::type*>(rows[std::min(first + r, row_count - 1)]);
            ahead[r] = rows[std::min(first + tile_rows + r, row_count - 1)];
        }
    }
};

template <Dtype dtype>
KERNEL void dots_of_one(const void* const* rows, std::size_t row_count, const float* x, std::size_t hidden,
                        float* dots) {
    constexpr std::size_t tile_rows = 8;
    Lane sums[tile_rows][1];
    for (std::size_t i = 0; i < row_count; i += tile_rows) {
        const Tile<dtype, tile_rows> tile(rows, row_count, i);
        dots_of_tile<dtype, tile_rows, 1>(tile.row, tile.ahead, &x, 0, hidden, sums);
        float of_row[tile_rows];
        for (std::size_t r = 0; r < tile_rows; ++r) of_row[r] = sum(sums[r][0]);
        std::copy_n(of_row, std::min(tile_rows, row_count - i), dots + i);
    }
}

// A block of rows is taken some elements at a time: those of x for one tile stay in the first cache, those of the rows
// in the second. Tiles at the edge repeat their last token.
template <Dtype dtype, std::size_t tile_rows, std::size_t tile_tokens>
KERNEL void dots_in_tiles(const void* const* rows, std::size_t row_count, const float* x, std::size_t hidden,
                          std::size_t tokens, float* dots) {
    constexpr std::size_t block_tiles = kBlockRows / tile_rows, block_rows = block_tiles * tile_rows;
    constexpr std::size_t elements = kBlockElements / tile_tokens;
    Lane sums[(kTokensMax + tile_tokens - 1) / tile_tokens][block_tiles][tile_rows][tile_tokens];
    const float* of_token[tile_tokens];
    for (std::size_t first = 0; first < row_count; first += block_rows) {
        const std::size_t last = std::min(first + block_rows, row_count);
        std::size_t begin = 0;
        do {
            const std::size_t end = std::min(begin + elements, hidden);
            for (std::size_t t = 0; t < tokens; t += tile_tokens) {
                for (std::size_t c = 0; c < tile_tokens; ++c) of_token[c] = x + std::min(t + c, tokens - 1) * hidden;
                auto* of_tile = sums[t / tile_tokens];
                for (std::size_t i = first; i < last; i += tile_rows) {
                    const Tile<dtype, tile_rows> tile(rows, row_count, i);
                    dots_of_tile<dtype, tile_rows, tile_tokens>(tile.row, tile.ahead, of_token, begin, end, *of_tile++);
                }
            }
            begin = end;
        } while (begin < hidden);
        for (std::size_t i = first; i < last; i += tile_rows)
            for (std::size_t r = 0; r < std::min(tile_rows, last - i); ++r)
                for (std::size_t t = 0; t < tokens; ++t)
                    dots[(i + r) * tokens + t] =
                        sum(sums[t / tile_tokens][(i - first) / tile_rows][r][t % tile_tokens]);
    }
}

template <Dtype dtype>
KERNEL void dots(const void* const* rows, std::size_t row_count, const float* x, std::size_t hidden, std::size_t tokens,
                 float* dots) {
    if (tokens == 1)
        dots_of_one<dtype>(rows, row_count, x, hidden, dots);
    else if (tokens == 2)
        dots_in_tiles<dtype, 4, 2>(rows, row_count, x, hidden, tokens, dots);
    else
        dots_in_tiles<dtype, Lane::kTileRows, Lane::kTileTokens>(rows, row_count, x, hidden, tokens, dots);
}

// y += h * row for `rows` rows of one token, so that y is loaded and stored once for all of them; `ahead` are the rows
// that come next.
template <Dtype dtype, std::size_t rows>
KERNEL void accumulate_rows(const void* const* row_of, const float* h, std::size_t begin, std::size_t end, float* y,
                            const void* const* ahead) {
    using Weight = typename Element<dtype>::type;
    for (std::size_t j = begin; j < end; j += Lane::kWidth) {
        const std::size_t some = std::min(Lane::kWidth, end - j);
        const bool whole = some == Lane::kWidth;
        Lane sum = whole ? Lane::template load<Dtype::f32>(y + j) : Lane::template load_some<Dtype::f32>(y + j, some);
        for (std::size_t k = 0; k < rows; ++k) {
            const auto* row = static_cast<const Weight*>(row_of[k]);
            __builtin_prefetch(static_cast<const Weight*>(ahead[k]) + j);
            const Lane weight =
                whole ? Lane::template load<dtype>(row + j) : Lane::template load_some<dtype>(row + j, some);
            sum = fma(weight, Lane::all(h[k]), sum);
        }
        if (whole)
            sum.store(y + j);
        else
            sum.store_some(y + j, some);
    }
}

template <Dtype dtype>
KERNEL void accumulate_one(const void* const* rows, const float* h, std::size_t row_count, std::size_t begin,
                           std::size_t end, float* y) {
    constexpr std::size_t step = 8;
    std::size_t k = 0;
    for (; k + step <= row_count; k += step)
        accumulate_rows<dtype, step>(rows + k, h + k, begin, end, y, rows + (k + 2 * step <= row_count ? k + step : k));
    for (; k < row_count; ++k) accumulate_rows<dtype, 1>(rows + k, h + k, begin, end, y, rows + k);
}

// y += h * row for all rows, in registers: elements [j, j + some) of y, `lanes` vectors, for a tile of tokens.
template <Dtype dtype, std::size_t lanes, std::size_t tile_tokens>
KERNEL void accumulate_tile(const void* const* rows, const float* const* h, std::size_t row_count, std::size_t tokens,
                            std::size_t j, std::size_t some, float* const* y, bool fetch_ahead) {
    using Weight = typename Element<dtype>::type;
    const bool whole = some == lanes * Lane::kWidth;
    Lane sums[tile_tokens][lanes];
    for (std::size_t t = 0; t < tile_tokens; ++t)
        for (std::size_t l = 0; l < lanes; ++l)
            sums[t][l] = whole ? Lane::template load<Dtype::f32>(y[t] + j + l * Lane::kWidth)
                               : Lane::template load_some<Dtype::f32>(y[t] + j, some);
    for (std::size_t k = 0; k < row_count; ++k) {
        const auto* row = static_cast<const Weight*>(rows[k]) + j;
        if (fetch_ahead)
            for (std::size_t l = 0; l < lanes; l += kLineBytes / bytes_of(dtype) / Lane::kWidth)
                __builtin_prefetch(row + (lanes + l) * Lane::kWidth);
        Lane weights[lanes];
        for (std::size_t l = 0; l < lanes; ++l)
            weights[l] =
                whole ? Lane::template load<dtype>(row + l * Lane::kWidth) : Lane::template load_some<dtype>(row, some);
        for (std::size_t t = 0; t < tile_tokens; ++t) {
            const Lane factor = Lane::all(h[t][k * tokens]);
            for (std::size_t l = 0; l < lanes; ++l) sums[t][l] = fma(weights[l], factor, sums[t][l]);
        }
    }
    for (std::size_t t = 0; t < tile_tokens; ++t)
        for (std::size_t l = 0; l < lanes; ++l) {
            if (whole)
                sums[t][l].store(y[t] + j + l * Lane::kWidth);
            else
                sums[t][l].store_some(y[t] + j, some);
        }
}

// Tiles at the edge repeat their last token, and store it again.
template <Dtype dtype, std::size_t lanes>
KERNEL void accumulate_strip(const void* const* rows, const float* h, std::size_t row_count, std::size_t tokens,
                             std::size_t hidden, std::size_t j, std::size_t some, float* y) {
    constexpr std::size_t tile_tokens = Lane::kTileTokens;
    const float* of_token[tile_tokens];
    float* out[tile_tokens];
    for (std::size_t t = 0; t < tokens; t += tile_tokens) {
        for (std::size_t c = 0; c < tile_tokens; ++c) {
            const std::size_t token = std::min(t + c, tokens - 1);
            of_token[c] = h + token;
            out[c] = y + token * hidden;
        }
        accumulate_tile<dtype, lanes, tile_tokens>(rows, of_token, row_count, tokens, j, some, out, t == 0);
    }
}

// What is left of [j, end) after whole strips of more than `lanes` vectors.
template <Dtype dtype, std::size_t lanes>
KERNEL void accumulate_rest(const void* const* rows, const float* h, std::size_t row_count, std::size_t tokens,
                            std::size_t hidden, std::size_t j, std::size_t end, float* y) {
    constexpr std::size_t strip = lanes * Lane::kWidth;
    if (j + strip <= end) {
        accumulate_strip<dtype, lanes>(rows, h, row_count, tokens, hidden, j, strip, y);
        j += strip;
    }
    if constexpr (lanes > 1)
        accumulate_rest<dtype, lanes - 1>(rows, h, row_count, tokens, hidden, j, end, y);
    else if (j < end)
        accumulate_strip<dtype, 1>(rows, h, row_count, tokens, hidden, j, end - j, y);
}

// A strip of a few vectors of some rows stays in the first cache for all tokens.
template <Dtype dtype>
KERNEL void accumulate(const void* const* rows, const float* h, std::size_t row_count, std::size_t tokens,
                       std::size_t hidden, std::size_t begin, std::size_t end, float* y) {
    constexpr std::size_t strip = Lane::kTileRows * Lane::kWidth;
    if (tokens == 1) return accumulate_one<dtype>(rows, h, row_count, begin, end, y);
    for (std::size_t k = 0; k < row_count; k += kStripRows) {
        const std::size_t count = std::min(kStripRows, row_count - k);
        std::size_t j = begin;
        for (; j + strip <= end; j += strip)
            accumulate_strip<dtype, Lane::kTileRows>(rows + k, h + k * tokens, count, tokens, hidden, j, strip, y);
        accumulate_rest<dtype, Lane::kTileRows - 1>(rows + k, h + k * tokens, count, tokens, hidden, j, end, y);
    }
}

template <Dtype dtype>
KERNEL void upcast(const void* row, std::size_t hidden, float* out) {
    const auto* weights = static_cast<const typename Element<dtype>::type*>(row);
    std::size_t j = 0;
    for (; j + Lane::kWidth <= hidden; j += Lane::kWidth) Lane::template load<dtype>(weights + j).store(out + j);
    if (j < hidden) Lane::template load_some<dtype>(weights + j, hidden - j).store_some(out + j, hidden - j);
}

// e^x for x <= 0 or NaN: 2^n * e^r, n the integer nearest to x / ln 2, which adding kRound leaves in the low bits; the
// polynomial is that of Cephes' expf.
KERNEL Lane exponential(Lane x) {
    constexpr float kRound = 0x1.8p23f + 127.0f;  // with the bias of an exponent
    const Lane one = Lane::all(1.0f), zero = Lane::zero();
    x = max(Lane::all(-88.0f), x);  // n is -127 at least, which makes 0; a NaN stays one
    const Lane rounded = fma(x, Lane::all(1.44269504f), Lane::all(kRound));
    const Lane n = fma(rounded, one, Lane::all(-kRound));
    const Lane r = fma(n, Lane::all(2.12194440e-4f), fma(n, Lane::all(-0.693359375f), x));
    Lane power = Lane::all(1.9875691500e-4f);
    for (float coefficient :
         {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f, 1.0f, 1.0f})
        power = fma(power, r, Lane::all(coefficient));
    return fma(power, power_of_two(rounded), zero);
}

KERNEL float greatest_of(const float* values, std::size_t count) {
    Lane lanes = Lane::all(values[0]);
    std::size_t i = 0;
    for (; i + Lane::kWidth <= count; i += Lane::kWidth)
        lanes = max(lanes, Lane::template load<Dtype::f32>(values + i));
    for (; i < count; ++i) lanes = max(lanes, Lane::all(values[i]));
    float each[Lane::kWidth];
    lanes.store(each);
    return *std::max_element(each, each + Lane::kWidth);
}

KERNEL float exponentials(float* values, std::size_t count) {
    const Lane shift = Lane::all(-greatest_of(values, count)), one = Lane::all(1.0f);
    Lane sums = Lane::zero();
    for (std::size_t i = 0; i < count; i += Lane::kWidth) {
        const std::size_t some = std::min(Lane::kWidth, count - i);
        const bool whole = some == Lane::kWidth;
        float* at = values + i;
        const Lane x = whole ? Lane::template load<Dtype::f32>(at) : Lane::template load_some<Dtype::f32>(at, some);
        Lane result = exponential(fma(x, one, shift));
        if (whole) {
            result.store(at);
        } else {
            result.store_some(at, some);
            result = Lane::template load_some<Dtype::f32>(at, some);  // zeros behind the end
        }
        sums = fma(result, one, sums);
    }
    return sum(sums);
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
    static const Kernels kernels{instruction_set, dots<dtype>,  accumulate<dtype>,
                                 upcast<dtype>,   exponentials, differing_bits};
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
