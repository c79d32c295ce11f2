#include "kernels/linear.h"

#include <algorithm>
#include <list>
#include <vector>

#include "kernels/packed_rows.h"

namespace flashclient {
namespace {

constexpr size_t BLOCK_BYTES = 512 * 1024;  // tens of microseconds of reading; fits into an L2 cache
constexpr size_t BLOCK_ROWS_MIN = 16;       // the largest tile of the kernels
constexpr size_t BLOCK_ROWS_STEP = 48;      // whole tiles of all kernels
constexpr size_t BLOCK_ROWS_MAX = 480;
constexpr size_t WIDE_KEPT_MAX = size_t{1} << 22;  // elements: 16 MiB

// A small matrix is cut into more blocks, so that every thread gets some.
size_t block_rows(size_t rows, size_t row_bytes, size_t threads) {
    const size_t block = std::min(BLOCK_BYTES / std::max<size_t>(row_bytes, 1), rows / (2 * threads));
    const size_t step = block < BLOCK_ROWS_STEP ? BLOCK_ROWS_MIN : BLOCK_ROWS_STEP;
    return std::clamp(block / step * step, BLOCK_ROWS_MIN, BLOCK_ROWS_MAX);
}

// x as some of the matrices' kernels take it.
struct PackedForm {
    PackedForm(Workers& workers, const Kernels& kernels, const float* x, size_t tokens, size_t columns)
        : pack(kernels.pack), rows(workers, kernels, x, tokens, columns) {}
    decltype(Kernels::pack) pack;
    PackedRows rows;
};

}  // namespace

struct Linear::Rows {
    const Matrix& matrix;
    const Kernels& kernels;
    size_t bytes;  // of a row

