// Products of bf16 rows with x by tiles of Intel's AMX; everything else is that of AVX-512.
//
// A tile of weights is 16 rows of 32 elements, read in place where the rows are equally spaced. A tile of x is 16
// columns of 32 elements, in pairs. The processor adds the 32 products of a row and a column as two chains, of even and
// of odd elements, then their sum to the dot. So the order of a sum follows from the length of the row alone.
//
// A row of x that is not exact in bf16 takes three columns, whose sum it is: bf16 has 8 bits, fp32 has 24. Numbers
// below 2^-126 count as 0.
#include "kernels/kernels.h"

#if defined(__x86_64__)
#include "vectors/amx_tiles.h"

namespace flashclient {
namespace {

constexpr size_t COLUMN_TILES = PARTS * TOKENS_MAX / TILE_COLUMNS;
constexpr size_t AHEAD = 8;        // blocks of a row that are fetched before they are computed: latency times speed
constexpr size_t COPIED = 4;       // blocks of scattered rows that are copied together
constexpr size_t SHORT_ROW = 256;  // elements: of such rows more tiles are multiplied at once, to hide latencies
constexpr size_t SHORT_TILES = 4;

size_t packed_bytes(size_t hidden, size_t tokens) {
    return sizeof(TileColumns) + divide_up(PARTS * tokens, TILE_COLUMNS) * divide_up(hidden, BLOCK) * TILE_BYTES;
}

KERNEL void assign_columns(const float* x, size_t hidden, size_t tokens, TileColumns& columns) {
    columns.assign(x, hidden, tokens);
    const size_t count = columns.count;
    const size_t pair_bytes = count <= FEW_COLUMNS ? std::bit_ceil(count) * sizeof(uint32_t) : ROW_BYTES;
    columns.pair_bytes = static_cast<uint8_t>(pair_bytes);
}

// A block of the one token that has PARTS columns, of the four of a tile.
LANE void store_parts(const __m512i (&pairs)[PARTS], void* tile) {
    const __m512i zero = _mm512_setzero_si512();
    const __m512i low[] = {_mm512_unpacklo_epi32(pairs[0], pairs[1]), _mm512_unpacklo_epi32(pairs[2], zero)};
    const __m512i high[] = {_mm512_unpackhi_epi32(pairs[0], pairs[1]), _mm512_unpackhi_epi32(pairs[2], zero)};
    const __m512i every_fourth[] = {_mm512_unpacklo_epi64(low[0], low[1]), _mm512_unpackhi_epi64(low[0], low[1]),
                                    _mm512_unpacklo_epi64(high[0], high[1]), _mm512_unpackhi_epi64(high[0], high[1])};
    auto* out = static_cast<__m128i*>(tile);
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; i++) {
        _mm_store_si128(out + i, _mm512_castsi512_si128(every_fourth[i]));
        _mm_store_si128(out + 4 + i, _mm512_extracti32x4_epi32(every_fourth[i], 1));
        _mm_store_si128(out + 8 + i, _mm512_extracti32x4_epi32(every_fourth[i], 2));
        _mm_store_si128(out + 12 + i, _mm512_extracti32x4_epi32(every_fourth[i], 3));
    }
}

KERNEL void pack(const float* x, size_t hidden, size_t tokens, void* packed) {
    TileColumns& columns = *static_cast<TileColumns*>(packed);
    assign_columns(x, hidden, tokens, columns);
    char* tiles = static_cast<char*>(packed) + sizeof(TileColumns);
    const size_t blocks = divide_up(hidden, BLOCK);
    const size_t apart = columns.pair_bytes / sizeof(uint32_t);
    __m512i pairs[PARTS];
    for (size_t t = 0; t < tokens; t++) {
        const size_t parts = columns.parts(t);
        for (size_t block = 0; block < blocks; block++) {
            take_pairs(x + t * hidden, block * BLOCK, hidden, parts, pairs);
            if (tokens == 1) {
                char* tile = tiles + block * columns.tile_bytes();
                parts == 1 ? _mm512_store_si512(tile, pairs[0]) : store_parts(pairs, tile);
                continue;
            }
            for (size_t part = 0; part < parts; part++) {
                alignas(64) uint32_t each[TILE_ROWS];
                _mm512_store_si512(each, pairs[part]);
                const size_t column = columns.first[t] + part;
                char* tile = tiles + (column / TILE_COLUMNS * blocks + block) * columns.tile_bytes();
                auto* out = reinterpret_cast<uint32_t*>(tile) + column % TILE_COLUMNS;
                for (size_t pair = 0; pair < TILE_ROWS; pair++) out[pair * apart] = each[pair];
            }
        }
    }
}

// Some tiles of rows of weights. At the edge the last row is repeated.
template <size_t tiles>
struct WeightRows {
    static constexpr size_t COUNT = tiles * TILE_ROWS;
    const void* const* row;
    size_t stride;                     // 0: they are scattered
    size_t fetched_apart = ROW_BYTES;  // from block to block
    const void* edge[COUNT];

