#include "kernels/linear.h"

#include <algorithm>

namespace flashclient {
namespace {

constexpr size_t BLOCK_BYTES = 512 * 1024;  // tens of microseconds of reading; fits into an L2 cache
constexpr size_t BLOCK_ROWS_MIN = 24;       // whole tiles of the kernels
constexpr size_t BLOCK_ROWS_MAX = 480;

// A small matrix is cut into more blocks, so that every thread gets some.
size_t block_rows(size_t rows, size_t row_bytes, size_t threads) {
    const size_t block = std::min(BLOCK_BYTES / std::max<size_t>(row_bytes, 1), rows / (2 * threads));
    return std::clamp(block / BLOCK_ROWS_MIN * BLOCK_ROWS_MIN, BLOCK_ROWS_MIN, BLOCK_ROWS_MAX);
}

}  // namespace

Linear::Linear(Workers& workers, Dtype dtype, const char* instruction_set)
    : workers_(workers), dtype_(dtype), kernels_(kernels_for(dtype, instruction_set)) {}

void Linear::for_blocks(const Matrix& weight, const float* x, size_t tokens, const Block& block) const {
    const size_t row_bytes = weight.columns * bytes_of(dtype_);
    const size_t rows_max = block_rows(weight.rows, row_bytes, workers_.threads());
    workers_.run((weight.rows + rows_max - 1) / rows_max, [&](size_t item) {
        const void* rows[BLOCK_ROWS_MAX];
        float values[BLOCK_ROWS_MAX * TOKENS_MAX];
        const size_t first = item * rows_max;
        const size_t count = std::min(rows_max, weight.rows - first);
        for (size_t i = 0; i < count; i++) rows[i] = static_cast<const char*>(weight.data) + (first + i) * row_bytes;
        for (size_t token = 0; token < tokens; token += TOKENS_MAX) {
            const size_t some = std::min(TOKENS_MAX, tokens - token);
            kernels_.dots(rows, count, x + token * weight.columns, weight.columns, some, values);
            block({first, count, token, some, values});
        }
    });
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
