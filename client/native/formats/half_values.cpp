#include "formats/half_values.h"

#include <cmath>
#include <cstdint>
#include <limits>

namespace flashclient {

alignas(64) float half_values[1 << 16];

namespace {

float value_of(uint32_t half) {
    const int exponent = static_cast<int>(half >> 10 & 31);
    const auto fraction = static_cast<float>(half & 1023);
    float value = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024.0f + fraction, exponent - 25);
    if (exponent == 31) value = fraction == 0.0f ? std::numeric_limits<float>::infinity() : std::nanf("");
    return std::copysign(value, (half & 0x8000) != 0 ? -1.0f : 1.0f);
}

const bool FILLED = [] {
    for (uint32_t half = 0; half < 1 << 16; half++) half_values[half] = value_of(half);
    return true;
}();

}  // namespace
}  // namespace flashclient