    KERNEL WeightRows(const void* const* rows, size_t row_count, size_t first) : row(rows + first) {
        if (first + COUNT > row_count) {
            for (size_t r = 0; r < COUNT; r++) edge[r] = rows[std::min(first + r, row_count - 1)];
            row = edge;
        }
        stride = common_stride();
    }

    // From each row to the next, or 0.
    LANE size_t common_stride() const {
        const auto first = reinterpret_cast<intptr_t>(row[0]);
        const auto apart = reinterpret_cast<intptr_t>(row[1]) - first;
        const __m512i eight = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
        __m512i expected = _mm512_mullo_epi64(_mm512_set1_epi64(apart), eight);
        expected = _mm512_add_epi64(expected, _mm512_set1_epi64(first));
        unsigned differ = 0;
        for (size_t r = 0; r < COUNT; r += 8) {
            differ |= _mm512_cmpneq_epi64_mask(_mm512_loadu_si512(row + r), expected);
            expected = _mm512_add_epi64(expected, _mm512_set1_epi64(8 * apart));
        }
        return differ == 0 ? static_cast<size_t>(apart) : 0;
    }

    // Of the rows of a tile, what lies `shift` bytes behind a block.
    LANE void prefetch(size_t tile, size_t block, ptrdiff_t shift) const {
        const ptrdiff_t offset = static_cast<ptrdiff_t>(block * fetched_apart) + shift;
        for (size_t r = tile * TILE_ROWS; r < (tile + 1) * TILE_ROWS; r++) {
            __builtin_prefetch(static_cast<const char*>(row[r]) + offset, 0, 2);
        }
    }
    // Short rows that lie back to back are fetched in the order of their addresses, in which memory is read the
    // fastest: these are then the lines of the first block.
    KERNEL void fetch_in_order(size_t blocks) {
        if (blocks > AHEAD || stride != blocks * ROW_BYTES) return;
        const char* first = static_cast<const char*>(row[0]);
        for (size_t r = 0; r < COUNT; r++) {
            edge[r] = first + r / TILE_ROWS * TILE_ROWS * stride + r % TILE_ROWS * ROW_BYTES;
        }
        row = edge;
        fetched_apart = TILE_BYTES;
    }
    KERNEL void copy(size_t begin, size_t end, size_t hidden, char* out) const {
        for (size_t block = begin; block < end; block++) {
            const size_t some = std::min(BLOCK, hidden - block * BLOCK);
            const __mmask32 mask = some == BLOCK ? ~__mmask32{0} : (__mmask32{1} << some) - 1;
            for (size_t r = 0; r < COUNT; r++) {
                const __m512i line =
                    _mm512_maskz_loadu_epi16(mask, static_cast<const char*>(row[r]) + block * ROW_BYTES);
                _mm512_store_si512(out + (block - begin) * tiles * TILE_BYTES + r * ROW_BYTES, line);
            }
        }
    }
};

// The numbers of the tiles: sums of each tile of rows with each of columns, then x, then weights in the rest.
template <size_t rows, size_t columns>
struct Tiles {
    static constexpr size_t SPARE = 8 - (rows + 1) * columns;
    static constexpr size_t sums(size_t row, size_t column) { return row * columns + column; }
    static constexpr size_t x(size_t column) { return rows * columns + column; }
    static constexpr size_t weights(size_t row) { return (rows + 1) * columns + row % SPARE; }

