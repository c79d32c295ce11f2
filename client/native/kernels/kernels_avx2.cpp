#include "kernels/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#define KERNEL __attribute__((target("avx2,fma,f16c,popcnt")))
#define LANE KERNEL __attribute__((always_inline)) inline

namespace flashclient {
namespace {

// Eight fp32. The end of a row goes through a small buffer, so no byte beyond the row is read.
struct Lane {
    static constexpr size_t WIDTH = 8;
    static constexpr size_t TILE_ROWS = 3;  // twelve sums, three weights and x: all 16 registers
    static constexpr size_t TILE_TOKENS = 4;
    __m256 value;

    LANE static Lane zero() { return {_mm256_setzero_ps()}; }
    LANE static Lane all(float one) { return {_mm256_set1_ps(one)}; }

    template <Dtype dtype, typename Weight>
    LANE static Lane load(const Weight* row) {
        if constexpr (dtype == Dtype::f32) {
            return {_mm256_loadu_ps(row)};
        } else if constexpr (dtype == Dtype::i8) {
            return from_bytes(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(row)));
        } else {
            return widen<dtype>(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row)));
        }
    }
    template <Dtype dtype, typename Weight>
    LANE static Lane load_some(const Weight* row, size_t some) {
        alignas(32) Weight padded[WIDTH] = {};
        std::memcpy(padded, row, some * sizeof(Weight));
        return load<dtype>(padded);
    }
    template <Dtype dtype>
    LANE static Lane widen(__m128i half) {
        if constexpr (dtype == Dtype::f16) return {_mm256_cvtph_ps(half)};
        return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
    }
    LANE static Lane from_bytes(__m128i bytes) { return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))}; }
    template <Dtype dtype>
    LANE void store_as(uint16_t* row) const {
        __m128i half;
        if constexpr (dtype == Dtype::f16) {
            half = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
        } else {
            const __m256i bits = _mm256_castps_si256(value);
            const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
            const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
            const __m256i not_a_number = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
            const __m256i rounded = _mm256_srli_epi32(up, 16);
            const __m256i whole = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), not_a_number);
            half = _mm_packus_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
        }
        _mm_storeu_si128(reinterpret_cast<__m128i*>(row), half);
    }
    LANE void store(float* out) const { _mm256_storeu_ps(out, value); }
    LANE void store_some(float* out, size_t some) const {
        alignas(32) float padded[WIDTH];
        store(padded);
        std::memcpy(out, padded, some * sizeof(float));
    }
};

LANE Lane fma(Lane a, Lane b, Lane c) { return {_mm256_fmadd_ps(a.value, b.value, c.value)}; }
LANE Lane max(Lane a, Lane b) { return {_mm256_max_ps(a.value, b.value)}; }  // b where either is NaN
LANE Lane divide(Lane a, Lane b) { return {_mm256_div_ps(a.value, b.value)}; }
LANE Lane power_of_two(Lane a) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.value), 23))}; }
LANE float sum(Lane a) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(a.value), _mm256_extractf128_ps(a.value, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

// Each half has the partial sums of four vectors.
LANE __m256 sums_of_four(const Lane* lanes) {
    return _mm256_hadd_ps(_mm256_hadd_ps(lanes[0].value, lanes[1].value),
                          _mm256_hadd_ps(lanes[2].value, lanes[3].value));
}
// Lane i of the result is the sum of the lanes of vector i.
LANE Lane sums_of(const Lane (&lanes)[Lane::WIDTH]) {
    const __m256 first = sums_of_four(lanes);
    const __m256 second = sums_of_four(lanes + 4);
    return {_mm256_add_ps(_mm256_permute2f128_ps(first, second, 0x20), _mm256_permute2f128_ps(first, second, 0x31))};
}

}  // namespace
}  // namespace flashclient

#include "formats/codes_avx2.h"
#include "kernels/kernels_body.h"

const flashclient::Kernels* flashclient::kernels_avx2(Dtype dtype) { return table_for(dtype, "avx2"); }
const flashclient::Kernels* flashclient::kernels_avx2(BlockFormat format) { return table_for(format, "avx2"); }
#else
const flashclient::Kernels* flashclient::kernels_avx2(Dtype) { return nullptr; }
const flashclient::Kernels* flashclient::kernels_avx2(BlockFormat) { return nullptr; }
#endif
