// What Codes<format> is of each format; integer_codes.h says what it has, and includes this.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace flashclient {
namespace {

// Blocks of 32 values with a scale in half precision, and a least behind it.
template <BlockFormat format, bool least>
struct SmallBlocks {
    static constexpr size_t BYTES = record_of<format>().bytes, PARTS = 1;
    static constexpr bool LEAST = least, IN_ORDER = false, FOLDED = false;

    template <size_t half>
    LANE static void scales(QuadBlocks at, QuadScales<1>& of) {
        of.scale[0] = halves_of_blocks<0, BYTES>(at);
        if constexpr (least) of.least[0] = halves_of_blocks<2, BYTES>(at);
    }
};

template <>
struct Codes<BlockFormat::q8_0> : SmallBlocks<BlockFormat::q8_0, false> {
    static constexpr int ZERO = 128;
    template <size_t half>
    LANE static StretchCodes codes(const uint8_t* at) {
        const __m512i sign = _mm512_set1_epi8(static_cast<char>(ZERO));
        return {{_mm512_xor_si512(of_four_blocks(at + 2, BYTES), sign),
                 _mm512_xor_si512(of_four_blocks(at + 18, BYTES), sign)}};
    }
};

template <>
struct Codes<BlockFormat::q4_0> : SmallBlocks<BlockFormat::q4_0, false> {
    static constexpr int ZERO = 8;
    template <size_t half>
    LANE static StretchCodes codes(const uint8_t* at) {
        return halves_of_bytes(at + 2, BYTES);
    }
};

template <>
struct Codes<BlockFormat::q4_1> : SmallBlocks<BlockFormat::q4_1, true> {
    static constexpr int ZERO = 0;
    template <size_t half>
    LANE static StretchCodes codes(const uint8_t* at) {
        return halves_of_bytes(at + 4, BYTES);
    }
};

// Numbers with `zero` added, so that none is below 0.
constexpr std::array<uint8_t, 16> above(const int8_t (&numbers)[16], int zero) {
    std::array<uint8_t, 16> sums{};
    for (size_t i = 0; i < 16; i++) sums[i] = static_cast<uint8_t>(numbers[i] + zero);
    return sums;
}

constexpr std::array<uint8_t, 16> IQ4_NL_ABOVE = above(IQ4_NL_NUMBERS, 128);

template <>
struct Codes<BlockFormat::iq4_nl> : SmallBlocks<BlockFormat::iq4_nl, false> {
    static constexpr int ZERO = 128;
    template <size_t half>
    LANE static StretchCodes codes(const uint8_t* at) {
        return looked_up_halves(at + 2, BYTES, IQ4_NL_ABOVE);
    }
};

// A fifth bit of each code: two bytes for sixteen codes of each block.
LANE StretchCodes with_fifth_bits(StretchCodes codes, const uint8_t* bits, size_t stride) {
    uint64_t masks[2] = {};
    for (size_t unit = UNITS; unit-- > 0;) {
        uint32_t of_unit;
        std::memcpy(&of_unit, bits + unit * stride, sizeof(of_unit));
        masks[0] = masks[0] << 16 | (of_unit & 0xffff);
        masks[1] = masks[1] << 16 | of_unit >> 16;
    }
    const __m512i fifth = _mm512_set1_epi8(16);
    for (size_t i = 0; i < 2; i++) {
        codes.halves[i] = _mm512_mask_add_epi8(codes.halves[i], masks[i], codes.halves[i], fifth);
    }
    return codes;
}

template <>
struct Codes<BlockFormat::q5_0> : SmallBlocks<BlockFormat::q5_0, false> {
    static constexpr int ZERO = 16;
    template <size_t half>
    LANE static StretchCodes codes(const uint8_t* at) {
        return with_fifth_bits(halves_of_bytes(at + 6, BYTES), at + 2, BYTES);
    }
};

template <>
struct Codes<BlockFormat::q5_1> : SmallBlocks<BlockFormat::q5_1, true> {
    static constexpr int ZERO = 0;
    template <size_t half>
    LANE static StretchCodes codes(const uint8_t* at) {
        return with_fifth_bits(halves_of_bytes(at + 8, BYTES), at + 4, BYTES);
    }
};

constexpr std::array<uint8_t, 16> E2M1_ABOVE = above(E2M1_NUMBERS, 16);

template <>
struct Codes<BlockFormat::mxfp4> {
    static constexpr size_t BYTES = record_of<BlockFormat::mxfp4>().bytes, PARTS = 1;
    static constexpr int ZERO = 16;
    static constexpr bool LEAST = false, IN_ORDER = false, FOLDED = false;

