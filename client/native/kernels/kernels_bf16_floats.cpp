// Products of rows in blocks of F8_E4M3 with x by the instructions for pairs of bf16; everything else is that of
// AVX-512 VNNI.
//
// bf16 holds numbers of F8_E4M3 exactly. Some rows are decoded, a panel of columns at a time, and multiplied with the
// columns of x that kernels_bf16.cpp makes. The sum of the products of a block times its scale is added in fp32, one
// block after the other, so the order follows from the length of the row alone.
#include "kernels/kernels.h"

#if defined(__x86_64__)
#include <array>
#include <bit>
#include <cmath>

#include "vectors/bf16_pairs.h"

namespace flashclient {
namespace {

constexpr size_t ROWS = 6;          // that are decoded together
constexpr size_t AHEAD_PANELS = 3;  // that are fetched before they are decoded
constexpr size_t PANEL = 16;        // lines of 32 elements of each: 6 KiB
constexpr size_t CODES = 128;       // without the sign
constexpr uint8_t SIGN = 0x80;
constexpr size_t COLUMNS_MAX = PARTS * TOKENS_MAX;

// The two bytes of the bf16 of each code.
struct CodeBytes {
    alignas(64) std::array<uint8_t, CODES> low, high;

    CodeBytes() {
        for (size_t code = 0; code < CODES; code++) {
            const size_t exponent = code / 8, fraction = code % 8;
            const float number =
                exponent == 0 ? static_cast<float>(fraction) / 512.0f
                              : std::ldexp(1.0f + static_cast<float>(fraction) / 8.0f, static_cast<int>(exponent) - 7);
            const uint32_t bits = std::bit_cast<uint32_t>(number);
            low[code] = static_cast<uint8_t>(bits >> 16);
            high[code] = static_cast<uint8_t>(bits >> 24);
        }
    }
};
const CodeBytes CODE_BYTES;

struct Decoder {
    __m512i low[2], high[2];

    KERNEL Decoder() {
        for (size_t i = 0; i < 2; i++) {
            low[i] = _mm512_load_si512(CODE_BYTES.low.data() + i * 64);
            high[i] = _mm512_load_si512(CODE_BYTES.high.data() + i * 64);
        }
    }

    // The numbers of some lines of codes.
    template <size_t lines>
    LANE void decode(const uint8_t* codes, uint16_t* values) const {
        auto* out = reinterpret_cast<__m512i*>(values);
        __m512i lower, upper;
        if constexpr (lines == 1) {
            const __m512i twice = _mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3);
            const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
            decode_eights(_mm512_permutexvar_epi64(twice, _mm512_castsi256_si512(half)), lower, upper);
            return _mm512_store_si512(out, lower);
        }
        const __m512i apart = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
#pragma GCC unroll 4
        for (size_t line = 0; line + 1 < lines; line += 2) {
            const __m512i both = _mm512_loadu_si512(codes + line * BLOCK);
            decode_eights(_mm512_permutexvar_epi64(apart, both), lower, upper);
            _mm512_store_si512(out + line, lower);
            _mm512_store_si512(out + line + 1, upper);
        }
    }

    // Of each 16 codes the first eight and the last eight, as bf16.
    LANE void decode_eights(__m512i codes, __m512i& lower, __m512i& upper) const {
        constexpr int OR_AND = 0xf8;  // of ternary logic: a | b & c
        const __m512i low_bytes = _mm512_permutex2var_epi8(low[0], codes, low[1]);
        const __m512i sizes = _mm512_permutex2var_epi8(high[0], codes, high[1]);
        const __m512i high_bytes =
            _mm512_ternarylogic_epi32(sizes, codes, _mm512_set1_epi8(static_cast<char>(SIGN)), OR_AND);
        lower = _mm512_unpacklo_epi8(low_bytes, high_bytes);
        upper = _mm512_unpackhi_epi8(low_bytes, high_bytes);
    }
};

template <BlockFormat format>
struct Blocks {
    static constexpr size_t VALUES = weightd::BLOCK_FORMATS[static_cast<size_t>(format)].values;
    static constexpr size_t BYTES = weightd::BLOCK_FORMATS[static_cast<size_t>(format)].bytes;
    static constexpr size_t LINES = VALUES / BLOCK;
    static_assert(PANEL % LINES == 0);
};

// Some columns of some rows, decoded.
template <BlockFormat format>
struct Panel {
    using Block = Blocks<format>;
    alignas(64) uint16_t values[ROWS][PANEL * BLOCK];
    float scale[PANEL / Block::LINES][ROWS];

