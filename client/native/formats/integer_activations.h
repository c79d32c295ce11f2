// Rows of x as integers of 16 bits, with a scale for each unit of 32: x is within half of the scale of scale * integer.
//
// A scale is the power of two for which the greatest number of a unit takes 15 bits and the sign. So what bf16 holds is
// exact down to 1 / 128 of the greatest, and no number is further off than 1 / 32768 of it. The upper and the lower
// byte of integers are apart, because instructions multiply bytes. Sums of products of codes are exact, so that all
// instructions find the same.
//
// A unit with a NaN or an infinity has the scale NaN, so all products with its row are NaN.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "formats/integer_codes.h"

namespace flashclient {
namespace {

// A stretch of a row of x. Each scale and sum is repeated four times, once for each row of a quad.
struct alignas(64) StretchOfX {
    int8_t upper[2 * UNITS][16];  // halves of units, at place_of_half()
    int8_t lower[2 * UNITS][16];
    float scale[UNITS][QUAD];
    struct Sums {  // of x
        int32_t integers[UNITS][QUAD];
        float values[UNITS][QUAD];
    } unit, half[2];
};

// Where a half of a unit lies among those of a stretch, as its codes do (StretchCodes).
constexpr size_t place_of_half(bool in_order, size_t unit, size_t half) {
    return in_order ? unit * 2 + half : half * UNITS + unit;
}

// The power of two that is a scale, for a finite greatest size.
LANE float scale_for(float greatest) {
    constexpr float ROUNDS_UP = 1.004f;  // the upper byte takes 127 at most, after rounding by the lower one
    constexpr uint32_t EXPONENT = 0x7f800000, BITS = 14, LEAST = 27;
    const float above = greatest * ROUNDS_UP;
    uint32_t bits;
    std::memcpy(&bits, &above, sizeof(bits));
    bits = std::max(bits & EXPONENT, LEAST << 23) - (BITS << 23);
    float scale;
    std::memcpy(&scale, &bits, sizeof(scale));
    return scale;
}

LANE float inverse_of_power(float power) {
    uint32_t bits;
    std::memcpy(&bits, &power, sizeof(bits));
    bits = (uint32_t{254} << 23) - bits;
    std::memcpy(&power, &bits, sizeof(power));
    return power;
}

LANE void set_sums(StretchOfX::Sums& sums, size_t unit, int32_t sum, float scale) {
    std::fill_n(sums.integers[unit], QUAD, sum);
    std::fill_n(sums.values[unit], QUAD, static_cast<float>(sum) * scale);
}

template <bool in_order>
LANE void quantise_unit(const float* x, size_t unit, StretchOfX& out) {
    const __m512 values[2] = {_mm512_loadu_ps(x), _mm512_loadu_ps(x + 16)};
    const __m512 sizes = _mm512_range_ps(values[0], values[1], 0x0b);  // the greater of the sizes
    const float greatest = _mm512_reduce_max_ps(sizes);
    const __mmask16 no_number = _mm512_cmp_ps_mask(values[0], values[1], _CMP_UNORD_Q);
    float scale = scale_for(greatest);
    __m512i integers[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    if (no_number != 0 || greatest > std::numeric_limits<float>::max()) {
        scale = std::numeric_limits<float>::quiet_NaN();
    } else {
        const __m512 inverse = _mm512_set1_ps(inverse_of_power(scale));
        for (size_t i = 0; i < 2; i++) integers[i] = _mm512_cvtps_epi32(_mm512_mul_ps(values[i], inverse));
    }
    std::fill_n(out.scale[unit], QUAD, scale);
    int32_t sums[2];
    for (size_t i = 0; i < 2; i++) {
        const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(integers[i], _mm512_set1_epi32(128)), 8);
        const size_t place = place_of_half(in_order, unit, i);
        _mm_store_si128(reinterpret_cast<__m128i*>(out.upper[place]), _mm512_cvtepi32_epi8(upper));
        _mm_store_si128(reinterpret_cast<__m128i*>(out.lower[place]), _mm512_cvtepi32_epi8(integers[i]));
        sums[i] = _mm512_reduce_add_epi32(integers[i]);
        set_sums(out.half[i], unit, sums[i], scale);
    }
    set_sums(out.unit, unit, sums[0] + sums[1], scale);
}

// `elements` are whole units, at most a stretch. Where they are fewer, those before them are 0: the last stretch of a
// row begins among units that belong to the one before it.
template <bool in_order>
KERNEL void quantise(const float* x, size_t elements, StretchOfX& out) {
    if (elements < STRETCH) std::memset(&out, 0, sizeof(out));
    const size_t units = elements / UNIT;
    for (size_t i = 0; i < units; i++) quantise_unit<in_order>(x + i * UNIT, UNITS - units + i, out);
}

template <bool in_order>
KERNEL void quantise_row(const float* x, size_t hidden, StretchOfX* out) {
    for (size_t j = 0; j < hidden; j += STRETCH) quantise<in_order>(x + j, std::min(STRETCH, hidden - j), *out++);
}

}  // namespace
}  // namespace flashclient
