// An FFN layer's output as a sum over neurons, from bundles that may lie anywhere and arrive a chunk at a time.
//
// A bundle is [gate row][up row][down column], or [up row][down column], of hidden_size elements each. Neuron n adds
// act(gate_n . x + b_n) * (up_n . x) * down_n to the output, or act(up_n . x + b_n) * down_n without a gate.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"
#include "workers.h"

namespace flashclient {

enum class Activation { relu, silu, gelu, gelu_tanh };

struct FfnShape {
    Dtype dtype;
    std::size_t hidden;  // elements of a row
    bool gated;
    Activation activation;
};

// The output's bits depend on the order of the neurons only: not on how they are cut into chunks, on the number of
// threads, or on the other tokens of a call. One call at a time. A call after fork runs on the caller's thread alone.
class Ffn {
  public:
    // More tokens than this make better use of a dense product: see gather().
    static constexpr std::size_t kTokensMax = 16;

    // Throws std::invalid_argument for an instruction set that the processor lacks; null picks the best.
    Ffn(FfnShape shape, std::size_t threads, const char* instruction_set = nullptr);

    // y[t] += what `count` neurons add for x[t]. x, y: [tokens, hidden] fp32; bias: [count] fp32 or null.
    // Bundles are read in place; the down column of a neuron that fires for no token is not read.
    void add_rows(const std::uint64_t* bundles, std::size_t count, const float* bias, const float* x,
                  std::size_t tokens, float* y);

    // out[part][first + i] = row `part` of bundle i in fp32, for out of [parts, capacity, hidden].
    void gather(const std::uint64_t* bundles, std::size_t count, std::size_t first, std::size_t capacity, float* out);

    const FfnShape& shape() const { return shape_; }
    std::size_t parts() const { return shape_.gated ? 3 : 2; }
    std::size_t threads() const { return workers_.threads(); }
    std::string instruction_set() const { return kernels_.instruction_set; }

  private:
    const char* row(std::uint64_t bundle, std::size_t part) const;
    void fire(std::uint64_t bundle, const float* bias, const float* x, std::size_t tokens, float* h) const;
    std::size_t keep_fired(const std::uint64_t* bundles, std::size_t count, std::size_t tokens);

    FfnShape shape_;
    const Kernels& kernels_;
    Workers workers_;
    std::vector<float> h_;                // [count, tokens], then compacted to those that fired
    std::vector<const void*> down_rows_;  // of those that fired
};

}  // namespace flashclient