    template <size_t column = 0>
    LANE static void load_x(const char* of_block, size_t column_bytes, size_t pair_bytes) {
        load_tile<x(column)>(of_block + column * column_bytes, pair_bytes);
        if constexpr (column + 1 < columns) load_x<column + 1>(of_block, column_bytes, pair_bytes);
    }
    template <size_t row, size_t column = 0>
    LANE static void add_row() {
        add_products<sums(row, column), weights(row), x(column)>();
        if constexpr (column + 1 < columns) add_row<row, column + 1>();
    }
    template <size_t row = 0>
    LANE static void add_rows(const char* of_block, size_t tile_bytes, size_t stride, const WeightRows<rows>* ahead,
                              size_t block, ptrdiff_t shift) {
        if (ahead != nullptr) ahead->prefetch(row, block, shift);
        load_tile<weights(row)>(of_block + row * tile_bytes, stride);
        add_row<row>();
        if constexpr (row + 1 < rows) add_rows<row + 1>(of_block, tile_bytes, stride, ahead, block, shift);
    }
    template <size_t tile = 0>
    LANE static void clear_sums() {
        clear_tile<tile>();
        if constexpr (tile + 1 < rows * columns) clear_sums<tile + 1>();
    }
    template <size_t tile = 0>
    LANE static void store_sums(float* out, size_t row_bytes) {
        store_tile<tile>(out + tile * TILE_ROWS * row_bytes / sizeof(float), row_bytes);
        if constexpr (tile + 1 < rows * columns) store_sums<tile + 1>(out, row_bytes);
    }
    // Where the tiles of x and of sums have so many columns.
    static TileConfig config(size_t count) {
        TileConfig made;
        std::fill_n(made.row_bytes, x(columns), static_cast<uint16_t>(count * sizeof(float)));
        return made;
    }
};

// Where the tile that is computed takes its rows: in place or copied.
struct WeightTiles {
    const char* data;
    size_t block_bytes;
    size_t tile_bytes;
    size_t stride;
};

// Tiles of x: those of the first tile of columns, block by block, and how far behind them those of the next one are.
struct ColumnTiles {
    const char* data;
    size_t apart_bytes;
    size_t pair_bytes;

