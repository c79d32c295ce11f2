// GGML's K-quants and IQ4_XS: blocks of 256 values. A block has one or two half-precision numbers, which multiply small
// scales of its groups. See block_formats.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "formats/block_formats.h"

namespace flashclient {
namespace {

// Of Q4_K and Q5_K: eight scales and eight leasts, of six bits each, in twelve bytes.
struct ScalesOfSixBits {
    float scale[8];
    float least[8];

    LANE static ScalesOfSixBits of(const uint8_t* block) {
        ScalesOfSixBits scales;
        constexpr uint32_t SIX = 0x3f3f3f3f, FOUR = 0x0f0f0f0f, UPPER_TWO = 0x30303030;
        uint32_t packed[3];
        std::memcpy(packed, block + 4, sizeof(packed));
        const uint32_t joined[4] = {packed[0] & SIX, (packed[2] & FOUR) | (packed[0] >> 2 & UPPER_TWO), packed[1] & SIX,
                                    (packed[2] >> 4 & FOUR) | (packed[1] >> 2 & UPPER_TWO)};
        uint8_t codes[16];
        std::memcpy(codes, joined, sizeof(codes));
        const float of_scales = half_at(block);
        const float of_leasts = -half_at(block + 2);
        for (size_t i = 0; i < 8; i++) scales.scale[i] = of_scales * static_cast<float>(codes[i]);
        for (size_t i = 0; i < 8; i++) scales.least[i] = of_leasts * static_cast<float>(codes[8 + i]);
        return scales;
    }
};

// value = scale * code + least. Of 64 values, the first half are in the lower halves of 32 bytes.
struct BlockQ4K {
    static constexpr size_t VALUES = 256, GROUP = 64, BYTES = 144;
    using Scales = ScalesOfSixBits;
    const uint8_t* codes;
    SixteenAbove lower;
    SixteenAbove upper;

    LANE BlockQ4K(const uint8_t* block, const Scales& of, size_t group)
        : codes(block + 16 + group * 32),
          lower(Lane::all(of.scale[2 * group]), Lane::all(of.least[2 * group])),
          upper(Lane::all(of.scale[2 * group + 1]), Lane::all(of.least[2 * group + 1])) {}
    LANE Lane lane(size_t first) const {
        return (first < 32 ? lower : upper).of_halves(codes + first % 32, first / 32);
    }
};

// The same with a fifth bit: bit i of 32 bytes belongs to values [32 * i, 32 * i + 32).
struct BlockQ5K {
    static constexpr size_t VALUES = 256, GROUP = 64, BYTES = 176;
    using Scales = ScalesOfSixBits;
    const uint8_t* bits;
    const uint8_t* codes;
    const float* scale;
    const float* least;
    size_t group;

    LANE BlockQ5K(const uint8_t* block, const Scales& of, size_t group)
        : bits(block + 16),
          codes(block + 48 + group * 32),
          scale(of.scale + 2 * group),
          least(of.least + 2 * group),
          group(group) {}
    LANE Lane lane(size_t first) const {
        const size_t half = first / 32;
        const Codes four = bits_of(codes_of(codes + first % 32), 4 * half, 15);
        const Codes fifth = bits_of(codes_of(bits + first % 32), 2 * group + half, 1);
        return add(multiply(numbers_of(joined(four, fifth, 4), 0), Lane::all(scale[half])), Lane::all(least[half]));
    }
};

// Sixteen scales, signed bytes.
struct ScalesOfQ6K {
    float scale[16];

    LANE static ScalesOfQ6K of(const uint8_t* block) {
        ScalesOfQ6K scales;
        int8_t codes[16];
        std::memcpy(codes, block + 192, sizeof(codes));
        const float of_scales = half_at(block + 208);
        for (size_t i = 0; i < 16; i++) scales.scale[i] = of_scales * static_cast<float>(codes[i]);
        return scales;
    }
};

// value = scale * (code - 32). Of 128 values, the lower four bits lie in 64 bytes, lower halves first, and the upper
// two in 32 bytes, lowest first.
struct BlockQ6K {
    static constexpr size_t VALUES = 256, GROUP = 32, BYTES = 210;
    using Scales = ScalesOfQ6K;
    const uint8_t* lower;
    const uint8_t* upper;
    const float* scale;
    size_t group;

    LANE BlockQ6K(const uint8_t* block, const Scales& of, size_t group)
        : lower(block + group / 4 * 64 + group % 2 * 32),
          upper(block + 128 + group / 4 * 32),
          scale(of.scale + 2 * group),
          group(group) {}
    LANE Lane lane(size_t first) const {
        const Codes four = bits_of(codes_of(lower + first), group % 4 / 2 * 4, 15);
        const Codes two = bits_of(codes_of(upper + first), group % 4 * 2, 3);
        return multiply(numbers_of(joined(four, two, 4), 32), Lane::all(scale[first / 16]));
    }
};

struct ScalesOfQ2K {
    float scale[16];
    float least[16];

