// GGML's quantised formats as integers: value = scale * (code - ZERO) + least, for products with integers
// (integer_products.h). block_formats.h has them in fp32. To add a format, see "Encodings" in proto/README.md.
//
// A stretch is 128 values of a row: four units of 32, which are blocks or parts of a block of 256. Codes<format> has
//   ZERO      a power of two, or 0
//   PARTS     1: a unit has one scale; 2: each half of it has its own
//   LEAST     whether there are leasts
//   IN_ORDER  whether codes stay in the order of their values (StretchCodes), for PARTS = 2
//   FOLDED    whether scales of halves are integers whose products with codes are bytes, for PARTS = 2
//   codes<half>(at)           the stretch's codes; `at`: its first block, or the block of 256 of which it is a half
//   scales<half>(at, of)      of four rows
//   folded<half>(at)          where FOLDED: SIGN * (code - ZERO) * integer of the half, signed bytes
//   UNIT_STEP                 unit u's codes are times two to the power of u times this, for FOLDED
// Compiled with AVX-512 VNNI and VBMI, by files that define KERNEL and LANE as kernels_body.h says.
#pragma once

#include <immintrin.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "encoding.h"
#include "formats/field.h"

namespace flashclient {
namespace {

constexpr size_t UNIT = 32, UNITS = 4, STRETCH = UNIT * UNITS;
constexpr size_t QUAD = 4;  // rows whose scales are made together

// The codes of a stretch, bytes: sixteen of each unit in `halves[0]`, the other sixteen in `halves[1]`. With IN_ORDER
// all of two units in the first, of the other two in the second.
struct StretchCodes {
    __m512i halves[2];
};

// Scales and leasts of four rows, of all units [unit][row], and of both halves where each has its own. Where they are
// folded, a half's scale is scale[0] * integer[half].
template <size_t parts>
struct QuadScales {
    __m512 scale[parts];
    __m512 least[parts];
    __m512i integer[parts];
};

using QuadBlocks = const uint8_t* const (&)[QUAD];

template <weightd::BlockFormat format>
struct Codes;

template <weightd::BlockFormat format>
constexpr weightd::BlockRecord record_of() {
    return weightd::BLOCK_FORMATS[static_cast<size_t>(format)];
}

// ---- Vectors of bytes ----

LANE __m128i sixteen_at(const uint8_t* bytes) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)); }

// Sixteen bytes of each of four blocks.
LANE __m512i of_four_blocks(const uint8_t* first, size_t stride) {
    __m512i bytes = _mm512_castsi128_si512(sixteen_at(first));
    bytes = _mm512_mask_broadcast_i32x4(bytes, 0x00f0, sixteen_at(first + stride));
    bytes = _mm512_mask_broadcast_i32x4(bytes, 0x0f00, sixteen_at(first + 2 * stride));
    return _mm512_mask_broadcast_i32x4(bytes, 0xf000, sixteen_at(first + 3 * stride));
}

LANE __m512i field(__m512i bytes, int mask) {
    return _mm512_and_si512(bytes, _mm512_set1_epi8(static_cast<char>(mask)));
}

constexpr int AND_OR = 0xea;  // of ternary logic: a & b | c

LANE __m512i with_field(__m512i codes, __m512i bytes, int mask) {
    return _mm512_ternarylogic_epi32(bytes, _mm512_set1_epi8(static_cast<char>(mask)), codes, AND_OR);
}

// Numbers for the four quarters of a vector.
LANE __m512i of_units(int first, int second, int third, int fourth) {
    return _mm512_setr_epi32(first, first, first, first, second, second, second, second, third, third, third, third,
                             fourth, fourth, fourth, fourth);
}

// Codes of four bits of blocks of 32: lower halves of bytes first.
LANE StretchCodes halves_of_bytes(const uint8_t* first, size_t stride) {
    const __m512i bytes = of_four_blocks(first, stride);
    return {{field(bytes, 15), field(_mm512_srli_epi32(bytes, 4), 15)}};
}

// The numbers for which such codes stand. A permutation reads six bits of a byte, of which the upper two pick one of
// four tables that are the same.
LANE StretchCodes looked_up_halves(const uint8_t* first, size_t stride, const std::array<uint8_t, 16>& numbers) {
    const __m512i table = _mm512_broadcast_i32x4(sixteen_at(numbers.data()));
    const __m512i bytes = of_four_blocks(first, stride);
    return {{_mm512_permutexvar_epi8(bytes, table), _mm512_permutexvar_epi8(_mm512_srli_epi32(bytes, 4), table)}};
}

// ---- Scales ----

