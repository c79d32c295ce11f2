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

Lane add(Lane a, Lane b) {
    for (size_t i = 0; i < Lane::WIDTH; i++) a.value[i] += b.value[i];
    return a;
}

// Integers, one in each lane.
struct Codes {
    int value[Lane::WIDTH];
};

Codes codes_of(const uint8_t* bytes) {
    Codes codes;
    for (size_t i = 0; i < Lane::WIDTH; i++) codes.value[i] = bytes[i];
    return codes;
}

// code >> shift & mask
Codes bits_of(Codes codes, size_t shift, int mask) {
    for (int& code : codes.value) code = code >> shift & mask;
    return codes;
}

// The bits of a string, from bit `first` on.
Codes bits_in_order(const uint8_t* bits, size_t first) {
    Codes codes;
    for (size_t i = 0; i < Lane::WIDTH; i++) codes.value[i] = bits[first / 8] >> (first % 8 + i) & 1;
    return codes;
}

// low | high << shift
Codes joined(Codes low, Codes high, unsigned shift) {
    for (size_t i = 0; i < Lane::WIDTH; i++) low.value[i] |= high.value[i] << shift;
    return low;
}

// code - zero, in fp32
Lane numbers_of(Codes codes, int zero) {
    Lane lane;
    for (size_t i = 0; i < Lane::WIDTH; i++) lane.value[i] = static_cast<float>(codes.value[i] - zero);
    return lane;
}

}  // namespace
}  // namespace flashclient
