// Products of rows that are too short to be summed one by one: the blocks of a down matrix in a slab (ffn.h), whose
// values lie along the neurons. kernels_body.h includes it.
//
// A row's product is one chain of vector sums, as everywhere. Then the lanes of as many chains as a vector has lanes
// are summed together, sums_of(): a tree whose shape does not depend on the other chains. One token: blocks are decoded
// in registers. Several: rows are decoded into a cache, for all tokens. The order of sums is the same.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "encoding.h"
#include "formats/block_loops.h"

namespace flashclient {
namespace {

// Numbers that are stored one by one, as block_formats.h describes formats.
template <Dtype dtype>
struct PlainGroup {
    static constexpr size_t VALUES = 32, GROUP = 32, BYTES = 32 * bytes_of(dtype);
    using Scales = NoScales;
    const typename Element<dtype>::type* values;

    LANE PlainGroup(const uint8_t* group, NoScales, size_t)
        : values(reinterpret_cast<const typename Element<dtype>::type*>(group)) {}
    LANE Lane lane(size_t first) const { return Lane::template load<dtype>(values + first); }
};

// The chain of one row.
template <typename Format>
LANE Lane product_of(const uint8_t* row, const float* h, size_t length) {
    using Row = BlockRow<Format>;
    Lane chain = Lane::zero();
    for (size_t n = 0; n < length; n += Format::VALUES) {
        const uint8_t* block = Row::block(row, n);
        const auto scales = Format::Scales::of(block);
        for (size_t g = 0; g < Row::GROUPS; g++) {
            const Format group(block, scales, g);
#pragma GCC unroll 32
            for (size_t l = 0; l < Row::LANES; l++) {
                const size_t first = g * Format::GROUP + l * Lane::WIDTH;
                chain = fma(group.lane(l * Lane::WIDTH), Lane::template load<Dtype::f32>(h + n + first), chain);
            }
        }
    }
    return chain;
}

// y[j] += the sums of the chains for `some` rows from j on.
LANE void add_sums(const Lane (&chains)[Lane::WIDTH], size_t some, float* y) {
    const Lane one = Lane::all(1.0f);
    if (some == Lane::WIDTH) {
        fma(sums_of(chains), one, Lane::template load<Dtype::f32>(y)).store(y);
    } else {
        fma(sums_of(chains), one, Lane::template load_some<Dtype::f32>(y, some)).store_some(y, some);
    }
}

template <typename Format>
KERNEL void add_products_of_one(const uint8_t* matrix, size_t length, size_t row_bytes, const float* h, size_t begin,
                                size_t end, float* y) {
    constexpr size_t FAR = 4096;  // behind: what is read next, in this matrix or behind it
    for (size_t j = begin; j < end; j += Lane::WIDTH) {
        const size_t some = std::min(Lane::WIDTH, end - j);
        const uint8_t* first = matrix + j * row_bytes;
        for (size_t line = 0; line < Lane::WIDTH * row_bytes; line += LINE_BYTES) prefetch(first + FAR + line);
        Lane chains[Lane::WIDTH];
        if constexpr (Format::VALUES == Format::GROUP) {
#pragma GCC unroll 16
            for (size_t r = 0; r < Lane::WIDTH; r++) {
                chains[r] = product_of<Format>(first + std::min(r, some - 1) * row_bytes, h, length);
            }
        } else {  // long enough to pass its sum through memory
#pragma GCC unroll 1
            for (size_t r = 0; r < Lane::WIDTH; r++) {
                chains[r] = product_of<Format>(first + std::min(r, some - 1) * row_bytes, h, length);
            }
        }
        add_sums(chains, some, y + j);
    }
}

template <typename Format>
KERNEL void add_products(const void* matrix, size_t length, const float* h, size_t h_stride, size_t tokens,
                         size_t hidden, size_t begin, size_t end, float* y) {
    const auto* rows = static_cast<const uint8_t*>(matrix);
    const size_t row_bytes = length / Format::VALUES * Format::BYTES;
    if (tokens == 1) return add_products_of_one<Format>(rows, length, row_bytes, h, begin, end, y);
    alignas(64) float values[Lane::WIDTH][weightd::SLAB_NEURONS_MAX];  // 16 KiB with AVX-512
    for (size_t j = begin; j < end; j += Lane::WIDTH) {
        const size_t some = std::min(Lane::WIDTH, end - j);
        for (size_t r = 0; r < some; r++) decode<Format>(rows + (j + r) * row_bytes, 0, length, values[r]);
        for (size_t r = some; r < Lane::WIDTH; r++) std::copy_n(values[some - 1], length, values[r]);
        for (size_t t = 0; t < tokens; t++) {
            Lane chains[Lane::WIDTH];
            for (Lane& chain : chains) chain = Lane::zero();
            for (size_t n = 0; n < length; n += Lane::WIDTH) {
                const Lane value = Lane::template load<Dtype::f32>(h + t * h_stride + n);
#pragma GCC unroll 16
                for (size_t r = 0; r < Lane::WIDTH; r++) {
                    chains[r] = fma(Lane::template load<Dtype::f32>(values[r] + n), value, chains[r]);
                }
            }
            add_sums(chains, some, y + t * hidden + j);
        }
    }
}

}  // namespace
}  // namespace flashclient
