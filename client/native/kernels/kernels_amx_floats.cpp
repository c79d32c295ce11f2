// Products of rows in blocks of F8_E4M3 with rows of x by tiles of Intel's AMX; everything else is that of AVX-512.
//
// bf16 holds numbers of F8_E4M3 exactly. 16 rows are decoded, some tiles of 32 columns at a time, and multiplied with
// the columns of x that kernels_amx.cpp makes. A tile sums the products of the numbers that share a scale. These sums
// times the scale are added in fp32, one block after the other, so the order follows from the length of the row alone.
#include "kernels/kernels.h"

#if defined(__x86_64__)
#include "formats/field.h"
#include "vectors/amx_tiles.h"

namespace flashclient {
namespace {

constexpr size_t PANEL = 8;  // tiles of a row that are decoded together: 8 KiB of all 16 rows

// Numbers of F8_E4M3, divided by E4M3_SCALE, of 32 codes. Those below the least normal one are looked up.
LANE __m512i bf16_of_e4m3(const uint8_t* codes) {
    constexpr short NORMAL = 112 << 7, FRACTION = 0x07f0, NOT_SUBNORMAL = 0x0078;
    constexpr int AND_OR = 0xea, OR_AND = 0xf8;  // of ternary logic: a & b | c, a | b & c
    const __m512i subnormals =
        _mm512_castsi128_si512(_mm_setr_epi16(0, 0x3700, 0x3780, 0x37c0, 0x3800, 0x3820, 0x3840, 0x3860));  // n * 2^-17
    const __m512i words = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    const __m512i normal = _mm512_ternarylogic_epi32(_mm512_slli_epi16(words, 4), _mm512_set1_epi16(FRACTION),
                                                     _mm512_set1_epi16(NORMAL), AND_OR);
    const __mmask32 small = _mm512_testn_epi16_mask(words, _mm512_set1_epi16(NOT_SUBNORMAL));
    const __m512i sizes = _mm512_mask_permutexvar_epi16(normal, small, words, subnormals);
    return _mm512_ternarylogic_epi32(sizes, words, _mm512_set1_epi16(static_cast<short>(0x8000)), OR_AND);
}

using TileOfRows = const uint8_t* const (&)[TILE_ROWS];

// Some columns of 16 rows, decoded.
template <BlockFormat format>
struct DecodedTiles {
    static constexpr size_t BYTES = weightd::BLOCK_FORMATS[static_cast<size_t>(format)].bytes;
    static constexpr size_t SPAN =
        weightd::BLOCK_FORMATS[static_cast<size_t>(format)].values / BLOCK;  // tiles of a block
    static_assert(PANEL % (2 * SPAN) == 0);
    alignas(64) uint16_t values[PANEL][TILE_ROWS][BLOCK];
    alignas(64) float scale[PANEL / SPAN][TILE_ROWS];

    // Tiles [begin, begin + count) of the rows. Fetches as many from the beginning of `ahead` on.
    KERNEL void fill(TileOfRows row, size_t begin, size_t count, TileOfRows ahead) {
        for (size_t span = 0; span < count / SPAN; span++) {
            const size_t offset = (begin / SPAN + span) * BYTES;
            for (size_t r = 0; r < TILE_ROWS; r++) {
                const uint8_t* block = row[r] + offset;
                for (size_t line = 0; line < BYTES; line += ROW_BYTES) {
                    __builtin_prefetch(ahead[r] + span * BYTES + line, 0, 2);
                }
                float of_block;
                std::memcpy(&of_block, block, sizeof(of_block));
                scale[span][r] = of_block * E4M3_SCALE;
#pragma GCC unroll 4
                for (size_t tile = 0; tile < SPAN; tile++) {
                    const __m512i numbers = bf16_of_e4m3(block + sizeof(of_block) + tile * BLOCK);
                    _mm512_store_si512(values[span * SPAN + tile][r], numbers);
                }
            }
        }
    }
};

// Tiles of x from the first that is multiplied on.
struct TilesOfColumns {
    const char* data;
    size_t tile_bytes;
    size_t pair_bytes;
};

// Sums of a tile of columns with 16 rows: [row][stride], where a few columns lie together, else a line for each row.
template <bool few>
struct Chains {
    static constexpr size_t STRIDE = few ? FEW_COLUMNS : TILE_COLUMNS;
    static constexpr size_t LINES = TILE_ROWS * STRIDE / TILE_COLUMNS;
    alignas(64) float sums[TILE_ROWS][STRIDE];

