// Quantised formats, GGML's, FP8 and NVFP4: blocks of values that share scales. Each is decoded a vector at a time, to
// the bits that gguf-py's dequantize() or transformers gives. To add one, see "Encodings" in proto/README.md.
//
// Compiled once per instruction set, after codes_*.h, which says what vectors can do. A format is a struct with
//   VALUES, BYTES   of a block
//   GROUP           the values that one object decodes: a part of a block that has scales of its own, or all of it
//   Scales          with of(block): what the groups need that is computed once of a block; NoScales for one group
//   (block, scales, group)  its constructor; `scales` outlive it
//   lane(first)     values [first, first + Lane::WIDTH) of the group
// The conditions on `first` are constants where loops are unrolled.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "formats/field.h"
#include "formats/half_values.h"

namespace flashclient {
namespace {

LANE float half_at(const uint8_t* number) {
    uint16_t half;
    std::memcpy(&half, number, sizeof(half));
    return half_values[half];
}

// A half-precision number in all lanes.
LANE Lane half_before_codes(const uint8_t* number) { return Lane::all(half_at(number)); }

struct NoScales {
    LANE static NoScales of(const uint8_t*) { return {}; }
};

// value = scale * code
struct BlockQ8_0 {
    static constexpr size_t VALUES = 32, GROUP = 32, BYTES = 34;
    using Scales = NoScales;
    const uint8_t* codes;
    Lane scale;

    LANE BlockQ8_0(const uint8_t* block, NoScales, size_t) : codes(block + 2), scale(half_before_codes(block)) {}
    LANE Lane lane(size_t first) const { return multiply(signed_bytes(codes + first), scale); }
};

// Codes of four bits: those of the first sixteen values in the lower halves of bytes, the others in the upper halves.
// value = scale * numbers[code]
template <const int8_t (&numbers)[16]>
struct BlockOfNumbers {
    static constexpr size_t VALUES = 32, GROUP = 32, BYTES = 18;
    using Scales = NoScales;
    const uint8_t* codes;
    Sixteen values;

    LANE BlockOfNumbers(const uint8_t* block, NoScales, size_t)
        : codes(block + 2), values(numbers, half_before_codes(block)) {}
    LANE Lane lane(size_t first) const { return values.of_halves(codes + first % 16, first / 16); }
};

constexpr int8_t Q4_0_NUMBERS[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
using BlockQ4_0 = BlockOfNumbers<Q4_0_NUMBERS>;
using BlockIq4Nl = BlockOfNumbers<IQ4_NL_NUMBERS>;

// value = scale * code + least
struct BlockQ4_1 {
    static constexpr size_t VALUES = 32, GROUP = 32, BYTES = 20;
    using Scales = NoScales;
    const uint8_t* codes;
    SixteenAbove values;

    LANE BlockQ4_1(const uint8_t* block, NoScales, size_t)
        : codes(block + 4), values(half_before_codes(block), half_before_codes(block + 2)) {}
    LANE Lane lane(size_t first) const { return values.of_halves(codes + first % 16, first / 16); }
};

// code - zero: the fifth bit of each code lies in a string of bits.
LANE Lane numbers_of_five_bits(const uint8_t* bits, const uint8_t* codes, size_t first, int zero) {
    return numbers_with_bits(codes_of(codes + first % 16), {first / 16 * 4, 4}, bits, first, zero);
}

// value = scale * (code - 16)
struct BlockQ5_0 {
    static constexpr size_t VALUES = 32, GROUP = 32, BYTES = 22;
    using Scales = NoScales;
    const uint8_t* block;
    Lane scale;

    LANE BlockQ5_0(const uint8_t* block, NoScales, size_t) : block(block), scale(half_before_codes(block)) {}
    LANE Lane lane(size_t first) const {
        return multiply(numbers_of_five_bits(block + 2, block + 6, first, 16), scale);
    }
};

// value = scale * code + least
struct BlockQ5_1 {
    static constexpr size_t VALUES = 32, GROUP = 32, BYTES = 24;
    using Scales = NoScales;
    const uint8_t* block;
    Lane scale;
    Lane least;

    LANE BlockQ5_1(const uint8_t* block, NoScales, size_t)
        : block(block), scale(half_before_codes(block)), least(half_before_codes(block + 2)) {}
    LANE Lane lane(size_t first) const {
        return add(multiply(numbers_of_five_bits(block + 4, block + 8, first, 0), scale), least);
    }
};

// Half of the power of two that an exponent of eight bits stands for: the numbers below are doubled.
LANE float half_of_power(uint8_t exponent) {
    const uint32_t bits = exponent < 2 ? uint32_t{0x00200000} << exponent : (exponent - uint32_t{1}) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof(power));
    return power;
}

struct BlockMxfp4 {
    static constexpr size_t VALUES = 32, GROUP = 32, BYTES = 17;
    using Scales = NoScales;
    const uint8_t* codes;
    Sixteen values;

