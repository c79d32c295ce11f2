// What block_formats.h does with vectors of sixteen numbers.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace flashclient {
namespace {

LANE Lane multiply(Lane a, Lane b) { return {_mm512_mul_ps(a.value, b.value)}; }

LANE __m512i widened_bytes(const uint8_t* bytes) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
}

LANE Lane signed_bytes(const uint8_t* bytes) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))))};
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

// The bits of a string, from bit `first` on.
LANE Codes bits_in_order(const uint8_t* bits, size_t first) {
    uint16_t some;
    std::memcpy(&some, bits + first / 8, sizeof(some));
    return {_mm512_maskz_set1_epi32(some, 1)};
}

// low | high << shift
LANE Codes joined(Codes low, Codes high, unsigned shift) {
    return {_mm512_or_si512(low.value, _mm512_slli_epi32(high.value, shift))};
}

// code - zero, in fp32
LANE Lane numbers_of(Codes codes, int zero) {
    return {_mm512_cvtepi32_ps(_mm512_sub_epi32(codes.value, _mm512_set1_epi32(zero)))};
}

}  // namespace
}  // namespace flashclient
