// Rows of x in the form that kernels_bf16*.cpp take: the lines of a few columns of bf16 lie side by side. It
// is included after kernels/kernels.h.
#pragma once

#if defined(__x86_64__)
#include "vectors/intrinsics.h"

#define KERNEL      \
    __attribute__(( \
        target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512bf16,avx2,bmi2,fma,f16c,popcnt")))
#define LANE KERNEL __attribute__((always_inline)) inline

#include <algorithm>
#include <cstring>

#include "vectors/bf16_parts.h"
#include "vectors/vector_sums.h"

namespace flashclient {
namespace {

constexpr size_t COLUMNS_TOGETHER = 4;  // of x, that are multiplied together

LANE __m512bh line_of(const void* row, size_t line) {
    return __builtin_bit_cast(__m512bh, _mm512_loadu_si512(static_cast<const char*>(row) + line * ROW_BYTES));
}

// The sums of `count` vectors.
KERNEL void sum_chains(const __m512* chains, size_t count, float* sums) {
    for (size_t first = 0; first < count; first += 16) {
        __m512 vectors[16];
        for (size_t i = 0; i < 16; i++) vectors[i] = first + i < count ? chains[first + i] : _mm512_setzero_ps();
        _mm512_storeu_ps(sums + first, sums_of(vectors));
    }
}

// x: Columns in a line, then [tile of columns][line of the row][column of the tile] lines. The last tile has the rest
// of the columns.
struct PackedX {
    const Columns& columns;
    const char* lines;
    size_t tokens;

    PackedX(const void* packed, size_t of_tokens)
        : columns(*static_cast<const Columns*>(packed)),
          lines(static_cast<const char*>(packed) + ROW_BYTES),
          tokens(of_tokens) {
        static_assert(sizeof(Columns) <= ROW_BYTES);
    }

    static size_t bytes(size_t hidden, size_t tokens) {
        return ROW_BYTES + PARTS * tokens * divide_up(hidden, BLOCK) * ROW_BYTES;
    }

    KERNEL static void pack(const float* x, size_t hidden, size_t tokens, void* packed) {
        Columns& columns = *static_cast<Columns*>(packed);
        columns.assign(x, hidden, tokens);
        char* lines = static_cast<char*>(packed) + ROW_BYTES;
        const size_t count = divide_up(hidden, BLOCK);
        for (size_t t = 0; t < tokens; t++) {
            for (size_t line = 0; line < count; line++) {
                __m512i parts[PARTS];
                take_pairs(x + t * hidden, line * BLOCK, hidden, columns.parts(t), parts);
                for (size_t part = 0; part < columns.parts(t); part++) {
                    const size_t column = columns.first[t] + part;
                    const size_t first = column / COLUMNS_TOGETHER * COLUMNS_TOGETHER;
                    const size_t width = std::min<size_t>(columns.count - first, COLUMNS_TOGETHER);
                    _mm512_store_si512(lines + (first * count + line * width + column - first) * ROW_BYTES,
                                       parts[part]);
                }
            }
        }
    }

    // The dots of `some` of these rows, [row, token], of the chains of all columns: of each tile of columns in turn,
    // [row][column].
    template <size_t rows>
    KERNEL void store_tile(const __m512* chains, size_t some, float* dots) const {
        const size_t count = columns.count;
        float sums[divide_up(rows * PARTS * TOKENS_MAX, 16) * 16];
        sum_chains(chains, rows * count, sums);
        const auto sum_of = [&](size_t row, size_t column) {
            const size_t first = column / COLUMNS_TOGETHER * COLUMNS_TOGETHER;
            const size_t width = std::min(count - first, COLUMNS_TOGETHER);
            return sums[first * rows + row * width + column - first];
        };
        for (size_t r = 0; r < some; r++) {
            for (size_t t = 0; t < tokens; t++) {
                const size_t c = columns.first[t];
                const float first = sum_of(r, c);
                dots[r * tokens + t] = columns.exact[t] ? first : first + (sum_of(r, c + 1) + sum_of(r, c + 2));
            }
        }
    }
};

}  // namespace
}  // namespace flashclient
#endif
