// Sums over groups of neurons by tiles of Intel's AMX: y (tokens x elements) += h (tokens x neurons) * down.
//
// A tile of h is 16 tokens of the 32 neurons of a group, one of down 16 elements of them, in pairs of neurons. A
// product adds to y the sum of a group for one part of h (amx_tiles.h). For one token vectors take the same steps in
// the same order, rounded in the same way, and memory is read as fast as it can be.
#include "kernels/kernels.h"
#include "vectors/amx_tiles.h"

#if defined(__x86_64__)
namespace flashclient {
namespace {

constexpr size_t PAIRS = GROUP_NEURONS / 2;
constexpr size_t STRIP = SUM_ELEMENTS;
constexpr size_t STRIP_BYTES = STRIP * sizeof(float);
constexpr size_t GROUPS_MAX = 16;  // whose strip of down stays in the L1 cache
constexpr size_t FEW_TOKENS = 32;  // computed group by group
constexpr size_t WIDTH = 16;       // of a vector
constexpr size_t H_BYTES = PARTS * TILE_BYTES;
static_assert(GROUP_NEURONS == BLOCK && TOKENS_MAX == TILE_ROWS && STRIP == 2 * TILE_COLUMNS);

size_t packed_bytes(size_t neurons) { return divide_up(neurons, GROUP_NEURONS) * H_BYTES; }

// Tiles are [group][part], of [token][neuron].
KERNEL void pack(const float* h, size_t neurons, size_t tokens, void* packed) {
    char* out = static_cast<char*>(packed);
    const auto of_tokens = static_cast<__mmask16>((1U << tokens) - 1);
    const __m512i column = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                              _mm512_set1_epi32(TILE_COLUMNS));
    for (size_t first = 0; first < neurons; first += GROUP_NEURONS, out += H_BYTES) {
        alignas(64) uint32_t pairs[PARTS][PAIRS][TILE_ROWS];
        for (size_t pair = 0; pair < PAIRS; pair++) {
            const size_t neuron = first + 2 * pair;
            const auto there = [&](size_t n) { return n < neurons ? of_tokens : __mmask16{0}; };
            __m512 even = _mm512_maskz_loadu_ps(there(neuron), h + neuron * tokens);
            __m512 odd = _mm512_maskz_loadu_ps(there(neuron + 1), h + (neuron + 1) * tokens);
            for (size_t part = 0; part < PARTS; part++) {
                const __m512i low = _mm512_srli_epi32(take_part(even), 16);
                _mm512_store_si512(pairs[part][pair], _mm512_or_si512(low, take_part(odd)));
            }
        }
        for (size_t part = 0; part < PARTS; part++) {
            for (size_t t = 0; t < TILE_ROWS; t++) {
                const __m512i of_token = _mm512_i32gather_epi32(column, pairs[part][0] + t, sizeof(uint32_t));
                _mm512_store_si512(out + part * TILE_BYTES + t * ROW_BYTES, of_token);
            }
        }
    }
}

// Two tiles of down for each group, of [pair of neurons][element]: the elements [j, j + some). Fetches what lies
// `ahead` rows and `shift` elements further.
KERNEL void pack_down(const void* const* rows, size_t row_count, size_t ahead, size_t shift, size_t j, size_t some,
                      char* out) {
    alignas(64) static const auto order = [] {
        struct {
            uint16_t of[2][STRIP];
        } made;
        for (size_t i = 0; i < STRIP; i++) {
            for (size_t tile = 0; tile < 2; tile++) {
                made.of[tile][i] = static_cast<uint16_t>(i / 2 + tile * TILE_COLUMNS + i % 2 * STRIP);
            }
        }
        return made;
    }();
    const __m512i first = _mm512_loadu_si512(order.of[0]);
    const __m512i second = _mm512_loadu_si512(order.of[1]);
    const __mmask32 mask = some == STRIP ? ~__mmask32{0} : (__mmask32{1} << some) - 1;
    for (size_t k = 0; k < divide_up(row_count, GROUP_NEURONS) * GROUP_NEURONS; k += 2) {
        const auto row = [&](size_t n) { return static_cast<const uint16_t*>(rows[std::min(n, row_count - 1)]) + j; };
        for (size_t n = k; n < k + 2; n++) {
            __builtin_prefetch(static_cast<const uint16_t*>(rows[std::min(n, row_count - 1) + ahead]) + j + shift, 0,
                               2);
        }
        const __m512i even = _mm512_maskz_loadu_epi16(k < row_count ? mask : 0, row(k));
        const __m512i odd = _mm512_maskz_loadu_epi16(k + 1 < row_count ? mask : 0, row(k + 1));
        char* pair = out + k / GROUP_NEURONS * 2 * TILE_BYTES + k % GROUP_NEURONS / 2 * ROW_BYTES;
        _mm512_store_si512(pair, _mm512_permutex2var_epi16(even, first, odd));
        _mm512_store_si512(pair + TILE_BYTES, _mm512_permutex2var_epi16(even, second, odd));
    }
}

// The numbers of the tiles: y [tile of tokens][tile of elements], then down, then h.
constexpr size_t y_tile(size_t tokens, size_t elements) { return 2 * tokens + elements; }
constexpr size_t DOWN_TILE = 4;
constexpr size_t H_TILE = 6;

template <size_t tiles>
LANE void load_sums(const float* sums) {
    load_tile<y_tile(0, 0)>(sums, STRIP_BYTES);
    load_tile<y_tile(0, 1)>(sums + TILE_COLUMNS, STRIP_BYTES);
    if constexpr (tiles == 2) {
        load_tile<y_tile(1, 0)>(sums + TILE_ROWS * STRIP, STRIP_BYTES);
        load_tile<y_tile(1, 1)>(sums + TILE_ROWS * STRIP + TILE_COLUMNS, STRIP_BYTES);
    }
}
template <size_t tiles>
LANE void store_sums(float* sums) {
    store_tile<y_tile(0, 0)>(sums, STRIP_BYTES);
    store_tile<y_tile(0, 1)>(sums + TILE_COLUMNS, STRIP_BYTES);
    if constexpr (tiles == 2) {
        store_tile<y_tile(1, 0)>(sums + TILE_ROWS * STRIP, STRIP_BYTES);
        store_tile<y_tile(1, 1)>(sums + TILE_ROWS * STRIP + TILE_COLUMNS, STRIP_BYTES);
    }
}

// Groups of one or two tiles of tokens, whose h are `apart` bytes apart.
template <size_t tiles>
KERNEL void add_groups(const char* down, const char* h, size_t apart, size_t groups, float* sums) {
    load_sums<tiles>(sums);
    for (size_t group = 0; group < groups; group++) {
        load_tile<DOWN_TILE>(down + group * 2 * TILE_BYTES, ROW_BYTES);
        load_tile<DOWN_TILE + 1>(down + group * 2 * TILE_BYTES + TILE_BYTES, ROW_BYTES);
#pragma GCC unroll 3
        for (size_t part = 0; part < PARTS; part++) {
            const char* of_part = h + group * H_BYTES + part * TILE_BYTES;
            load_tile<H_TILE>(of_part, ROW_BYTES);
            add_products<y_tile(0, 0), H_TILE, DOWN_TILE>();
            add_products<y_tile(0, 1), H_TILE, DOWN_TILE + 1>();
            if constexpr (tiles == 2) {
                load_tile<H_TILE + 1>(of_part + apart, ROW_BYTES);
                add_products<y_tile(1, 0), H_TILE + 1, DOWN_TILE>();
                add_products<y_tile(1, 1), H_TILE + 1, DOWN_TILE + 1>();
            }
        }
    }
    store_sums<tiles>(sums);
}

// For a few tokens group by group, so that few rows are read at a time; for many some groups, whose strip of down stays
// in the L1 cache.
KERNEL void add(const void* const* rows, const void* packed, size_t row_count, size_t tokens, size_t hidden,
                size_t begin, size_t end, float* sums) {
    static const TileConfig config;
    _tile_loadconfig(&config);
    const size_t apart = packed_bytes(row_count);
    const size_t tiles = divide_up(tokens, TILE_ROWS);
    const bool few = tokens <= FEW_TOKENS;
    const size_t block = (few ? 1 : GROUPS_MAX) * GROUP_NEURONS;
    alignas(64) char down[GROUPS_MAX * 2 * TILE_BYTES];
    for (size_t k = 0; k < row_count; k += block) {
        const size_t count = std::min(block, row_count - k);
        const size_t groups = divide_up(count, GROUP_NEURONS);
        const size_t ahead = few && k + 2 * block <= row_count ? block : 0;
        const char* h = static_cast<const char*>(packed) + k / GROUP_NEURONS * H_BYTES;
        for (size_t j = begin; j < end; j += STRIP) {
            pack_down(rows + k, count, ahead, few ? 0 : STRIP, j, std::min(STRIP, hidden - j), down);
            float* of_strip = sums + j * tiles * TILE_ROWS;
            for (size_t tile = 0; tile < tiles; tile += 2) {
                const auto add_some = tile + 1 < tiles ? add_groups<2> : add_groups<1>;
                add_some(down, h + tile * apart, apart, groups, of_strip + tile * TILE_ROWS * STRIP);
            }
        }
    }
    _tile_release();
}

// The neurons of a group whose h is not 0, the even ones first.
struct FiringGroup {
    const uint16_t* row[GROUP_NEURONS];
    float h[GROUP_NEURONS][PARTS];
    size_t even = 0;
    size_t count = 0;

