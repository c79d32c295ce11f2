// What block_formats.h does with arrays of four numbers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats/field.h"
#include "formats/half_values.h"

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

// Numbers of F8_E4M3, divided by E4M3_SCALE.
Lane unscaled_e4m3(const uint8_t* bytes) {
    Lane lane;
    for (size_t i = 0; i < Lane::WIDTH; i++) {
        lane.value[i] = half_values[(static_cast<int8_t>(bytes[i]) << E4M3_PLACES) & E4M3_BITS];
    }
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

// code - zero, in fp32
Lane numbers_of(Codes codes, int zero) {
    Lane lane;
    for (size_t i = 0; i < Lane::WIDTH; i++) lane.value[i] = static_cast<float>(codes.value[i] - zero);
    return lane;
}

// The same for codes of a lower and an upper field of bits: field(lower) | field(upper) << lower.count
Lane numbers_of_fields(Codes lower, Field of_lower, Codes upper, Field of_upper, int zero) {
    Codes joined = bits_of(lower, of_lower.first, of_lower.mask());
    upper = bits_of(upper, of_upper.first, of_upper.mask());
    for (size_t i = 0; i < Lane::WIDTH; i++) joined.value[i] |= upper.value[i] << of_lower.count;
    return numbers_of(joined, zero);
}

// The same where the upper field is bit `first` and the following of a string of bits.
Lane numbers_with_bits(Codes lower, Field of_lower, const uint8_t* bits, size_t first, int zero) {
    return numbers_of_fields(lower, of_lower, bits_in_order(bits, first), {0, 1}, zero);
}

}  // namespace
}  // namespace flashclient
