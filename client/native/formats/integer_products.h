// Products of rows in blocks with rows of x as integers (integer_activations.h), for four rows at a time.
//
// A dot is four chains of sums in fp32: chain i adds the products of unit i of each stretch, each an exact integer
// times both scales, and the leasts times the sums of x. Scales of halves that are integers are part of the exact one.
// The units of a shorter last stretch go to the last chains. The chains are added in the end. This order follows from
// the length of the row alone.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <utility>

#include "formats/integer_activations.h"

namespace flashclient {
namespace {

constexpr size_t AHEAD_BYTES = 8192;  // fetched before they are computed: latency times speed
constexpr size_t LINE_BYTES = 64;

// Where the stretches of rows lie.
template <BlockFormat format>
struct Stretches {
    static constexpr bool LARGE = record_of<format>().values > UNIT;                  // a block is two stretches
    static constexpr size_t BYTES = record_of<format>().bytes * (LARGE ? 1 : UNITS);  // of two or one
    static constexpr size_t STRETCHES = LARGE ? 2 : 1;                                // in BYTES
    static size_t bytes_of(size_t elements) {
        return elements / record_of<format>().values * record_of<format>().bytes;
    }
};

// Sums of the four numbers in each quarter of four vectors: [quarter][vector].
LANE __m512i quarter_sums(const __m512i (&of)[QUAD]) {
    const __m512i first = _mm512_add_epi32(_mm512_unpacklo_epi32(of[0], of[1]), _mm512_unpackhi_epi32(of[0], of[1]));
    const __m512i second = _mm512_add_epi32(_mm512_unpacklo_epi32(of[2], of[3]), _mm512_unpackhi_epi32(of[2], of[3]));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(first, second), _mm512_unpackhi_epi64(first, second));
}

// (chain 0 + chain 1) + (chain 2 + chain 3) of four rows.
LANE __m128 sums_of_chains(__m512 chains) {
    const __m128 low = _mm_add_ps(_mm512_castps512_ps128(chains), _mm512_extractf32x4_ps(chains, 1));
    const __m128 high = _mm_add_ps(_mm512_extractf32x4_ps(chains, 2), _mm512_extractf32x4_ps(chains, 3));
    return _mm_add_ps(low, high);
}

template <BlockFormat format>
struct QuadStretch {  // a stretch of four rows, decoded
    using Of = Codes<format>;
    StretchCodes codes[QUAD];
    QuadScales<Of::PARTS> scales;

    template <size_t half>
    LANE void decode(QuadBlocks at) {
        for (size_t r = 0; r < QUAD; r++) codes[r] = Of::template codes<half>(at[r]);
        Of::template scales<half>(at, scales);
    }

    LANE static __m512i without_zero(__m512i sum, const StretchOfX::Sums& of_x) {
        if constexpr (Of::ZERO == 0) return sum;
        constexpr int SHIFT = __builtin_ctz(Of::ZERO | 1 << 30);
        return _mm512_sub_epi32(sum, _mm512_slli_epi32(_mm512_load_si512(of_x.integers), SHIFT));
    }

    template <size_t part>
    LANE __m512 add_part(__m512i sum, const StretchOfX::Sums& of_x, __m512 scale_of_x, __m512 chains) const {
        const __m512 scale = _mm512_mul_ps(scales.scale[part], scale_of_x);
        chains = _mm512_fmadd_ps(_mm512_cvtepi32_ps(without_zero(sum, of_x)), scale, chains);
        if constexpr (Of::LEAST) {
            chains = _mm512_fmadd_ps(scales.least[part], _mm512_load_ps(of_x.values), chains);
        }
        return chains;
    }

    LANE static __m512i times(__m512i codes, const int8_t (&x)[2 * UNITS][16], size_t half, __m512i sums) {
        return _mm512_dpbusd_epi32(sums, codes, _mm512_load_si512(x[half * UNITS]));
    }
    // Sums of products of a half of the codes with x, [quarter][row].
    LANE __m512i sums_of_half(const StretchOfX& x, size_t half) const {
        __m512i sums[QUAD];
        for (size_t r = 0; r < QUAD; r++) {
            const __m512i upper = times(codes[r].halves[half], x.upper, half, _mm512_setzero_si512());
            sums[r] = times(codes[r].halves[half], x.lower, half, _mm512_slli_epi32(upper, 8));
        }
        return quarter_sums(sums);
    }