    template <size_t half>
    LANE static StretchCodes codes(const uint8_t* at) {
        return looked_up_halves(at + 1, BYTES, E2M1_ABOVE);
    }
    // Half of the power of two that an exponent stands for. The power of the least is smaller than normal numbers, and
    // that of the greatest is beyond fp32, as the values of most codes are.
    template <size_t half>
    LANE static void scales(QuadBlocks at, QuadScales<1>& of) {
        const __m128i place = _mm_setr_epi8(0, 0, 0, 0, 17, 17, 17, 17, 34, 34, 34, 34, 51, 51, 51, 51);
        static_assert(BYTES == 17);
        const __m512i places = _mm512_castsi128_si512(place);
        __m512i bytes = _mm512_permutexvar_epi8(places, _mm512_loadu_si512(at[0]));
        bytes = _mm512_mask_permutexvar_epi8(bytes, 0x2222, places, _mm512_loadu_si512(at[1]));
        bytes = _mm512_mask_permutexvar_epi8(bytes, 0x4444, places, _mm512_loadu_si512(at[2]));
        bytes = _mm512_mask_permutexvar_epi8(bytes, 0x8888, places, _mm512_loadu_si512(at[3]));
        const __m512i exponent = _mm512_cvtepu8_epi32(_mm512_castsi512_si128(bytes));
        const __m512i power = _mm512_max_epu32(_mm512_slli_epi32(exponent, 23), _mm512_set1_epi32(0x00400000));
        of.scale[0] = _mm512_mul_ps(_mm512_castsi512_ps(power), _mm512_set1_ps(0.5f));
    }
};

// ---- Blocks of 256 values ----

template <BlockFormat format>
struct SixBitScales {  // of Q4_K and Q5_K
    static constexpr size_t BYTES = record_of<format>().bytes, PARTS = 1;
    static constexpr int ZERO = 0;
    static constexpr bool LEAST = true, IN_ORDER = false, FOLDED = false;

    template <size_t half>
    LANE static void scales(QuadBlocks at, QuadScales<1>& of) {
        // A scale and a least in half precision, then four scales, four leasts, and four bytes with the lower four bits
        // of the other scales and leasts, whose upper two bits are above the first ones.
        const __m512i rows = of_four_rows(at, 0);
        const __m512i six = _mm512_set1_epi32(63), four = _mm512_set1_epi32(15), two = _mm512_set1_epi32(48);
        __m512i scale = numbers_of_bytes(rows, 4), least = numbers_of_bytes(rows, 8);
        if constexpr (half == 0) {
            scale = _mm512_and_si512(scale, six);
            least = _mm512_and_si512(least, six);
        } else {
            const __m512i lower = numbers_of_bytes(rows, 12);
            scale = _mm512_ternarylogic_epi32(_mm512_srli_epi32(scale, 2), two, _mm512_and_si512(lower, four), AND_OR);
            least = _mm512_ternarylogic_epi32(_mm512_srli_epi32(least, 2), two, _mm512_srli_epi32(lower, 4), AND_OR);
        }
        const __m512i pairs = _mm512_setr_epi32(0x00080000, 0x00180010, 0x00080000, 0x00180010, 0x00080000, 0x00180010,
                                                0x00080000, 0x00180010, 0x00090001, 0x00190011, 0x00090001, 0x00190011,
                                                0x00090001, 0x00190011, 0x00090001, 0x00190011);
        const __m512i factors = _mm512_permutexvar_epi16(pairs, rows);
        const __m512 of_least = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(factors, 1));
        of.scale[0] = scaled(scale, 0, _mm512_cvtph_ps(_mm512_castsi512_si256(factors)));
        of.least[0] = scaled(least, 0, _mm512_xor_ps(of_least, _mm512_set1_ps(-0.0f)));
    }
    // Of 64 values, the first half are in the lower halves of 32 bytes.
    LANE static StretchCodes halves(const uint8_t* bytes) {
        const __m512i all = _mm512_loadu_si512(bytes);
        const __m512i shift = of_units(0, 4, 0, 4);
        return {{field(_mm512_srlv_epi32(_mm512_shuffle_i64x2(all, all, 0xa0), shift), 15),
                 field(_mm512_srlv_epi32(_mm512_shuffle_i64x2(all, all, 0xf5), shift), 15)}};
    }
};

