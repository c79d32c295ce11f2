// Attention over keys and values, which are read in place: out[t] = softmax(cap(scale * q[t] . k) + mask[t]) v.
//
// A head of keys serves a group of heads of queries (grouped-query attention, arXiv 2305.13245). Its keys and values
// are read once for up to 16 rows of queries.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels/kernels.h"
#include "kernels/workers.h"

namespace flashclient {

class PackedRows;

struct AttentionShape {
    size_t sequences;
    size_t heads;      // of queries, a multiple of key_heads
    size_t key_heads;  // of keys and values
    size_t tokens;     // of each sequence
    size_t keys;       // of a head, and its values
    size_t key_elements;
    size_t value_elements;
    float scale;
    bool in_blocks = false;        // keys and values are rows of BLOCKS, with zeros up to a whole block
    float softcap = 0.0f;          // cap(s) = softcap * tanh(s / softcap); 0: s
    const float* sinks = nullptr;  // of each head: a score that takes its share of the sum of weights, and has no value
};

// [sequences, heads, tokens or keys, elements]; the elements of a row are contiguous. Strides are in bytes.
struct AttentionRows {
    const void* data;
    size_t sequence_stride;
    size_t head_stride;
    size_t row_stride;
};

// [sequences, heads, tokens, keys], with stride 0 where it is the same for all. causal: token t attends to the
// keys up to t.
struct AttentionMask {
    enum class Kind { none, causal, boolean, additive };
    Kind kind = Kind::none;
    const void* data = nullptr;  // boolean: bytes, 0 is masked; additive: fp32, -inf is masked
    size_t sequence_stride = 0;
    size_t head_stride = 0;
    size_t token_stride = 0;
    size_t key_stride = 0;
};

// The bits of a row depend only on its query and on the keys and values that it attends to, in their order. They do not
// depend on the other rows of a call, the number of threads, or on masked entries, which are left out of every sum.
// Keys and values that no row attends to are not read. All sums are fp32. Safe to call from several threads.
class Attention {
  public:
    // `workers` is shared and must outlive this. Throws std::invalid_argument for an instruction set that the processor
    // lacks; null picks the best.
    Attention(Workers& workers, Dtype dtype, const char* instruction_set = nullptr);

    // out: [sequences, tokens, heads, value_elements] of dtype(), contiguous, rounded once; 0 where a row attends to
    // nothing.
    void attend(const AttentionShape& shape, const AttentionRows& query, const AttentionRows& key,
                const AttentionRows& value, const AttentionMask& mask, void* out) const;

    Dtype dtype() const { return dtype_; }
    std::string instruction_set() const { return kernels_.instruction_set; }

    // What keys and values are in if not in dtype().
    static constexpr BlockFormat BLOCKS = BlockFormat::q8_0;
    // The elements of rows in blocks, and their bytes.
    static constexpr size_t whole_blocks(size_t elements) { return divide_up(elements, BLOCK_VALUES) * BLOCK_VALUES; }
    static constexpr size_t block_row_bytes(size_t elements) { return divide_up(elements, BLOCK_VALUES) * BLOCK_BYTES; }

  private:
    static constexpr size_t BLOCK_VALUES = weightd::BLOCK_FORMATS[static_cast<size_t>(BLOCKS)].values;
    static constexpr size_t BLOCK_BYTES = weightd::BLOCK_FORMATS[static_cast<size_t>(BLOCKS)].bytes;

    struct Call;     // the arguments of attend()
    struct Item;     // some rows of queries over one head of keys
    struct Scratch;  // the intermediate results of an item
    void attend_item(const Call& call, const Item& item, const Item& next) const;
    void weigh(const Call& call, const Item& item, Scratch& scratch) const;
    static void multiply(const Call& call, const Item& item, size_t first, size_t count, const PackedRows& query,
                         Scratch& scratch);
    void fetch_rows(const Call& call, const Item& item, const AttentionRows& rows, size_t elements,
                    const Scratch& scratch) const;
    void blend(const Call& call, const Item& item, Scratch& scratch) const;
    Workers& workers_;
    Dtype dtype_;
    const Kernels& kernels_;
    const Kernels& of_blocks_;
};

// Rounds keys or values to Attention::BLOCKS. Writes `count` values as whole blocks, with zeros after the last one. The
// scale of a block is the greatest size of its values / 127, rounded to half precision, so no value moves by more than
// about half of it. A block with a NaN, an infinity or a scale that half precision does not hold has the scale NaN, so
// that all of its values are. The bits depend on the values alone, not on the processor.
void encode_q8_0(const float* values, size_t count, uint8_t* blocks);

}  // namespace flashclient
