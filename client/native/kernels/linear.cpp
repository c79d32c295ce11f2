#include "kernels/linear.h"

#include <algorithm>

namespace flashclient {
namespace {

constexpr std::size_t kBlockBytes = 512 * 1024;  // tens of microseconds of memory bandwidth; fits a second cache
constexpr std::size_t kBlockRowsMin = 24;        // whole tiles of the kernels
constexpr std::size_t kBlockRowsMax = 480;

// A small matrix is cut so that every thread gets some of it.
std::size_t block_rows(std::size_t rows, std::size_t row_bytes, std::size_t threads) {
    const std::size_t block = std::min(kBlockBytes / std::max<std::size_t>(row_bytes, 1), rows / (2 * threads));
    return std::clamp(block / kBlockRowsMin * kBlockRowsMin, kBlockRowsMin, kBlockRowsMax);
}

}  // namespace

Linear::Linear(Workers& workers, Dtype dtype, const char* instruction_set)
    : workers_(workers), dtype_(dtype), kernels_(kernels_for(dtype, instruction_set)) {}

void Linear::for_blocks(const Matrix& weight, const float* x, std::size_t tokens, const Block& block) const {
    const std::size_t row_bytes = weight.columns * bytes_of(dtype_);
    const std::size_t rows_max = block_rows(weight.rows, row_bytes, workers_.threads());
    workers_.run((weight.rows + rows_max - 1) / rows_max, [&](std::size_t item) {
        const void* rows[kBlockRowsMax];
        float values[kBlockRowsMax * kTokensMax];
        const std::size_t first = item * rows_max;
        const std::size_t count = std::min(rows_max, weight.rows - first);
        for (std::size_t i = 0; i < count; ++i)
            rows[i] = static_cast<const char*>(weight.data) + (first + i) * row_bytes;
        for (std::size_t token = 0; token < tokens; token += kTokensMax) {
            const std::size_t some = std::min(kTokensMax, tokens - token);
            kernels_.dots(rows, count, x + token * weight.columns, weight.columns, some, values);
            block({first, count, token, some, values});
        }
    });
}

void Linear::multiply(const Matrix& weight, const float* x, std::size_t tokens, float* y) const {
    for_blocks(weight, x, tokens, [&](const Dots& dots) {
        for (std::size_t t = 0; t < dots.tokens; ++t) {
            float* out = y + (dots.first_token + t) * weight.rows + dots.first;
            for (std::size_t i = 0; i < dots.count; ++i) out[i] = dots.values[i * dots.tokens + t];
        }
    });
}

}  // namespace flashclient
