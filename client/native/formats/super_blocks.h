// GGML's K-quants and IQ4_XS: blocks of 256 values. A block has one or two half-precision numbers, which multiply small
// scales of its groups. See block_formats.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "formats/block_formats.h"

namespace flashclient {
namespace {

// out[i] = factor * (code - zero), for sixteen codes that are each in a byte.
LANE void scale_codes(const uint8_t* codes, int zero, float factor, float* out) {
    for (size_t i = 0; i < 16; i += Lane::WIDTH) {
        multiply(numbers_of(codes_of(codes + i), zero), Lane::all(factor)).store(out + i);
    }
}

// Of Q4_K and Q5_K: eight scales and eight leasts, of six bits each, in twelve bytes. They are made as vectors of
// sixteen, of which half are not used.
struct ScalesOfSixBits {
    float scale[16];
    float least_behind[16];

    const float* least() const { return least_behind + 8; }

    LANE static ScalesOfSixBits of(const uint8_t* block) {
        ScalesOfSixBits scales;
        constexpr uint32_t SIX = 0x3f3f3f3f, FOUR = 0x0f0f0f0f, UPPER_TWO = 0x30303030;
        uint32_t packed[3];
        std::memcpy(packed, block + 4, sizeof(packed));
        const uint32_t joined[4] = {packed[0] & SIX, (packed[2] & FOUR) | (packed[0] >> 2 & UPPER_TWO), packed[1] & SIX,
                                    (packed[2] >> 4 & FOUR) | (packed[1] >> 2 & UPPER_TWO)};
        uint8_t codes[16];
        std::memcpy(codes, joined, sizeof(codes));
        scale_codes(codes, 0, half_at(block), scales.scale);
        scale_codes(codes, 0, -half_at(block + 2), scales.least_behind);
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
          lower(Lane::all(of.scale[2 * group]), Lane::all(of.least()[2 * group])),
          upper(Lane::all(of.scale[2 * group + 1]), Lane::all(of.least()[2 * group + 1])) {}
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
          least(of.least() + 2 * group),
          group(group) {}
    LANE Lane lane(size_t first) const {
        const size_t half = first / 32;
        const Lane number = numbers_of_fields(codes_of(codes + first % 32), {4 * half, 4}, codes_of(bits + first % 32),
                                              {2 * group + half, 1}, 0);
        return add(multiply(number, Lane::all(scale[half])), Lane::all(least[half]));
    }
};

// Sixteen scales, signed bytes.
struct ScalesOfQ6K {
    float scale[16];

    LANE static ScalesOfQ6K of(const uint8_t* block) {
        ScalesOfQ6K scales;
        const Lane factor = Lane::all(half_at(block + 208));
        for (size_t i = 0; i < 16; i += Lane::WIDTH) {
            multiply(signed_bytes(block + 192 + i), factor).store(scales.scale + i);
        }
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
        const Lane number = numbers_of_fields(codes_of(lower + first), {group % 4 / 2 * 4, 4}, codes_of(upper + first),
                                              {group % 4 * 2, 2}, 32);
        return multiply(number, Lane::all(scale[first / 16]));
    }
};

struct ScalesOfQ2K {
    float scale[16];
    float least[16];

    LANE static ScalesOfQ2K of(const uint8_t* block) {
        ScalesOfQ2K scales;
        const Lane of_scales = Lane::all(half_at(block + 80));
        const Lane of_leasts = Lane::all(-half_at(block + 82));
        for (size_t i = 0; i < 16; i += Lane::WIDTH) {
            const Codes codes = codes_of(block + i);
            multiply(numbers_of(bits_of(codes, 0, 15), 0), of_scales).store(scales.scale + i);
            multiply(numbers_of(bits_of(codes, 4, 15), 0), of_leasts).store(scales.least + i);
        }
        return scales;
    }
};

// value = scale * code + least. 128 codes of two bits lie in 32 bytes, lowest bits first.
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
        const Lane number = numbers_of(bits_of(codes_of(codes + group / 4 * 32 + first), group % 4 * 2, 3), 0);
        return add(multiply(number, Lane::all(scale[first / 16])), Lane::all(least[first / 16]));
    }
};

// Sixteen scales of six bits: the lower four in eight bytes, lower halves first, the upper two in four bytes.
struct ScalesOfQ3K {
    float scale[16];

    LANE static ScalesOfQ3K of(const uint8_t* block) {
        ScalesOfQ3K scales;
        constexpr uint64_t FOUR = 0x0f0f0f0f0f0f0f0f;
        constexpr uint32_t TWO = 0x03030303;
        uint64_t lower;
        uint32_t upper;
        std::memcpy(&lower, block + 96, sizeof(lower));
        std::memcpy(&upper, block + 104, sizeof(upper));
        const auto both = [&](unsigned shift) {
            return uint64_t{upper >> shift & TWO} | uint64_t{upper >> (shift + 2) & TWO} << 32;
        };
        const uint64_t joined[2] = {(lower & FOUR) | both(0) << 4, (lower >> 4 & FOUR) | both(4) << 4};
        uint8_t codes[16];
        std::memcpy(codes, joined, sizeof(codes));
        scale_codes(codes, 32, half_at(block + 108), scales.scale);
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
        const Lane number = numbers_of_fields(codes_of(bits + 32 + group / 4 * 32 + first), {group % 4 * 2, 2},
                                              codes_of(bits + first), {group, 1}, 4);
        return multiply(number, Lane::all(scale[first / 16]));
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