template <>
struct Codes<BlockFormat::q4_k> : SixBitScales<BlockFormat::q4_k> {
    template <size_t half>
    LANE static StretchCodes codes(const uint8_t* at) {
        return halves(at + 16 + half * 64);
    }
};

// Adds a field of bits of sixteen bytes: of each unit other bits, which a rotation brings to their place.
LANE __m512i with_upper_bits(__m512i codes, const uint8_t* bytes, __m512i rotation, int mask) {
    const __m512i bits = _mm512_rolv_epi32(_mm512_broadcast_i32x4(sixteen_at(bytes)), rotation);
    return with_field(codes, bits, mask);
}

// The fifth bit: bit i of 32 bytes belongs to unit i of the block.
template <>
struct Codes<BlockFormat::q5_k> : SixBitScales<BlockFormat::q5_k> {
    template <size_t half>
    LANE static StretchCodes codes(const uint8_t* at) {
        const StretchCodes lower = halves(at + 48 + half * 64);
        const __m512i rotation = half == 0 ? of_units(4, 3, 2, 1) : of_units(0, 31, 30, 29);
        return {{with_upper_bits(lower.halves[0], at + 16, rotation, 16),
                 with_upper_bits(lower.halves[1], at + 32, rotation, 16)}};
    }
};

// Blocks whose halves of units have scales, of one byte each.
template <BlockFormat format>
struct ScalesOfHalves {
    static constexpr size_t BYTES = record_of<format>().bytes, PARTS = 2;
};

template <>
struct Codes<BlockFormat::q6_k> : ScalesOfHalves<BlockFormat::q6_k> {
    static constexpr int ZERO = 32;
    static constexpr bool LEAST = false, IN_ORDER = true, FOLDED = false;

    // The lower four bits lie in 64 bytes, lower halves first, and the upper two in 32 bytes, lowest first.
    template <size_t half>
    LANE static StretchCodes codes(const uint8_t* at) {
        const __m512i lower = _mm512_loadu_si512(at + half * 64);
        const __m512i upper =
            _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 128 + half * 32)));
        const __m512i first = _mm512_rolv_epi32(upper, of_units(4, 4, 2, 2));
        const __m512i second = _mm512_rolv_epi32(upper, of_units(0, 0, 30, 30));
        return {
            {with_field(field(lower, 15), first, 48), with_field(field(_mm512_srli_epi32(lower, 4), 15), second, 48)}};
    }
    template <size_t half>
    LANE static void scales(QuadBlocks at, QuadScales<2>& of) {
        uint64_t bytes[QUAD];
        for (size_t r = 0; r < QUAD; r++) std::memcpy(&bytes[r], at[r] + 192 + half * 8, sizeof(bytes[r]));
        const HalfNumbers<true> numbers(bytes);
        const __m512 factor = halves_of_rows(at, 208);
        for (size_t i = 0; i < 2; i++) of.scale[i] = _mm512_mul_ps(_mm512_cvtepi32_ps(numbers.of[i]), factor);
    }
};