// Numbers of two bytes of four blocks of four rows, [unit][row]. Where those of a row are within 64 bytes, a
// permutation takes them.
template <size_t offset, size_t stride>
LANE __m256i pairs_of_blocks(QuadBlocks at) {
    if constexpr (offset + (UNITS - 1) * stride + 2 <= 64) {
        constexpr short FIRST = offset / 2, STEP = stride / 2;
        const __m256i unit = _mm256_setr_epi16(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        const __m256i word =
            _mm256_add_epi16(_mm256_mullo_epi16(unit, _mm256_set1_epi16(STEP)), _mm256_set1_epi16(FIRST));
        const __m512i words = _mm512_castsi256_si512(word);
        __m512i pairs = _mm512_permutexvar_epi16(words, _mm512_loadu_si512(at[0]));
        pairs = _mm512_mask_permutexvar_epi16(pairs, 0x2222, words, _mm512_loadu_si512(at[1]));
        pairs = _mm512_mask_permutexvar_epi16(pairs, 0x4444, words, _mm512_loadu_si512(at[2]));
        pairs = _mm512_mask_permutexvar_epi16(pairs, 0x8888, words, _mm512_loadu_si512(at[3]));
        return _mm512_castsi512_si256(pairs);
    } else {
        uint16_t pair[UNITS * QUAD];
        for (size_t i = 0; i < UNITS * QUAD; i++) {
            std::memcpy(&pair[i], at[i % QUAD] + offset + i / QUAD * stride, sizeof(pair[i]));
        }
        return _mm256_setr_epi16(static_cast<short>(pair[0]), static_cast<short>(pair[1]), static_cast<short>(pair[2]),
                                 static_cast<short>(pair[3]), static_cast<short>(pair[4]), static_cast<short>(pair[5]),
                                 static_cast<short>(pair[6]), static_cast<short>(pair[7]), static_cast<short>(pair[8]),
                                 static_cast<short>(pair[9]), static_cast<short>(pair[10]),
                                 static_cast<short>(pair[11]), static_cast<short>(pair[12]),
                                 static_cast<short>(pair[13]), static_cast<short>(pair[14]),
                                 static_cast<short>(pair[15]));
    }
}

template <size_t offset, size_t stride>
LANE __m512 halves_of_blocks(QuadBlocks at) {
    return _mm512_cvtph_ps(pairs_of_blocks<offset, stride>(at));
}

// A number of half precision of each of four rows, for all units.
LANE __m512 halves_of_rows(QuadBlocks at, size_t offset) {
    uint16_t each[QUAD];
    for (size_t r = 0; r < QUAD; r++) std::memcpy(&each[r], at[r] + offset, 2);
    __m128i halves = _mm_cvtsi32_si128(each[0]);
    halves = _mm_insert_epi16(halves, each[1], 1);
    halves = _mm_insert_epi16(halves, each[2], 2);
    halves = _mm_insert_epi16(halves, each[3], 3);
    return _mm512_cvtph_ps(_mm256_broadcastq_epi64(halves));
}

// Sixteen bytes of each of four rows.
LANE __m512i of_four_rows(QuadBlocks at, size_t offset) {
    __m512i bytes = _mm512_castsi128_si512(sixteen_at(at[0] + offset));
    bytes = _mm512_mask_broadcast_i32x4(bytes, 0x00f0, sixteen_at(at[1] + offset));
    bytes = _mm512_mask_broadcast_i32x4(bytes, 0x0f00, sixteen_at(at[2] + offset));
    return _mm512_mask_broadcast_i32x4(bytes, 0xf000, sixteen_at(at[3] + offset));
}

// Of sixteen bytes of each of four rows: those from `first` on, one for each unit, as numbers [unit][row].
LANE __m512i numbers_of_bytes(__m512i rows, int first) {
    const __m512i place = _mm512_setr_epi32(0, 16, 32, 48, 1, 17, 33, 49, 2, 18, 34, 50, 3, 19, 35, 51);
    return _mm512_maskz_permutexvar_epi8(0x1111111111111111, _mm512_add_epi32(place, _mm512_set1_epi32(first)), rows);
}

// Bytes of four rows, one of each unit, as numbers [unit][row].
LANE __m512i bytes_of_rows(uint32_t first, uint32_t second, uint32_t third, uint32_t fourth) {
    __m128i bytes = _mm_cvtsi32_si128(static_cast<int>(first));
    bytes = _mm_insert_epi32(bytes, static_cast<int>(second), 1);
    bytes = _mm_insert_epi32(bytes, static_cast<int>(third), 2);
    bytes = _mm_insert_epi32(bytes, static_cast<int>(fourth), 3);
    const __m128i by_unit = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_cvtepu8_epi32(_mm_shuffle_epi8(bytes, by_unit));
}

LANE __m512 scaled(__m512i numbers, int zero, __m512 by) {
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(numbers, _mm512_set1_epi32(zero))), by);
}

// Of four rows of eight bytes, for both halves of four units: [unit][half].
template <bool is_signed = false>
struct HalfNumbers {
    __m512i of[2];

    LANE explicit HalfNumbers(const uint64_t (&rows)[QUAD]) {
        const __m256i bytes = _mm256_setr_epi64x(static_cast<long long>(rows[0]), static_cast<long long>(rows[1]),
                                                 static_cast<long long>(rows[2]), static_cast<long long>(rows[3]));
        const __m256i by_unit = _mm256_setr_epi8(0, 8, 16, 24, 2, 10, 18, 26, 4, 12, 20, 28, 6, 14, 22, 30,  //
                                                 1, 9, 17, 25, 3, 11, 19, 27, 5, 13, 21, 29, 7, 15, 23, 31);
        const __m256i sorted = _mm256_permutexvar_epi8(by_unit, bytes);
        const __m128i halves[2] = {_mm256_castsi256_si128(sorted), _mm256_extracti128_si256(sorted, 1)};
        for (size_t i = 0; i < 2; i++) {
            of[i] = is_signed ? _mm512_cvtepi8_epi32(halves[i]) : _mm512_cvtepu8_epi32(halves[i]);
        }
    }
};

}  // namespace
}  // namespace flashclient

#include "formats/integer_formats.h"
