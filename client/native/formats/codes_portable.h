// What block_formats.h does with arrays of four numbers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flashclient {
namespace {

Lane multiply(Lane a, Lane b) {
    for (size_t i = 0; i < Lane::WIDTH; i++) a.value[i] *= b.value[i];
    return a;
}

Lane signed_bytes(const uint8_t* bytes) {
    Lane lane;
    for (size_t i = 0; i < Lane::WIDTH; i++) lane.value[i] = static_cast<float>(static_cast<int8_t>(bytes[i]));
    return lane;
}

inline uint8_t half_of(uint8_t byte, size_t upper) { return upper != 0 ? byte >> 4 : byte & 15; }

// The values of codes of four bits: scale * numbers[code]
struct Sixteen {
    const int8_t* numbers;
    Lane scale;

    Sixteen(const int8_t (&numbers)[16], Lane scale) : numbers(numbers), scale(scale) {}
    Lane of_halves(const uint8_t* bytes, size_t upper) const {
        Lane lane;
        for (size_t i = 0; i < Lane::WIDTH; i++) {
            lane.value[i] = scale.value[i] * static_cast<float>(numbers[half_of(bytes[i], upper)]);
        }
        return lane;
    }
};

// scale * code + least
struct SixteenAbove {
    Lane scale;
    Lane least;

    SixteenAbove(Lane scale, Lane least) : scale(scale), least(least) {}
    Lane of_halves(const uint8_t* bytes, size_t upper) const {
        Lane lane;
        for (size_t i = 0; i < Lane::WIDTH; i++) {
            lane.value[i] = scale.value[i] * static_cast<float>(half_of(bytes[i], upper)) + least.value[i];
        }
        return lane;
    }
};

}  // namespace
}  // namespace flashclient