    KERNEL void take(const void* const* rows, const float* all, size_t size) {
        count = 0;
        for (size_t odd = 0; odd < 2; odd++) {
            for (size_t k = odd; k < size; k += 2) {
                if (all[k] == 0.0f) continue;
                row[count] = static_cast<const uint16_t*>(rows[k]);
                __m512 value = _mm512_set1_ps(all[k]);
                for (float& part : h[count]) part = _mm512_cvtss_f32(_mm512_castsi512_ps(take_part(value)));
                count++;
            }
            if (odd == 0) even = count;
        }
    }
};

LANE __m512 load_weights(const uint16_t* row, __mmask16 mask) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row)), 16));
}

// The sums of the rows [first, end) of a group for some vectors from j on, for each part of h.
template <size_t lanes>
LANE void sum_vectors(const FiringGroup& group, const FiringGroup& next, size_t first, size_t end, size_t j,
                      __mmask16 mask, __m512 (&sums)[PARTS][lanes]) {
    for (size_t part = 0; part < PARTS; part++) {
        for (size_t l = 0; l < lanes; l++) sums[part][l] = _mm512_setzero_ps();
    }
    for (size_t k = first; k < end; k++) {
        const uint16_t* ahead = (k < next.count ? next : group).row[k] + j;
        for (size_t l = 0; l < lanes; l += 2) __builtin_prefetch(ahead + l * WIDTH, 0, 2);
        __m512 factors[PARTS];
        for (size_t part = 0; part < PARTS; part++) factors[part] = _mm512_set1_ps(group.h[k][part]);
#pragma GCC unroll 8
        for (size_t l = 0; l < lanes; l++) {
            const __m512 weights = load_weights(group.row[k] + j + l * WIDTH, mask);
            for (size_t part = 0; part < PARTS; part++) {
                sums[part][l] = _mm512_fmadd_ps(factors[part], weights, sums[part][l]);
            }
        }
    }
}