    // Of the block that a thread most likely takes next, the beginning of the first rows.
    void fetch(size_t first) const {
        constexpr size_t OF_ROW = FETCHED_BYTES / BLOCK_ROWS_MIN;
        const size_t some = std::min(bytes, OF_ROW);
        for (size_t row = first; row < std::min(matrix.rows, first + FETCHED_BYTES / std::max<size_t>(some, 1));
             row++) {
            fetch_lines(static_cast<const char*>(matrix.data) + row * bytes, some);
        }
    }
};

Linear::Linear(Workers& workers, Dtype dtype, const char* instruction_set)
    : workers_(workers), dtype_(dtype), kernels_(kernels_for(dtype, instruction_set)) {
    for (size_t i = 0; i < of_blocks_.size(); i++) {
        of_blocks_[i] = &kernels_for(static_cast<BlockFormat>(i), instruction_set);
    }
}

Linear::Rows Linear::rows_of(const Matrix& weight) const {
    if (!weight.blocks) return {weight, kernels_, weight.columns * bytes_of(dtype_)};
    const auto format = static_cast<size_t>(*weight.blocks);
    const auto& [name, values, bytes] = weightd::BLOCK_FORMATS[format];
    return {weight, *of_blocks_[format], weight.columns / values * bytes};
}

void Linear::for_blocks(const Matrix& weight, const float* x, size_t tokens, const Block& block) const {
    const Rows of = rows_of(weight);
    const size_t rows = block_rows(weight.rows, of.bytes, workers_.threads());
    const PackedRows packed(workers_, of.kernels, x, tokens, weight.columns);
    workers_.run(divide_up(weight.rows, rows), [&](size_t item) {
        const size_t first = item * rows;
        of_block(of, first, std::min(rows, weight.rows - first), packed, tokens, [&](const Dots& dots) {
            if (dots.first_token == 0) of.fetch(first + workers_.threads() * rows);
            block(dots);
        });
    });
}

void Linear::of_block(const Rows& of, size_t first, size_t count, const PackedRows& x, size_t tokens,
                      const Block& block) {
    const void* rows[BLOCK_ROWS_MAX];
    float values[2][BLOCK_ROWS_MAX * TOKENS_MAX];
    for (size_t i = 0; i < count; i++) rows[i] = static_cast<const char*>(of.matrix.data) + (first + i) * of.bytes;
    const auto in_group = [&](size_t from) { return std::min(TOKENS_MAX, tokens - from); };
    size_t token = 0;
    for (; of.kernels.dots_of_groups != nullptr && token + TOKENS_MAX < tokens; token += 2 * TOKENS_MAX) {
        const size_t next = token + TOKENS_MAX;
        of.kernels.dots_of_groups(rows, count, {x.group(token), x.group(next)}, of.matrix.columns,
                                  {TOKENS_MAX, in_group(next)}, {values[0], values[1]});
        block({first, count, token, TOKENS_MAX, values[0]});
        block({first, count, next, in_group(next), values[1]});
    }
    for (; token < tokens; token += TOKENS_MAX) {
        of.kernels.dots(rows, count, x.group(token), of.matrix.columns, in_group(token), values[0]);
        block({first, count, token, in_group(token), values[0]});
    }
}

// The blocks of all matrices are items of one run, so that the threads meet once.
void Linear::project(std::span<const Projection> projections, const void* x, size_t tokens) const {
    struct Part {
        const Projection* projection;
        Rows rows;
        const PackedRows* x;
        size_t first;
        size_t count;
    };
    const size_t columns = projections.front().weight.columns;
    const float* wide = widened(x, tokens, columns);
    std::list<PackedForm> forms;  // of x, that the matrices' kernels take
    std::vector<Part> parts;
    for (const Projection& projection : projections) {
        const Rows of = rows_of(projection.weight);
        const size_t rows = block_rows(projection.weight.rows, of.bytes, workers_.threads());
        auto form = std::ranges::find(forms, of.kernels.pack, &PackedForm::pack);
        if (form == forms.end()) form = forms.emplace(form, workers_, of.kernels, wide, tokens, columns);
        for (size_t first = 0; first < projection.weight.rows; first += rows) {
            parts.push_back({&projection, of, &form->rows, first, std::min(rows, projection.weight.rows - first)});
        }
    }
    workers_.run(parts.size(), [&](size_t item) {
        const Part& part = parts[item];
        of_block(part.rows, part.first, part.count, *part.x, tokens, [&](const Dots& dots) {
            const size_t next = item + workers_.threads();
            if (dots.first_token == 0 && next < parts.size()) parts[next].rows.fetch(parts[next].first);
            round(*part.projection, dots);
        });
    });
}

void Linear::round(const Projection& projection, const Dots& dots) const {
    const size_t bytes = bytes_of(dtype_);
    float bias[BLOCK_ROWS_MAX];
    float sums[BLOCK_ROWS_MAX];
    if (projection.bias.data != nullptr && projection.bias.is_fp32) {
        std::copy_n(static_cast<const float*>(projection.bias.data) + dots.first, dots.count, bias);
    } else if (projection.bias.data != nullptr) {
        kernels_.upcast(static_cast<const char*>(projection.bias.data) + dots.first * bytes, dots.count, bias);
    }
    for (size_t t = 0; t < dots.tokens; t++) {
        for (size_t i = 0; i < dots.count; i++) {
            const float sum = dots.values[i * dots.tokens + t];
            sums[i] = projection.bias.data != nullptr ? sum + bias[i] : sum;
        }
        const size_t offset = (dots.first_token + t) * projection.weight.rows + dots.first;
        kernels_.downcast(sums, dots.count, static_cast<char*>(projection.y) + offset * bytes);
    }
}

const float* Linear::widened(const void* x, size_t tokens, size_t columns) const {
    if (dtype_ == Dtype::f32) return static_cast<const float*>(x);
    static thread_local std::vector<float> wide;  // kept, because allocating takes longer than a small product
    if (wide.size() < tokens * columns || wide.size() > WIDE_KEPT_MAX) wide = std::vector<float>(tokens * columns);
    const auto widen = [this, x, columns, out = wide.data()](size_t first, size_t rows) {
        kernels_.upcast(static_cast<const char*>(x) + first * columns * bytes_of(dtype_), rows * columns,
                        out + first * columns);
    };
    if (tokens <= TOKENS_MAX) {
        widen(0, tokens);
    } else {
        workers_.run(divide_up(tokens, TOKENS_MAX),
                     [&](size_t item) { widen(item * TOKENS_MAX, std::min(TOKENS_MAX, tokens - item * TOKENS_MAX)); });
    }
    return wide.data();
}

void Linear::multiply(const Matrix& weight, const float* x, size_t tokens, float* y) const {
    for_blocks(weight, x, tokens, [&](const Dots& dots) {
        for (size_t t = 0; t < dots.tokens; t++) {
            float* out = y + (dots.first_token + t) * weight.rows + dots.first;
            for (size_t i = 0; i < dots.count; i++) out[i] = dots.values[i * dots.tokens + t];
        }
    });
}

}  // namespace flashclient