// Codes of two bits: 128 in 32 bytes, lowest bits first.
LANE StretchCodes quarters_of_bytes(const uint8_t* bytes) {
    const __m512i shift = of_units(0, 2, 4, 6);
    return {{field(_mm512_srlv_epi32(_mm512_broadcast_i32x4(sixteen_at(bytes)), shift), 3),
             field(_mm512_srlv_epi32(_mm512_broadcast_i32x4(sixteen_at(bytes + 16)), shift), 3)}};
}

template <>
struct Codes<BlockFormat::q2_k> : ScalesOfHalves<BlockFormat::q2_k> {
    static constexpr int ZERO = 0, SIGN = 1, UNIT_STEP = 2;
    static constexpr bool LEAST = true, IN_ORDER = false, FOLDED = true;

    // Of each unit two other bits of bytes, where they are.
    template <size_t half>
    LANE static StretchCodes codes(const uint8_t* at) {
        const __m512i mask = of_units(0x03030303, 0x0c0c0c0c, 0x30303030, static_cast<int>(0xc0c0c0c0));
        const uint8_t* bytes = at + 16 + half * 32;
        return {{_mm512_and_si512(_mm512_broadcast_i32x4(sixteen_at(bytes)), mask),
                 _mm512_and_si512(_mm512_broadcast_i32x4(sixteen_at(bytes + 16)), mask)}};
    }
    // Products of bytes take no more than a byte, so that words multiply two of them.
    template <size_t half>
    LANE static StretchCodes folded(const uint8_t* at) {
        const __m512i scales = field(_mm512_broadcast_i32x4(sixteen_at(at)), 15);
        constexpr int OF_STRETCH = half * 8, ZEROS = 0x0080;
        const auto words = [](int unit) { return ((OF_STRETCH + 2 * unit) | ZEROS << 8) * 0x00010001U; };
        const __m512i first = of_units(static_cast<int>(words(0)), static_cast<int>(words(1)),
                                       static_cast<int>(words(2)), static_cast<int>(words(3)));
        const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(1));
        const StretchCodes plain = quarters_of_bytes(at + 16 + half * 32);
        return {{_mm512_mullo_epi16(plain.halves[0], _mm512_shuffle_epi8(scales, first)),
                 _mm512_mullo_epi16(plain.halves[1], _mm512_shuffle_epi8(scales, second))}};
    }
    template <size_t half>
    LANE static void scales(QuadBlocks at, QuadScales<2>& of) {
        const __m512i rows = of_four_rows(at, 0);
        of.scale[0] = halves_of_rows(at, 80);
        const __m512 of_least = _mm512_xor_ps(halves_of_rows(at, 82), _mm512_set1_ps(-0.0f));
        const __m512i place = _mm512_setr_epi32(0, 16, 32, 48, 2, 18, 34, 50, 4, 20, 36, 52, 6, 22, 38, 54);
        for (int i = 0; i < 2; i++) {
            const __m512i places = _mm512_add_epi32(place, _mm512_set1_epi32(static_cast<int>(half) * 8 + i));
            const __m512i both = _mm512_maskz_permutexvar_epi8(0x1111111111111111, places, rows);
            of.integer[i] = _mm512_and_si512(both, _mm512_set1_epi32(15));
            of.least[i] = scaled(_mm512_srli_epi32(both, 4), 0, of_least);
        }
    }
};

// What a code of three bits stands for, times a scale of six bits; negative, because the greatest product is 128.
struct ProductsOfQ3K {
    int8_t of[64][8];
    constexpr ProductsOfQ3K() : of() {
        for (int scale = 0; scale < 64; scale++) {
            for (int code = 0; code < 8; code++) of[scale][code] = static_cast<int8_t>((4 - code) * (scale - 32));
        }
    }
};
constexpr ProductsOfQ3K PRODUCTS_OF_Q3K;

