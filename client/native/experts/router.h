// Routers of mixtures: which experts a row picks, and with which weights.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/kernels.h"
#include "kernels/linear.h"
#include "kernels/workers.h"

namespace flashclient {

// A row picks the experts with the greatest logits. Their weights are the softmax over all logits.
struct Router {
    Matrix weight;  // [experts, columns]
    MatrixBias bias;
    size_t picks;
    bool normalised;  // the weights of a row are divided by their sum
    bool rounded;     // to the dtype
};

// The bits of a row depend on that row alone. Safe to call from several threads.
class Routers {
  public:
    // `workers` is shared and must outlive this. Throws std::invalid_argument for an instruction set that the processor
    // lacks; null picks the best.
    Routers(Workers& workers, Dtype dtype, const char* instruction_set = nullptr)
        : workers_(workers), kernels_(kernels_for(dtype, instruction_set)), linear_(workers, dtype, instruction_set) {}

    // Logits [rows, experts] of x [rows, columns], both of dtype(), rounded once.
    void project(const Router& router, const void* x, size_t rows, void* logits) const;
    // Weights [rows, picks] in fp32, and experts likewise: the greatest first, the lower one where they are equal.
    void pick(const Router& router, const void* logits, size_t rows, float* weights, int64_t* experts) const;

    Dtype dtype() const { return linear_.dtype(); }
    const Kernels& kernels() const { return kernels_; }

  private:
    void pick_row(const Router& router, const void* logits, float* weights, int64_t* experts) const;

    Workers& workers_;
    const Kernels& kernels_;
    Linear linear_;
};

}  // namespace flashclient
