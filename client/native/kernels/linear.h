// Products of a matrix, which is read in place, with rows of x: y[t][o] = weight[o] . x[t].
#pragma once

#include <array>
#include <cstddef>
#include <functional>
#include <iterator>
#include <optional>
#include <span>
#include <string>

#include "kernels/kernels.h"
#include "kernels/workers.h"

namespace flashclient {

class PackedRows;

struct Matrix {
    const void* data;  // [rows, columns], contiguous
    size_t rows;
    size_t columns;
    std::optional<BlockFormat> blocks = std::nullopt;  // of its rows; none: they are of the product's dtype
};

struct MatrixBias {
    const void* data = nullptr;  // [rows of the matrix]; null: none
    bool is_fp32 = false;        // not of the kernels' dtype
};

// The bits of a row of y depend on that row of x alone. Safe to call from several threads.
class Linear {
  public:
    // Dots [count][tokens] of the weight's rows [first, first + count) and of the tokens [first_token, first_token +
    // tokens), at most TOKENS_MAX of them.
    struct Dots {
        size_t first;
        size_t count;
        size_t first_token;
        size_t tokens;
        const float* values;
    };
    using Block = std::function<void(const Dots& dots)>;

    // `workers` is shared and must outlive this. Throws std::invalid_argument for an instruction set that the processor
    // lacks; null picks the best.
    Linear(Workers& workers, Dtype dtype, const char* instruction_set = nullptr);

    // Products of the same x with several matrices, in one pass: y = x weight^T + bias, summed in fp32 and rounded
    // once.
    struct Projection {
        Matrix weight;
        MatrixBias bias;
        void* y;  // [tokens, weight.rows]
    };
    // All but such biases and matrices in blocks are of dtype(). x: [tokens, columns]; each weight has as many columns.
    void project(std::span<const Projection> projections, const void* x, size_t tokens) const;

    // y: [tokens, weight.rows] fp32; x: [tokens, weight.columns] fp32.
    void multiply(const Matrix& weight, const float* x, size_t tokens, float* y) const;

    // Passes the same dots to `block`, which several threads call at once.
    void for_blocks(const Matrix& weight, const float* x, size_t tokens, const Block& block) const;

    // [tokens, columns] of dtype() in fp32, valid until the next call by this thread.
    const float* widened(const void* x, size_t tokens, size_t columns) const;

    Dtype dtype() const { return dtype_; }
    std::string instruction_set() const { return kernels_.instruction_set; }

  private:
    struct Rows;  // of a matrix, and the kernels that take them
    Rows rows_of(const Matrix& weight) const;
    static void of_block(const Rows& rows, size_t first, size_t count, const PackedRows& x, size_t tokens,
                         const Block& block);
    void round(const Projection& projection, const Dots& dots) const;

    Workers& workers_;
    Dtype dtype_;
    const Kernels& kernels_;
    std::array<const Kernels*, std::size(weightd::BLOCK_FORMATS)> of_blocks_;
};

}  // namespace flashclient
