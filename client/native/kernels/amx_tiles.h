// Tiles of Intel's AMX, and the products of bf16 in them, for kernels_amx*.cpp. Files with products of other numbers
// define KERNEL and LANE before.
#pragma once

#include "kernels/kernels.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false in GCC 12's own header (its bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cstring>

#ifndef KERNEL
#define KERNEL __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,amx-tile,amx-bf16")))
#define LANE KERNEL __attribute__((always_inline)) inline
#endif

// A processor adds the 32 products of a row and a column as two chains, of even and of odd elements, and their sum to
// what the tile holds. Each step is rounded to the nearest, and numbers below 2^-126 count as 0.
namespace flashclient {
namespace {

constexpr size_t TILE_ROWS = 16;
constexpr size_t TILE_COLUMNS = 16;
constexpr size_t ROW_BYTES = 64;
constexpr size_t TILE_BYTES = TILE_ROWS * ROW_BYTES;
constexpr size_t BLOCK = ROW_BYTES / sizeof(uint16_t);  // elements of a row in a tile
constexpr size_t PARTS = 3;                             // numbers of bf16 whose sum is one of fp32

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

// The next of the PARTS of x, in the upper half of each; what remains is left in x. A part of infinity or NaN is the
// last.
LANE __m512i take_part(__m512& x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i part = _mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
    const __m512i exponent = _mm512_and_si512(bits, _mm512_set1_epi32(0x7f800000));
    const __mmask16 finite = _mm512_cmpneq_epi32_mask(exponent, _mm512_set1_epi32(0x7f800000));
    x = _mm512_maskz_sub_ps(finite, x, _mm512_castsi512_ps(part));
    return part;
}

}  // namespace
}  // namespace flashclient
#endif
