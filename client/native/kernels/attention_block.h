// The attention of a decoder layer with what surrounds it: norm, attention over a cache that grows in place, output
// projection, norm, residual sum, and the norm before the FFN. The roundings are those of transformers' modules.
#pragma once

#include <cstddef>
#include <functional>
#include <optional>
#include <vector>

#include "kernels/attention.h"
#include "kernels/attention_inputs.h"

namespace flashclient {

struct AttentionBlock {
    AttentionLayer attention;
    AttentionProjection output;      // without norm
    std::optional<Norm> before;      // of the layer's input
    std::optional<Norm> after;       // of the attention's output
    std::optional<Norm> before_ffn;  // of the sum
    float scale;                     // of scores
};

// Keys and values of all tokens so far, with room for more behind them.
struct KeyValueRoom {
    HeadRows keys, values;
    size_t tokens;           // held
    bool in_blocks = false;  // rows of Attention::BLOCKS, with strides in bytes
};

// Safe to call from several threads.
class AttentionBlocks {
  public:
    // `workers` is shared and must outlive this. Throws std::invalid_argument for an instruction set that the processor
    // lacks; null picks the best.
    AttentionBlocks(Workers& workers, Dtype dtype, const char* instruction_set = nullptr)
        : workers_(workers),
          dtype_(dtype),
          kernels_(kernels_for(dtype, instruction_set)),
          inputs_(workers, dtype, instruction_set),
          attention_(workers, dtype, instruction_set),
          linear_(workers, dtype, instruction_set),
          norms_(workers, dtype, instruction_set) {}

    // x: [sequences, tokens, hidden]; sum = x + attention, and what the FFN takes, likewise; all of dtype(), or the
    // FFN's input in fp32, rounded to it. Writes keys and values of the new tokens behind the others. `mask` is over
    // all keys.
    void compute(const AttentionBlock& block, const void* x, size_t sequences, size_t tokens, const Rotation& rotation,
                 const KeyValueRoom& room, const AttentionMask& mask, void* sum, void* ffn_input,
                 bool ffn_in_fp32) const;

    // out = sum + the norm of y, if there is one. y: [rows, hidden] fp32, which is rounded to dtype() first.
    void finish(const float* y, const std::optional<Norm>& norm, const void* sum, size_t rows, size_t hidden,
                void* out) const;

    // y = the FFN of x, both [rows, hidden] fp32.
    using FfnOfRows = std::function<void(const float* x, size_t rows, float* y)>;

    // Is called with what the FFN would take if attention added nothing, [rows, hidden] of dtype().
    using Expected = std::function<void(const void* x, size_t rows)>;

    // out = the whole layer: `expected` if there is one, compute(), `ffn`, and finish() with `after_ffn`. out:
    // [sequences, tokens, hidden]. What the functions throw comes out; the cache's room may hold the new tokens then,
    // as it does after another attempt.
    void layer(const AttentionBlock& block, const void* x, size_t sequences, size_t tokens, const Rotation& rotation,
               const KeyValueRoom& room, const AttentionMask& mask, const Expected& expected, const FfnOfRows& ffn,
               const std::optional<Norm>& after_ffn, void* out) const;

    Dtype dtype() const { return dtype_; }

  private:
    // Where the rows of the new tokens are written first, of keys or of values.
    HeadRows new_rows(const HeadRows& held, const KeyValueRoom& room, size_t heads, size_t rows, size_t tokens,
                      size_t elements, std::vector<char>& scratch) const;
    // Writes new rows in blocks behind the others.
    void encode(const HeadRows& rows, const HeadRows& held, const KeyValueRoom& room, size_t sequences, size_t heads,
                size_t tokens, size_t elements) const;
    void add(const void* x, const void* y, size_t count, void* sum) const;
    void expect(const AttentionBlock& block, const void* x, size_t rows, const Expected& expected) const;

    Workers& workers_;
    Dtype dtype_;
    const Kernels& kernels_;
    AttentionInputs inputs_;
    Attention attention_;
    Linear linear_;
    Norms norms_;
};

}  // namespace flashclient
