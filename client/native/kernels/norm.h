// Norms of rows, with the roundings of transformers' modules.
#pragma once

#include <cstddef>

#include "kernels/kernels.h"
#include "kernels/workers.h"

namespace flashclient {

// The factor of a row x is f = 1 / sqrt(mean(x^2) + eps).
enum class NormKind {
    rms,         // round(weight * round(x * f)), as in Llama (arXiv 1910.07467)
    scaled_rms,  // round(x * f * (offset + weight)), as in Gemma, whose offset is 1
    layer,       // round((x - mean(x)) / sqrt(variance(x) + eps) * weight + bias)
};

struct Norm {
    NormKind kind;
    size_t width;        // elements of a row
    const void* weight;  // [width]; null: all 1
    const void* bias;    // [width], of kind layer; null: none
    float eps;
    float offset;
};

// Sums are fp32, in an order that depends on the width alone. Safe to call from several threads.
class Norms {
  public:
    // `workers` is shared and must outlive this. Throws std::invalid_argument for an instruction set that the processor
    // lacks; null picks the best.
    Norms(Workers& workers, Dtype dtype, const char* instruction_set = nullptr)
        : workers_(workers), dtype_(dtype), kernels_(kernels_for(dtype, instruction_set)) {}

    // y = the norm of x; both [rows, width] of dtype(), as the weights are. They may be the same memory.
    void apply(const Norm& norm, const void* x, size_t rows, void* y) const;

    Dtype dtype() const { return dtype_; }

  private:
    void apply_to_row(const Norm& norm, const void* x, void* y) const;

    Workers& workers_;
    Dtype dtype_;
    const Kernels& kernels_;
};

}  // namespace flashclient
