// What codes are: for products in fp32 (codes_*.h, block_formats.h) and in integers (integer_formats.h).
#pragma once

#include <cstddef>
#include <cstdint>

namespace flashclient {
namespace {

// Which bits of a byte are a part of a code.
struct Field {
    size_t first;
    unsigned count;

    int mask() const { return (1 << count) - 1; }
};

// Of codes that stand for numbers of a list.
constexpr int8_t IQ4_NL_NUMBERS[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr int8_t E2M1_NUMBERS[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};  // doubled

// The bits of F8_E4M3, one place lower than those of half precision, are a number of it that is 2^-8 times as large.
constexpr float E4M3_SCALE = 256;
constexpr int E4M3_PLACES = 7, E4M3_BITS = 0xbfff;  // from a byte that was widened with its sign

}  // namespace
}  // namespace flashclient
