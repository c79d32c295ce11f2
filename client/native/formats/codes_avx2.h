// What block_formats.h does with vectors of eight numbers.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "formats/field.h"

namespace flashclient {
namespace {

LANE Lane multiply(Lane a, Lane b) { return {_mm256_mul_ps(a.value, b.value)}; }

LANE __m128i eight_bytes(const uint8_t* bytes) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)); }

LANE Lane floats_of(__m128i signed_bytes) { return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(signed_bytes))}; }

LANE Lane signed_bytes(const uint8_t* bytes) { return floats_of(eight_bytes(bytes)); }

// Numbers of F8_E4M3, divided by E4M3_SCALE.
LANE Lane unscaled_e4m3(const uint8_t* bytes) {
    const __m128i places = _mm_slli_epi16(_mm_cvtepi8_epi16(eight_bytes(bytes)), E4M3_PLACES);
    return {_mm256_cvtph_ps(_mm_and_si128(places, _mm_set1_epi16(static_cast<short>(E4M3_BITS))))};
}

LANE __m128i halves(const uint8_t* bytes, size_t upper) {
    const __m128i eight = eight_bytes(bytes);
    return _mm_and_si128(upper != 0 ? _mm_srli_epi16(eight, 4) : eight, _mm_set1_epi8(15));
}

// The values of codes of four bits: scale * numbers[code]
struct Sixteen {
    __m128i numbers;
    Lane scale;

    LANE Sixteen(const int8_t (&numbers)[16], Lane scale)
        : numbers(_mm_loadu_si128(reinterpret_cast<const __m128i*>(numbers))), scale(scale) {}
    LANE Lane of_halves(const uint8_t* bytes, size_t upper) const {
        return multiply(floats_of(_mm_shuffle_epi8(numbers, halves(bytes, upper))), scale);
    }
};

// scale * code + least
struct SixteenAbove {
    Lane scale;
    Lane least;

    LANE SixteenAbove(Lane scale, Lane least) : scale(scale), least(least) {}
    LANE Lane of_halves(const uint8_t* bytes, size_t upper) const {
        return {_mm256_add_ps(multiply(floats_of(halves(bytes, upper)), scale).value, least.value)};
    }
};

LANE Lane add(Lane a, Lane b) { return {_mm256_add_ps(a.value, b.value)}; }

// Integers, one in each lane.
struct Codes {
    __m256i value;
};

LANE Codes codes_of(const uint8_t* bytes) { return {_mm256_cvtepu8_epi32(eight_bytes(bytes))}; }

// code >> shift & mask
LANE Codes bits_of(Codes codes, size_t shift, int mask) {
    const __m256i shifted = _mm256_srlv_epi32(codes.value, _mm256_set1_epi32(static_cast<int>(shift)));
    return {_mm256_and_si256(shifted, _mm256_set1_epi32(mask))};
}

// The bits of a string, from bit `first` on.
LANE Codes bits_in_order(const uint8_t* bits, size_t first) {
    const __m256i byte = _mm256_set1_epi32(bits[first / 8]);
    const __m256i shifted = _mm256_srlv_epi32(byte, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return {_mm256_and_si256(shifted, _mm256_set1_epi32(1))};
}

// code - zero, in fp32
LANE Lane numbers_of(Codes codes, int zero) {
    return {_mm256_cvtepi32_ps(_mm256_sub_epi32(codes.value, _mm256_set1_epi32(zero)))};
}

// The same for codes of a lower and an upper field of bits: field(lower) | field(upper) << lower.count
LANE Lane numbers_of_fields(Codes lower, Field of_lower, Codes upper, Field of_upper, int zero) {
    const __m256i low = bits_of(lower, of_lower.first, of_lower.mask()).value;
    const __m256i high = bits_of(upper, of_upper.first, of_upper.mask()).value;
    return numbers_of({_mm256_or_si256(low, _mm256_slli_epi32(high, static_cast<int>(of_lower.count)))}, zero);
}

// The same where the upper field is bit `first` and the following of a string of bits.
LANE Lane numbers_with_bits(Codes lower, Field of_lower, const uint8_t* bits, size_t first, int zero) {
    return numbers_of_fields(lower, of_lower, bits_in_order(bits, first), {0, 1}, zero);
}

}  // namespace
}  // namespace flashclient
