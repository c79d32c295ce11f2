// Queries, keys and values of a layer from its input: projections, norms of heads, rotary position embedding
// (arXiv 2104.09864), with the roundings of transformers' modules.
#pragma once

#include <cstddef>
#include <optional>

#include "kernels/linear.h"
#include "kernels/norm.h"

namespace flashclient {

// Which elements of a head rotate together: i and i + width / 2, or 2 i and 2 i + 1.
enum class Pairs { none, halves, neighbours };

struct AttentionProjection {
    Matrix weight;
    MatrixBias bias;
    std::optional<Norm> norm;  // of each head, or of all of them as one row
    float factor;              // of the product, before the norm
};

struct AttentionLayer {
    AttentionProjection query, key, value;
    size_t elements;  // of a head
    Pairs pairs;      // how queries and keys rotate
};

// cos and sin by position: [sequences, tokens, width] of the kernels' dtype. The first `width` elements of a head
// rotate.
struct Rotation {
    const void* cos;
    const void* sin;
    size_t width;
    size_t sequence_stride;  // elements; 0: the same for all sequences
    size_t token_stride;
};

// Rows of heads to write, [sequences, heads, tokens, elements] of the kernels' dtype; the rows of a head lie side by
// side. Strides are in elements.
struct HeadRows {
    void* data;
    size_t sequence_stride;
    size_t head_stride;
};

struct AttentionInput {
    HeadRows query, key, value;
};

// The bits of a token depend on its row of x and on its rotation alone. Safe to call from several threads.
class AttentionInputs {
  public:
    // `workers` is shared and must outlive this. Throws std::invalid_argument for an instruction set that the processor
    // lacks; null picks the best.
    AttentionInputs(Workers& workers, Dtype dtype, const char* instruction_set = nullptr)
        : workers_(workers),
          dtype_(dtype),
          kernels_(kernels_for(dtype, instruction_set)),
          linear_(workers, dtype, instruction_set),
          norms_(workers, dtype, instruction_set) {}

    // x: [sequences, tokens, columns] of dtype().
    void compute(const AttentionLayer& layer, const void* x, size_t sequences, size_t tokens, const Rotation& rotation,
                 const AttentionInput& out) const;

    Dtype dtype() const { return dtype_; }

  private:
    struct Heads;  // the products of one projection, on their way to the output
    void finish(const Heads& heads, size_t sequence, size_t token, const Rotation& rotation, Pairs pairs) const;
    void rotate(float* row, size_t heads, size_t elements, const float* cos, const float* sin, size_t width,
                Pairs pairs) const;
    void round(float* values, size_t count) const;

    Workers& workers_;
    Dtype dtype_;
    const Kernels& kernels_;
    Linear linear_;
    Norms norms_;
};

}  // namespace flashclient
