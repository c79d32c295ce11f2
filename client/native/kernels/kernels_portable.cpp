#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/kernels.h"

#define KERNEL
#define LANE inline

namespace flashclient {
namespace {

// Half precision in integers: the exponent moves from bias 15 to 127; subnormals are scaled by a power of two, exactly.
float widen_f16(uint16_t half) {
    const uint32_t sign = (half & 0x8000U) << 16;
    const uint32_t exponent = (half >> 10) & 0x1fU;
    const uint32_t fraction = half & 0x3ffU;
    if (exponent == 0) return std::copysign(static_cast<float>(fraction) * 0x1p-24f, std::bit_cast<float>(sign | 1U));
    const uint32_t widened = exponent == 0x1f ? 0xffU : exponent + 112;
    return std::bit_cast<float>(sign | widened << 23 | fraction << 13);
}

// Adding a number whose last bit is that of the result rounds the fraction; results beyond 65504 are infinite.
uint16_t narrow_f16(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000U);
    const float size = std::fabs(value);
    if (std::isnan(value)) return sign | 0x7e00U;
    if (size >= 65520.0f) return sign | 0x7c00U;
    if (size < 0x1p-14f) return sign | static_cast<uint16_t>(std::bit_cast<uint32_t>(size + 0.5f) - 0x3f000000U);
    const uint32_t magnitude = bits & 0x7fffffffU;
    const uint32_t rounded = magnitude + 0xfffU + (magnitude >> 13 & 1U);
    return sign | static_cast<uint16_t>((rounded >> 13) - (112U << 10));
}

uint16_t narrow_bf16(float value) {
    if (std::isnan(value)) return 0x7fc0U;
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    return static_cast<uint16_t>((bits + 0x7fffU + (bits >> 16 & 1U)) >> 16);
}

float widen_bf16(uint16_t half) { return std::bit_cast<float>(static_cast<uint32_t>(half) << 16); }

// Four fp32 in an array, which compilers turn into what vectors there are. A product is rounded before it is added.
struct Lane {
    static constexpr size_t WIDTH = 4;
    static constexpr size_t TILE_ROWS = 4;
    static constexpr size_t TILE_TOKENS = 2;
    float value[WIDTH];

    static Lane zero() { return all(0.0f); }
    static Lane all(float one) { return {{one, one, one, one}}; }

    template <Dtype dtype, typename Weight>
    static Lane load(const Weight* row) {
        return load_some<dtype>(row, WIDTH);
    }
    template <Dtype dtype, typename Weight>
    static Lane load_some(const Weight* row, size_t some) {
        Lane lane = zero();
        for (size_t i = 0; i < some; i++) {
            if constexpr (dtype == Dtype::f32 || dtype == Dtype::i8) {
                lane.value[i] = row[i];
            } else {
                lane.value[i] = dtype == Dtype::bf16 ? widen_bf16(row[i]) : widen_f16(row[i]);
            }
        }
        return lane;
    }
    template <Dtype dtype>
    void store_as(uint16_t* row) const {
        for (size_t i = 0; i < WIDTH; i++) row[i] = dtype == Dtype::f16 ? narrow_f16(value[i]) : narrow_bf16(value[i]);
    }
    void store(float* out) const { std::memcpy(out, value, sizeof(value)); }
    void store_some(float* out, size_t some) const { std::memcpy(out, value, some * sizeof(float)); }
};

Lane fma(Lane a, Lane b, Lane c) {
    for (size_t i = 0; i < Lane::WIDTH; i++) c.value[i] += a.value[i] * b.value[i];
    return c;
}
Lane max(Lane a, Lane b) {  // b where either is NaN
    for (size_t i = 0; i < Lane::WIDTH; i++) {
        if (a.value[i] > b.value[i]) b.value[i] = a.value[i];
    }
    return b;
}
Lane divide(Lane a, Lane b) {
    for (size_t i = 0; i < Lane::WIDTH; i++) a.value[i] /= b.value[i];
    return a;
}
Lane power_of_two(Lane a) {
    for (float& value : a.value) value = std::bit_cast<float>(std::bit_cast<uint32_t>(value) << 23);
    return a;
}
float sum(Lane a) { return (a.value[0] + a.value[1]) + (a.value[2] + a.value[3]); }
// Lane i of the result is the sum of the lanes of vector i.
Lane sums_of(const Lane (&lanes)[Lane::WIDTH]) {
    Lane sums;
    for (size_t i = 0; i < Lane::WIDTH; i++) sums.value[i] = sum(lanes[i]);
    return sums;
}

}  // namespace
}  // namespace flashclient

#include "formats/codes_portable.h"
#include "kernels/kernels_body.h"

const flashclient::Kernels* flashclient::kernels_portable(Dtype dtype) { return table_for(dtype, "portable"); }
const flashclient::Kernels* flashclient::kernels_portable(BlockFormat format) { return table_for(format, "portable"); }
