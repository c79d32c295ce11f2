// Tiles of Intel's AMX, and the products of bf16 in them, for kernels_amx*.cpp. Files with products of other numbers
// define KERNEL and LANE before. All include kernels/kernels.h before.
#pragma once

#if defined(__x86_64__)
#include <algorithm>
#include <bit>
#include <cstring>

#include "vectors/intrinsics.h"

#ifndef KERNEL
#define KERNEL __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,amx-tile,amx-bf16")))
#define LANE KERNEL __attribute__((always_inline)) inline
#endif

#include "vectors/bf16_parts.h"

// A processor adds the 32 products of a row and a column as two chains, of even and of odd elements, and their sum to
// what the tile holds. Each step is rounded to the nearest, and numbers below 2^-126 count as 0.
namespace flashclient {
namespace {

constexpr size_t TILE_ROWS = 16;
constexpr size_t TILE_COLUMNS = 16;
constexpr size_t TILE_BYTES = TILE_ROWS * ROW_BYTES;

struct alignas(64) TileConfig {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    TileConfig() {
        std::fill_n(row_bytes, 8, uint16_t{ROW_BYTES});
        std::fill_n(rows, 8, uint8_t{TILE_ROWS});
    }
};

// Not the compiler's intrinsics: they take no template's argument, and do not say that they read memory.
template <size_t tile>
LANE void load_tile(const void* rows, size_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(stride), "i"(tile) : "memory");
}
template <size_t tile>
LANE void store_tile(void* rows, size_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(stride), "i"(tile) : "memory");
}
template <size_t tile>
LANE void clear_tile() {
    asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
template <size_t sums, size_t weights, size_t x>
LANE void add_products() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(weights), "i"(x));
}

// What precedes the tiles of x. Tiles are [column tile][block], of [pair][column]. Those of few columns are small, so
// that x stays in the L1 cache.
struct alignas(ROW_BYTES) TileColumns : Columns {
    uint8_t pair_bytes;  // from a pair of a tile to the next

    size_t tile_bytes() const { return TILE_ROWS * pair_bytes; }
};
static_assert(sizeof(TileColumns) == ROW_BYTES);
constexpr size_t FEW_COLUMNS = 4;

// The dots of a row with the columns of some tokens, [tile of columns, TILE_COLUMNS]; `apart` from one tile to the
// next.
KERNEL inline void store_dots(const float* sums, size_t apart, const TileColumns& columns, size_t tokens, float* dots) {
    if (columns.count == tokens) {  // each token has one column
        const auto mask = static_cast<__mmask16>((1U << tokens) - 1);
        return _mm512_mask_storeu_ps(dots, mask, _mm512_maskz_loadu_ps(mask, sums));
    }
    const auto dot = [&](size_t column) { return sums[column / TILE_COLUMNS * apart + column % TILE_COLUMNS]; };
    for (size_t t = 0; t < tokens; t++) {
        const size_t column = columns.first[t];
        const float rest = columns.exact[t] ? 0.0f : dot(column + 1) + dot(column + 2);
        dots[t] = columns.exact[t] ? dot(column) : dot(column) + rest;
    }
}

// The dots of a tile of rows with the one token that has PARTS columns: sums [row][FEW_COLUMNS].
KERNEL inline void store_dots_of_parts(const float* sums, size_t some, float* dots) {
    const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    __m512 part[PARTS];
    for (size_t p = 0; p < PARTS; p++) {
        const __m512i places = _mm512_add_epi32(first, _mm512_set1_epi32(static_cast<int>(p)));
        const __m512 low = _mm512_permutex2var_ps(_mm512_load_ps(sums), places, _mm512_load_ps(sums + 16));
        const __m512 high = _mm512_permutex2var_ps(_mm512_load_ps(sums + 32), places, _mm512_load_ps(sums + 48));
        part[p] = _mm512_shuffle_f32x4(low, high, 0x44);
    }
    const auto mask = static_cast<__mmask16>((1U << some) - 1);
    _mm512_mask_storeu_ps(dots, mask, _mm512_add_ps(part[0], _mm512_add_ps(part[1], part[2])));
}

LANE __m512 low_pairs(__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
LANE __m512 high_pairs(__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}

// Columns of sixteen vectors.
LANE void transpose(__m512 (&rows)[16]) {
    __m512 pairs[16], fours[16];
#pragma GCC unroll 8
    for (size_t i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 4
    for (size_t i = 0; i < 16; i += 4) {
        fours[i] = low_pairs(pairs[i], pairs[i + 2]);
        fours[i + 1] = high_pairs(pairs[i], pairs[i + 2]);
        fours[i + 2] = low_pairs(pairs[i + 1], pairs[i + 3]);
        fours[i + 3] = high_pairs(pairs[i + 1], pairs[i + 3]);
    }
#pragma GCC unroll 4
    for (size_t c = 0; c < 4; c++) {
        const __m512 even[] = {_mm512_shuffle_f32x4(fours[c], fours[4 + c], 0x88),
                               _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0x88)};
        const __m512 odd[] = {_mm512_shuffle_f32x4(fours[c], fours[4 + c], 0xdd),
                              _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0xdd)};
        rows[c] = _mm512_shuffle_f32x4(even[0], even[1], 0x88);
        rows[c + 4] = _mm512_shuffle_f32x4(odd[0], odd[1], 0x88);
        rows[c + 8] = _mm512_shuffle_f32x4(even[0], even[1], 0xdd);
        rows[c + 12] = _mm512_shuffle_f32x4(odd[0], odd[1], 0xdd);
    }
}

}  // namespace
}  // namespace flashclient
#endif
