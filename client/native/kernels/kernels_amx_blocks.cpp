// Products of rows in blocks with several rows of x by tiles of Intel's AMX; everything else is that of
// kernels_vnni.cpp.
//
// A tile of weights has the codes of a unit, or of half of it, of 16 rows; a tile of x those integers of 16 rows of x,
// in groups of four. Their products are exact, and are added as integer_products.h says, so that a dot has the bits
// that it has alone.
#include "kernels/kernels.h"

#if defined(__x86_64__)
#include "vectors/intrinsics.h"
#define KERNEL                                                                                           \
    __attribute__((                                                                                      \
        target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx2,bmi2,fma,f16c,popcnt,amx-" \
               "tile,amx-int8")))
#define LANE KERNEL __attribute__((always_inline)) inline

#include "formats/integer_products.h"
#include "formats/integer_slabs.h"
#include "vectors/amx_tiles.h"

namespace flashclient {
namespace {

constexpr size_t TILE_QUADS = TILE_ROWS / QUAD;
constexpr size_t PANEL = 8;  // stretches that are decoded together: with their scales less than half of an L1 cache
constexpr size_t FEW_TOKENS = 6;  // of which products by tiles take longer than those of kernels_vnni.cpp
constexpr size_t GROUP = 4;       // integers of a row that lie together in a tile of x
static_assert(PANEL % 2 == 0 && TILE_COLUMNS == TOKENS_MAX);

// A stretch of up to 16 rows of x.
struct alignas(64) TilesOfX {
    using Bytes = int8_t[UNITS][UNIT / GROUP][TILE_COLUMNS][GROUP];
    Bytes upper, lower;
    float scale[UNITS][TILE_COLUMNS];
    float unit_sums[UNITS][TILE_COLUMNS];
    float half_sums[2][UNITS][TILE_COLUMNS];

    template <bool in_order>
    void set_token(size_t token, const StretchOfX& x) {
        for (size_t unit = 0; unit < UNITS; unit++) {
            for (size_t half = 0; half < 2; half++) {
                const size_t place = place_of_half(in_order, unit, half);
                for (size_t group = 0; group < UNIT / GROUP / 2; group++) {
                    const size_t to = half * UNIT / GROUP / 2 + group;
                    std::memcpy(upper[unit][to][token], x.upper[place] + group * GROUP, GROUP);
                    std::memcpy(lower[unit][to][token], x.lower[place] + group * GROUP, GROUP);
                }
                half_sums[half][unit][token] = x.half[half].values[unit][0];
            }
            scale[unit][token] = x.scale[unit][0];
            unit_sums[unit][token] = x.unit.values[unit][0];
        }
    }
};

// Few rows of x are taken as kernels_vnni.cpp takes them.
size_t packed_bytes(size_t hidden, size_t tokens) {
    const size_t of_few = stretches_of(hidden) * std::min(tokens, FEW_TOKENS) * sizeof(StretchOfX);
    return tokens <= FEW_TOKENS ? of_few : std::max(of_few, stretches_of(hidden) * sizeof(TilesOfX));
}

template <bool in_order>
KERNEL void pack(const float* x, size_t hidden, size_t tokens, void* packed) {
    if (tokens <= FEW_TOKENS) {
        auto* rows = static_cast<StretchOfX*>(packed);
        for (size_t t = 0; t < tokens; t++) {
            quantise_row<in_order>(x + t * hidden, hidden, rows + t * stretches_of(hidden));
        }
        return;
    }
    auto* tiles = static_cast<TilesOfX*>(packed);
    for (size_t j = 0; j < hidden; j += STRETCH, tiles++) {
        if (tokens < TILE_COLUMNS) std::memset(tiles, 0, sizeof(*tiles));
        for (size_t t = 0; t < tokens; t++) {
            StretchOfX stretch;
            quantise<in_order>(x + t * hidden + j, std::min(STRETCH, hidden - j), stretch);
            tiles->template set_token<in_order>(t, stretch);
        }
    }
}

// `values`: of a row in a tile of weights, numbers 6 and 7; those of x, 4 and 5, have as many integers in a column.
TileConfig config_for(size_t values) {
    TileConfig config;
    std::fill_n(config.row_bytes + 6, 2, static_cast<uint16_t>(values));
    std::fill_n(config.rows + 4, 2, static_cast<uint8_t>(values / GROUP));
    return config;
}

template <size_t sums, size_t weights, size_t x>
LANE void multiply_tiles() {
    asm volatile("tilezero %%tmm%c0\n\ttdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(weights), "i"(x));
}

// Sums of products of the upper and of the lower bytes of x, [row][column].
struct alignas(64) TileSums {
    int32_t upper[TILE_ROWS][TILE_COLUMNS];
    int32_t lower[TILE_ROWS][TILE_COLUMNS];
};

// Parts of a unit that are multiplied apart.
template <BlockFormat format>
constexpr size_t APART = Codes<format>::FOLDED ? 1 : Codes<format>::PARTS;

// Stretches of 16 rows, decoded.
template <BlockFormat format>
struct DecodedPanel {
    using Of = Codes<format>;
    alignas(64) int8_t codes[PANEL][TILE_ROWS][STRETCH];  // code - ZERO, or folded
    alignas(64) float scale[PANEL][APART<format>][TILE_QUADS][UNITS][QUAD];
    alignas(64) float least[PANEL][Of::PARTS][TILE_QUADS][UNITS][QUAD];

    template <size_t half>
    LANE static StretchCodes signed_codes(const uint8_t* at) {
        if constexpr (Of::FOLDED) {
            return Of::template folded<half>(at);
        } else {
            const StretchCodes of = Of::template codes<half>(at);
            const __m512i zero = _mm512_set1_epi8(static_cast<char>(Of::ZERO));
            return {{_mm512_sub_epi8(of.halves[0], zero), _mm512_sub_epi8(of.halves[1], zero)}};
        }
    }

    template <size_t half>
    LANE void decode(QuadBlocks at, size_t stretch, size_t quad) {
        for (size_t r = 0; r < QUAD; r++) {
            const auto [first, second] = signed_codes<half>(at[r]).halves;
            int8_t* out = codes[stretch][quad * QUAD + r];
            if constexpr (Of::IN_ORDER) {
                _mm512_store_si512(out, first);
                _mm512_store_si512(out + 64, second);
                continue;
            }
            const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
            const __m512i high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
            _mm512_store_si512(out, _mm512_permutex2var_epi64(first, low, second));
            _mm512_store_si512(out + 64, _mm512_permutex2var_epi64(first, high, second));
        }
        QuadScales<Of::PARTS> scales;
        Of::template scales<half>(at, scales);
        if constexpr (Of::FOLDED) scales.scale[0] = _mm512_mul_ps(scales.scale[0], _mm512_set1_ps(Of::SIGN));
        for (size_t part = 0; part < APART<format>; part++) {
            _mm512_store_ps(scale[stretch][part][quad][0], scales.scale[part]);
        }
        for (size_t part = 0; Of::LEAST && part < Of::PARTS; part++) {
            _mm512_store_ps(least[stretch][part][quad][0], scales.least[part]);
        }
    }

    // Stretches [begin, end) of the rows; a whole number of blocks.
    KERNEL void fill(const QuadRows& rows, size_t quad, size_t begin, size_t end, size_t hidden) {
        using Row = Stretches<format>;
        const uint8_t* at[QUAD];
        const size_t whole = std::min(end, hidden / STRETCH);
        for (size_t s = begin; s < whole; s += Row::STRETCHES) {
            const size_t offset = s / Row::STRETCHES * Row::BYTES;
            for (size_t r = 0; r < QUAD; r++) at[r] = rows.row[r] + offset;
            decode<0>(at, s - begin, quad);
            if constexpr (Row::LARGE) decode<1>(at, s - begin + 1, quad);
        }
        if constexpr (!Row::LARGE) {
            if (whole == end) return;
            const LastOfQuad<format> last(rows, hidden);
            decode<0>(last.at, whole - begin, quad);
        }
    }
};

// What is decoded next, fetched some lines at a time, because memory gives nothing faster when it is asked for all at
// once. None where nothing is.
class NextRows {
  public:
    NextRows() = default;
    // Of each row that is a multiple of `apart`, `bytes` from `offset` on.
    KERNEL NextRows(const void* const* rows, size_t row_count, size_t apart, size_t offset, size_t bytes, size_t steps)
        : rows_(rows),
          end_(rows + row_count),
          apart_(apart),
          offset_(offset),
          lines_(divide_up(bytes, LINE_BYTES) + 1) {
        at_once_ = divide_up(divide_up(row_count, apart) * lines_, steps);
    }

    LANE void fetch() {
        for (size_t i = 0; i < at_once_ && rows_ < end_; i++) {
            __builtin_prefetch(static_cast<const uint8_t*>(*rows_) + offset_ + line_ * LINE_BYTES, 0, 2);
            if (++line_ == lines_) line_ = 0, rows_ += apart_;
        }
    }

  private:
    const void* const* rows_ = nullptr;  // the next
    const void* const* end_ = nullptr;
    size_t apart_ = 0, offset_ = 0, lines_ = 0, at_once_ = 0;
    size_t line_ = 0;  // the next
};

// Products of the decoded rows with tiles of x.
template <BlockFormat format>
struct PanelProducts {
    using Of = Codes<format>;
    static constexpr size_t PARTS = APART<format>;
    const DecodedPanel<format>& panel;

    // Products of a unit of a stretch, or of half of it, with tiles of x. Two sets of tiles take turns.
    template <size_t set>
    LANE void multiply(const TilesOfX& x, size_t stretch, size_t unit, size_t part, TileSums& sums) const {
        const size_t group = part * UNIT / PARTS / GROUP;
        load_tile<6 + set>(panel.codes[stretch][0] + unit * UNIT + group * GROUP, STRETCH);
        load_tile<4>(x.upper[unit][group], 64);
        load_tile<5>(x.lower[unit][group], 64);
        multiply_tiles<2 * set, 6 + set, 4>();
        multiply_tiles<2 * set + 1, 6 + set, 5>();
        store_tile<2 * set>(sums.upper, 64);
        store_tile<2 * set + 1>(sums.lower, 64);
    }
    LANE void multiply_step(const TilesOfX* x, size_t step, size_t unit, TileSums (&sums)[2]) const {
        if (step % 2 == 0) {
            multiply<0>(x[step / PARTS], step / PARTS, unit, step % PARTS, sums[0]);
        } else {
            multiply<1>(x[step / PARTS], step / PARTS, unit, step % PARTS, sums[1]);
        }
    }

    // Of formats with leasts, where a unit is one part.
    LANE __m512 with_least(__m512 chain, const TilesOfX& of_x, size_t stretch, size_t r, size_t unit) const {
        static_assert(!Of::LEAST || PARTS == 1);
        for (size_t i = 0; i < Of::PARTS; i++) {
            const float* sums = Of::PARTS == 1 ? of_x.unit_sums[unit] : of_x.half_sums[i][unit];
            const __m512 of_row = _mm512_set1_ps(panel.least[stretch][i][r / QUAD][unit][r % QUAD]);
            chain = _mm512_fmadd_ps(of_row, _mm512_load_ps(sums), chain);
        }
        return chain;
    }

    // Adds the products of one unit of each stretch to its chains, [row]. Tiles are multiplied some steps ahead,
    // because what they store can be read only after a while.
    KERNEL void add_unit(const TilesOfX* x, size_t stretches, size_t unit, __m512 (&chains)[TILE_ROWS],
                         NextRows& next) const {
        TileSums sums[2];
        const size_t steps = stretches * PARTS;
        __m512 chain[TILE_ROWS];
#pragma GCC unroll 16
        for (size_t r = 0; r < TILE_ROWS; r++) chain[r] = chains[r];
        multiply_step(x, 0, unit, sums);
        for (size_t step = 0; step < steps; step++) {
            next.fetch();
            if (step + 1 < steps) multiply_step(x, step + 1, unit, sums);
            const TileSums& done = sums[step % 2];
            const size_t s = step / PARTS, part = step % PARTS;
            const __m512 scale_of_x = _mm512_load_ps(x[s].scale[unit]);
#pragma GCC unroll 16
            for (size_t r = 0; r < TILE_ROWS; r++) {
                const __m512i upper = _mm512_slli_epi32(_mm512_load_si512(done.upper[r]), 8);
                const __m512i sum = _mm512_add_epi32(upper, _mm512_load_si512(done.lower[r]));
                const float scale_of_row = panel.scale[s][part][r / QUAD][unit][r % QUAD];
                const __m512 both = _mm512_mul_ps(scale_of_x, _mm512_set1_ps(scale_of_row));
                chain[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), both, chain[r]);
                if constexpr (Of::LEAST) chain[r] = with_least(chain[r], x[s], s, r, unit);
            }
        }
#pragma GCC unroll 16
        for (size_t r = 0; r < TILE_ROWS; r++) chains[r] = chain[r];
    }
};

// Rows of x, in tiles, and their dots [row, token].
struct TileGroup {
    const TilesOfX* x;
    size_t tokens;
    float* dots;
};

// What follows the stretches before `end` of a tile of rows that begins with row `first`.
template <BlockFormat format>
KERNEL NextRows next_rows(const void* const* rows, size_t row_count, size_t hidden, size_t first, size_t end,
                          size_t steps) {
    using Row = Stretches<format>;
    const bool of_next_tile = end == stretches_of(hidden);
    const size_t apart = divide_up(row_count, TILE_ROWS);
    if (of_next_tile) first++, end = 0;
    if (first >= apart) return {};
    const size_t some = std::min(hidden - end * STRETCH, PANEL * STRETCH);
    return {rows + first,        row_count - first,    apart, Row::bytes_of(end * STRETCH),
            Row::bytes_of(some), steps * APART<format>};
}

template <BlockFormat format, size_t groups>
KERNEL void dots_in_tiles(const void* const* rows, size_t row_count, size_t hidden, const TileGroup (&group)[groups]) {
    static const TileConfig config = config_for(UNIT / APART<format>);
    _tile_loadconfig(&config);
    DecodedPanel<format> panel;
    const size_t apart = divide_up(row_count, TILE_ROWS);
    for (size_t i = 0; i < apart; i++) {
        __m512 chains[groups][UNITS][TILE_ROWS];
        for (auto& of_group : chains) {
            for (auto& of_unit : of_group) std::fill_n(of_unit, TILE_ROWS, _mm512_setzero_ps());
        }
        for (size_t begin = 0; begin < stretches_of(hidden); begin += PANEL) {
            const size_t end = std::min(begin + PANEL, stretches_of(hidden));
            for (size_t quad = 0; quad < TILE_QUADS; quad++) {
                panel.fill(QuadRows(rows, row_count, i + quad * QUAD * apart, apart, 0), quad, begin, end, hidden);
            }
            NextRows next = next_rows<format>(rows, row_count, hidden, i, end, groups * UNITS * (end - begin));
            for (size_t g = 0; g < groups; g++) {
                for (size_t unit = 0; unit < UNITS; unit++) {
                    PanelProducts<format>{panel}.add_unit(group[g].x + begin, end - begin, unit, chains[g][unit], next);
                }
            }
        }
        for (size_t g = 0; g < groups; g++) {
            const auto mask = static_cast<__mmask16>((1U << group[g].tokens) - 1);
            for (size_t r = 0; r < TILE_ROWS && i + r * apart < row_count; r++) {
                const __m512 low = _mm512_add_ps(chains[g][0][r], chains[g][1][r]);
                const __m512 high = _mm512_add_ps(chains[g][2][r], chains[g][3][r]);
                _mm512_mask_storeu_ps(group[g].dots + (i + r * apart) * group[g].tokens, mask,
                                      _mm512_add_ps(low, high));
            }
        }
    }
    _tile_release();
}

template <BlockFormat format>
KERNEL void dots(const void* const* rows, size_t row_count, const void* packed, size_t hidden, size_t tokens,
                 float* dots) {
    const auto* few = static_cast<const StretchOfX*>(packed);
    if (tokens == 1) return dots_of_quads<format, true>(rows, row_count, few, hidden, 1, dots);
    if (tokens <= FEW_TOKENS) return dots_of_quads<format, false>(rows, row_count, few, hidden, tokens, dots);
    const TileGroup group[] = {{static_cast<const TilesOfX*>(packed), tokens, dots}};
    dots_in_tiles<format, 1>(rows, row_count, hidden, group);
}

template <BlockFormat format>
KERNEL void dots_of_groups(const void* const* rows, size_t row_count, const void* const (&packed)[2], size_t hidden,
                           const size_t (&tokens)[2], float* const (&of)[2]) {
    if (tokens[0] <= FEW_TOKENS || tokens[1] <= FEW_TOKENS) {
        for (size_t g = 0; g < 2; g++) dots<format>(rows, row_count, packed[g], hidden, tokens[g], of[g]);
        return;
    }
    const TileGroup group[] = {{static_cast<const TilesOfX*>(packed[0]), tokens[0], of[0]},
                               {static_cast<const TilesOfX*>(packed[1]), tokens[1], of[1]}};
    dots_in_tiles<format, 2>(rows, row_count, hidden, group);
}

// Dots of 16 rows of a matrix [row, token], of the chains of rows of stretches, `which` of those that these have.
KERNEL void sums_of_tile(const __m512 (&chains)[UNITS][TILE_ROWS], size_t length, size_t which, __m512 (&sums)[16]) {
    for (size_t i = 0; i < 16; i++) {
        const size_t row = which * 16 + i;
        if (length == UNIT) {
            sums[i] = chains[row % 4][row / 4];
        } else if (length < STRETCH) {
            sums[i] = _mm512_add_ps(chains[row % 2 * 2][row / 2], chains[row % 2 * 2 + 1][row / 2]);
        } else {
            sums[i] = _mm512_add_ps(_mm512_add_ps(chains[0][row], chains[1][row]),
                                    _mm512_add_ps(chains[2][row], chains[3][row]));
        }
    }
}

constexpr size_t SLAB_GROUPS = 4;  // of tokens for which rows are decoded once: 40 KiB

// y[t][j] += row j . h[t] for j in [begin, end), for groups of 2 to 16 tokens each.
template <BlockFormat format>
KERNEL void add_products_of_tiles(const ShortRows<format>& rows, const float* h, size_t h_stride, size_t tokens,
                                  size_t hidden, size_t begin, float* y) {
    static const TileConfig config = config_for(UNIT / APART<format>);
    TilesOfX x[SLAB_GROUPS][SLAB_STRETCHES];
    const size_t stretches = rows.hidden() / STRETCH;
    if (tokens % TILE_COLUMNS != 0) std::memset(x[tokens / TILE_COLUMNS], 0, sizeof(x[0]));
    for (size_t t = 0; t < tokens; t++) {
        StretchOfX of_token[SLAB_STRETCHES];
        constexpr bool IN_ORDER = Codes<format>::IN_ORDER;
        quantise_short<IN_ORDER>(h + t * h_stride, rows.length, of_token);
        for (size_t s = 0; s < stretches; s++) {
            x[t / TILE_COLUMNS][s].template set_token<IN_ORDER>(t % TILE_COLUMNS, of_token[s]);
        }
    }
    _tile_loadconfig(&config);
    DecodedPanel<format> panel;
    typename ShortRows<format>::Rest rest, zeros;
    for (size_t j = begin; j < rows.end; j += TILE_ROWS * rows.together()) {
        const void* of_tile[TILE_ROWS];
        rows.addresses(j, of_tile, rest, zeros);
        for (size_t quad = 0; quad < TILE_QUADS; quad++) {
            const QuadRows of_quad(of_tile + quad * QUAD);
            of_quad.prefetch(0, Stretches<format>::bytes_of(rows.hidden()));
            panel.fill(of_quad, quad, 0, stretches, rows.hidden());
        }
        for (size_t first = 0; first < tokens; first += TILE_COLUMNS) {
            __m512 chains[UNITS][TILE_ROWS];
            for (size_t unit = 0; unit < UNITS; unit++) {
                std::fill_n(chains[unit], TILE_ROWS, _mm512_setzero_ps());
                NextRows none;
                PanelProducts<format>{panel}.add_unit(x[first / TILE_COLUMNS], stretches, unit, chains[unit], none);
            }
            for (size_t i = j; i < std::min(j + TILE_ROWS * rows.together(), rows.end); i += 16) {
                const auto some = static_cast<__mmask16>((1U << std::min<size_t>(16, rows.end - i)) - 1);
                __m512 sums[16];
                sums_of_tile(chains, rows.length, (i - j) / 16, sums);
                transpose(sums);
                for (size_t t = 0; t < std::min(TILE_COLUMNS, tokens - first); t++) {
                    float* out = y + (first + t) * hidden + i;
                    _mm512_mask_storeu_ps(out, some, _mm512_add_ps(_mm512_maskz_loadu_ps(some, out), sums[t]));
                }
            }
        }
    }
    _tile_release();
}

template <BlockFormat format>
KERNEL void add_products_in_tiles(const void* matrix, size_t length, const float* h, size_t h_stride, size_t tokens,
                                  size_t hidden, size_t begin, size_t end, float* y) {
    const ShortRows<format> rows{static_cast<const uint8_t*>(matrix), length, end};
    if (tokens <= FEW_TOKENS) return add_products<format>(matrix, length, h, h_stride, tokens, hidden, begin, end, y);
    constexpr size_t TOGETHER = SLAB_GROUPS * TILE_COLUMNS;
    for (size_t t = 0; t < tokens; t += TOGETHER) {
        add_products_of_tiles<format>(rows, h + t * h_stride, h_stride, std::min(TOGETHER, tokens - t), hidden, begin,
                                      y + t * hidden);
    }
}

template <BlockFormat format>
struct TileTable {
    static const Kernels* get() {
        static const Kernels kernels = [] {
            Kernels table = *kernels_vnni(format);
            table.instruction_set = "amx";
            table.packed_bytes = packed_bytes;
            table.pack = pack<Codes<format>::IN_ORDER>;
            table.dots = dots<format>;
            table.dots_of_groups = dots_of_groups<format>;
            table.add_products = add_products_in_tiles<format>;
            return table;
        }();
        return &kernels;
    }
};

}  // namespace
}  // namespace flashclient

const flashclient::Kernels* flashclient::kernels_amx(BlockFormat format) {
    return table_of_format<TileTable>(format, kernels_amx_floats(format));
}
#else
const flashclient::Kernels* flashclient::kernels_amx(BlockFormat) { return nullptr; }
#endif
