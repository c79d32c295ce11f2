// Numbers of fp32 as sums of numbers of bf16, for kernels that multiply bf16: it has 8 bits, fp32 has 24. Files that
// include this define KERNEL and LANE before, as kernels_body.h says, and include kernels/kernels.h.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "vectors/intrinsics.h"

namespace flashclient {
namespace {

constexpr size_t ROW_BYTES = 64;
constexpr size_t BLOCK = ROW_BYTES / sizeof(uint16_t);  // elements of bf16 in a line of memory
constexpr size_t PARTS = 3;                             // numbers of bf16 whose sum is one of fp32

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

// Whether one part is enough.
KERNEL inline bool is_exact(const float* x, size_t hidden) {
    __m512i bits = _mm512_setzero_si512();
    size_t j = 0;
    for (; j + 16 <= hidden; j += 16) bits = _mm512_or_si512(bits, _mm512_loadu_si512(x + j));
    if (j < hidden) {
        const auto mask = static_cast<__mmask16>((1U << (hidden - j)) - 1);
        bits = _mm512_or_si512(bits, _mm512_maskz_loadu_epi32(mask, x + j));
    }
    return (_mm512_reduce_or_epi32(bits) & 0xffff) == 0;
}

// The bf16 in the upper halves, in order.
LANE __m256i narrow(__m512i upper) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(upper, 16)); }

// Which columns are whose, of the columns that the numbers of some tokens take.
struct Columns {
    uint8_t first[TOKENS_MAX];  // column of a token
    bool exact[TOKENS_MAX];     // it has one column, not PARTS
    uint8_t count;

    KERNEL void assign(const float* x, size_t hidden, size_t tokens) {
        count = 0;
        for (size_t t = 0; t < tokens; t++) {
            first[t] = count;
            exact[t] = is_exact(x + t * hidden, hidden);
            count = static_cast<uint8_t>(count + (exact[t] ? 1 : PARTS));
        }
    }
    size_t parts(size_t token) const { return exact[token] ? 1 : PARTS; }
};

LANE __m512 load_some(const float* x, size_t from, size_t hidden) {
    const size_t first = std::min(from, hidden);
    const size_t some = std::min<size_t>(16, hidden - first);
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1U << some) - 1), x + first);
}

// The parts of the numbers [j, j + BLOCK) of a row of x, in pairs.
LANE void take_pairs(const float* x, size_t j, size_t hidden, size_t parts, __m512i (&pairs)[PARTS]) {
    __m512 low = load_some(x, j, hidden);
    __m512 high = load_some(x, j + 16, hidden);
    for (size_t part = 0; part < parts; part++) {
        const __m256i narrow_low = narrow(take_part(low));
        pairs[part] = _mm512_inserti64x4(_mm512_castsi256_si512(narrow_low), narrow(take_part(high)), 1);
    }
}

}  // namespace
}  // namespace flashclient
