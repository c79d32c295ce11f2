// The inner loops over rows of weights, which are read in place. There is one set of loops for each instruction set.
//
// The order of every sum follows from the length of the row alone, so the number of tokens, rows or elements of a call
// changes no bit of a result. Rows need only the alignment of their elements; rows in blocks (formats/) need none.
// Their hidden, begin and end are whole blocks.
#pragma once

#include <cstddef>
#include <cstdint>

#include "encoding.h"

namespace flashclient {

using weightd::BlockFormat;
using weightd::bytes_of;
using weightd::Dtype;
using weightd::Encoding;

// Tokens of one call: the bits of a row mask. More tokens are computed in groups, while the weights are in a cache.
inline constexpr size_t TOKENS_MAX = 16;

constexpr size_t divide_up(size_t value, size_t by) { return (value + by - 1) / by; }

// Asks for bytes that are soon read, so that memory is read while something else is computed. Into the L2 cache, which
// has more misses under way than L1.
inline void fetch_lines(const void* first, size_t bytes) {
    constexpr size_t LINE = 64;
    const char* lines = static_cast<const char*>(first);
    for (size_t line = 0; line < bytes; line += LINE) __builtin_prefetch(lines + line, 0, 2);
}
constexpr size_t FETCHED_BYTES = 8192;  // by a thread, of what it reads next: latency times speed

// Neurons of a layer that are summed together, for tables with GroupSums: a tile adds the sum of 32 products.
inline constexpr size_t GROUP_NEURONS = 32;
inline constexpr size_t SUM_ELEMENTS = 32;  // of y that lie together in the sums of tiles: two tiles of columns

// Sums over all neurons of a layer, group after group. An h is the sum of three numbers of 16 bits, h = h_0 + h_1 +
// h_2. For each part p in turn, y += (sum of h_p[n] * down[n] over the even n of the group) + (the same over its odd
// n). The last group may have fewer neurons.
struct GroupSums {
    // The form of h, [neurons, tokens] fp32 of at most TOKENS_MAX tokens, that add() takes; aligned to a cache line.
    size_t (*packed_bytes)(size_t neurons);
    void (*pack)(const float* h, size_t neurons, size_t tokens, void* packed);
    // Adds the groups of h[k][t] * rows[k][j] for j in [begin, end), which are multiples of SUM_ELEMENTS or `hidden`.
    // `packed`: of each TOKENS_MAX tokens in turn, back to back. `sums`: y as [SUM_ELEMENTS of hidden][tokens, rounded
    // up to TOKENS_MAX][SUM_ELEMENTS].
    void (*add)(const void* const* rows, const void* packed, size_t row_count, size_t tokens, size_t hidden,
                size_t begin, size_t end, float* sums);
    // The same for one token, with h and y as they are. Rows whose h is 0 are not read.
    void (*add_to_one)(const void* const* rows, const float* h, size_t row_count, size_t begin, size_t end, float* y);
};

struct Kernels {
    const char* instruction_set;
    // The form of x, [tokens, hidden] fp32, that dots() takes, at most TOKENS_MAX tokens of it; `packed` is aligned to
    // a cache line. Null: x itself.
    size_t (*packed_bytes)(size_t hidden, size_t tokens);
    void (*pack)(const float* x, size_t hidden, size_t tokens, void* packed);
    // dots[i][t] = rows[i] . x[t], for dots [row_count, tokens] and what pack() made of x, or x where that is null.
    void (*dots)(const void* const* rows, size_t row_count, const void* x, size_t hidden, size_t tokens, float* dots);
    // y[t][j] += h[k][t] * rows[k][j], k rising, for j in [begin, end); y is [tokens, hidden] fp32, h [rows, tokens].
    void (*accumulate)(const void* const* rows, const float* h, size_t row_count, size_t tokens, size_t hidden,
                       size_t begin, size_t end, float* y);
    // out[j] = row[j] in fp32, exactly.
    void (*upcast)(const void* row, size_t hidden, float* out);
    // row[j] = values[j], rounded to the nearest, ties to even. Null for i8 and for blocks.
    void (*downcast)(const float* values, size_t count, void* row);
    // values[i] = exp(values[i] - the greatest value), in place. The relative error is at most 2e-7; results below
    // e^-87.7 are 0. Returns the sum in fp32. `count` is at least 1.
    float (*exponentials)(float* values, size_t count);
    // The number of bits in which a and b differ.
    size_t (*differing_bits)(const uint8_t* a, const uint8_t* b, size_t bytes);
    // y[t][j] += row j . h[t] for j in [begin, end). `matrix`: rows of `length` values back to back, at most 256 and
    // whole blocks and 32s. h: h_stride values from token to token; y: [tokens, hidden]. Null for i8.
    void (*add_products)(const void* matrix, size_t length, const float* h, size_t h_stride, size_t tokens,
                         size_t hidden, size_t begin, size_t end, float* y);
    // values[i] = 1 / (1 + exp(-values[i])), in place. The relative error is at most 4e-7 where the result is at least
    // e^-87; a NaN stays one.
    void (*logistic)(float* values, size_t count);
    // dots() of two groups of tokens, with the same bits, for rows that are in a cache. Null: there is nothing faster
    // than two calls of dots().
    void (*dots_of_groups)(const void* const* rows, size_t row_count, const void* const (&x)[2], size_t hidden,
                           const size_t (&tokens)[2], float* const (&dots)[2]) = nullptr;
    const GroupSums* groups = nullptr;  // null: there is nothing faster than accumulate()
};

// The best instruction set of the processor, or the one named: "amx", "avx512_bf16" (which differs from
// "avx512_vnni" for bf16 and blocks of FP8 only), "avx512_vnni" (which differs from "avx512" for blocks only),
// "avx512", "avx2" or "portable". Throws std::invalid_argument for an unknown name and for one that this processor
// lacks.
const Kernels& kernels_for(Dtype dtype, const char* instruction_set = nullptr);

// The same for rows of an encoding: plain F32, BF16 and F16, and BLOCK_FORMATS. std::invalid_argument for all others.
const Kernels& kernels_for(const Encoding& encoding, const char* instruction_set = nullptr);

// The same for rows in blocks.
const Kernels& kernels_for(BlockFormat format, const char* instruction_set = nullptr);

// One table per instruction set and dtype or format; null where the compiler's target has no such instructions.
const Kernels* kernels_amx(Dtype dtype);  // that of AVX-512 but for bf16
const GroupSums* group_sums_amx();        // of bf16
const Kernels* kernels_avx512(Dtype dtype);
const Kernels* kernels_avx512(BlockFormat format);
const Kernels* kernels_bf16(Dtype dtype);               // that of AVX-512 but for bf16
const Kernels* kernels_bf16(BlockFormat format);        // that of AVX-512 VNNI but for FP8
const Kernels* kernels_vnni(Dtype dtype);               // that of AVX-512
const Kernels* kernels_vnni(BlockFormat format);        // that of AVX-512 but for products of integers: not FP8's
const Kernels* kernels_amx(BlockFormat format);         // the same, of several rows of x by tiles
const Kernels* kernels_amx_floats(BlockFormat format);  // of FP8; of others that of AVX-512
const Kernels* kernels_avx2(Dtype dtype);
const Kernels* kernels_avx2(BlockFormat format);
const Kernels* kernels_portable(Dtype dtype);
const Kernels* kernels_portable(BlockFormat format);

}  // namespace flashclient
