#include "kernels/attention_block.h"

#include <algorithm>
#include <vector>

namespace flashclient {
namespace {

constexpr size_t ADDED_TOGETHER = 32768;      // elements that one thread adds: some microseconds
constexpr size_t KEPT_MAX = size_t{1} << 24;  // bytes of an array that a thread keeps from call to call

struct BlockScratch {
    std::vector<char> normed, query, attended, output, rounded;

    void shrink() {
        for (std::vector<char>* bytes : {&normed, &query, &attended, &output, &rounded}) {
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
    const auto behind = [&](const HeadRows& held) {
        return HeadRows{static_cast<char*>(held.data) + room.tokens * elements * bytes, held.sequence_stride,
                        held.head_stride};
    };
    const HeadRows query{scratch.query.data(), heads * tokens * elements, tokens * elements};
    inputs_.compute(block.attention, input, sequences, tokens, rotation,
                    {query, behind(room.keys), behind(room.values)});
    const auto all = [&](const HeadRows& held) {
        return AttentionRows{held.data, held.sequence_stride, held.head_stride, elements};
    };
    const AttentionShape shape{
        sequences, heads,      block.attention.key.weight.rows / elements, tokens, room.tokens + tokens, elements,
        elements,  block.scale};
    attention_.attend(shape, all(query), all(room.keys), all(room.values), mask, scratch.attended.data());
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
                            const FfnOfRows& ffn, const std::optional<Norm>& after_ffn, void* out) const {
    static thread_local std::vector<float> input, y;
    const size_t rows = sequences * tokens;
    const size_t hidden = block.output.weight.rows;
    const size_t count = rows * hidden;
    for (std::vector<float>* one : {&input, &y}) {
        const bool is_large = one->size() * sizeof(float) > KEPT_MAX;
        if (one->size() < count || is_large) *one = std::vector<float>(count);
    }
    compute(block, x, sequences, tokens, rotation, room, mask, out, input.data(), dtype_ != Dtype::f32);
    ffn(input.data(), rows, y.data());
    finish(y.data(), after_ffn, out, rows, hidden, out);
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