    // Adds those of one block, times the scales of the rows.
    LANE void add(const Chains& of_block, const float* scale) {
        const __m512 of_rows = _mm512_load_ps(scale);
#pragma GCC unroll 16
        for (size_t line = 0; line < LINES; line++) {
            __m512 factor = _mm512_set1_ps(scale[line]);
            if constexpr (few) {
                const __m512i fours = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
                const __m512i rows = _mm512_add_epi32(fours, _mm512_set1_epi32(static_cast<int>(4 * line)));
                factor = _mm512_permutexvar_ps(rows, of_rows);
            }
            float* out = sums[0] + line * TILE_COLUMNS;
            const __m512 products = _mm512_load_ps(of_block.sums[0] + line * TILE_COLUMNS);
            _mm512_store_ps(out, _mm512_fmadd_ps(products, factor, _mm512_load_ps(out)));
        }
    }

    // Adds the products of `count` tiles. Those of two blocks are multiplied in turn, to hide latencies.
    template <BlockFormat format>
    KERNEL void add_tiles(const DecodedTiles<format>& rows, const TilesOfColumns& x, size_t count) {
        constexpr size_t SPAN = DecodedTiles<format>::SPAN, STRIDE_BYTES = STRIDE * sizeof(float);
        Chains of_block[2] = {};
        for (size_t first = 0; first < count; first += 2 * SPAN) {
            const bool both = first + SPAN < count;
            clear_tile<0>();
            clear_tile<1>();
            for (size_t tile = first; tile < first + SPAN; tile++) {
                load_tile<2>(rows.values[tile], ROW_BYTES);
                load_tile<4>(x.data + tile * x.tile_bytes, x.pair_bytes);
                add_products<0, 2, 4>();
                if (!both) continue;
                load_tile<3>(rows.values[tile + SPAN], ROW_BYTES);
                load_tile<5>(x.data + (tile + SPAN) * x.tile_bytes, x.pair_bytes);
                add_products<1, 3, 5>();
            }
            store_tile<0>(of_block[0].sums, STRIDE_BYTES);
            if (both) store_tile<1>(of_block[1].sums, STRIDE_BYTES);
            add(of_block[0], rows.scale[first / SPAN]);
            if (both) add(of_block[1], rows.scale[first / SPAN + 1]);
        }
    }
};

// What pack() made of rows of x, and how wide tiles of it are.
struct PackedColumns {
    const TileColumns& columns;
    const char* tiles;
    size_t blocks;  // of a row

    PackedColumns(const void* packed, size_t hidden)
        : columns(*static_cast<const TileColumns*>(packed)),
          tiles(static_cast<const char*>(packed) + sizeof(TileColumns)),
          blocks(hidden / BLOCK) {}

