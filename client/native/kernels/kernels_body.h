// The loops of kernels.h, written once. Included by one file per instruction set, which defines first
//   KERNEL  the attributes of a function (its target), so that no function leaks into another file's code
//   LANE    the same, and always inline
//   Lane    a vector of fp32: WIDTH, TILE_ROWS, TILE_TOKENS, load<dtype>(row), load_some<dtype>(row, n), store,
//           store_some, store_as<dtype>(row) for bf16 and f16, fma (a * b + c), max, divide, sum, and power_of_two (2^n
//           of the low bits of fp32, bias included), and sums_of (the sum of the lanes of each of WIDTH vectors)
// and includes formats/codes_*.h, with what decoding blocks needs of its vectors.
// Everything has internal linkage, because the same names exist once per instruction set.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/kernels.h"

namespace flashclient {
namespace {

template <Dtype dtype>
struct Element {
    using type = uint16_t;
};
template <>
struct Element<Dtype::f32> {
    using type = float;
};
template <>
struct Element<Dtype::i8> {
    using type = int8_t;
};

constexpr size_t LINE_BYTES = 64;
constexpr size_t AHEAD_BYTES = 8192;  // of one token's rows, fetched before they are computed: latency times speed
constexpr size_t BLOCK_ROWS = 96;
constexpr size_t BLOCK_ELEMENTS = 4096;  // of x, for all tokens of a tile: half of an L1 cache
constexpr size_t TERMS = 16;             // down columns that are added together for several tokens
constexpr size_t FEW_TERMS = 4;          // the same where there are fewer
constexpr size_t TERM_ELEMENTS = 512;    // of them: half of an L1 cache in 16 bit
static_assert(BLOCK_ELEMENTS / TOKENS_MAX % LINE_BYTES == 0);

// Into the L2 cache, which has more misses under way than L1: that reads memory up to 1.5 times as fast.
LANE void prefetch(const void* line) { __builtin_prefetch(line, 0, 2); }

// Adds elements [begin, end) to rows x tokens dots at once. A dot is one chain of vector sums, kept in `sums` between
// calls, so neither the shape of a tile nor the borders between calls change a bit of it. The many chains of a tile
// hide the latency of the multiply-add. What is read next lies `shift` bytes behind the same place in the rows `ahead`.
// `begin` is a multiple of a cache line.
template <Dtype dtype, size_t rows, size_t tokens>
LANE void dots_of_tile(const typename Element<dtype>::type* const* row, const void* const* ahead, ptrdiff_t shift,
                       const float* const* x, size_t begin, size_t end, Lane (&sums)[rows][tokens]) {
    constexpr size_t LINE = LINE_BYTES / bytes_of(dtype);
    Lane chain[rows][tokens];
    for (size_t r = 0; r < rows; r++) {
        for (size_t t = 0; t < tokens; t++) chain[r][t] = begin == 0 ? Lane::zero() : sums[r][t];
    }
    size_t j = begin;
    for (; j + LINE <= end; j += LINE) {
        for (size_t r = 0; r < rows; r++) {
            prefetch(static_cast<const char*>(ahead[r]) + static_cast<ptrdiff_t>(j * bytes_of(dtype)) + shift);
        }
        for (size_t k = j; k < j + LINE; k += Lane::WIDTH) {
            Lane weights[rows];
            for (size_t r = 0; r < rows; r++) weights[r] = Lane::template load<dtype>(row[r] + k);
            for (size_t t = 0; t < tokens; t++) {
                const Lane value = Lane::template load<Dtype::f32>(x[t] + k);
                for (size_t r = 0; r < rows; r++) chain[r][t] = fma(weights[r], value, chain[r][t]);
            }
        }
    }
    for (; j < end; j += Lane::WIDTH) {
        const size_t some = std::min(Lane::WIDTH, end - j);
        for (size_t r = 0; r < rows; r++) {
            const Lane weight = Lane::template load_some<dtype>(row[r] + j, some);
            for (size_t t = 0; t < tokens; t++) {
                chain[r][t] = fma(weight, Lane::template load_some<Dtype::f32>(x[t] + j, some), chain[r][t]);
            }
        }
    }
    for (size_t r = 0; r < rows; r++) {
        for (size_t t = 0; t < tokens; t++) sums[r][t] = chain[r][t];
    }
}

// The rows of a tile and of the next. A tile at the edge repeats its last row, which is in the cache, so that all tiles
// run the same code.
template <Dtype dtype, size_t tile_rows>
struct Tile {
    const typename Element<dtype>::type* row[tile_rows];
    const void* ahead[tile_rows];

