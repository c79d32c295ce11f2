// Sums of the lanes of vectors of AVX-512, for files that define KERNEL and LANE before, as kernels_body.h says.
#pragma once

#include <cstddef>

#include "vectors/intrinsics.h"

namespace flashclient {
namespace {

LANE __m512 pair_sums(__m512 a, __m512 b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); }
LANE __m512 pair_sums_of_two(__m512 a, __m512 b) {
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b));
    return _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
}
LANE __m512 quarter_sums(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}
// Lane i of the result is the sum of the lanes of vector i, in an order that does not depend on i.
LANE __m512 sums_of(const __m512 (&vectors)[16]) {
    __m512 fours[4];  // each has in a quarter the partial sums of four vectors
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; i++) {
        fours[i] = pair_sums_of_two(pair_sums(vectors[4 * i], vectors[4 * i + 1]),
                                    pair_sums(vectors[4 * i + 2], vectors[4 * i + 3]));
    }
    return quarter_sums(quarter_sums(fours[0], fours[1]), quarter_sums(fours[2], fours[3]));
}

}  // namespace
}  // namespace flashclient