    size_t tile_bytes() const { return TILE_ROWS * pair_bytes; }
};

// Blocks [begin, end) of some tiles of rows, times those of x. Fetches what lies `shift` bytes behind each in `ahead`,
// if it is not null.
template <size_t tiles, size_t columns>
LANE void add_blocks(const WeightTiles& source, const ColumnTiles& x, size_t begin, size_t end,
                     const WeightRows<tiles>* ahead, ptrdiff_t shift) {
    for (size_t block = begin; block < end; block++) {
        Tiles<tiles, columns>::load_x(x.data + block * x.tile_bytes(), x.apart_bytes, x.pair_bytes);
        Tiles<tiles, columns>::add_rows(source.data + (block - begin) * source.block_bytes, source.tile_bytes,
                                        source.stride, ahead, block, shift);
    }
}

// Dots of some tiles of rows with some of columns: [tile of rows, tile of columns, TILE_ROWS, column], with
// `sums_bytes` from a row to the next. `next`: the rows that are fetched; null where these and the next ones are in a
// cache.
template <size_t tiles, size_t columns>
KERNEL void dots_of_tiles(const WeightRows<tiles>& rows, const WeightRows<tiles>* next, const ColumnTiles& x,
                          size_t hidden, float* sums, size_t sums_bytes = ROW_BYTES) {
    const size_t blocks = divide_up(hidden, BLOCK);
    const size_t whole = rows.stride != 0 ? hidden / BLOCK : 0;
    Tiles<tiles, columns>::clear_sums();
    alignas(64) char copied[COPIED * tiles * TILE_BYTES];
    for (size_t begin = 0; begin < blocks;) {
        const bool here = begin + AHEAD < blocks;  // what is fetched lies in these rows
        size_t end = here ? blocks - AHEAD : blocks;
        WeightTiles source{static_cast<const char*>(rows.row[0]) + begin * ROW_BYTES, ROW_BYTES,
                           TILE_ROWS * rows.stride, rows.stride};
        if (begin < whole) {
            end = std::min(end, whole);
        } else {
            end = std::min(end, begin + COPIED);
            rows.copy(begin, end, hidden, copied);
            source = {copied, tiles * TILE_BYTES, TILE_BYTES, ROW_BYTES};
        }
        const auto shift = static_cast<ptrdiff_t>(AHEAD * ROW_BYTES);
        if (here) {
            add_blocks<tiles, columns>(source, x, begin, end, next == nullptr ? nullptr : &rows, shift);
        } else {
            const auto back = blocks > AHEAD ? shift - static_cast<ptrdiff_t>(blocks * ROW_BYTES) : 0;
            add_blocks<tiles, columns>(source, x, begin, end, next, back);
        }
        begin = end;
    }
    Tiles<tiles, columns>::store_sums(sums, sums_bytes);
}

template <size_t tiles, size_t column_tiles>
KERNEL void dots_in_tiles(const void* const* rows, size_t row_count, const TileColumns& columns, const char* x,
                          size_t hidden, size_t tokens, float* dots) {
    alignas(64) float sums[tiles][column_tiles][TILE_ROWS][TILE_COLUMNS];
    const size_t tiles_ahead = std::max<size_t>(1, AHEAD / tiles / divide_up(hidden, BLOCK));
    const ColumnTiles of_x{x, divide_up(hidden, BLOCK) * TILE_BYTES, columns.pair_bytes};
    const bool in_place = column_tiles == 1 && columns.count == tokens;
    const auto config = Tiles<tiles, column_tiles>::config(std::min<size_t>(columns.count, TILE_COLUMNS));
    _tile_loadconfig(&config);
    const size_t blocks = divide_up(hidden, BLOCK);
    const WeightRows<tiles> first(rows, row_count, 0);
    for (size_t block = 0; block < std::min(AHEAD, blocks); block++) {
        for (size_t tile = 0; tile < tiles; tile++) first.prefetch(tile, block, 0);
    }
    for (size_t i = 0; i < row_count; i += tiles * TILE_ROWS) {
        const WeightRows<tiles> rows_here(rows, row_count, i);
        WeightRows<tiles> ahead(rows, row_count, i + tiles_ahead * tiles * TILE_ROWS);
        ahead.fetch_in_order(blocks);
        const size_t some = std::min(tiles * TILE_ROWS, row_count - i);
        if (in_place && some == tiles * TILE_ROWS) {
            dots_of_tiles<tiles, column_tiles>(rows_here, &ahead, of_x, hidden, dots + i * tokens,
                                               tokens * sizeof(float));
            continue;
        }
        if (tokens == 1 && !columns.exact[0]) {
            dots_of_tiles<tiles, column_tiles>(rows_here, &ahead, of_x, hidden, sums[0][0][0], columns.pair_bytes);
            for (size_t r = 0; r < some; r += TILE_ROWS) {
                store_dots_of_parts(sums[0][0][0] + r * FEW_COLUMNS, std::min(TILE_ROWS, some - r), dots + i + r);
            }
            continue;
        }
        dots_of_tiles<tiles, column_tiles>(rows_here, &ahead, of_x, hidden, sums[0][0][0]);
        for (size_t r = 0; r < some; r++) {
            store_dots(sums[r / TILE_ROWS][0][r % TILE_ROWS], TILE_ROWS * TILE_COLUMNS, columns, tokens,
                       dots + (i + r) * tokens);
        }
    }
}

KERNEL void dots(const void* const* rows, size_t row_count, const void* packed, size_t hidden, size_t tokens,
                 float* dots) {
    const TileColumns& columns = *static_cast<const TileColumns*>(packed);
    const char* x = static_cast<const char*>(packed) + sizeof(TileColumns);
    if (columns.count <= TILE_COLUMNS && hidden <= SHORT_ROW) {
        dots_in_tiles<SHORT_TILES, 1>(rows, row_count, columns, x, hidden, tokens, dots);
    } else if (columns.count <= TILE_COLUMNS) {
        dots_in_tiles<1, 1>(rows, row_count, columns, x, hidden, tokens, dots);
    } else if (columns.count <= 2 * TILE_COLUMNS) {
        dots_in_tiles<2, 2>(rows, row_count, columns, x, hidden, tokens, dots);
    } else {
        dots_in_tiles<1, 3>(rows, row_count, columns, x, hidden, tokens, dots);
    }
    _tile_release();
}

// One or two tiles of rows with two tiles of columns, of a group of tokens each. Twice the products of each line that
// is loaded from the L2 cache, which otherwise takes longer than multiplying.
template <size_t tiles>
KERNEL void dots_of_two(const WeightRows<tiles>& rows, size_t row_count, const void* const (&packed)[2], size_t hidden,
                        const size_t (&tokens)[2], float* const (&dots)[2]) {
    alignas(64) float sums[tiles][2][TILE_ROWS][TILE_COLUMNS];
    const auto tiles_of = [&](size_t group) { return static_cast<const char*>(packed[group]) + sizeof(TileColumns); };
    const ColumnTiles x{tiles_of(0), static_cast<size_t>(tiles_of(1) - tiles_of(0)), ROW_BYTES};
    dots_of_tiles<tiles, 2>(rows, nullptr, x, hidden, sums[0][0][0]);
    for (size_t r = 0; r < row_count; r++) {
        for (size_t group = 0; group < 2; group++) {
            store_dots(sums[r / TILE_ROWS][group][r % TILE_ROWS], 0, *static_cast<const TileColumns*>(packed[group]),
                       tokens[group], dots[group] + r * tokens[group]);
        }
    }
}

KERNEL void dots_of_groups(const void* const* rows, size_t row_count, const void* const (&packed)[2], size_t hidden,
                           const size_t (&tokens)[2], float* const (&dots)[2]) {
    const auto one_column_each = [&](size_t group) {
        const TileColumns& columns = *static_cast<const TileColumns*>(packed[group]);
        return columns.count == tokens[group] && columns.pair_bytes == ROW_BYTES;
    };
    if (!one_column_each(0) || !one_column_each(1)) {
        for (size_t group = 0; group < 2; group++) {
            flashclient::dots(rows, row_count, packed[group], hidden, tokens[group], dots[group]);
        }
        return;
    }
    static const TileConfig config;
    _tile_loadconfig(&config);
    for (size_t i = 0; i < row_count; i += 2 * TILE_ROWS) {
        const size_t some = std::min(2 * TILE_ROWS, row_count - i);
        float* const out[2] = {dots[0] + i * tokens[0], dots[1] + i * tokens[1]};
        if (some > TILE_ROWS) {
            dots_of_two<2>(WeightRows<2>(rows, row_count, i), some, packed, hidden, tokens, out);
        } else {
            dots_of_two<1>(WeightRows<1>(rows, row_count, i), some, packed, hidden, tokens, out);
        }
    }
    _tile_release();
}

}  // namespace
}  // namespace flashclient

const flashclient::Kernels* flashclient::kernels_amx(Dtype dtype) {
    if (dtype != Dtype::bf16) return kernels_avx512(dtype);
    static const Kernels kernels = [] {
        Kernels table = *kernels_avx512(Dtype::bf16);
        table.instruction_set = "amx";
        table.packed_bytes = packed_bytes;
        table.pack = pack;
        table.dots = dots;
        table.dots_of_groups = dots_of_groups;
        table.groups = group_sums_amx();
        return table;
    }();
    return &kernels;
}
#else
const flashclient::Kernels* flashclient::kernels_amx(Dtype) { return nullptr; }
#endif
