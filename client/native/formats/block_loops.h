// The loops of kernels.h over rows in blocks (block_formats.h). kernels_body.h includes it.
//
// One token: a block is decoded in registers. Several: some rows and elements are decoded into a cache, for all tokens.
// The order of sums is that of kernels_body.h in both, so the number of tokens changes no bit.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "formats/block_formats.h"
#include "formats/super_blocks.h"

namespace flashclient {
namespace {

constexpr size_t DECODED_ROWS = 24;       // at a time: whole tiles of all instruction sets
constexpr size_t DECODED_ELEMENTS = 256;  // of each, a whole block of any format: 24 KiB
static_assert(DECODED_ROWS % Lane::TILE_ROWS == 0);

template <typename Format>
struct BlockRow {
    static constexpr size_t LANES = Format::GROUP / Lane::WIDTH;
    static constexpr size_t GROUPS = Format::VALUES / Format::GROUP;
    static_assert(DECODED_ELEMENTS % Format::VALUES == 0);

    static const uint8_t* block(const void* row, size_t first) {
        return static_cast<const uint8_t*>(row) + first / Format::VALUES * Format::BYTES;
    }

    // The lines of the blocks from element `first` on, each once: small blocks share them.
    template <size_t rows>
    LANE static void prefetch_lines(const void* const* row, size_t first) {
        constexpr size_t TOGETHER = std::max<size_t>(1, LINE_BYTES / Format::BYTES);
        if (first / Format::VALUES % TOGETHER != 0) return;
        for (size_t r = 0; r < rows; r++) {
            for (size_t line = 0; line < Format::BYTES; line += LINE_BYTES) prefetch(block(row[r], first) + line);
        }
    }
};

// Elements [begin, end), which are whole blocks.
template <typename Format>
KERNEL void decode(const void* row, size_t begin, size_t end, float* out) {
    using Row = BlockRow<Format>;
    for (size_t j = begin; j < end; j += Format::VALUES) {
        const auto scales = Format::Scales::of(Row::block(row, j));
        for (size_t g = 0; g < Row::GROUPS; g++) {
            const Format group(Row::block(row, j), scales, g);
#pragma GCC unroll 32
            for (size_t l = 0; l < Row::LANES; l++, out += Lane::WIDTH) group.lane(l * Lane::WIDTH).store(out);
        }
    }
}

template <typename Format>
KERNEL void upcast_blocks(const void* row, size_t hidden, float* out) {
    decode<Format>(row, 0, hidden, out);
}

// Of one token, for a tile of rows; `ahead` are those of the next tile. A tile at the edge repeats its last row.
template <typename Format, size_t rows>
LANE void dots_of_blocks(const void* const* row, const void* const* ahead, const float* x, size_t hidden, Lane* sums) {
    using Row = BlockRow<Format>;
    Lane chain[rows];
    for (size_t r = 0; r < rows; r++) chain[r] = Lane::zero();
    for (size_t j = 0; j < hidden; j += Format::VALUES) {
        Row::template prefetch_lines<rows>(ahead, j);
        typename Format::Scales scales[rows];
        for (size_t r = 0; r < rows; r++) scales[r] = Format::Scales::of(Row::block(row[r], j));
        for (size_t g = 0; g < Row::GROUPS; g++) {
            const float* of_group = x + j + g * Format::GROUP;
#pragma GCC unroll 8
            for (size_t r = 0; r < rows; r++) {
                const Format group(Row::block(row[r], j), scales[r], g);
#pragma GCC unroll 32
                for (size_t l = 0; l < Row::LANES; l++) {
                    const Lane value = Lane::template load<Dtype::f32>(of_group + l * Lane::WIDTH);
                    chain[r] = fma(group.lane(l * Lane::WIDTH), value, chain[r]);
                }
            }
        }
    }
    for (size_t r = 0; r < rows; r++) sums[r] = chain[r];
}

template <typename Format>
KERNEL void dots_of_one_in_blocks(const void* const* rows, size_t row_count, const float* x, size_t hidden,
                                  float* dots) {
    constexpr size_t ROWS = 8;
    Lane sums[ROWS];
    const void* row[ROWS];
    const void* ahead[ROWS];
    const size_t apart = divide_up(row_count, ROWS);  // as integer_products.h says
    for (size_t i = 0; i < apart; i++) {
        for (size_t r = 0; r < ROWS; r++) {
            row[r] = rows[std::min(i + r * apart, row_count - 1)];
            ahead[r] = rows[std::min(i + 1 + r * apart, row_count - 1)];
        }
        dots_of_blocks<Format, ROWS>(row, ahead, x, hidden, sums);
        for (size_t r = 0; r < ROWS && i + r * apart < row_count; r++) dots[i + r * apart] = sum(sums[r]);
    }
}

// Some rows and elements of an operation, decoded.
struct Decoded {
    alignas(64) float values[DECODED_ROWS][DECODED_ELEMENTS];

