#include "bundle/quantise.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

#include "bundle/half_precision.h"

#define INLINED __attribute__((always_inline)) inline

namespace weightd {
namespace {

constexpr size_t VALUES = 32;  // of a block
constexpr size_t LANES = 8;
constexpr size_t VECTORS = VALUES / LANES;
constexpr float ROUNDING = 0x1.8p23f;  // adding and subtracting it rounds to an integer, ties to even
typedef float Floats __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(LANES * sizeof(int32_t))));
using Values = Floats[VECTORS];

// Vectors are passed by reference: the ABI for their values differs between instruction sets.
INLINED float sum(const Floats& lanes) {
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

INLINED float product(const Values& a, const Values& b) {
    Floats sums = {};
    for (size_t i = 0; i < VECTORS; i++) sums += a[i] * b[i];
    return sum(sums);
}

// The value that is furthest from zero.
INLINED float extreme(const Values& values) {
    Floats least = values[0], greatest = values[0];
    for (const Floats& some : values) {
        least = some < least ? some : least;
        greatest = some > greatest ? some : greatest;
    }
    float low = least[0], high = greatest[0];
    for (size_t i = 1; i < LANES; i++) {
        low = least[i] < low ? least[i] : low;
        high = greatest[i] > high ? greatest[i] : high;
    }
    return -low > high ? low : high;
}

INLINED bool all_finite(const Values& values) {
    Floats zeros = {};
    for (const Floats& some : values) zeros += some * 0.0f;
    return sum(zeros) == 0.0f;
}

// The scale of a block as it is stored, and the factor that makes numbers of values. A scale of zero makes zeros.
struct Scale {
    uint16_t half;
    float value;
    float inverse;

    INLINED explicit Scale(float wanted) : half(narrow_f16(wanted)), value(widen_f16(half)), inverse(0.0f) {
        if (std::isinf(value)) throw UnquantisableValue("too large for the half-precision scale of a block");
        if (value != 0.0f) inverse = std::isinf(1.0f / value) ? 0.0f : 1.0f / value;
    }
};

// The numbers that a format has for codes, and how blocks hold the codes.

struct Bytes {  // Q8_0
    static constexpr size_t BYTES = 34;

    INLINED static Scale scale(const Values& values) { return Scale(std::fabs(extreme(values)) / 127.0f); }

    INLINED static void round(const Values& values, float inverse, Values& numbers) {
        for (size_t i = 0; i < VECTORS; i++) {
            const Floats rounded = values[i] * inverse + ROUNDING - ROUNDING;
            const Floats below = rounded < 127.0f ? rounded : Floats{} + 127.0f;
            numbers[i] = below > -127.0f ? below : Floats{} - 127.0f;
        }
    }

    INLINED static void pack(const Values& numbers, std::byte* out) {
        float each[VALUES];
        std::memcpy(each, numbers, sizeof(each));
        for (size_t i = 0; i < VALUES; i++) out[i] = static_cast<std::byte>(static_cast<int8_t>(each[i]));
    }
};

struct Nonlinear {  // IQ4_NL
    static constexpr size_t BYTES = 18;
    static constexpr float NUMBERS[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
    // What the value that is furthest from zero becomes: at or beyond an end of the numbers.
    static constexpr float EXTREMES[] = {-140.0f, -127.0f, -113.0f, 113.0f, 127.0f};

    // Of each extreme's codes the scale that suits them best: x . q / q . q. It leaves x . x - (x . q)^2 / q . q.
    INLINED static Scale scale(const Values& values) {
        const float furthest = extreme(values);
        if (furthest == 0.0f) return Scale(0.0f);
        float best = 0.0f, gained = -1.0f;
        for (const float to : EXTREMES) {
            Values numbers;
            round(values, to / furthest, numbers);
            const float of_numbers = product(numbers, numbers), of_both = product(values, numbers);
            const float gain = of_both / of_numbers * of_both;
            if (gain > gained) {
                gained = gain;
                best = of_both / of_numbers;
            }
        }
        return Scale(best);
    }

    // The nearest number, ties to the lower one.
    INLINED static void round(const Values& values, float inverse, Values& numbers) {
        for (size_t i = 0; i < VECTORS; i++) {
            const Floats scaled = values[i] * inverse;
            Floats nearest = Floats{} + NUMBERS[0];
#pragma GCC unroll 16
            for (size_t n = 1; n < 16; n++) {
                const Ints above = scaled > (NUMBERS[n - 1] + NUMBERS[n]) / 2;
                const Floats step = Floats{} + (NUMBERS[n] - NUMBERS[n - 1]);
                nearest += reinterpret_cast<Floats>(above & reinterpret_cast<Ints>(step));
            }
            numbers[i] = nearest;
        }
    }

    INLINED static void pack(const Values& numbers, std::byte* out) {
        int32_t codes[VALUES];
        for (size_t i = 0; i < VECTORS; i++) {
            Ints code = {};
#pragma GCC unroll 16
            for (size_t n = 1; n < 16; n++) code -= numbers[i] >= NUMBERS[n];
            std::memcpy(codes + i * LANES, &code, sizeof(code));
        }
        for (size_t i = 0; i < VALUES / 2; i++) out[i] = std::byte(codes[i] | codes[i + VALUES / 2] << 4);
    }
};

template <typename Format>
INLINED void quantise_blocks(const float* values, size_t count, std::byte* out, QuantisationError& error) {
    for (size_t j = 0; j < count; j += VALUES, out += Format::BYTES) {
        Values block, numbers;
        std::memcpy(block, values + j, sizeof(block));
        if (!all_finite(block)) throw UnquantisableValue("NaN or infinite");
        const Scale scale = Format::scale(block);
        Format::round(block, scale.inverse, numbers);
        std::memcpy(out, &scale.half, sizeof(scale.half));
        Format::pack(numbers, out + sizeof(scale.half));
        Values left;
        for (size_t i = 0; i < VECTORS; i++) left[i] = block[i] - numbers[i] * scale.value;
        error.squared_differences += static_cast<double>(product(left, left));
        error.squares += static_cast<double>(product(block, block));
    }
}

// Two sets of code with the same bits: products are rounded before they are added.
#if defined(__x86_64__)
template <typename Format>
__attribute__((target("avx2"))) void quantise_avx2(const float* values, size_t count, std::byte* out,
                                                   QuantisationError& error) {
    quantise_blocks<Format>(values, count, out, error);
}
#endif

template <typename Format>
void quantise_as(const float* values, size_t count, std::byte* out, QuantisationError& error) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2")) return quantise_avx2<Format>(values, count, out, error);
#endif
    quantise_blocks<Format>(values, count, out, error);
}

}  // namespace

bool has_quantiser(BlockFormat format) { return format == BlockFormat::q8_0 || format == BlockFormat::iq4_nl; }

void quantise(BlockFormat format, const float* values, size_t count, std::byte* blocks, QuantisationError& error) {
    if (format == BlockFormat::q8_0) return quantise_as<Bytes>(values, count, blocks, error);
    if (format == BlockFormat::iq4_nl) return quantise_as<Nonlinear>(values, count, blocks, error);
    throw std::invalid_argument("nothing is quantised to " +
                                std::string(BLOCK_FORMATS[static_cast<size_t>(format)].name));
}

}  // namespace weightd