    // Lines [begin, begin + count) of the rows. Fetches as many bytes from `ahead` on.
    KERNEL void fill(const Decoder& decoder, const uint8_t* const (&row)[ROWS], size_t begin, size_t count,
                     const uint8_t* const (&ahead)[ROWS]) {
        for (size_t r = 0; r < ROWS; r++) {
            for (size_t i = 0; i < count / Block::LINES; i++) {
                const uint8_t* block = row[r] + (begin / Block::LINES + i) * Block::BYTES;
                for (size_t line = 0; line < Block::BYTES; line += ROW_BYTES) {
                    __builtin_prefetch(ahead[r] + i * Block::BYTES + line, 0, 2);
                }
                std::memcpy(&scale[i][r], block, sizeof(float));
                decoder.decode<Block::LINES>(block + sizeof(float), values[r] + i * Block::VALUES);
            }
        }
    }
};

// Adds the products of `count` lines of rows [first, first + rows) with the tile of columns x.
template <BlockFormat format, size_t rows, size_t columns>
KERNEL void add_products(const Panel<format>& panel, size_t first, size_t count, const char* x, __m512* chains) {
    __m512 chain[rows][columns];
#pragma GCC unroll 8
    for (size_t r = 0; r < rows; r++) {
#pragma GCC unroll 4
        for (size_t c = 0; c < columns; c++) chain[r][c] = chains[r * columns + c];
    }
    for (size_t i = 0; i < count / Blocks<format>::LINES; i++) {
        __m512 of_block[rows][columns];
        for (auto& of_row : of_block) std::fill_n(of_row, columns, _mm512_setzero_ps());
        for (size_t line = i * Blocks<format>::LINES; line < (i + 1) * Blocks<format>::LINES;
             line++, x += columns * ROW_BYTES) {
#pragma GCC unroll 4
            for (size_t c = 0; c < columns; c++) {
                const __m512bh value = line_of(x, c);
#pragma GCC unroll 8
                for (size_t r = 0; r < rows; r++) {
                    of_block[r][c] = _mm512_dpbf16_ps(of_block[r][c], line_of(panel.values[first + r], line), value);
                }
            }
        }
#pragma GCC unroll 8
        for (size_t r = 0; r < rows; r++) {
            const __m512 factor = _mm512_set1_ps(panel.scale[i][first + r]);
#pragma GCC unroll 4
            for (size_t c = 0; c < columns; c++) chain[r][c] = _mm512_fmadd_ps(of_block[r][c], factor, chain[r][c]);
        }
    }
#pragma GCC unroll 8
    for (size_t r = 0; r < rows; r++) {
#pragma GCC unroll 4
        for (size_t c = 0; c < columns; c++) chains[r * columns + c] = chain[r][c];
    }
}

// The same for all rows and a tile of `width` columns.
template <BlockFormat format>
KERNEL void add_tile(const Panel<format>& panel, size_t width, size_t count, const char* x, __m512* chains) {
    switch (width) {
        case 1:
            return add_products<format, ROWS, 1>(panel, 0, count, x, chains);
        case 2:
            return add_products<format, ROWS, 2>(panel, 0, count, x, chains);
        case 3:
            add_products<format, ROWS / 2, 3>(panel, 0, count, x, chains);
            return add_products<format, ROWS / 2, 3>(panel, ROWS / 2, count, x, chains + ROWS / 2 * 3);
        default:
            add_products<format, ROWS / 2, 4>(panel, 0, count, x, chains);
            return add_products<format, ROWS / 2, 4>(panel, ROWS / 2, count, x, chains + ROWS / 2 * 4);
    }
}

template <BlockFormat format>
KERNEL void dots(const void* const* rows, size_t row_count, const void* packed, size_t hidden, size_t tokens,
                 float* dots) {
    using Block = Blocks<format>;
    const PackedX x(packed, tokens);
    const Decoder decoder;
    const size_t lines = hidden / BLOCK, count = x.columns.count;
    Panel<format> panel;
    __m512 chains[COLUMNS_MAX * ROWS];
    for (size_t i = 0; i < row_count; i += ROWS) {
        const uint8_t* row[ROWS];
        const uint8_t* ahead[ROWS];
        for (size_t r = 0; r < ROWS; r++) row[r] = static_cast<const uint8_t*>(rows[std::min(i + r, row_count - 1)]);
        std::fill_n(chains, count * ROWS, _mm512_setzero_ps());
        for (size_t begin = 0; begin < lines; begin += PANEL) {
            const size_t some = std::min(PANEL, lines - begin), fetched = begin + AHEAD_PANELS * PANEL;
            for (size_t r = 0; r < ROWS; r++) {
                const bool here = fetched < lines;  // else of the next rows
                const void* of = here ? row[r] : rows[std::min(i + ROWS + r, row_count - 1)];
                const size_t line = here ? fetched : std::min(fetched - lines, begin);
                ahead[r] = static_cast<const uint8_t*>(of) + line / Block::LINES * Block::BYTES;
            }
            panel.fill(decoder, row, begin, some, ahead);
            for (size_t c = 0; c < count; c += COLUMNS_TOGETHER) {
                const size_t width = std::min(count - c, COLUMNS_TOGETHER);
                add_tile(panel, width, some, x.lines + (c * lines + begin * width) * ROW_BYTES, chains + c * ROWS);
            }
        }
        x.store_tile<ROWS>(chains, std::min(ROWS, row_count - i), dots + i * tokens);
    }
}

template <BlockFormat format>
const Kernels* table_of_floats() {
    static const Kernels kernels = [] {
        Kernels table = *kernels_vnni(format);
        table.instruction_set = "avx512_bf16";
        table.packed_bytes = PackedX::bytes;
        table.pack = PackedX::pack;
        table.dots = dots<format>;
        return table;
    }();
    return &kernels;
}

}  // namespace
}  // namespace flashclient

const flashclient::Kernels* flashclient::kernels_bf16(BlockFormat format) {
    if (format == BlockFormat::fp8_128) return table_of_floats<BlockFormat::fp8_128>();
    if (format == BlockFormat::fp8_32) return table_of_floats<BlockFormat::fp8_32>();
    return kernels_vnni(format);
}
#else
const flashclient::Kernels* flashclient::kernels_bf16(BlockFormat) { return nullptr; }
#endif
