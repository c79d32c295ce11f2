// Products of short rows in blocks that lie back to back, the part of a down matrix in a slab (ffn.h), with integers.
// Of rows of less than a stretch, several make one: x is then repeated. kernels_vnni.cpp includes it, and what is for
// tiles kernels_amx_blocks.cpp.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "formats/integer_products.h"

namespace flashclient {
namespace {

constexpr size_t SLAB_STRETCHES = weightd::SLAB_NEURONS_MAX / STRETCH;

// The rows [begin, end) of a matrix.
template <BlockFormat format>
struct ShortRows {
    const uint8_t* matrix;
    size_t length;  // of a row: a power of two
    size_t end;

    size_t together() const { return length < STRETCH ? STRETCH / length : 1; }  // rows in a stretch
    size_t hidden() const { return std::max(length, STRETCH); }                  // of such rows
    size_t row_bytes() const { return Stretches<format>::bytes_of(length); }

    // Addresses of `count` rows of whole stretches from row `first` on. Those behind the end have zeros, in `rest`.
    struct Rest {
        uint8_t bytes[SLAB_STRETCHES * STRETCH / record_of<format>().values * record_of<format>().bytes];
    };
    template <size_t count>
    KERNEL void addresses(size_t first, const void* (&rows)[count], Rest& rest, Rest& zeros) const {
        const size_t bytes = row_bytes();
        for (size_t r = 0; r < count; r++) {
            const size_t row = first + r * together();
            rows[r] = matrix + row * bytes;
            if (row + together() <= end) continue;
            Rest& copy = row < end ? rest : zeros;
            std::memset(&copy, 0, sizeof(copy));
            if (row < end) std::memcpy(copy.bytes, matrix + row * bytes, (end - row) * bytes);
            rows[r] = copy.bytes;
        }
    }
};

// h of one token, repeated if it is shorter than a stretch.
template <bool in_order>
KERNEL void quantise_short(const float* h, size_t length, StretchOfX (&x)[SLAB_STRETCHES]) {
    if (length >= STRETCH) return quantise_row<in_order>(h, length, x);
    for (size_t unit = 0; unit < UNITS; unit++) quantise_unit<in_order>(h + unit * UNIT % length, unit, x[0]);
}

// Sums of the chains of four rows of stretches, in the order of the matrix's rows: 4, 8 or 16 of them.
LANE __m512 sums_of_short(__m512 chains, size_t length) {
    const __m512i by_row = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    if (length >= STRETCH) return _mm512_castps128_ps512(sums_of_chains(chains));
    if (length == UNIT) return _mm512_permutexvar_ps(by_row, chains);
    const __m512i even = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m512 second = _mm512_permutexvar_ps(_mm512_add_epi32(even, _mm512_set1_epi32(4)), chains);
    return _mm512_add_ps(_mm512_permutexvar_ps(even, chains), second);
}

// y[t][j] += row j . h[t] for j in [begin, end) and at most TOKENS_MAX tokens.
template <BlockFormat format, bool one>
KERNEL void add_products_of_quads(const ShortRows<format>& rows, const float* h, size_t h_stride, size_t tokens,
                                  size_t hidden, size_t begin, float* y) {
    StretchOfX x[one ? 1 : TOKENS_MAX][SLAB_STRETCHES];
    for (size_t t = 0; t < tokens; t++) quantise_short<Codes<format>::IN_ORDER>(h + t * h_stride, rows.length, x[t]);
    QuadChains<format, one> chains;
    chains.x = x[0];
    chains.stretches = SLAB_STRETCHES;
    chains.tokens = tokens;
    typename ShortRows<format>::Rest rest, zeros;
    const size_t step = QUAD * rows.together();
    for (size_t j = begin; j < rows.end; j += step) {
        const void* of_quad[QUAD];
        rows.addresses(j, of_quad, rest, zeros);
        chains.add_rows(QuadRows(of_quad), rows.hidden());
        const auto some = static_cast<__mmask16>((1U << std::min(step, rows.end - j)) - 1);
        for (size_t t = 0; t < tokens; t++) {
            float* out = y + t * hidden + j;
            const __m512 sums = sums_of_short(chains.of_token[t], rows.length);
            _mm512_mask_storeu_ps(out, some, _mm512_add_ps(_mm512_maskz_loadu_ps(some, out), sums));
        }
    }
}

template <BlockFormat format>
KERNEL void add_products(const void* matrix, size_t length, const float* h, size_t h_stride, size_t tokens,
                         size_t hidden, size_t begin, size_t end, float* y) {
    const ShortRows<format> rows{static_cast<const uint8_t*>(matrix), length, end};
    if (tokens == 1) return add_products_of_quads<format, true>(rows, h, h_stride, 1, hidden, begin, y);
    for (size_t t = 0; t < tokens; t += TOKENS_MAX) {
        add_products_of_quads<format, false>(rows, h + t * h_stride, h_stride, std::min(TOKENS_MAX, tokens - t), hidden,
                                             begin, y + t * hidden);
    }
}

}  // namespace
}  // namespace flashclient