    bool few() const { return columns.count <= FEW_COLUMNS; }
    size_t column_tiles() const { return divide_up(columns.count, TILE_COLUMNS); }
    TilesOfColumns from(size_t column_tile, size_t block) const {
        const size_t bytes = columns.tile_bytes();
        return {tiles + (column_tile * blocks + block) * bytes, bytes, columns.pair_bytes};
    }
    KERNEL void configure() const {
        TileConfig config;
        for (size_t tile : {0, 1, 4, 5}) {  // of sums and of x
            if (few()) config.row_bytes[tile] = static_cast<uint16_t>(columns.count * sizeof(float));
        }
        _tile_loadconfig(&config);
    }
};

// The dots of 16 rows [row, token], while the rows `next` are fetched.
template <BlockFormat format, bool few>
KERNEL void dots_of_tile(TileOfRows row, TileOfRows next, const PackedColumns& x, size_t tokens,
                         float (&dots)[TILE_ROWS * TOKENS_MAX]) {
    using Decoded = DecodedTiles<format>;
    Decoded decoded;
    Chains<few> chains[few ? 1 : PARTS] = {};
    for (size_t begin = 0; begin < x.blocks; begin += PANEL) {
        const size_t count = std::min(PANEL, x.blocks - begin), end = begin + count;
        const uint8_t* ahead[TILE_ROWS];
        for (size_t r = 0; r < TILE_ROWS; r++) {
            ahead[r] = end < x.blocks ? row[r] + end / Decoded::SPAN * Decoded::BYTES : next[r];
        }
        decoded.fill(row, begin, count, ahead);
        for (size_t column_tile = 0; column_tile < x.column_tiles(); column_tile++) {
            chains[column_tile].add_tiles(decoded, x.from(column_tile, begin), count);
        }
    }
    if (few && tokens == 1 && !x.columns.exact[0]) return store_dots_of_parts(chains[0].sums[0], TILE_ROWS, dots);
    for (size_t r = 0; r < TILE_ROWS; r++) {
        store_dots(chains[0].sums[r], TILE_ROWS * TILE_COLUMNS, x.columns, tokens, dots + r * tokens);
    }
}

template <BlockFormat format>
KERNEL void dots(const void* const* rows, size_t row_count, const void* packed, size_t hidden, size_t tokens,
                 float* dots) {
    const PackedColumns x(packed, hidden);
    x.configure();
    alignas(64) float of_tile[TILE_ROWS * TOKENS_MAX];
    for (size_t i = 0; i < row_count; i += TILE_ROWS) {
        const uint8_t* row[TILE_ROWS];
        const uint8_t* next[TILE_ROWS];
        for (size_t r = 0; r < TILE_ROWS; r++) {
            row[r] = static_cast<const uint8_t*>(rows[std::min(i + r, row_count - 1)]);
            next[r] = static_cast<const uint8_t*>(rows[std::min(i + TILE_ROWS + r, row_count - 1)]);
        }
        x.few() ? dots_of_tile<format, true>(row, next, x, tokens, of_tile)
                : dots_of_tile<format, false>(row, next, x, tokens, of_tile);
        std::copy_n(of_tile, std::min(TILE_ROWS, row_count - i) * tokens, dots + i * tokens);
    }
    _tile_release();
}

// y[t][j + r] += dots[r][t] for some rows.
KERNEL void add_transposed(const float* dots, size_t some, size_t tokens, size_t hidden, float* y) {
    const auto rows = static_cast<__mmask16>((1U << some) - 1), columns = static_cast<__mmask16>((1U << tokens) - 1);
    __m512 sums[TILE_ROWS];
    if (tokens == 1) {
        sums[0] = _mm512_load_ps(dots);
    } else {
        for (size_t r = 0; r < TILE_ROWS; r++) sums[r] = _mm512_maskz_loadu_ps(columns, dots + r * tokens);
        transpose(sums);
    }
    for (size_t t = 0; t < tokens; t++, y += hidden) {
        _mm512_mask_storeu_ps(y, rows, _mm512_add_ps(_mm512_maskz_loadu_ps(rows, y), sums[t]));
    }
}

template <BlockFormat format>
KERNEL void add_products_of_slab(const void* matrix, size_t length, const float* h, size_t h_stride, size_t tokens,
                                 size_t hidden, size_t begin, size_t end, float* y) {
    constexpr size_t LENGTH_MAX = weightd::SLAB_NEURONS_MAX;
    const size_t row_bytes = length / weightd::BLOCK_FORMATS[static_cast<size_t>(format)].values *
                             weightd::BLOCK_FORMATS[static_cast<size_t>(format)].bytes;
    alignas(64) char packed[sizeof(TileColumns) + PARTS * LENGTH_MAX / BLOCK * TILE_BYTES];
    alignas(64) float of_tile[TILE_ROWS * TOKENS_MAX];
    float together[TOKENS_MAX * LENGTH_MAX];
    for (size_t first = 0; first < tokens; first += TOKENS_MAX) {
        const size_t some = std::min(TOKENS_MAX, tokens - first);
        for (size_t t = 0; t < some; t++) std::copy_n(h + (first + t) * h_stride, length, together + t * length);
        kernels_amx(Dtype::bf16)->pack(together, length, some, packed);
        const PackedColumns x(packed, length);
        x.configure();
        for (size_t j = begin; j < end; j += TILE_ROWS) {
            const uint8_t* row[TILE_ROWS];
            const uint8_t* next[TILE_ROWS];
            for (size_t r = 0; r < TILE_ROWS; r++) {
                row[r] = static_cast<const uint8_t*>(matrix) + std::min(j + r, end - 1) * row_bytes;
                next[r] = row[r] + TILE_ROWS * row_bytes;
            }
            x.few() ? dots_of_tile<format, true>(row, next, x, some, of_tile)
                    : dots_of_tile<format, false>(row, next, x, some, of_tile);
            add_transposed(of_tile, std::min(TILE_ROWS, end - j), some, hidden, y + first * hidden + j);
        }
        _tile_release();
    }
}

template <BlockFormat format>
const Kernels* table_of_floats() {
    static const Kernels kernels = [] {
        Kernels table = *kernels_avx512(format);
        table.instruction_set = "amx";
        table.packed_bytes = kernels_amx(Dtype::bf16)->packed_bytes;
        table.pack = kernels_amx(Dtype::bf16)->pack;
        table.dots = dots<format>;
        table.add_products = add_products_of_slab<format>;
        return table;
    }();
    return &kernels;
}

}  // namespace
}  // namespace flashclient

const flashclient::Kernels* flashclient::kernels_amx_floats(BlockFormat format) {
    if (format == BlockFormat::fp8_128) return table_of_floats<BlockFormat::fp8_128>();
    if (format == BlockFormat::fp8_32) return table_of_floats<BlockFormat::fp8_32>();
    return kernels_avx512(format);
}
#else
const flashclient::Kernels* flashclient::kernels_amx_floats(BlockFormat) { return nullptr; }
#endif