template <>
struct Codes<BlockFormat::q3_k> : ScalesOfHalves<BlockFormat::q3_k> {
    static constexpr int ZERO = 4, SIGN = -1, UNIT_STEP = 0;
    static constexpr bool LEAST = false, IN_ORDER = false, FOLDED = true;

    // The third bit: bit i of 32 bytes belongs to unit i of the block.
    template <size_t half>
    LANE static StretchCodes codes(const uint8_t* at) {
        const StretchCodes lower = quarters_of_bytes(at + 32 + half * 32);
        const __m512i rotation = half == 0 ? of_units(2, 1, 0, 31) : of_units(30, 29, 28, 27);
        return {{with_upper_bits(lower.halves[0], at, rotation, 4),
                 with_upper_bits(lower.halves[1], at + 16, rotation, 4)}};
    }
    // The scales of a stretch, six bits of each byte: the lower four are in eight bytes, lower halves first, the upper
    // two in four bytes.
    template <size_t half>
    LANE static uint64_t six_bits(const uint8_t* at) {
        constexpr uint64_t FOUR = 0x0f0f0f0f0f0f0f0f;
        constexpr uint32_t TWO = 0x03030303;
        uint64_t lower;
        uint32_t upper;
        std::memcpy(&lower, at + 96, sizeof(lower));
        std::memcpy(&upper, at + 104, sizeof(upper));
        const uint64_t both = uint64_t{upper >> 4 * half & TWO} | uint64_t{upper >> (4 * half + 2) & TWO} << 32;
        return (lower >> 4 * half & FOUR) | both << 4;
    }
    template <size_t half>
    LANE static StretchCodes folded(const uint8_t* at) {
        const uint64_t scales = six_bits<half>(at);
        StretchCodes of = codes<half>(at);
        for (size_t i = 0; i < 2; i++) {
            const auto products = [&](size_t unit) {
                long long eight;
                std::memcpy(&eight, PRODUCTS_OF_Q3K.of[scales >> (16 * unit + 8 * i) & 63], sizeof(eight));
                return eight;
            };
            __m512i table = _mm512_set1_epi64(products(0));
            table = _mm512_mask_set1_epi64(table, 0x0c, products(1));
            table = _mm512_mask_set1_epi64(table, 0x30, products(2));
            table = _mm512_mask_set1_epi64(table, 0xc0, products(3));
            of.halves[i] = _mm512_shuffle_epi8(table, of.halves[i]);
        }
        return of;
    }
    template <size_t half>
    LANE static void scales(QuadBlocks at, QuadScales<2>& of) {
        uint64_t bytes[QUAD];
        for (size_t r = 0; r < QUAD; r++) bytes[r] = six_bits<half>(at[r]);
        const HalfNumbers<> numbers(bytes);
        of.scale[0] = halves_of_rows(at, 108);
        for (size_t i = 0; i < 2; i++) of.integer[i] = _mm512_sub_epi32(numbers.of[i], _mm512_set1_epi32(32));
    }
};

template <>
struct Codes<BlockFormat::iq4_xs> {
    static constexpr size_t BYTES = record_of<BlockFormat::iq4_xs>().bytes, PARTS = 1;
    static constexpr int ZERO = 128;
    static constexpr bool LEAST = false, IN_ORDER = false, FOLDED = false;

    template <size_t half>
    LANE static StretchCodes codes(const uint8_t* at) {
        return looked_up_halves(at + 8 + half * 64, 16, IQ4_NL_ABOVE);
    }
    // Eight scales of six bits: the lower four in four bytes, the upper two in a number of sixteen bits.
    template <size_t half>
    LANE static void scales(QuadBlocks at, QuadScales<1>& of) {
        uint32_t bytes[QUAD];
        for (size_t r = 0; r < QUAD; r++) {
            uint16_t lower;
            std::memcpy(&lower, at[r] + 4 + half * 2, sizeof(lower));
            bytes[r] = _pdep_u32(lower, 0x0f0f0f0f) | _pdep_u32(at[r][2 + half], 0x30303030);
        }
        of.scale[0] = scaled(bytes_of_rows(bytes[0], bytes[1], bytes[2], bytes[3]), 32, halves_of_rows(at, 0));
    }
};

