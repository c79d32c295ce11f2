// Products of bf16 rows with x by the instructions for pairs of bf16, AVX-512 BF16; everything else is that of AVX-512.
//
// An instruction adds the products of 16 pairs of a line of 32 elements to 16 sums. It rounds to the nearest, and
// numbers below 2^-126 count as 0. A dot is one chain of these, line after line, so the order of a sum follows from
// the length of the row alone. A row of x that is not exact in bf16 takes three columns, whose sum it is.
#include "kernels/kernels.h"

#if defined(__x86_64__)
#include "vectors/bf16_pairs.h"

namespace flashclient {
namespace {

constexpr size_t ROWS = 8, ROWS_OF_MANY = 6;  // rows of weights that are multiplied together
constexpr size_t STRETCH = 64;                // lines of them that are multiplied with all columns in turn: 24 KiB
constexpr size_t COLUMN_TILES = divide_up(PARTS * TOKENS_MAX, COLUMNS_TOGETHER);
constexpr size_t AHEAD_LINES = FETCHED_BYTES / ROW_BYTES;

// The last line of a row, of `some` elements: nothing behind them is read.
LANE __m512bh end_of(const void* row, size_t line, size_t some) {
    const __mmask32 mask = (__mmask32{1} << some) - 1;
    return __builtin_bit_cast(__m512bh,
                              _mm512_maskz_loadu_epi16(mask, static_cast<const char*>(row) + line * ROW_BYTES));
}

template <size_t rows, size_t columns>
LANE void add_line(const __m512bh (&weights)[rows], const char* x, __m512 (&chain)[rows][columns]) {
#pragma GCC unroll 4
    for (size_t c = 0; c < columns; c++) {
        const __m512bh value = line_of(x, c);
#pragma GCC unroll 8
        for (size_t r = 0; r < rows; r++) chain[r][c] = _mm512_dpbf16_ps(chain[r][c], weights[r], value);
    }
}

// Some rows, and those whose lines are fetched meanwhile. At the edge the last row is repeated.
template <size_t count>
struct RowTile {
    const void* row[count];
    const void* next[count];

    KERNEL RowTile(const void* const* rows, size_t row_count, size_t first, size_t tiles_ahead) {
        for (size_t r = 0; r < count; r++) {
            row[r] = rows[std::min(first + r, row_count - 1)];
            next[r] = rows[std::min(first + tiles_ahead * count + r, row_count - 1)];
        }
    }
};

// Lines that are fetched beside those that are computed: of some rows, `shift` lines behind each.
struct Fetched {
    const void* const* row;
    size_t rows;
    ptrdiff_t shift;

    LANE void fetch(size_t line) const {
        const ptrdiff_t offset = (static_cast<ptrdiff_t>(line) + shift) * static_cast<ptrdiff_t>(ROW_BYTES);
#pragma GCC unroll 8
        for (size_t r = 0; r < rows; r++) __builtin_prefetch(static_cast<const char*>(row[r]) + offset, 0, 2);
    }
};

// Adds lines [begin, end) of rows of `hidden` elements; x begins with line `begin`.
template <size_t rows, size_t columns>
LANE void add_lines(const void* const (&row)[rows], const Fetched& fetched, const char* x, size_t begin, size_t end,
                    size_t hidden, __m512 (&chain)[rows][columns]) {
    const size_t whole = std::min(end, hidden / BLOCK);
    __m512bh weights[rows];
    for (size_t line = begin; line < whole; line++, x += columns * ROW_BYTES) {
        fetched.fetch(line);
#pragma GCC unroll 8
        for (size_t r = 0; r < rows; r++) weights[r] = line_of(row[r], line);
        add_line(weights, x, chain);
    }
    if (whole < end) {
#pragma GCC unroll 8
        for (size_t r = 0; r < rows; r++) weights[r] = end_of(row[r], whole, hidden - whole * BLOCK);
        add_line(weights, x, chain);
    }
}

// Few columns: each row is read once, and memory decides how long that takes.
template <size_t columns>
KERNEL void dots_of_few(const void* const* rows, size_t row_count, const PackedX& x, size_t hidden, float* dots) {
    constexpr size_t TOGETHER = columns <= 2 ? ROWS : ROWS_OF_MANY;
    constexpr size_t AHEAD = AHEAD_LINES / TOGETHER;
    const size_t lines = divide_up(hidden, BLOCK);
    const size_t tiles_ahead = std::max<size_t>(1, AHEAD / std::max<size_t>(lines, 1));
    const size_t here = lines - std::min(lines, AHEAD);  // lines that are computed while others of the row come
    for (size_t i = 0; i < row_count; i += TOGETHER) {
        const RowTile<TOGETHER> tile(rows, row_count, i, tiles_ahead);
        __m512 chain[TOGETHER][columns];
        for (auto& of_row : chain) std::fill_n(of_row, columns, _mm512_setzero_ps());
        add_lines(tile.row, {tile.row, TOGETHER, AHEAD}, x.lines, 0, here, hidden, chain);
        const Fetched next{tile.next, TOGETHER, -static_cast<ptrdiff_t>(here)};
        add_lines(tile.row, next, x.lines + here * columns * ROW_BYTES, here, lines, hidden, chain);
        x.store_tile<TOGETHER>(chain[0], std::min(TOGETHER, row_count - i), dots + i * x.tokens);
    }
}

// The chains of some rows with all columns: of each tile of columns in turn, [row][column].
struct ChainsOfColumns {
    __m512 of[COLUMN_TILES * ROWS_OF_MANY * COLUMNS_TOGETHER];

