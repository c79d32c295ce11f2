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
#include "kernels/amx_tiles.h"

namespace flashclient {
namespace {

constexpr size_t COLUMN_TILES = PARTS * TOKENS_MAX / TILE_COLUMNS;
constexpr size_t AHEAD = 8;   // blocks of a row that are fetched before they are computed: latency times speed
constexpr size_t COPIED = 4;  // blocks of scattered rows that are copied together

// What precedes the tiles of x: which columns are whose. Tiles are [column tile][block], of [pair][column].
struct alignas(ROW_BYTES) Columns {
    uint8_t first[TOKENS_MAX];  // column of a token
    bool exact[TOKENS_MAX];     // it has one column, not PARTS
    uint8_t count;
};
static_assert(sizeof(Columns) == ROW_BYTES);

size_t packed_bytes(size_t hidden, size_t tokens) {
    return sizeof(Columns) + divide_up(PARTS * tokens, TILE_COLUMNS) * divide_up(hidden, BLOCK) * TILE_BYTES;
}

KERNEL bool is_exact(const float* x, size_t hidden) {
    __m512i bits = _mm512_setzero_si512();
    size_t j = 0;
    for (; j + 16 <= hidden; j += 16) bits = _mm512_or_si512(bits, _mm512_loadu_si512(x + j));
    if (j < hidden) {
        const auto mask = static_cast<__mmask16>((1U << (hidden - j)) - 1);
        bits = _mm512_or_si512(bits, _mm512_maskz_loadu_epi32(mask, x + j));
    }
    return (_mm512_reduce_or_epi32(bits) & 0xffff) == 0;
}

// The bf16 in the upper halves, in order.
LANE __m256i narrow(__m512i upper) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(upper, 16)); }

KERNEL void pack(const float* x, size_t hidden, size_t tokens, void* packed) {
    Columns& columns = *static_cast<Columns*>(packed);
    char* tiles = static_cast<char*>(packed) + sizeof(Columns);
    const size_t blocks = divide_up(hidden, BLOCK);
    size_t count = 0;
    for (size_t t = 0; t < tokens; t++) {
        const float* of_token = x + t * hidden;
        columns.first[t] = static_cast<uint8_t>(count);
        columns.exact[t] = is_exact(of_token, hidden);
        const size_t parts = columns.exact[t] ? 1 : PARTS;
        for (size_t block = 0; block < blocks; block++) {
            const auto some = [&](size_t from) { return std::min<size_t>(16, hidden - std::min(hidden, from)); };
            const auto mask = [&](size_t from) { return static_cast<__mmask16>((1U << some(from)) - 1); };
            const size_t j = block * BLOCK;
            __m512 low = _mm512_maskz_loadu_ps(mask(j), of_token + j);
            __m512 high = _mm512_maskz_loadu_ps(mask(j + 16), of_token + std::min(hidden, j + 16));
            for (size_t part = 0; part < parts; part++) {
                const __m256i narrow_low = narrow(take_part(low));
                const __m512i pairs =
                    _mm512_inserti64x4(_mm512_castsi256_si512(narrow_low), narrow(take_part(high)), 1);
                alignas(64) uint32_t each[TILE_ROWS];
                _mm512_store_si512(each, pairs);
                const size_t column = count + part;
                char* tile = tiles + (column / TILE_COLUMNS * blocks + block) * TILE_BYTES;
                auto* out = reinterpret_cast<uint32_t*>(tile) + column % TILE_COLUMNS;
                for (size_t pair = 0; pair < TILE_ROWS; pair++) out[pair * TILE_COLUMNS] = each[pair];
            }
        }
        count += parts;
    }
    columns.count = static_cast<uint8_t>(count);
}

// Some tiles of rows of weights. At the edge the last row is repeated.
template <size_t tiles>
struct WeightRows {
    static constexpr size_t COUNT = tiles * TILE_ROWS;
    const void* const* row;
    size_t stride;  // 0: they are scattered
    const void* edge[COUNT];

    KERNEL WeightRows(const void* const* rows, size_t row_count, size_t first) : row(rows + first) {
        if (first + COUNT > row_count) {
            for (size_t r = 0; r < COUNT; r++) edge[r] = rows[std::min(first + r, row_count - 1)];
            row = edge;
        }
        const auto apart = [this](size_t r) {
            return reinterpret_cast<uintptr_t>(row[r]) - reinterpret_cast<uintptr_t>(row[r - 1]);
        };
        stride = apart(1);
        uintptr_t differ = 0;
        for (size_t r = 2; r < COUNT; r++) differ |= apart(r) ^ stride;
        if (differ != 0) stride = 0;
    }