// Numbers of F8_E4M3 in the upper bytes of words, divided by E4M3_SCALE.
LANE __m512 unscaled_e4m3_of_words(__m256i words) {
    const __m256i mask = _mm256_set1_epi16(static_cast<short>(E4M3_BITS & ~0x7f));  // without the lower bytes
    return _mm512_cvtph_ps(_mm256_and_si256(_mm256_srai_epi16(words, 1), mask));
}

// What scales of NVFP4 are multiplied by, by the factors of tensors: see ScalesOfNvfp4 in block_formats.h. A quotient
// is the product with the inverse here, which rounds once more.
LANE __m512 factors_of_nvfp4(__m512 wholes) {
    const __m512 unscaled = _mm512_set1_ps(E4M3_SCALE / 2);
    const __mmask16 divide = _mm512_cmp_ps_mask(wholes, _mm512_setzero_ps(), _CMP_LT_OQ);
    const __m512 products = _mm512_mul_ps(wholes, unscaled);
    if (divide == 0) return products;
    return _mm512_mask_div_ps(products, divide, _mm512_sub_ps(_mm512_setzero_ps(), unscaled), wholes);
}

// Blocks of E2M1 with a scale for each half of a unit.
struct Nvfp4 {
    static constexpr size_t PARTS = 2;
    static constexpr int ZERO = 16;
    static constexpr bool LEAST = false, IN_ORDER = false, FOLDED = false;

    // `pairs`: the scales of both halves, [unit][row].
    LANE static void scale(__m256i pairs, __m512 factors, QuadScales<2>& of) {
        of.scale[0] = _mm512_mul_ps(unscaled_e4m3_of_words(_mm256_slli_epi16(pairs, 8)), factors);
        of.scale[1] = _mm512_mul_ps(unscaled_e4m3_of_words(pairs), factors);
    }
};

template <>
struct Codes<BlockFormat::nvfp4_256> : Nvfp4 {
    template <size_t half>
    LANE static StretchCodes codes(const uint8_t* at) {
        return looked_up_halves(at + 20 + half * 64, 16, E2M1_ABOVE);
    }
    template <size_t half>
    LANE static void scales(QuadBlocks at, QuadScales<2>& of) {
        const __m512i rows = of_four_rows(at, 4);
        const __m256i place = _mm256_setr_epi16(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27);
        const __m256i words = _mm256_add_epi16(place, _mm256_set1_epi16(4 * half));
        float wholes[QUAD];
        for (size_t r = 0; r < QUAD; r++) std::memcpy(&wholes[r], at[r], sizeof(wholes[r]));
        const __m512 of_units = _mm512_broadcast_f32x4(_mm_setr_ps(wholes[0], wholes[1], wholes[2], wholes[3]));
        const __m512i pairs = _mm512_permutexvar_epi16(_mm512_castsi256_si512(words), rows);
        scale(_mm512_castsi512_si256(pairs), factors_of_nvfp4(of_units), of);
    }
};

template <>
struct Codes<BlockFormat::nvfp4_32> : Nvfp4 {
    static constexpr size_t BYTES = record_of<BlockFormat::nvfp4_32>().bytes;
    template <size_t half>
    LANE static StretchCodes codes(const uint8_t* at) {
        return looked_up_halves(at + 6, BYTES, E2M1_ABOVE);
    }
    template <size_t half>
    LANE static void scales(QuadBlocks at, QuadScales<2>& of) {
        alignas(64) float wholes[UNITS][QUAD];
        for (size_t i = 0; i < UNITS * QUAD; i++) {
            std::memcpy(&wholes[i / QUAD][i % QUAD], at[i % QUAD] + i / QUAD * BYTES, sizeof(float));
        }
        scale(pairs_of_blocks<4, BYTES>(at), factors_of_nvfp4(_mm512_load_ps(wholes[0])), of);
    }
};

}  // namespace
}  // namespace flashclient