    LANE static ScalesOfQ2K of(const uint8_t* block) {
        ScalesOfQ2K scales;
        const float of_scales = half_at(block + 80);
        const float of_leasts = -half_at(block + 82);
        for (size_t i = 0; i < 16; i++) scales.scale[i] = of_scales * static_cast<float>(block[i] & 15);
        for (size_t i = 0; i < 16; i++) scales.least[i] = of_leasts * static_cast<float>(block[i] >> 4);
        return scales;
    }
};

// Codes of two bits: 128 values lie in 32 bytes, lowest bits first.
LANE Codes codes_of_two_bits(const uint8_t* codes, size_t group, size_t first) {
    return bits_of(codes_of(codes + group / 4 * 32 + first), group % 4 * 2, 3);
}

// value = scale * code + least
struct BlockQ2K {
    static constexpr size_t VALUES = 256, GROUP = 32, BYTES = 84;
    using Scales = ScalesOfQ2K;
    const uint8_t* codes;
    const float* scale;
    const float* least;
    size_t group;

    LANE BlockQ2K(const uint8_t* block, const Scales& of, size_t group)
        : codes(block + 16), scale(of.scale + 2 * group), least(of.least + 2 * group), group(group) {}
    LANE Lane lane(size_t first) const {
        const Lane number = numbers_of(codes_of_two_bits(codes, group, first), 0);
        return add(multiply(number, Lane::all(scale[first / 16])), Lane::all(least[first / 16]));
    }
};

// Sixteen scales of six bits: the lower four in eight bytes, lower halves first, the upper two in four bytes.
struct ScalesOfQ3K {
    float scale[16];

    LANE static ScalesOfQ3K of(const uint8_t* block) {
        ScalesOfQ3K scales;
        const float of_scales = half_at(block + 108);
        for (size_t i = 0; i < 16; i++) {
            const int four = block[96 + i % 8] >> (i / 8 * 4) & 15;
            const int two = block[104 + i % 4] >> (i / 4 * 2) & 3;
            scales.scale[i] = of_scales * static_cast<float>((four | two << 4) - 32);
        }
        return scales;
    }
};

// value = scale * (code - 4). The third bit of a code: bit i of 32 bytes belongs to values [32 * i, 32 * i + 32).
struct BlockQ3K {
    static constexpr size_t VALUES = 256, GROUP = 32, BYTES = 110;
    using Scales = ScalesOfQ3K;
    const uint8_t* bits;
    const float* scale;
    size_t group;

    LANE BlockQ3K(const uint8_t* block, const Scales& of, size_t group)
        : bits(block), scale(of.scale + 2 * group), group(group) {}
    LANE Lane lane(size_t first) const {
        const Codes two = codes_of_two_bits(bits + 32, group, first);
        const Codes third = bits_of(codes_of(bits + first), group, 1);
        return multiply(numbers_of(joined(two, third, 2), 4), Lane::all(scale[first / 16]));
    }
};

// Eight scales of six bits: the lower four in four bytes, the upper two in a number of sixteen bits.
struct ScalesOfIq4Xs {
    float scale[8];

    LANE static ScalesOfIq4Xs of(const uint8_t* block) {
        ScalesOfIq4Xs scales;
        const float of_scales = half_at(block);
        const unsigned upper = block[2] | static_cast<unsigned>(block[3]) << 8;
        for (size_t i = 0; i < 8; i++) {
            const unsigned four = block[4 + i / 2] >> (i % 2 * 4) & 15U;
            const unsigned two = upper >> (2 * i) & 3U;
            scales.scale[i] = of_scales * static_cast<float>(static_cast<int>(four | two << 4) - 32);
        }
        return scales;
    }
};

// value = scale * numbers[code], in groups like blocks of IQ4_NL
struct BlockIq4Xs {
    static constexpr size_t VALUES = 256, GROUP = 32, BYTES = 136;
    using Scales = ScalesOfIq4Xs;
    const uint8_t* codes;
    Sixteen values;

    LANE BlockIq4Xs(const uint8_t* block, const Scales& of, size_t group)
        : codes(block + 8 + group * 16), values(IQ4_NL_NUMBERS, Lane::all(of.scale[group])) {}
    LANE Lane lane(size_t first) const { return values.of_halves(codes + first % 16, first / 16); }
};

}  // namespace
}  // namespace flashclient
