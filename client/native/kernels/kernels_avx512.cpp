#include "kernels/kernels.h"

#if defined(__x86_64__)
#include <cstddef>
#include <cstdint>

#include "vectors/intrinsics.h"

#define KERNEL __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,popcnt")))
#define LANE KERNEL __attribute__((always_inline)) inline

#include "vectors/vector_sums.h"

namespace flashclient {
namespace {

// Sixteen fp32. The ends of rows are masked, so they read no byte beyond the row.
struct Lane {
    static constexpr size_t WIDTH = 16;
    static constexpr size_t TILE_ROWS = 6;  // 24 sums, six weights and x: 31 of 32 registers
    static constexpr size_t TILE_TOKENS = 4;
    __m512 value;

    LANE static Lane zero() { return {_mm512_setzero_ps()}; }
    LANE static Lane all(float one) { return {_mm512_set1_ps(one)}; }

    template <Dtype dtype, typename Weight>
    LANE static Lane load(const Weight* row) {
        if constexpr (dtype == Dtype::f32) {
            return {_mm512_loadu_ps(row)};
        } else if constexpr (dtype == Dtype::i8) {
            return from_bytes(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row)));
        } else {
            return widen<dtype>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
        }
    }
    template <Dtype dtype, typename Weight>
    LANE static Lane load_some(const Weight* row, size_t some) {
        const auto mask = static_cast<__mmask16>((1U << some) - 1);
        if constexpr (dtype == Dtype::f32) {
            return {_mm512_maskz_loadu_ps(mask, row)};
        } else if constexpr (dtype == Dtype::i8) {
            return from_bytes(_mm_maskz_loadu_epi8(mask, row));
        } else {
            return widen<dtype>(_mm256_maskz_loadu_epi16(mask, row));
        }
    }
    template <Dtype dtype>
    LANE static Lane widen(__m256i half) {
        if constexpr (dtype == Dtype::f16) return {_mm512_cvtph_ps(half)};
        return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
    }
    LANE static Lane from_bytes(__m128i bytes) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))}; }
    template <Dtype dtype>
    LANE void store_as(uint16_t* row) const {
        __m256i half;
        if constexpr (dtype == Dtype::f16) {
            half = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
        } else {
            const __m512i bits = _mm512_castps_si512(value);
            const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
            const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
            const __mmask16 not_a_number = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
            half = _mm512_cvtepi32_epi16(
                _mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), not_a_number, _mm512_set1_epi32(0x7fc0)));
        }
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(row), half);
    }
    LANE void store(float* out) const { _mm512_storeu_ps(out, value); }
    LANE void store_some(float* out, size_t some) const {
        _mm512_mask_storeu_ps(out, static_cast<__mmask16>((1U << some) - 1), value);
    }
};

LANE Lane fma(Lane a, Lane b, Lane c) { return {_mm512_fmadd_ps(a.value, b.value, c.value)}; }
LANE Lane max(Lane a, Lane b) { return {_mm512_max_ps(a.value, b.value)}; }  // b where either is NaN
LANE Lane divide(Lane a, Lane b) { return {_mm512_div_ps(a.value, b.value)}; }
LANE Lane power_of_two(Lane a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.value), 23))}; }
LANE float sum(Lane a) { return _mm512_reduce_add_ps(a.value); }

LANE Lane sums_of(const Lane (&lanes)[Lane::WIDTH]) {
    __m512 vectors[Lane::WIDTH];
    for (size_t i = 0; i < Lane::WIDTH; i++) vectors[i] = lanes[i].value;
    return {sums_of(vectors)};
}

}  // namespace
}  // namespace flashclient

#include "formats/codes_avx512.h"
#include "kernels/kernels_body.h"

const flashclient::Kernels* flashclient::kernels_avx512(Dtype dtype) { return table_for(dtype, "avx512"); }
const flashclient::Kernels* flashclient::kernels_avx512(BlockFormat format) { return table_for(format, "avx512"); }
#else
const flashclient::Kernels* flashclient::kernels_avx512(Dtype) { return nullptr; }
const flashclient::Kernels* flashclient::kernels_avx512(BlockFormat) { return nullptr; }
#endif