    template <size_t columns>
    KERNEL void add(const RowTile<ROWS_OF_MANY>& tile, const Fetched& fetched, size_t first_column, const char* x,
                    size_t begin, size_t end, size_t hidden) {
        __m512 chain[ROWS_OF_MANY][columns];
        __m512* kept = of + first_column * ROWS_OF_MANY;
        for (size_t i = 0; i < ROWS_OF_MANY * columns; i++) {
            chain[i / columns][i % columns] = begin == 0 ? _mm512_setzero_ps() : kept[i];
        }
        add_lines(tile.row, fetched, x + begin * columns * ROW_BYTES, begin, end, hidden, chain);
        for (size_t i = 0; i < ROWS_OF_MANY * columns; i++) kept[i] = chain[i / columns][i % columns];
    }
};

KERNEL void dots_of_many(const void* const* rows, size_t row_count, const PackedX& x, size_t hidden, float* dots) {
    const size_t lines = divide_up(hidden, BLOCK), count = x.columns.count;
    const auto row_of_tile = [&](size_t column) { return std::min(column, count) * ROWS_OF_MANY / count; };
    ChainsOfColumns chains;
    for (size_t i = 0; i < row_count; i += ROWS_OF_MANY) {
        const RowTile<ROWS_OF_MANY> tile(rows, row_count, i, 1);
        size_t begin = 0;
        do {  // once at least, which clears the chains
            const size_t end = std::min(begin + STRETCH, lines);
            for (size_t c = 0; c < count; c += COLUMNS_TOGETHER) {
                const size_t from = row_of_tile(c), to = row_of_tile(c + COLUMNS_TOGETHER);
                const Fetched fetched{tile.next + from, to - from, 0};
                const char* of_tile = x.lines + c * lines * ROW_BYTES;
                switch (std::min(count - c, COLUMNS_TOGETHER)) {
                    case 1:
                        chains.add<1>(tile, fetched, c, of_tile, begin, end, hidden);
                        break;
                    case 2:
                        chains.add<2>(tile, fetched, c, of_tile, begin, end, hidden);
                        break;
                    case 3:
                        chains.add<3>(tile, fetched, c, of_tile, begin, end, hidden);
                        break;
                    default:
                        chains.add<COLUMNS_TOGETHER>(tile, fetched, c, of_tile, begin, end, hidden);
                }
            }
            begin = end;
        } while (begin < lines);
        x.store_tile<ROWS_OF_MANY>(chains.of, std::min(ROWS_OF_MANY, row_count - i), dots + i * x.tokens);
    }
}

KERNEL void dots(const void* const* rows, size_t row_count, const void* packed, size_t hidden, size_t tokens,
                 float* dots) {
    const PackedX x(packed, tokens);
    switch (x.columns.count) {
        case 1:
            return dots_of_few<1>(rows, row_count, x, hidden, dots);
        case 2:
            return dots_of_few<2>(rows, row_count, x, hidden, dots);
        case 3:
            return dots_of_few<3>(rows, row_count, x, hidden, dots);
        case 4:
            return dots_of_few<4>(rows, row_count, x, hidden, dots);
        default:
            return dots_of_many(rows, row_count, x, hidden, dots);
    }
}

}  // namespace
}  // namespace flashclient

const flashclient::Kernels* flashclient::kernels_bf16(Dtype dtype) {
    if (dtype != Dtype::bf16) return kernels_vnni(dtype);
    static const Kernels kernels = [] {
        Kernels table = *kernels_vnni(Dtype::bf16);
        table.instruction_set = "avx512_bf16";
        table.packed_bytes = PackedX::bytes;
        table.pack = PackedX::pack;
        table.dots = dots;
        return table;
    }();
    return &kernels;
}
#else
const flashclient::Kernels* flashclient::kernels_bf16(Dtype) { return nullptr; }
#endif
