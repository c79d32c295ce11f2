#include "kernels/attention_block.h"

#include <algorithm>
#include <vector>

namespace flashclient {
namespace {

constexpr size_t ADDED_TOGETHER = 32768;      // elements that one thread adds: some microseconds
constexpr size_t ENCODED_ALONE = 8192;        // values that one thread encodes sooner than it wakes another
constexpr size_t KEPT_MAX = size_t{1} << 24;  // bytes of an array that a thread keeps from call to call

struct BlockScratch {
    std::vector<char> normed, query, keys, values, attended, output, rounded;

    void shrink() {
        for (std::vector<char>* bytes : {&normed, &query, &keys, &values, &attended, &output, &rounded}) {
            if (bytes->capacity() > KEPT_MAX) *bytes = {};
        }
    }
};

// Kept from call to call, because allocating takes longer than a small call.
BlockScratch& scratch_of_thread() {
    static thread_local BlockScratch scratch;
    return scratch;
}

}  // namespace

void AttentionBlocks::compute(const AttentionBlock& block, const void* x, size_t sequences, size_t tokens,
                              const Rotation& rotation, const KeyValueRoom& room, const AttentionMask& mask, void* sum,
                              void* ffn_input, bool ffn_in_fp32) const {
    BlockScratch& scratch = scratch_of_thread();
    const size_t bytes = bytes_of(dtype_);
    const size_t rows = sequences * tokens;
    const size_t hidden = block.output.weight.rows;
    const size_t elements = block.attention.elements;
    const size_t query_row = block.attention.query.weight.rows;
    const size_t heads = query_row / elements;
    scratch.query.resize(rows * query_row * bytes);
    scratch.attended.resize(rows * query_row * bytes);
    scratch.output.resize(rows * hidden * bytes);
    const void* input = x;
    if (block.before) {
        scratch.normed.resize(rows * hidden * bytes);
        norms_.apply(*block.before, x, rows, scratch.normed.data());
        input = scratch.normed.data();
    }
    const size_t key_heads = block.attention.key.weight.rows / elements;
    const HeadRows query{scratch.query.data(), heads * tokens * elements, tokens * elements};
    const HeadRows keys = new_rows(room.keys, room, key_heads, rows, tokens, elements, scratch.keys);
    const HeadRows values = new_rows(room.values, room, key_heads, rows, tokens, elements, scratch.values);
    inputs_.compute(block.attention, input, sequences, tokens, rotation, {query, keys, values});
    if (room.in_blocks) {
        encode(keys, room.keys, room, sequences, key_heads, tokens, elements);
        encode(values, room.values, room, sequences, key_heads, tokens, elements);
    }
    const auto rows_of = [&](const HeadRows& of, bool in_blocks) {
        const size_t unit = in_blocks ? 1 : bytes;
        const size_t row = in_blocks ? Attention::block_row_bytes(elements) : elements * bytes;
        return AttentionRows{of.data, of.sequence_stride * unit, of.head_stride * unit, row};
    };
    const AttentionShape shape{sequences, heads,    key_heads,   tokens,        room.tokens + tokens,
                               elements,  elements, block.scale, room.in_blocks};
    attention_.attend(shape, rows_of(query, false), rows_of(room.keys, room.in_blocks),
                      rows_of(room.values, room.in_blocks), mask, scratch.attended.data());
    const Linear::Projection output{block.output.weight, block.output.bias, scratch.output.data()};
    linear_.project({&output, 1}, scratch.attended.data(), rows);
    if (block.after) norms_.apply(*block.after, scratch.output.data(), rows, scratch.output.data());
    add(x, scratch.output.data(), rows * hidden, sum);
    const void* ffn = sum;
    if (block.before_ffn) {
        void* normed = ffn_in_fp32 ? scratch.output.data() : ffn_input;
        norms_.apply(*block.before_ffn, sum, rows, normed);
        ffn = normed;
    }
    if (ffn_in_fp32) {
        kernels_.upcast(ffn, rows * hidden, static_cast<float*>(ffn_input));
    } else if (ffn != ffn_input) {
        std::copy_n(static_cast<const char*>(ffn), rows * hidden * bytes, static_cast<char*>(ffn_input));
    }
    scratch.shrink();
}

HeadRows AttentionBlocks::new_rows(const HeadRows& held, const KeyValueRoom& room, size_t heads, size_t rows,
                                   size_t tokens, size_t elements, std::vector<char>& scratch) const {
    if (!room.in_blocks) {
        return {static_cast<char*>(held.data) + room.tokens * elements * bytes_of(dtype_), held.sequence_stride,
                held.head_stride};
    }
    scratch.resize(rows * heads * elements * bytes_of(dtype_));
    return {scratch.data(), heads * tokens * elements, tokens * elements};
}

void AttentionBlocks::encode(const HeadRows& rows, const HeadRows& held, const KeyValueRoom& room, size_t sequences,
                             size_t heads, size_t tokens, size_t elements) const {
    const size_t row_bytes = Attention::block_row_bytes(elements);
    const auto encode_head = [&](size_t index) {
        static thread_local std::vector<float> values;
        values.resize(elements);
        const size_t sequence = index / heads, head = index % heads;
        const char* from = static_cast<const char*>(rows.data) +
                           (sequence * rows.sequence_stride + head * rows.head_stride) * bytes_of(dtype_);
        auto* to = static_cast<uint8_t*>(held.data) + sequence * held.sequence_stride + head * held.head_stride +
                   room.tokens * row_bytes;
        for (size_t t = 0; t < tokens; t++, to += row_bytes) {
            kernels_.upcast(from + t * elements * bytes_of(dtype_), elements, values.data());
            encode_q8_0(values.data(), elements, to);
        }
    };
    const size_t items = sequences * heads;
    if (items * tokens * elements <= ENCODED_ALONE) {
        for (size_t item = 0; item < items; item++) encode_head(item);
    } else {
        workers_.run(items, encode_head);
    }
}

void AttentionBlocks::finish(const float* y, const std::optional<Norm>& norm, const void* sum, size_t rows,
                             size_t hidden, void* out) const {
    BlockScratch& scratch = scratch_of_thread();
    scratch.rounded.resize(rows * hidden * bytes_of(dtype_));
    kernels_.downcast(y, rows * hidden, scratch.rounded.data());
    if (norm) norms_.apply(*norm, scratch.rounded.data(), rows, scratch.rounded.data());
    add(sum, scratch.rounded.data(), rows * hidden, out);
    scratch.shrink();
}

void AttentionBlocks::layer(const AttentionBlock& block, const void* x, size_t sequences, size_t tokens,
                            const Rotation& rotation, const KeyValueRoom& room, const AttentionMask& mask,
                            const Expected& expected, const FfnOfRows& ffn, const std::optional<Norm>& after_ffn,
                            void* out) const {
    static thread_local std::vector<float> input, y;
    const size_t rows = sequences * tokens;
    const size_t hidden = block.output.weight.rows;
    const size_t count = rows * hidden;
    for (std::vector<float>* one : {&input, &y}) {
        const bool is_large = one->size() * sizeof(float) > KEPT_MAX;
        if (one->size() < count || is_large) *one = std::vector<float>(count);
    }
    if (expected) expect(block, x, rows, expected);
    compute(block, x, sequences, tokens, rotation, room, mask, out, input.data(), dtype_ != Dtype::f32);
    ffn(input.data(), rows, y.data());
    finish(y.data(), after_ffn, out, rows, hidden, out);
}

void AttentionBlocks::expect(const AttentionBlock& block, const void* x, size_t rows, const Expected& expected) const {
    if (!block.before_ffn) return expected(x, rows);
    std::vector<char>& normed = scratch_of_thread().normed;
    normed.resize(rows * block.output.weight.rows * bytes_of(dtype_));
    norms_.apply(*block.before_ffn, x, rows, normed.data());
    expected(normed.data(), rows);
}

void AttentionBlocks::add(const void* x, const void* y, size_t count, void* sum) const {
    const size_t bytes = bytes_of(dtype_);
    const auto some = [&](size_t item) {
        static thread_local std::vector<float> left, right;
        const size_t first = item * ADDED_TOGETHER;
        const size_t added = std::min(ADDED_TOGETHER, count - first);
        left.resize(ADDED_TOGETHER);
        right.resize(ADDED_TOGETHER);
        kernels_.upcast(static_cast<const char*>(x) + first * bytes, added, left.data());
        kernels_.upcast(static_cast<const char*>(y) + first * bytes, added, right.data());
        for (size_t i = 0; i < added; i++) left[i] += right[i];
        kernels_.downcast(left.data(), added, static_cast<char*>(sum) + first * bytes);
    };
    if (count <= ADDED_TOGETHER) return some(0);
    workers_.run(divide_up(count, ADDED_TOGETHER), some);
}

}  // namespace flashclient