    LANE BlockMxfp4(const uint8_t* block, NoScales, size_t)
        : codes(block + 1), values(E2M1_NUMBERS, Lane::all(half_of_power(block[0]))) {}
    LANE Lane lane(size_t first) const { return values.of_halves(codes + first % 16, first / 16); }
};

// The scale of a block of F8_E4M3, times what unscaled_e4m3() leaves out. Imports refuse scales beyond 2^119.
struct ScaleOfFp8 {
    Lane scale;

    LANE static ScaleOfFp8 of(const uint8_t* block) {
        float scale;
        std::memcpy(&scale, block, sizeof(scale));
        return {Lane::all(scale * E4M3_SCALE)};
    }
};

// value = scale * code. Imports refuse codes of NaN, which are 480 here.
template <size_t values>
struct BlockFp8 {
    static constexpr size_t VALUES = values, GROUP = 32, BYTES = sizeof(float) + values;
    using Scales = ScaleOfFp8;
    const uint8_t* codes;
    Lane scale;

    LANE BlockFp8(const uint8_t* block, Scales of, size_t group)
        : codes(block + sizeof(float) + group * GROUP), scale(of.scale) {}
    LANE Lane lane(size_t first) const { return multiply(unscaled_e4m3(codes + first), scale); }
};

// Of NVFP4, half of each scale, since the numbers below are doubled: a number of F8_E4M3 times the tensor's one, or
// divided by it where that is negative, as one publisher multiplies and another divides.
template <size_t count>
struct ScalesOfNvfp4 {
    static constexpr size_t SOME = count < Lane::WIDTH ? Lane::WIDTH : count;
    float scale[SOME];

    LANE static ScalesOfNvfp4 of(const uint8_t* block) {
        constexpr float UNSCALED = E4M3_SCALE / 2;
        ScalesOfNvfp4 scales;
        float whole;
        std::memcpy(&whole, block, sizeof(whole));
        const uint8_t* of_groups = block + sizeof(whole);
        uint8_t padded[SOME] = {};
        if constexpr (count < SOME) {
            std::memcpy(padded, of_groups, count);
            of_groups = padded;
        }
        for (size_t i = 0; i < count; i += Lane::WIDTH) {
            const Lane numbers = unscaled_e4m3(of_groups + i);
            const Lane scaled = whole < 0 ? divide(numbers, Lane::all(-whole / UNSCALED))
                                          : multiply(numbers, Lane::all(whole * UNSCALED));
            scaled.store(scales.scale + i);
        }
        return scales;
    }
};

// value = scale * number; a scale for 16 values. Codes lie as in MXFP4, 32 in 16 bytes.
template <size_t values>
struct BlockNvfp4 {
    static constexpr size_t VALUES = values, GROUP = 32, SCALES = values / 16;
    static constexpr size_t BYTES = sizeof(float) + SCALES + values / 2;
    using Scales = ScalesOfNvfp4<SCALES>;
    const uint8_t* codes;
    Sixteen lower;
    Sixteen upper;

    LANE BlockNvfp4(const uint8_t* block, const Scales& of, size_t group)
        : codes(block + sizeof(float) + SCALES + group * GROUP / 2),
          lower(E2M1_NUMBERS, Lane::all(of.scale[2 * group])),
          upper(E2M1_NUMBERS, Lane::all(of.scale[2 * group + 1])) {}
    LANE Lane lane(size_t first) const {
        return (first < 16 ? lower : upper).of_halves(codes + first % 16, first / 16);
    }
};

}  // namespace
}  // namespace flashclient
