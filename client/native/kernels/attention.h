// Attention over keys and values, which are read in place: out[t] = softmax(scale * q[t] . k + mask[t]) v.
//
// A head of keys serves a group of heads of queries (grouped-query attention, arXiv 2305.13245). Its keys and values
// are read once for up to 16 rows of queries.
#pragma once

#include <cstddef>
#include <string>

#include "kernels/kernels.h"
#include "kernels/workers.h"

namespace flashclient {

struct AttentionShape {
    size_t sequences;
    size_t heads;      // of queries, a multiple of key_heads
    size_t key_heads;  // of keys and values
    size_t tokens;     // of each sequence
    size_t keys;       // of a head, and its values
    size_t key_elements;
    size_t value_elements;
    float scale;
};

// [sequences, heads, tokens or keys, elements]; the elements of a row are contiguous. Strides are in elements.
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

  private:
    struct Call;     // the arguments of attend()
    struct Item;     // some rows of queries over one head of keys
    struct Scratch;  // the intermediate results of an item
    void attend_item(const Call& call, const Item& item, const Item& next) const;
    void weigh(const Call& call, const Item& item, Scratch& scratch) const;
    void fetch_rows(const Call& call, const Item& item, const AttentionRows& rows, size_t elements,
                    const Scratch& scratch) const;
    void address_rows(const AttentionRows& of, const Item& item, size_t begin, size_t count, const void** rows) const;
    void blend(const Call& call, const Item& item, Scratch& scratch) const;
    const char* row(const AttentionRows& rows, size_t sequence, size_t head, size_t index) const;

    Workers& workers_;
    Dtype dtype_;
    const Kernels& kernels_;
};

}  // namespace flashclient
