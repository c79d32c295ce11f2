// Numbers of half precision (fp16).
#pragma once

#include <bit>
#include <cstdint>

namespace weightd {

// Both conversions of fp16 are free of branches, so that they vectorise. The method is Fabian Giesen's
// (half_to_float_fast5, float_to_half_fast3_rtne, public domain): subnormals are aligned by a floating-point addition
// or subtraction.
inline float widen_f16(uint16_t half) {
    constexpr uint32_t EXPONENT_MASK = 0x7c00U << 13;
    const uint32_t magnitude = (half & 0x7fffU) << 13;
    const uint32_t exponent = magnitude & EXPONENT_MASK;
    const uint32_t rebased = magnitude + ((127U - 15U) << 23);
    const uint32_t special = rebased + ((128U - 16U) << 23);
    const float smallest_normal = std::bit_cast<float>(113U << 23);
    const auto subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(rebased + (1U << 23)) - smallest_normal);
    const uint32_t bits = exponent == EXPONENT_MASK ? special : exponent == 0 ? subnormal : rebased;
    return std::bit_cast<float>(bits | (half & 0x8000U) << 16);
}

inline uint16_t narrow_f16(float value) {
    const auto bits = std::bit_cast<uint32_t>(value);
    const uint32_t sign = bits & 0x80000000U;
    const uint32_t magnitude = bits ^ sign;
    const float aligner = std::bit_cast<float>(126U << 23);  // 0.5: its last bit is worth 2^-24, fp16's smallest step
    const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + aligner) - (126U << 23);
    const uint32_t normal = (magnitude - ((127U - 15U) << 23) + 0xfffU + ((magnitude >> 13) & 1U)) >> 13;
    const uint32_t special = magnitude > 0x7f800000U ? 0x7e00U | ((magnitude >> 13) & 0x1ffU) : 0x7c00U;
    const uint32_t finite = magnitude < (113U << 23) ? subnormal : normal;
    return static_cast<uint16_t>((magnitude >= (143U << 23) ? special : finite) | sign >> 16);
}

}  // namespace weightd
