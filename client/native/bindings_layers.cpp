// flashclient._native: native decoder layers, for Python. Computed without the GIL. Each array is checked against the
// others.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "attention_arguments.h"
#include "kernels/attention_block.h"
#include "layer_ffn.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using flashclient::aligned;
using flashclient::Angles;
using flashclient::AttendedRows;
using flashclient::Attention;
using flashclient::AttentionBlock;
using flashclient::AttentionBlocks;
using flashclient::AttentionLayer;
using flashclient::AttentionMask;
using flashclient::AttentionProjection;
using flashclient::AttentionShape;
using flashclient::Dtype;
using flashclient::HeadRows;
using flashclient::heads_of;
using flashclient::in_blocks;
using flashclient::is_of;
using flashclient::KeyValueRoom;
using flashclient::LayerFfn;
using flashclient::LentNorm;
using flashclient::LentProjection;
using flashclient::make_kernel;
using flashclient::mask_of;
using flashclient::Norm;
using flashclient::Pairs;
using flashclient::pairs_named;
using flashclient::require;
using flashclient::Rotation;
using flashclient::rotation_of;
using flashclient::Rows;
using flashclient::StepTimes;
using flashclient::Tokens;
using flashclient::TokensOut;

// A block whose parts Python has lent.
struct LentBlock {
    const LentProjection *query, *key, *value, *output;
    const LentNorm *before, *after, *before_ffn;
    Pairs pairs;
    size_t elements;
    float scale;

    AttentionBlock checked(Dtype dtype, size_t hidden) const {
        const AttentionLayer attention{query->checked(dtype, elements), key->checked(dtype, elements),
                                       value->checked(dtype, elements), elements, pairs};
        AttentionBlock block{attention, output->checked(dtype, 1), std::nullopt, std::nullopt, std::nullopt, scale};
        for (const AttentionProjection* one : {&block.attention.query, &block.attention.key, &block.attention.value}) {
            require(one->weight.columns == hidden, "weights must have as many columns as x");
        }
        const size_t heads = block.attention.query.weight.rows / elements;
        const size_t key_heads = block.attention.key.weight.rows / elements;
        require(key_heads > 0 && heads % key_heads == 0, "heads must be a multiple of key heads");
        require(block.attention.value.weight.rows == key_heads * elements, "keys and values must have the same heads");
        require(block.output.weight.rows == hidden && block.output.weight.columns == heads * elements,
                "the output's weight must be [columns of x, heads * elements]");
        const auto set = [&](std::optional<Norm>& norm, const LentNorm* lent) {
            if (lent != nullptr) norm = lent->checked(dtype, hidden);
        };
        set(block.before, before);
        set(block.after, after);
        set(block.before_ffn, before_ffn);
        return block;
    }
};

void make_block(LentBlock* self, const LentProjection* query, const LentProjection* key, const LentProjection* value,
                const LentProjection* output, const LentNorm* before, const LentNorm* after, const LentNorm* before_ffn,
                const std::string& pairs, size_t elements, float scale) {
    require(elements > 0, "a head has at least one element");
    new (self) LentBlock{query, key, value, output, before, after, before_ffn, pairs_named(pairs), elements, scale};
}

HeadRows room_of(const AttendedRows& room, Dtype dtype, const AttentionBlock& block, size_t sequences, size_t begin,
                 size_t tokens) {
    const size_t elements = block.attention.elements;
    const bool blocks = in_blocks(room.dtype());
    const size_t row = blocks ? Attention::block_row_bytes(elements) : elements;
    require((blocks || is_of(aligned(room, "a room").dtype(), dtype)) && room.shape(0) == sequences &&
                room.shape(1) * elements == block.attention.key.weight.rows && room.shape(2) >= begin &&
                room.shape(2) - begin >= tokens && room.shape(3) == row,
            "rooms must be [sequences, key heads, tokens and more, elements] of the kernel's dtype, or of uint8 with "
            "rows in blocks");
    HeadRows rows = heads_of(room);
    rows.data = static_cast<char*>(rows.data) + begin * row * room.itemsize();
    return rows;
}

// What a call of a block computes on, checked.
struct BlockCall {
    AttentionBlock block;
    KeyValueRoom room;
    AttentionMask mask;
    Rotation rotation;
};

