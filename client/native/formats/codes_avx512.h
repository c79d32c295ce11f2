// What block_formats.h does with vectors of sixteen numbers.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "formats/field.h"

namespace flashclient {
namespace {

LANE Lane multiply(Lane a, Lane b) { return {_mm512_mul_ps(a.value, b.value)}; }

LANE __m512i widened_bytes(const uint8_t* bytes) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
}

LANE Lane signed_bytes(const uint8_t* bytes) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))))};
}

// Numbers of F8_E4M3, divided by E4M3_SCALE.
LANE Lane unscaled_e4m3(const uint8_t* bytes) {
    const __m256i words = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    const __m256i places = _mm256_slli_epi16(words, E4M3_PLACES);
    return {_mm512_cvtph_ps(_mm256_and_si256(places, _mm256_set1_epi16(static_cast<short>(E4M3_BITS))))};
}

// The values of codes of four bits: a table, in which a permutation looks up the lowest four bits of each lane.
struct LookUp {
    __m512 values;

    LANE Lane of_halves(const uint8_t* bytes, size_t upper) const {
        const __m512i codes = widened_bytes(bytes);
        return {_mm512_permutexvar_ps(upper != 0 ? _mm512_srli_epi32(codes, 4) : codes, values)};
    }
};

// scale * numbers[code]
struct Sixteen : LookUp {
    LANE Sixteen(const int8_t (&numbers)[16], Lane scale)
        : LookUp{multiply(signed_bytes(reinterpret_cast<const uint8_t*>(numbers)), scale).value} {}
};

// scale * code + least
struct SixteenAbove : LookUp {
    LANE SixteenAbove(Lane scale, Lane least)
        : LookUp{_mm512_add_ps(
              _mm512_mul_ps(_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), scale.value),
              least.value)} {}
};

LANE Lane add(Lane a, Lane b) { return {_mm512_add_ps(a.value, b.value)}; }

// Integers, one in each lane.
struct Codes {
    __m512i value;
};

LANE Codes codes_of(const uint8_t* bytes) { return {widened_bytes(bytes)}; }

// code >> shift & mask
LANE Codes bits_of(Codes codes, size_t shift, int mask) {
    const __m512i shifted = _mm512_srlv_epi32(codes.value, _mm512_set1_epi32(static_cast<int>(shift)));
    return {_mm512_and_si512(shifted, _mm512_set1_epi32(mask))};
}

constexpr int AND_OR = 0xea;     // of ternary logic: a & b | c
constexpr float FROM = 0x1p23f;  // from here on, the fraction of a number in fp32 counts ones

// code - zero in fp32, for codes of a lower and an upper field of bits: field(lower) | field(upper) << lower.count. The
// code becomes the fraction of a number from 2^23 on, from which 2^23 + zero is subtracted, exactly.
LANE Lane numbers_of_fields(Codes lower, Field of_lower, Codes upper, Field of_upper, int zero) {
    const auto left = static_cast<int>(of_lower.count - of_upper.first);  // or right: widened bytes have room for both
    const __m512i low = _mm512_srlv_epi32(lower.value, _mm512_set1_epi32(static_cast<int>(of_lower.first)));
    const __m512i high = _mm512_rolv_epi32(upper.value, _mm512_set1_epi32(left & 31));
    const __m512i from = _mm512_castps_si512(_mm512_set1_ps(FROM));
    const __m512i fraction = _mm512_ternarylogic_epi32(low, _mm512_set1_epi32(of_lower.mask()), from, AND_OR);
    const __m512i whole =
        _mm512_ternarylogic_epi32(high, _mm512_set1_epi32(of_upper.mask() << of_lower.count), fraction, AND_OR);
    return {_mm512_sub_ps(_mm512_castsi512_ps(whole), _mm512_set1_ps(FROM + static_cast<float>(zero)))};
}

// The same where the upper field is bit `first` and the following of a string of bits.
LANE Lane numbers_with_bits(Codes lower, Field of_lower, const uint8_t* bits, size_t first, int zero) {
    uint16_t some;
    std::memcpy(&some, bits + first / 8, sizeof(some));
    const __m512i low = _mm512_srlv_epi32(lower.value, _mm512_set1_epi32(static_cast<int>(of_lower.first)));
    const __m512i from = _mm512_castps_si512(_mm512_set1_ps(FROM));
    const __m512i fraction = _mm512_ternarylogic_epi32(low, _mm512_set1_epi32(of_lower.mask()), from, AND_OR);
    const __m512i whole = _mm512_mask_or_epi32(fraction, some, fraction, _mm512_set1_epi32(of_lower.mask() + 1));
    return {_mm512_sub_ps(_mm512_castsi512_ps(whole), _mm512_set1_ps(FROM + static_cast<float>(zero)))};
}

// code - zero, in fp32
LANE Lane numbers_of(Codes codes, int zero) {
    return {_mm512_cvtepi32_ps(_mm512_sub_epi32(codes.value, _mm512_set1_epi32(zero)))};
}

}  // namespace
}  // namespace flashclient