    // The sums of both halves of units times their integers are exact, and scaled once.
    LANE __m512 add_folded(__m512i (&sums)[2], const StretchOfX& x, __m512 scale_of_x, __m512 chains) const {
        for (size_t i = 0; i < 2; i++) {
            if constexpr (Of::UNIT_STEP != 0) {
                sums[i] = _mm512_srav_epi32(sums[i], of_units(0, Of::UNIT_STEP, 2 * Of::UNIT_STEP, 3 * Of::UNIT_STEP));
            }
            sums[i] = _mm512_mullo_epi32(without_zero(sums[i], x.half[i]), scales.integer[i]);
        }
        const __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(sums[0], sums[1]));
        chains = _mm512_fmadd_ps(sum, _mm512_mul_ps(scales.scale[0], scale_of_x), chains);
        for (size_t i = 0; Of::LEAST && i < 2; i++) {
            chains = _mm512_fmadd_ps(scales.least[i], _mm512_load_ps(x.half[i].values), chains);
        }
        return chains;
    }

    // Chains [unit][row] with the products of a stretch of x.
    LANE __m512 add_to(__m512 chains, const StretchOfX& x) const {
        const __m512 scale_of_x = _mm512_load_ps(x.scale);
        if constexpr (Of::PARTS == 1) {
            __m512i sums[QUAD];
            for (size_t r = 0; r < QUAD; r++) {
                const StretchCodes& row = codes[r];
                const __m512i first = times(row.halves[0], x.upper, 0, _mm512_setzero_si512());
                const __m512i upper = _mm512_slli_epi32(times(row.halves[1], x.upper, 1, first), 8);
                sums[r] = times(row.halves[1], x.lower, 1, times(row.halves[0], x.lower, 0, upper));
            }
            return add_part<0>(quarter_sums(sums), x.unit, scale_of_x, chains);
        } else {
            __m512i sums[] = {sums_of_half(x, 0), sums_of_half(x, 1)};
            if constexpr (Of::IN_ORDER) {  // each has both halves of two units
                const __m512i first = _mm512_shuffle_i32x4(sums[0], sums[1], 0x88);
                sums[1] = _mm512_shuffle_i32x4(sums[0], sums[1], 0xdd);
                sums[0] = first;
            }
            if constexpr (Of::FOLDED) return add_folded(sums, x, scale_of_x, chains);
            chains = add_part<0>(sums[0], x.half[0], scale_of_x, chains);
            return add_part<1>(sums[1], x.half[1], scale_of_x, chains);
        }
    }
};

// Four rows, and those to fetch meanwhile. At the edge the last row is repeated.
//
// Rows that are multiplied together lie as far apart as they can. A processor itself fetches ahead in one place of a
// page only, so with four rows of a page one row of x took 1.3 times as long.
struct QuadRows {
    const uint8_t* row[QUAD];
    const uint8_t* ahead[QUAD];

    KERNEL QuadRows(const void* const* rows, size_t row_count, size_t first, size_t apart, size_t rows_ahead) {
        for (size_t r = 0; r < QUAD; r++) {
            const size_t number = first + r * apart;
            row[r] = static_cast<const uint8_t*>(rows[std::min(number, row_count - 1)]);
            ahead[r] = static_cast<const uint8_t*>(rows[std::min(number + rows_ahead, row_count - 1)]);
        }
    }
    // Of rows that lie back to back.
    KERNEL explicit QuadRows(const void* const* rows) {
        for (size_t r = 0; r < QUAD; r++) {
            row[r] = static_cast<const uint8_t*>(rows[r]);
            ahead[r] = row[r] + AHEAD_BYTES / 2;
        }
    }
    LANE void prefetch(size_t offset, size_t bytes) const {
        for (size_t r = 0; r < QUAD; r++) {
            for (size_t line = 0; line < bytes; line += LINE_BYTES) __builtin_prefetch(ahead[r] + offset + line, 0, 2);
        }
    }
};

// The last stretch of four rows that are not whole stretches: their last units. Shorter rows are copied, with zeros
// before them.
template <BlockFormat format>
struct LastOfQuad {
    static constexpr size_t BLOCK_BYTES = record_of<format>().bytes;
    const uint8_t* at[QUAD];
    uint8_t copied[QUAD][UNITS * BLOCK_BYTES];