    KERNEL Tile(const void* const* rows, size_t row_count, size_t first, size_t tiles_ahead = 1) {
        for (size_t r = 0; r < tile_rows; r++) {
            row[r] = static_cast<const typename Element<dtype>::type*>(rows[std::min(first + r, row_count - 1)]);
            ahead[r] = rows[std::min(first + tiles_ahead * tile_rows + r, row_count - 1)];
        }
    }
};

template <Dtype dtype>
KERNEL void dots_of_one(const void* const* rows, size_t row_count, const float* x, size_t hidden, float* dots) {
    constexpr size_t ROWS = 8;
    constexpr size_t AHEAD = AHEAD_BYTES / ROWS / bytes_of(dtype);  // elements of a row
    const size_t tiles_ahead = std::max<size_t>(1, AHEAD / std::max<size_t>(hidden, 1));
    const size_t here = hidden - std::min(hidden, AHEAD);  // elements that are computed while others of the row come
    const size_t split = here / (LINE_BYTES / bytes_of(dtype)) * (LINE_BYTES / bytes_of(dtype));
    const auto shift = static_cast<ptrdiff_t>(AHEAD * bytes_of(dtype));
    const ptrdiff_t back = split > 0 ? -static_cast<ptrdiff_t>(split * bytes_of(dtype)) : 0;
    Lane sums[ROWS][1];
    for (size_t i = 0; i < row_count; i += ROWS) {
        const Tile<dtype, ROWS> tile(rows, row_count, i, tiles_ahead);
        const void* of_tile[ROWS];
        std::copy_n(tile.row, ROWS, of_tile);
        if (split > 0) dots_of_tile<dtype, ROWS, 1>(tile.row, of_tile, shift, &x, 0, split, sums);
        dots_of_tile<dtype, ROWS, 1>(tile.row, tile.ahead, back, &x, split, hidden, sums);
        float of_row[ROWS];
        for (size_t r = 0; r < ROWS; r++) of_row[r] = sum(sums[r][0]);
        std::copy_n(of_row, std::min(ROWS, row_count - i), dots + i);
    }
}

// Computes a block of rows some elements at a time, so that the elements of x for a tile stay in the L1 cache, and
// those of the rows in the L2 cache. A tile at the edge repeats its last token.
template <Dtype dtype, size_t tile_rows, size_t tile_tokens>
KERNEL void dots_in_tiles(const void* const* rows, size_t row_count, const float* x, size_t hidden, size_t tokens,
                          float* dots) {
    constexpr size_t BLOCK_TILES = BLOCK_ROWS / tile_rows;
    constexpr size_t ROWS = BLOCK_TILES * tile_rows;
    constexpr size_t ELEMENTS = BLOCK_ELEMENTS / tile_tokens;
    Lane sums[(TOKENS_MAX + tile_tokens - 1) / tile_tokens][BLOCK_TILES][tile_rows][tile_tokens];
    const float* of_token[tile_tokens];
    for (size_t first = 0; first < row_count; first += ROWS) {
        const size_t last = std::min(first + ROWS, row_count);
        size_t begin = 0;
        do {
            const size_t end = std::min(begin + ELEMENTS, hidden);
            for (size_t t = 0; t < tokens; t += tile_tokens) {
                for (size_t c = 0; c < tile_tokens; c++) of_token[c] = x + std::min(t + c, tokens - 1) * hidden;
                auto* of_tile = sums[t / tile_tokens];
                for (size_t i = first; i < last; i += tile_rows) {
                    const Tile<dtype, tile_rows> tile(rows, row_count, i);
                    dots_of_tile<dtype, tile_rows, tile_tokens>(tile.row, tile.ahead, 0, of_token, begin, end,
                                                                *of_tile++);
                }
            }
            begin = end;
        } while (begin < hidden);
        for (size_t i = first; i < last; i += tile_rows) {
            for (size_t r = 0; r < std::min(tile_rows, last - i); r++) {
                for (size_t t = 0; t < tokens; t++) {
                    dots[(i + r) * tokens + t] =
                        sum(sums[t / tile_tokens][(i - first) / tile_rows][r][t % tile_tokens]);
                }
            }
        }
    }
}

template <Dtype dtype>
KERNEL void dots(const void* const* rows, size_t row_count, const void* of_x, size_t hidden, size_t tokens,
                 float* dots) {
    const auto* x = static_cast<const float*>(of_x);
    if (tokens == 1) {
        dots_of_one<dtype>(rows, row_count, x, hidden, dots);
    } else if (tokens == 2) {
        dots_in_tiles<dtype, 4, 2>(rows, row_count, x, hidden, tokens, dots);
    } else {
        dots_in_tiles<dtype, Lane::TILE_ROWS, Lane::TILE_TOKENS>(rows, row_count, x, hidden, tokens, dots);
    }
}

// y += h * row for `rows` rows of one token: y is loaded and stored once for all rows. `ahead` are the rows that come
// next.
template <Dtype dtype, size_t rows>
KERNEL void accumulate_rows(const void* const* row_of, const float* h, size_t begin, size_t end, float* y,
                            const void* const* ahead) {
    using Weight = typename Element<dtype>::type;
    constexpr size_t LINE = LINE_BYTES / bytes_of(dtype);
    constexpr size_t LANES = LINE / Lane::WIDTH;
    size_t j = begin;
    for (; j + LINE <= end; j += LINE) {
        Lane sums[LANES];
        for (size_t l = 0; l < LANES; l++) sums[l] = Lane::template load<Dtype::f32>(y + j + l * Lane::WIDTH);
        for (size_t k = 0; k < rows; k++) {
            const auto* row = static_cast<const Weight*>(row_of[k]) + j;
            prefetch(static_cast<const Weight*>(ahead[k]) + j);
            const Lane factor = Lane::all(h[k]);
            for (size_t l = 0; l < LANES; l++) {
                sums[l] = fma(Lane::template load<dtype>(row + l * Lane::WIDTH), factor, sums[l]);
            }
        }
        for (size_t l = 0; l < LANES; l++) sums[l].store(y + j + l * Lane::WIDTH);
    }
    for (; j < end; j += Lane::WIDTH) {
        const size_t some = std::min(Lane::WIDTH, end - j);
        Lane sum = Lane::template load_some<Dtype::f32>(y + j, some);
        for (size_t k = 0; k < rows; k++) {
            const auto* row = static_cast<const Weight*>(row_of[k]) + j;
            sum = fma(Lane::template load_some<dtype>(row, some), Lane::all(h[k]), sum);
        }
        sum.store_some(y + j, some);
    }
}

template <Dtype dtype>
KERNEL void accumulate_one(const void* const* rows, const float* h, size_t row_count, size_t begin, size_t end,
                           float* y) {
    constexpr size_t STEP = 8;
    const size_t step_bytes = STEP * std::max<size_t>(end - begin, 1) * bytes_of(dtype);
    const size_t ahead = STEP * divide_up(AHEAD_BYTES, step_bytes);
    for (size_t r = 0; r < std::min(STEP, row_count); r++) {
        fetch_lines(static_cast<const typename Element<dtype>::type*>(rows[r]) + begin, step_bytes / STEP);
    }
    size_t k = 0;
    for (; k + STEP <= row_count; k += STEP) {
        const size_t next = k + ahead + STEP <= row_count ? k + ahead : k;
        accumulate_rows<dtype, STEP>(rows + k, h + k, begin, end, y, rows + next);
    }
    for (; k < row_count; k++) accumulate_rows<dtype, 1>(rows + k, h + k, begin, end, y, rows + k);
}

// Some rows of down, and their h for a tile of tokens.
template <size_t rows, size_t tokens>
struct Terms {
    const void* const* row;
    float h[rows][tokens];
};

// y += h * row for a tile of tokens, on elements [j, j + some) of y.
template <Dtype dtype, size_t lanes, size_t rows, size_t tokens>
LANE void accumulate_terms(const Terms<rows, tokens>& terms, size_t j, size_t some, float* const (&y)[tokens]) {
    using Weight = typename Element<dtype>::type;
    const bool whole = some == lanes * Lane::WIDTH;
    Lane sums[tokens][lanes];
    for (size_t t = 0; t < tokens; t++) {
        for (size_t l = 0; l < lanes; l++) {
            const float* at = y[t] + j + l * Lane::WIDTH;
            sums[t][l] = whole ? Lane::template load<Dtype::f32>(at) : Lane::template load_some<Dtype::f32>(at, some);
        }
    }
    for (size_t k = 0; k < rows; k++) {
        const auto* row = static_cast<const Weight*>(terms.row[k]) + j;
        Lane weights[lanes];
        for (size_t l = 0; l < lanes; l++) {
            weights[l] =
                whole ? Lane::template load<dtype>(row + l * Lane::WIDTH) : Lane::template load_some<dtype>(row, some);
        }
        for (size_t t = 0; t < tokens; t++) {
            const Lane factor = Lane::all(terms.h[k][t]);
            for (size_t l = 0; l < lanes; l++) sums[t][l] = fma(weights[l], factor, sums[t][l]);
        }
    }
    for (size_t t = 0; t < tokens; t++) {
        for (size_t l = 0; l < lanes; l++) {
            float* at = y[t] + j + l * Lane::WIDTH;
            whole ? sums[t][l].store(at) : sums[t][l].store_some(at, some);
        }
    }
}

// The same for all tokens, a tile after the other, on [begin, end), while the rows `ahead` are fetched. A tile at the
// edge repeats its last token, and stores it again.
template <Dtype dtype, size_t rows>
KERNEL void accumulate_tiles(const void* const* row, const void* const* ahead, const float* h, size_t tokens,
                             size_t hidden, size_t begin, size_t end, float* y) {
    constexpr size_t TOKENS = Lane::TILE_TOKENS, LANES = std::bit_floor(Lane::TILE_ROWS);
    constexpr size_t STEP = LANES * Lane::WIDTH, LINE = LINE_BYTES / bytes_of(dtype);
    static_assert(TERM_ELEMENTS % STEP == 0);
    for (size_t t = 0; t < tokens; t += TOKENS) {
        Terms<rows, TOKENS> terms{row, {}};
        float* of_token[TOKENS];
        for (size_t c = 0; c < TOKENS; c++) {
            const size_t token = std::min(t + c, tokens - 1);
            for (size_t k = 0; k < rows; k++) terms.h[k][c] = h[k * tokens + token];
            of_token[c] = y + token * hidden;
        }
        size_t j = begin;
        for (; j + STEP <= end; j += STEP) {
            for (size_t k = 0; t == 0 && k < rows; k++) {
                const auto* next = static_cast<const typename Element<dtype>::type*>(ahead[k]) + j;
                for (size_t l = 0; l < STEP; l += LINE) prefetch(next + l);
            }
            accumulate_terms<dtype, LANES>(terms, j, STEP, of_token);
        }
        for (; j < end; j += Lane::WIDTH) {
            accumulate_terms<dtype, 1>(terms, j, std::min(Lane::WIDTH, end - j), of_token);
        }
    }
}

// Some rows, and some elements of them, are in the L1 cache for all tokens.
template <Dtype dtype>
KERNEL void accumulate(const void* const* rows, const float* h, size_t row_count, size_t tokens, size_t hidden,
                       size_t begin, size_t end, float* y) {
    if (tokens == 1) return accumulate_one<dtype>(rows, h, row_count, begin, end, y);
    for (size_t r = 0; r < std::min(TERMS, row_count); r++) {
        fetch_lines(static_cast<const typename Element<dtype>::type*>(rows[r]) + begin,
                    (end - begin) * bytes_of(dtype));
    }
    size_t k = 0;
    for (; k + TERMS <= row_count; k += TERMS) {
        const void* ahead[TERMS];
        for (size_t r = 0; r < TERMS; r++) ahead[r] = rows[std::min(k + TERMS + r, row_count - 1)];
        for (size_t j = begin; j < end; j += TERM_ELEMENTS) {
            accumulate_tiles<dtype, TERMS>(rows + k, ahead, h + k * tokens, tokens, hidden, j,
                                           std::min(j + TERM_ELEMENTS, end), y);
        }
    }
    for (; k + FEW_TERMS <= row_count; k += FEW_TERMS) {
        accumulate_tiles<dtype, FEW_TERMS>(rows + k, rows + k, h + k * tokens, tokens, hidden, begin, end, y);
    }
    for (; k < row_count; k++) {
        accumulate_tiles<dtype, 1>(rows + k, rows + k, h + k * tokens, tokens, hidden, begin, end, y);
    }
}

template <Dtype dtype>
KERNEL void upcast(const void* row, size_t hidden, float* out) {
    const auto* weights = static_cast<const typename Element<dtype>::type*>(row);
    size_t j = 0;
    for (; j + Lane::WIDTH <= hidden; j += Lane::WIDTH) Lane::template load<dtype>(weights + j).store(out + j);
    if (j < hidden) Lane::template load_some<dtype>(weights + j, hidden - j).store_some(out + j, hidden - j);
}

template <Dtype dtype>
KERNEL void downcast(const float* values, size_t count, void* row) {
    if constexpr (dtype == Dtype::f32) {
        std::memcpy(row, values, count * sizeof(float));
    } else {
        auto* out = static_cast<uint16_t*>(row);
        size_t j = 0;
        for (; j + Lane::WIDTH <= count; j += Lane::WIDTH) {
            Lane::template load<Dtype::f32>(values + j).template store_as<dtype>(out + j);
        }
        if (j == count) return;
        uint16_t last[Lane::WIDTH];
        Lane::template load_some<Dtype::f32>(values + j, count - j).template store_as<dtype>(last);
        std::copy_n(last, count - j, out + j);
    }
}

// e^x for x <= 88 or NaN: 2^n * e^r, n the integer nearest to x / ln 2, which adding ROUND leaves in the low bits; the
// polynomial is that of Cephes' expf.
KERNEL Lane exponential(Lane x) {
    constexpr float ROUND = 0x1.8p23f + 127.0f;  // with the bias of an exponent
    const Lane one = Lane::all(1.0f);
    const Lane zero = Lane::zero();
    x = max(Lane::all(-88.0f), x);  // n is -127 at least, which makes 0; a NaN stays one
    const Lane rounded = fma(x, Lane::all(1.44269504f), Lane::all(ROUND));
    const Lane n = fma(rounded, one, Lane::all(-ROUND));
    const Lane r = fma(n, Lane::all(2.12194440e-4f), fma(n, Lane::all(-0.693359375f), x));
    Lane power = Lane::all(1.9875691500e-4f);
    for (float coefficient :
         {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f, 1.0f, 1.0f}) {
        power = fma(power, r, Lane::all(coefficient));
    }
    return fma(power, power_of_two(rounded), zero);
}

KERNEL float greatest_of(const float* values, size_t count) {
    Lane lanes = Lane::all(values[0]);
    size_t i = 0;
    for (; i + Lane::WIDTH <= count; i += Lane::WIDTH) lanes = max(lanes, Lane::template load<Dtype::f32>(values + i));
    for (; i < count; i++) lanes = max(lanes, Lane::all(values[i]));
    float each[Lane::WIDTH];
    lanes.store(each);
    return *std::max_element(each, each + Lane::WIDTH);
}

KERNEL float exponentials(float* values, size_t count) {
    const Lane shift = Lane::all(-greatest_of(values, count));
    const Lane one = Lane::all(1.0f);
    Lane sums = Lane::zero();
    for (size_t i = 0; i < count; i += Lane::WIDTH) {
        const size_t some = std::min(Lane::WIDTH, count - i);
        const bool whole = some == Lane::WIDTH;
        float* at = values + i;
        const Lane x = whole ? Lane::template load<Dtype::f32>(at) : Lane::template load_some<Dtype::f32>(at, some);
        Lane result = exponential(fma(x, one, shift));
        if (whole) {
            result.store(at);
        } else {
            result.store_some(at, some);
            result = Lane::template load_some<Dtype::f32>(at, some);  // with zeros after the end
        }
        sums = fma(result, one, sums);
    }
    return sum(sums);
}

KERNEL void logistic(float* values, size_t count) {
    const Lane minus_one = Lane::all(-1.0f), one = Lane::all(1.0f), zero = Lane::zero(), least = Lane::all(-88.0f);
    for (size_t i = 0; i < count; i += Lane::WIDTH) {
        const size_t some = std::min(Lane::WIDTH, count - i);
        const bool whole = some == Lane::WIDTH;
        float* at = values + i;
        const Lane x = whole ? Lane::template load<Dtype::f32>(at) : Lane::template load_some<Dtype::f32>(at, some);
        const Lane minus_x = fma(max(least, x), minus_one, zero);  // 88 at most; a NaN stays one
        const Lane result = divide(one, fma(exponential(minus_x), one, one));
        if (whole) {
            result.store(at);
        } else {
            result.store_some(at, some);
        }
    }
}

KERNEL size_t differing_bits(const uint8_t* a, const uint8_t* b, size_t bytes) {
    size_t differing = 0;
    for (size_t j = 0; j < bytes; j += sizeof(uint64_t)) {
        const size_t some = std::min(sizeof(uint64_t), bytes - j);
        uint64_t left = 0;
        uint64_t right = 0;
        std::memcpy(&left, a + j, some);
        std::memcpy(&right, b + j, some);
        differing += static_cast<size_t>(__builtin_popcountll(left ^ right));
    }
    return differing;
}

// See formats/slab_loops.h.
template <typename Format>
KERNEL void add_products(const void* matrix, size_t length, const float* h, size_t h_stride, size_t tokens,
                         size_t hidden, size_t begin, size_t end, float* y);
template <Dtype dtype>
struct PlainGroup;

template <Dtype dtype>
constexpr decltype(Kernels::add_products) add_products_of() {
    if constexpr (dtype == Dtype::i8) {
        return nullptr;
    } else {
        return add_products<PlainGroup<dtype>>;
    }
}

template <Dtype dtype>
constexpr auto downcast_of() {
    if constexpr (dtype == Dtype::i8) {
        return nullptr;
    } else {
        return downcast<dtype>;
    }
}

template <Dtype dtype>
const Kernels* table(const char* instruction_set) {
    static const Kernels kernels{instruction_set,
                                 nullptr,
                                 nullptr,
                                 dots<dtype>,
                                 accumulate<dtype>,
                                 upcast<dtype>,
                                 downcast_of<dtype>(),
                                 exponentials,
                                 differing_bits,
                                 add_products_of<dtype>(),
                                 logistic};
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

// Loops over rows in blocks, which use those above.
#include "formats/block_loops.h"
#include "formats/slab_loops.h"