BlockCall checked_call(const AttentionBlocks& blocks, const LentBlock& lent, const Tokens& x,
                       const std::optional<Angles>& cos, const std::optional<Angles>& sin, const AttendedRows& keys,
                       const AttendedRows& values, size_t begin, size_t held, const std::optional<Rows>& mask,
                       bool causal) {
    const Dtype dtype = blocks.dtype();
    require(is_of(aligned(x, "x").dtype(), dtype), "x must be of the kernel's dtype");
    require(held <= keys.shape(2), "there is no room for so many tokens");
    const AttentionBlock block = lent.checked(dtype, x.shape(2));
    const size_t tokens = held + x.shape(1);
    const KeyValueRoom room{room_of(keys, dtype, block, x.shape(0), begin, tokens),
                            room_of(values, dtype, block, x.shape(0), begin, tokens), held, in_blocks(keys.dtype())};
    require(in_blocks(values.dtype()) == room.in_blocks, "keys and values must both be in blocks, or neither");
    const AttentionShape shape{x.shape(0),    block.attention.query.weight.rows / lent.elements,
                               keys.shape(1), x.shape(1),
                               tokens,        lent.elements,
                               lent.elements, lent.scale};
    return {block, room, mask_of(mask, causal, shape), rotation_of(lent.pairs, cos, sin, dtype, x, lent.elements)};
}

void require_like(const TokensOut& out, const Tokens& x) {
    require(
        aligned(out, "an output").shape(0) == x.shape(0) && out.shape(1) == x.shape(1) && out.shape(2) == x.shape(2),
        "outputs must be of the shape of x");
}

void compute_block(const AttentionBlocks& blocks, const LentBlock& lent, const Tokens& x,
                   const std::optional<Angles>& cos, const std::optional<Angles>& sin, const AttendedRows& keys,
                   const AttendedRows& values, size_t begin, size_t held, const std::optional<Rows>& mask, bool causal,
                   const TokensOut& sum, const TokensOut& ffn_input) {
    const Dtype dtype = blocks.dtype();
    const bool ffn_in_fp32 = dtype != Dtype::f32 && is_of(ffn_input.dtype(), Dtype::f32);
    require(is_of(sum.dtype(), dtype) && (ffn_in_fp32 || is_of(ffn_input.dtype(), dtype)),
            "outputs must be of the dtype of x, or the input of the FFN float32");
    for (const TokensOut* one : {&sum, &ffn_input}) require_like(*one, x);
    const BlockCall call = checked_call(blocks, lent, x, cos, sin, keys, values, begin, held, mask, causal);
    const nb::gil_scoped_release released;
    blocks.compute(call.block, x.data(), x.shape(0), x.shape(1), call.rotation, call.room, call.mask, sum.data(),
                   ffn_input.data(), ffn_in_fp32);
}

// A layer of a run: what was checked, and what Python has lent for it.
struct LayerCall {
    const AttentionBlocks* blocks;
    BlockCall call;
    Tokens x;
    LayerFfn* ffn;
    std::optional<Norm> after_ffn;
    TokensOut out;
    std::optional<Angles> cos, sin;
    AttendedRows keys, values;
    std::optional<Rows> mask;
    nb::object lent[4];
};

using Times = std::tuple<double, double, double, double>;

// Decoder layers that are one call. Each is added with its arguments, which stay alive until clear().
class LayerCalls {
  public:
    void add(const AttentionBlocks& blocks, const LentBlock& lent, const Tokens& x, const std::optional<Angles>& cos,
             const std::optional<Angles>& sin, const AttendedRows& keys, const AttendedRows& values, size_t begin,
             size_t held, const std::optional<Rows>& mask, bool causal, LayerFfn& ffn, const LentNorm* after_ffn,
             const TokensOut& out) {
        const Dtype dtype = blocks.dtype();
        require_like(out, x);
        require(is_of(out.dtype(), dtype) && ffn.hidden() == x.shape(2), "out and the FFN must be like x");
        std::optional<Norm> norm;
        if (after_ffn != nullptr) norm = after_ffn->checked(dtype, x.shape(2));
        calls_.push_back({&blocks,
                          checked_call(blocks, lent, x, cos, sin, keys, values, begin, held, mask, causal),
                          x,
                          &ffn,
                          norm,
                          out,
                          cos,
                          sin,
                          keys,
                          values,
                          mask,
                          {nb::find(blocks), nb::find(lent), nb::find(ffn), nb::find(after_ffn)}});
    }

    // Computes all, in the order in which they were added. It may be called again, after an exception.
    std::vector<Times> run() const {
        std::vector<Times> times;
        times.reserve(calls_.size());
        const nb::gil_scoped_release released;
        for (const LayerCall& one : calls_) times.push_back(computed(one));
        return times;
    }