    LANE void prefetch(ptrdiff_t offset_bytes) const {
        for (size_t r = 0; r < COUNT; r++) __builtin_prefetch(static_cast<const char*>(row[r]) + offset_bytes, 0, 2);
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
    LANE static void load_x(const char* of_block, size_t column_bytes) {
        load_tile<x(column)>(of_block + column * column_bytes, ROW_BYTES);
        if constexpr (column + 1 < columns) load_x<column + 1>(of_block, column_bytes);
    }
    template <size_t row, size_t column = 0>
    LANE static void add_row() {
        add_products<sums(row, column), weights(row), x(column)>();
        if constexpr (column + 1 < columns) add_row<row, column + 1>();
    }
    template <size_t row = 0>
    LANE static void add_rows(const char* of_block, size_t tile_bytes, size_t stride) {
        load_tile<weights(row)>(of_block + row * tile_bytes, stride);
        add_row<row>();
        if constexpr (row + 1 < rows) add_rows<row + 1>(of_block, tile_bytes, stride);
    }
    template <size_t tile = 0>
    LANE static void clear_sums() {
        clear_tile<tile>();
        if constexpr (tile + 1 < rows * columns) clear_sums<tile + 1>();
    }
    template <size_t tile = 0>
    LANE static void store_sums(float* out) {
        store_tile<tile>(out + tile * TILE_ROWS * TILE_COLUMNS, ROW_BYTES);
        if constexpr (tile + 1 < rows * columns) store_sums<tile + 1>(out);
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
};

// Blocks [begin, end) of some tiles of rows, times those of x. Fetches what lies `shift` bytes behind each in `ahead`,
// if it is not null.
template <size_t tiles, size_t columns>
LANE void add_blocks(const WeightTiles& source, const ColumnTiles& x, size_t begin, size_t end,
                     const WeightRows<tiles>* ahead, ptrdiff_t shift) {
    for (size_t block = begin; block < end; block++) {
        if (ahead != nullptr) ahead->prefetch(static_cast<ptrdiff_t>(block * ROW_BYTES) + shift);
        Tiles<tiles, columns>::load_x(x.data + block * TILE_BYTES, x.apart_bytes);
        Tiles<tiles, columns>::add_rows(source.data + (block - begin) * source.block_bytes, source.tile_bytes,
                                        source.stride);
    }
}

// Dots of some tiles of rows with some of columns: [tile of rows, tile of columns, TILE_ROWS, TILE_COLUMNS]. `next`:
// the rows that are fetched; null where these and the next ones are in a cache.
template <size_t tiles, size_t columns>
KERNEL void dots_of_tiles(const WeightRows<tiles>& rows, const WeightRows<tiles>* next, const ColumnTiles& x,
                          size_t hidden, float* sums) {
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
    Tiles<tiles, columns>::store_sums(sums);
}

// The dots of a row with the columns of some tokens, [tile of columns, TILE_COLUMNS]; `apart` from one tile to the
// next.
KERNEL void store_dots(const float* sums, size_t apart, const Columns& columns, size_t tokens, float* dots) {
    if (columns.count == tokens) {  // each token has one column
        const auto mask = static_cast<__mmask16>((1U << tokens) - 1);
        return _mm512_mask_storeu_ps(dots, mask, _mm512_load_ps(sums));
    }
    const auto dot = [&](size_t column) { return sums[column / TILE_COLUMNS * apart + column % TILE_COLUMNS]; };
    for (size_t t = 0; t < tokens; t++) {
        const size_t column = columns.first[t];
        const float rest = columns.exact[t] ? 0.0f : dot(column + 1) + dot(column + 2);
        dots[t] = columns.exact[t] ? dot(column) : dot(column) + rest;
    }
}

template <size_t tiles, size_t column_tiles>
KERNEL void dots_in_tiles(const void* const* rows, size_t row_count, const Columns& columns, const char* x,
                          size_t hidden, size_t tokens, float* dots) {
    alignas(64) float sums[tiles][column_tiles][TILE_ROWS][TILE_COLUMNS];
    const size_t tiles_ahead = std::max<size_t>(1, AHEAD / tiles / divide_up(hidden, BLOCK));
    const ColumnTiles of_x{x, divide_up(hidden, BLOCK) * TILE_BYTES};
    for (size_t i = 0; i < row_count; i += tiles * TILE_ROWS) {
        const WeightRows<tiles> rows_here(rows, row_count, i);
        const WeightRows<tiles> ahead(rows, row_count, i + tiles_ahead * tiles * TILE_ROWS);
        dots_of_tiles<tiles, column_tiles>(rows_here, &ahead, of_x, hidden, sums[0][0][0]);
        for (size_t r = 0; r < std::min(tiles * TILE_ROWS, row_count - i); r++) {
            store_dots(sums[r / TILE_ROWS][0][r % TILE_ROWS], TILE_ROWS * TILE_COLUMNS, columns, tokens,
                       dots + (i + r) * tokens);
        }
    }
}

KERNEL void dots(const void* const* rows, size_t row_count, const void* packed, size_t hidden, size_t tokens,
                 float* dots) {
    const Columns& columns = *static_cast<const Columns*>(packed);
    const char* x = static_cast<const char*>(packed) + sizeof(Columns);
    static const TileConfig config;
    _tile_loadconfig(&config);
    if (columns.count <= TILE_COLUMNS) {
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
    const auto tiles_of = [&](size_t group) { return static_cast<const char*>(packed[group]) + sizeof(Columns); };
    const ColumnTiles x{tiles_of(0), static_cast<size_t>(tiles_of(1) - tiles_of(0))};
    dots_of_tiles<tiles, 2>(rows, nullptr, x, hidden, sums[0][0][0]);
    for (size_t r = 0; r < row_count; r++) {
        for (size_t group = 0; group < 2; group++) {
            store_dots(sums[r / TILE_ROWS][group][r % TILE_ROWS], 0, *static_cast<const Columns*>(packed[group]),
                       tokens[group], dots[group] + r * tokens[group]);
        }
    }
}

KERNEL void dots_of_groups(const void* const* rows, size_t row_count, const void* const (&packed)[2], size_t hidden,
                           const size_t (&tokens)[2], float* const (&dots)[2]) {
    const auto one_column_each = [&](size_t group) {
        return static_cast<const Columns*>(packed[group])->count == tokens[group];
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