    template <typename Format>
    KERNEL void fill(const void* const* rows, size_t row_count, size_t begin, size_t end) {
        for (size_t r = 0; r < row_count; r++) decode<Format>(rows[r], begin, end, values[r]);
    }
};

// Adds `elements` of the decoded rows to the dots of a tile; the first time to zero.
template <size_t tile_rows, size_t tile_tokens>
LANE void add_dots(const float* const* row, const float* const* x, size_t elements, bool first,
                   Lane (&sums)[tile_rows][tile_tokens]) {
    Lane chain[tile_rows][tile_tokens];
    for (size_t r = 0; r < tile_rows; r++) {
        for (size_t t = 0; t < tile_tokens; t++) chain[r][t] = first ? Lane::zero() : sums[r][t];
    }
    for (size_t j = 0; j < elements; j += Lane::WIDTH) {
        Lane weights[tile_rows];
        for (size_t r = 0; r < tile_rows; r++) weights[r] = Lane::template load<Dtype::f32>(row[r] + j);
        for (size_t t = 0; t < tile_tokens; t++) {
            const Lane value = Lane::template load<Dtype::f32>(x[t] + j);
            for (size_t r = 0; r < tile_rows; r++) chain[r][t] = fma(weights[r], value, chain[r][t]);
        }
    }
    for (size_t r = 0; r < tile_rows; r++) {
        for (size_t t = 0; t < tile_tokens; t++) sums[r][t] = chain[r][t];
    }
}

template <typename Format>
KERNEL void dots_of_many_in_blocks(const void* const* rows, size_t row_count, const float* x, size_t hidden,
                                   size_t tokens, float* dots) {
    constexpr size_t ROWS = Lane::TILE_ROWS, TOKENS = Lane::TILE_TOKENS, TILES = DECODED_ROWS / ROWS;
    Decoded decoded;
    Lane sums[TOKENS_MAX / TOKENS][TILES][ROWS][TOKENS];
    const float* of_token[TOKENS];
    const float* of_row[ROWS];
    for (size_t first = 0; first < row_count; first += DECODED_ROWS) {
        const size_t count = std::min(DECODED_ROWS, row_count - first);
        for (size_t begin = 0; begin < hidden; begin += DECODED_ELEMENTS) {
            const size_t end = std::min(begin + DECODED_ELEMENTS, hidden);
            decoded.fill<Format>(rows + first, count, begin, end);
            for (size_t t = 0; t < tokens; t += TOKENS) {
                for (size_t c = 0; c < TOKENS; c++) of_token[c] = x + std::min(t + c, tokens - 1) * hidden + begin;
                for (size_t i = 0; i < count; i += ROWS) {
                    for (size_t r = 0; r < ROWS; r++) of_row[r] = decoded.values[std::min(i + r, count - 1)];
                    add_dots<ROWS, TOKENS>(of_row, of_token, end - begin, begin == 0, sums[t / TOKENS][i / ROWS]);
                }
            }
        }
        for (size_t i = 0; i < count; i++) {
            for (size_t t = 0; t < tokens; t++) {
                dots[(first + i) * tokens + t] = sum(sums[t / TOKENS][i / ROWS][i % ROWS][t % TOKENS]);
            }
        }
    }
}

template <typename Format>
KERNEL void dots_in_blocks(const void* const* rows, size_t row_count, const void* of_x, size_t hidden, size_t tokens,
                           float* dots) {
    const auto* x = static_cast<const float*>(of_x);
    if (tokens == 1) {
        dots_of_one_in_blocks<Format>(rows, row_count, x, hidden, dots);
    } else {
        dots_of_many_in_blocks<Format>(rows, row_count, x, hidden, tokens, dots);
    }
}

// y += h * row for `rows` rows of one token: y is loaded and stored once for all rows.
template <typename Format, size_t rows>
KERNEL void accumulate_block_rows(const void* const* row, const void* const* ahead, const float* h, size_t begin,
                                  size_t end, float* y) {
    using Row = BlockRow<Format>;
    Lane factor[rows];
    for (size_t r = 0; r < rows; r++) factor[r] = Lane::all(h[r]);
    for (size_t j = begin; j < end; j += Format::VALUES) {
        Row::template prefetch_lines<rows>(ahead, j);
        typename Format::Scales scales[rows];
        for (size_t r = 0; r < rows; r++) scales[r] = Format::Scales::of(Row::block(row[r], j));
        for (size_t g = 0; g < Row::GROUPS; g++) {
            float* of_group = y + j + g * Format::GROUP;
            Lane sums[Row::LANES];
            for (size_t l = 0; l < Row::LANES; l++) {
                sums[l] = Lane::template load<Dtype::f32>(of_group + l * Lane::WIDTH);
            }
#pragma GCC unroll 8
            for (size_t r = 0; r < rows; r++) {
                const Format group(Row::block(row[r], j), scales[r], g);
#pragma GCC unroll 32
                for (size_t l = 0; l < Row::LANES; l++) sums[l] = fma(group.lane(l * Lane::WIDTH), factor[r], sums[l]);
            }
            for (size_t l = 0; l < Row::LANES; l++) sums[l].store(of_group + l * Lane::WIDTH);
        }
    }
}

template <typename Format>
KERNEL void accumulate_in_blocks(const void* const* rows, const float* h, size_t row_count, size_t tokens,
                                 size_t hidden, size_t begin, size_t end, float* y) {
    if (tokens == 1) {
        constexpr size_t STEP = 8;
        size_t k = 0;
        for (; k + STEP <= row_count; k += STEP) {
            const size_t next = k + 2 * STEP <= row_count ? k + STEP : k;
            accumulate_block_rows<Format, STEP>(rows + k, rows + next, h + k, begin, end, y);
        }
        for (; k < row_count; k++) accumulate_block_rows<Format, 1>(rows + k, rows + k, h + k, begin, end, y);
        return;
    }
    Decoded decoded;
    const void* of_row[DECODED_ROWS];
    for (size_t r = 0; r < DECODED_ROWS; r++) of_row[r] = decoded.values[r];
    for (size_t j = begin; j < end; j += DECODED_ELEMENTS) {
        const size_t elements = std::min(DECODED_ELEMENTS, end - j);
        for (size_t k = 0; k < row_count; k += DECODED_ROWS) {
            const size_t count = std::min(DECODED_ROWS, row_count - k);
            decoded.fill<Format>(rows + k, count, j, j + elements);
            accumulate<Dtype::f32>(of_row, h + k * tokens, count, tokens, hidden, 0, elements, y + j);
        }
    }
}

template <typename Format>
const Kernels* table_of_blocks(const char* instruction_set) {
    static const Kernels kernels{instruction_set,
                                 nullptr,
                                 nullptr,
                                 dots_in_blocks<Format>,
                                 accumulate_in_blocks<Format>,
                                 upcast_blocks<Format>,
                                 nullptr,
                                 exponentials,
                                 differing_bits,
                                 add_products<Format>,
                                 logistic};
    return &kernels;
}

const Kernels* table_for(BlockFormat format, const char* instruction_set) {
    switch (format) {
        case BlockFormat::q8_0:
            return table_of_blocks<BlockQ8_0>(instruction_set);
        case BlockFormat::q4_0:
            return table_of_blocks<BlockQ4_0>(instruction_set);
        case BlockFormat::q4_1:
            return table_of_blocks<BlockQ4_1>(instruction_set);
        case BlockFormat::iq4_nl:
            return table_of_blocks<BlockIq4Nl>(instruction_set);
        case BlockFormat::q5_0:
            return table_of_blocks<BlockQ5_0>(instruction_set);
        case BlockFormat::q5_1:
            return table_of_blocks<BlockQ5_1>(instruction_set);
        case BlockFormat::mxfp4:
            return table_of_blocks<BlockMxfp4>(instruction_set);
        case BlockFormat::q2_k:
            return table_of_blocks<BlockQ2K>(instruction_set);
        case BlockFormat::q3_k:
            return table_of_blocks<BlockQ3K>(instruction_set);
        case BlockFormat::q4_k:
            return table_of_blocks<BlockQ4K>(instruction_set);
        case BlockFormat::q5_k:
            return table_of_blocks<BlockQ5K>(instruction_set);
        case BlockFormat::q6_k:
            return table_of_blocks<BlockQ6K>(instruction_set);
        case BlockFormat::iq4_xs:
            return table_of_blocks<BlockIq4Xs>(instruction_set);
        case BlockFormat::fp8_128:
            return table_of_blocks<BlockFp8<128>>(instruction_set);
        case BlockFormat::fp8_32:
            return table_of_blocks<BlockFp8<32>>(instruction_set);
        case BlockFormat::nvfp4_256:
            return table_of_blocks<BlockNvfp4<256>>(instruction_set);
        case BlockFormat::nvfp4_32:
            return table_of_blocks<BlockNvfp4<32>>(instruction_set);
    }
    return nullptr;
}

}  // namespace
}  // namespace flashclient