    void clear() { calls_.clear(); }

  private:
    static Times computed(const LayerCall& one) {
        StepTimes times;
        const auto ffn = [&](const float* input, size_t rows, float* y) { times = one.ffn->run(input, rows, y); };
        AttentionBlocks::Expected expected;
        if (one.ffn->expects(one.blocks->dtype())) {
            expected = [&](const void* input, size_t rows) { one.ffn->expect(input, rows); };
        }
        one.blocks->layer(one.call.block, one.x.data(), one.x.shape(0), one.x.shape(1), one.call.rotation,
                          one.call.room, one.call.mask, expected, ffn, one.after_ffn, one.out.data());
        return {times.predict_s, times.acquire_s, times.compute_s, times.wait_s};
    }

    std::vector<LayerCall> calls_;
};

void finish_block(const AttentionBlocks& blocks, const flashclient::Array<const float, 2>& y, const LentNorm* norm,
                  const Tokens& sum, const TokensOut& out) {
    const size_t hidden = sum.shape(2);
    const size_t rows = sum.shape(0) * sum.shape(1);
    require(aligned(y, "y").shape(0) == rows && y.shape(1) == hidden, "y must be [rows, hidden]");
    require(is_of(aligned(sum, "sum").dtype(), blocks.dtype()) && is_of(aligned(out, "out").dtype(), blocks.dtype()) &&
                out.shape(0) == sum.shape(0) && out.shape(1) == sum.shape(1) && out.shape(2) == hidden,
            "sum and out must be of the same shape and the kernel's dtype");
    std::optional<Norm> checked;
    if (norm != nullptr) checked = norm->checked(blocks.dtype(), hidden);
    const nb::gil_scoped_release released;
    blocks.finish(y.data(), checked, sum.data(), rows, hidden, out.data());
}

}  // namespace

void bind_layers(nb::module_& module) {
    nb::class_<LentBlock>(module, "AttentionBlock", "See client/native/kernels/attention_block.h.")
        .def("__init__", &make_block, "query"_a, "key"_a, "value"_a, "output"_a, "before"_a.none(), "after"_a.none(),
             "before_ffn"_a.none(), "pairs"_a, "elements"_a, "scale"_a, nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(),
             nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>(), nb::keep_alive<1, 7>(),
             nb::keep_alive<1, 8>());
    nb::class_<AttentionBlocks>(module, "AttentionBlocks")
        .def("__init__", &make_kernel<AttentionBlocks>, "workers"_a, "dtype"_a, "instruction_set"_a = nb::none(),
             nb::keep_alive<1, 2>())
        .def(
            "compute", &compute_block, "block"_a, "x"_a.noconvert(), "cos"_a.noconvert().none(),
            "sin"_a.noconvert().none(), "keys"_a.noconvert(), "values"_a.noconvert(), "begin"_a, "held"_a,
            "mask"_a.noconvert().none(), "causal"_a, "sum"_a.noconvert(), "ffn_input"_a.noconvert(),
            "sum = x [sequences, tokens, hidden] + attention; ffn_input: its norm. keys, values [sequences, key heads, "
            "capacity, elements]: at `begin` `held` tokens, and room behind them for these. mask, causal: as for "
            "Attention.attend(), over all keys. ffn_input may be float32. Rooms of uint8 hold rows in blocks.")
        .def("finish", &finish_block, "y"_a.noconvert(), "norm"_a.none(), "sum"_a.noconvert(), "out"_a.noconvert(),
             "out = sum + y [rows, hidden] float32, rounded and normed.");
    nb::class_<LayerCalls>(module, "LayerCalls", "Decoder layers that are one call.")
        .def(nb::init<>())
        .def("add", &LayerCalls::add, "blocks"_a, "block"_a, "x"_a.noconvert(), "cos"_a.noconvert().none(),
             "sin"_a.noconvert().none(), "keys"_a.noconvert(), "values"_a.noconvert(), "begin"_a, "held"_a,
             "mask"_a.noconvert().none(), "causal"_a, "ffn"_a, "after_ffn"_a.none(), "out"_a.noconvert(),
             "A layer after those before: out = AttentionBlocks.compute(), the FFN, and finish(), with the same bits. "
             "x may be the out of a layer before.")
        .def("run", &LayerCalls::run,
             "Computes all layers, in order. Returns for each the seconds that its FFN took for predicting, acquiring, "
             "computing and waiting. After an exception it may be called again.")
        .def("clear", &LayerCalls::clear);
}