// y[j] += the sum of a group, for some vectors from j on. Fetches as much of the group `next`.
template <size_t lanes>
LANE void add_vectors(const FiringGroup& group, const FiringGroup& next, size_t j, __mmask16 mask, float* y) {
    __m512 even[PARTS][lanes];
    __m512 odd[PARTS][lanes];
    sum_vectors<lanes>(group, next, 0, group.even, j, mask, even);
    sum_vectors<lanes>(group, next, group.even, group.count, j, mask, odd);
    for (size_t k = group.count; k < next.count; k++) {
        for (size_t l = 0; l < lanes; l += 2) __builtin_prefetch(next.row[k] + j + l * WIDTH, 0, 2);
    }
    for (size_t l = 0; l < lanes; l++) {
        __m512 sum = _mm512_maskz_loadu_ps(mask, y + j + l * WIDTH);
        for (size_t part = 0; part < PARTS; part++) {
            sum = _mm512_add_ps(sum, _mm512_add_ps(even[part][l], odd[part][l]));
        }
        _mm512_mask_storeu_ps(y + j + l * WIDTH, mask, sum);
    }
}

// Not inline: no sum may be moved to where the mode of rounding is another.
__attribute__((noinline)) KERNEL void add_group(const FiringGroup& group, const FiringGroup& next, size_t begin,
                                                size_t end, float* y) {
    constexpr size_t LANES = 4;
    size_t j = begin;
    for (; j + LANES * WIDTH <= end; j += LANES * WIDTH) {
        add_vectors<LANES>(group, next, j, static_cast<__mmask16>(~0U), y);
    }
    for (; j < end; j += WIDTH) {
        const auto mask = static_cast<__mmask16>((1U << std::min(WIDTH, end - j)) - 1);
        add_vectors<1>(group, next, j, mask, y);
    }
}

KERNEL void add_to_one(const void* const* rows, const float* h, size_t row_count, size_t begin, size_t end, float* y) {
    FiringGroup groups[2];
    groups[0].take(rows, h, std::min(GROUP_NEURONS, row_count));
    for (size_t k = 0, turn = 0; k < row_count; k += GROUP_NEURONS, turn ^= 1) {
        FiringGroup& next = groups[turn ^ 1];
        const size_t after = std::min(k + GROUP_NEURONS, row_count);
        next.take(rows + after, h + after, std::min(GROUP_NEURONS, row_count - after));
        const unsigned mode = _mm_getcsr();
        _mm_setcsr(mode | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON);
        if (groups[turn].count > 0) add_group(groups[turn], next, begin, end, y);
        _mm_setcsr(mode);
    }
}

}  // namespace
}  // namespace flashclient

const flashclient::GroupSums* flashclient::group_sums_amx() {
    static const GroupSums sums{packed_bytes, pack, add, add_to_one};
    return &sums;
}
#else
const flashclient::GroupSums* flashclient::group_sums_amx() { return nullptr; }
#endif