    LANE LastOfQuad(const QuadRows& rows, size_t hidden) {
        const size_t units = hidden / UNIT;
        for (size_t r = 0; r < QUAD; r++) {
            if (units >= UNITS) {
                at[r] = rows.row[r] + (units - UNITS) * BLOCK_BYTES;
                continue;
            }
            std::memset(copied[r], 0, sizeof(copied[r]));
            std::memcpy(copied[r] + (UNITS - units) * BLOCK_BYTES, rows.row[r], units * BLOCK_BYTES);
            at[r] = copied[r];
        }
    }
};

inline size_t stretches_of(size_t hidden) { return divide_up(hidden, STRETCH); }

// The chains of four rows and some tokens.
template <BlockFormat format, bool one>
struct QuadChains {
    using Row = Stretches<format>;
    __m512 of_token[one ? 1 : TOKENS_MAX];
    const StretchOfX* x;
    size_t stretches;
    size_t tokens;

    template <size_t half>
    LANE void add(QuadBlocks at, size_t stretch) {
        QuadStretch<format> quad;
        quad.template decode<half>(at);
        if constexpr (one) {
            of_token[0] = quad.add_to(of_token[0], x[stretch]);
        } else {
            for (size_t t = 0; t < tokens; t++) of_token[t] = quad.add_to(of_token[t], x[t * stretches + stretch]);
        }
    }

    LANE void add_rows(const QuadRows& rows, size_t hidden) {
        for (size_t t = 0; t < (one ? 1 : tokens); t++) of_token[t] = _mm512_setzero_ps();
        const size_t whole = hidden / (STRETCH * Row::STRETCHES);
        const uint8_t* at[QUAD];
        for (size_t i = 0; i < whole; i++) {
            rows.prefetch(i * Row::BYTES, Row::BYTES);
            for (size_t r = 0; r < QUAD; r++) at[r] = rows.row[r] + i * Row::BYTES;
            add<0>(at, i * Row::STRETCHES);
            if constexpr (Row::LARGE) add<1>(at, i * Row::STRETCHES + 1);
        }
        if constexpr (!Row::LARGE) {
            if (whole * STRETCH == hidden) return;
            const LastOfQuad<format> last(rows, hidden);
            add<0>(last.at, whole);
        }
    }
};

// dots [row_count, tokens] of rows with x, [tokens][stretches of hidden].
template <BlockFormat format, bool one>
KERNEL void dots_of_quads(const void* const* rows, size_t row_count, const StretchOfX* x, size_t hidden, size_t tokens,
                          float* dots) {
    const size_t ahead = divide_up(AHEAD_BYTES, QUAD * Stretches<format>::bytes_of(hidden));
    QuadChains<format, one> chains;
    chains.x = x;
    chains.stretches = stretches_of(hidden);
    chains.tokens = tokens;
    const size_t apart = divide_up(row_count, QUAD);
    for (size_t i = 0; i < apart; i++) {
        chains.add_rows(QuadRows(rows, row_count, i, apart, ahead), hidden);
        for (size_t t = 0; t < (one ? 1 : tokens); t++) {
            alignas(16) float sums[QUAD];
            _mm_store_ps(sums, sums_of_chains(chains.of_token[t]));
            for (size_t r = 0; r < QUAD && i + r * apart < row_count; r++) dots[(i + r * apart) * tokens + t] = sums[r];
        }
    }
}

// Of a format whose codes are integers that fit into bytes; those of FP8 do not.
template <template <BlockFormat> typename Table, BlockFormat format>
const Kernels* table_of_integers() {
    if constexpr (requires { Codes<format>::ZERO; }) return Table<format>::get();
    return nullptr;
}

// Table<format>::get() of a format; `others`: of one that has no integers.
template <template <BlockFormat> typename Table>
const Kernels* table_of_format(BlockFormat format, const Kernels* others) {
    const auto among = [&]<size_t... i>(std::index_sequence<i...>) {
        const Kernels* found = nullptr;
        ((format == static_cast<BlockFormat>(i) &&
          (found = table_of_integers<Table, static_cast<BlockFormat>(i)>()) != nullptr) ||
         ...);
        return found != nullptr ? found : others;
    };
    return among(std::make_index_sequence<std::size(weightd::BLOCK_FORMATS)>());
}

}  // namespace
}  // namespace flashclient
