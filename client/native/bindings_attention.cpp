// flashclient._native: attention and what surrounds it, for Python. Computed without the GIL. Each array is checked
// against the others.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <optional>
#include <string>
#include <tuple>

#include "kernel_arguments.h"
#include "kernels/attention.h"
#include "kernels/attention_block.h"
#include "kernels/attention_inputs.h"
#include "kernels/norm.h"
#include "kernels/workers.h"
#include "layer_ffn.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using flashclient::aligned;
using flashclient::AnyWeight;
using flashclient::Attention;
using flashclient::AttentionBlock;
using flashclient::AttentionBlocks;
using flashclient::AttentionInputs;
using flashclient::AttentionLayer;
using flashclient::AttentionMask;
using flashclient::AttentionProjection;
using flashclient::AttentionRows;
using flashclient::AttentionShape;
using flashclient::bias_of;
using flashclient::Dtype;
using flashclient::HeadRows;
using flashclient::InstructionSet;
using flashclient::is_of;
using flashclient::KeyValueRoom;
using flashclient::LayerFfn;
using flashclient::Matrix;
using flashclient::matrix_of;
using flashclient::name_of;
using flashclient::Norm;
using flashclient::NormKind;
using flashclient::Norms;
using flashclient::Pairs;
using flashclient::require;
using flashclient::Rotation;
using flashclient::RowsIn;
using flashclient::RowsOut;
using flashclient::RowValues;
using flashclient::StepTimes;
using flashclient::Workers;

using Rows = nb::ndarray<nb::ro, nb::ndim<4>, nb::device::cpu>;  // with strides
using AttendedRows = nb::ndarray<nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using Tokens = nb::ndarray<nb::ro, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using TokensOut = nb::ndarray<nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Angles = nb::ndarray<nb::ro, nb::ndim<3>, nb::device::cpu>;  // with strides

template <typename Kernel>
void make_kernel(Kernel* self, Workers& workers, const std::string& dtype, const InstructionSet& instruction_set) {
    new (self) Kernel(workers, weightd::compute_dtype_named(dtype), name_of(instruction_set));
}

// ---- Norm ----

// A norm whose arrays Python has lent, for as long as this lives.
struct LentNorm {
    Norm norm;
    std::optional<RowValues> weight;
    std::optional<RowValues> bias;

    const Norm& checked(Dtype dtype, size_t width) const {
        require(norm.width == width, "the norm has another width");
        for (const std::optional<RowValues>* one : {&weight, &bias}) {
            require(!*one || is_of((*one)->dtype(), dtype), "the weights of a norm must be of the kernel's dtype");
        }
        return norm;
    }
};

void make_norm(LentNorm* self, const std::string& kind, size_t width, const std::optional<RowValues>& weight,
               const std::optional<RowValues>& bias, float eps, float offset) {
    require(width > 0, "a norm has at least one element");
    for (const std::optional<RowValues>* one : {&weight, &bias}) {
        require(!*one || aligned(**one, "a weight").shape(0) == width, "the weights of a norm must be [width]");
    }
    const auto named = [&] {
        if (kind == "rms") return NormKind::rms;
        if (kind == "scaled_rms") return NormKind::scaled_rms;
        require(kind == "layer", "a norm is of kind rms, scaled_rms or layer");
        return NormKind::layer;
    };
    new (self) LentNorm{
        {named(), width, weight ? weight->data() : nullptr, bias ? bias->data() : nullptr, eps, offset}, weight, bias};
}

void apply(const Norms& norms, const LentNorm& norm, const RowsIn& x, const RowsOut& y) {
    require(is_of(x.dtype(), norms.dtype()) && is_of(y.dtype(), norms.dtype()),
            "x and y must be of the kernel's dtype");
    require(aligned(x, "x").shape(0) == aligned(y, "y").shape(0) && x.shape(1) == y.shape(1),
            "x and y must have the same shape");
    const Norm& checked = norm.checked(norms.dtype(), x.shape(1));
    const nb::gil_scoped_release released;
    norms.apply(checked, x.data(), x.shape(0), y.data());
}

void bind_norm(nb::module_& module) {
    nb::class_<LentNorm>(module, "Norm", "A norm of rows; see client/native/kernels/norm.h.")
        .def("__init__", &make_norm, "kind"_a, "width"_a, "weight"_a.noconvert().none(), "bias"_a.noconvert().none(),
             "eps"_a, "offset"_a = 0.0f, "kind: rms, scaled_rms or layer. weight, bias: [width], read in place.");
    nb::class_<Norms>(module, "Norms")
        .def("__init__", &make_kernel<Norms>, "workers"_a, "dtype"_a, "instruction_set"_a = nb::none(),
             nb::keep_alive<1, 2>())
        .def("apply", &apply, "norm"_a, "x"_a.noconvert(), "y"_a.noconvert(),
             "y = the norm of the rows of x; both [rows, width] of the kernel's dtype.");
}

// ---- AttentionInputs ----

// One projection, whose arrays Python has lent.
struct LentProjection {
    AnyWeight weight;
    std::optional<RowValues> bias;
    const LentNorm* norm;
    float factor;

    AttentionProjection checked(Dtype dtype, size_t elements) const {
        const Matrix matrix = matrix_of(weight, dtype);
        require(matrix.rows % elements == 0, "the rows of a projection must be whole heads");
        AttentionProjection made{matrix, bias_of(bias, matrix.rows, dtype), std::nullopt, factor};
        if (norm != nullptr) {
            const size_t width = norm->norm.width;
            require(width == elements || width == matrix.rows, "a norm is of a head or of all heads");
            made.norm = norm->checked(dtype, width);
        }
        return made;
    }
};

Pairs pairs_named(const std::string& name) {
    if (name == "none") return Pairs::none;
    if (name == "halves") return Pairs::halves;
    require(name == "neighbours", "pairs are none, halves or neighbours");
    return Pairs::neighbours;
}

// cos or sin: the elements of a position are contiguous.
Rotation rotation_of(Pairs pairs, const std::optional<Angles>& given_cos, const std::optional<Angles>& given_sin,
                     Dtype dtype, const Tokens& x, size_t elements) {
    if (pairs == Pairs::none) return {};
    require(given_cos && given_sin, "rotating needs cos and sin");
    const Angles& cos = *given_cos;
    const Angles& sin = *given_sin;
    for (const Angles* one : {&cos, &sin}) {
        require(is_of(one->dtype(), dtype), "cos and sin must be of the kernel's dtype");
        require(one->shape(0) == x.shape(0) || one->shape(0) == 1,
                "cos and sin must be [sequences or 1, tokens, width]");
        require(one->shape(0) == cos.shape(0) && one->shape(1) == x.shape(1) && one->shape(2) == cos.shape(2),
                "cos and sin must have the same shape, with a row per token");
        require(one->shape(2) <= elements && one->shape(2) % 2 == 0, "cos and sin have at most the elements of a head");
        require(one->stride(2) == 1 || one->shape(2) <= 1, "the elements of cos and sin must be contiguous");
        require(one->stride(0) >= 0 && one->stride(1) >= 0, "strides must not be negative");
        require(one->stride(0) == cos.stride(0) && one->stride(1) == cos.stride(1),
                "cos and sin must be laid out alike");
        aligned(*one, "cos and sin");
    }
    const size_t sequence_stride = cos.shape(0) == 1 ? 0 : static_cast<size_t>(cos.stride(0));
    return {cos.data(), sin.data(), cos.shape(2), sequence_stride, static_cast<size_t>(cos.stride(1))};
}

HeadRows heads_of(const AttendedRows& rows) {
    const size_t head = rows.shape(2) * rows.shape(3);
    return {rows.data(), rows.shape(1) * head, head};
}

void compute(const AttentionInputs& inputs, const LentProjection& query, const LentProjection& key,
             const LentProjection& value, const std::string& pairs, const Tokens& x, const std::optional<Angles>& cos,
             const std::optional<Angles>& sin, const AttendedRows& query_out, const AttendedRows& key_out,
             const AttendedRows& value_out) {
    const Dtype dtype = inputs.dtype();
    const size_t elements = query_out.shape(3);
    require(elements > 0 && is_of(aligned(x, "x").dtype(), dtype), "x must be of the kernel's dtype");
    const AttentionLayer layer{query.checked(dtype, elements), key.checked(dtype, elements),
                               value.checked(dtype, elements), elements, pairs_named(pairs)};
    const AttendedRows* outs[] = {&query_out, &key_out, &value_out};
    const AttentionProjection* projections[] = {&layer.query, &layer.key, &layer.value};
    for (size_t i = 0; i < 3; i++) {
        const AttendedRows& out = *outs[i];
        require(projections[i]->weight.columns == x.shape(2), "weights must have as many columns as x");
        require(is_of(aligned(out, "an output").dtype(), dtype) && out.shape(0) == x.shape(0) &&
                    out.shape(1) * elements == projections[i]->weight.rows && out.shape(2) == x.shape(1) &&
                    out.shape(3) == elements,
                "outputs must be [sequences, heads, tokens, elements] of the kernel's dtype");
    }
    const Rotation rotation = rotation_of(layer.pairs, cos, sin, dtype, x, elements);
    const nb::gil_scoped_release released;
    inputs.compute(layer, x.data(), x.shape(0), x.shape(1), rotation,
                   {heads_of(query_out), heads_of(key_out), heads_of(value_out)});
}

void bind_attention_inputs(nb::module_& module) {
    nb::class_<LentProjection>(module, "AttentionProjection", "A projection of attention, with arrays read in place.")
        .def(
            "__init__",
            [](LentProjection* self, const AnyWeight& weight, const std::optional<RowValues>& bias,
               const LentNorm* norm, float factor) {
                new (self) LentProjection{weight, bias, norm, factor};
            },
            "weight"_a.noconvert(), "bias"_a.noconvert().none(), "norm"_a.none(), "factor"_a = 1.0f,
            nb::keep_alive<1, 2>(), nb::keep_alive<1, 4>(),
            "weight [heads * elements, columns]; norm: of a head or of all heads, after factor.");
    nb::class_<AttentionInputs>(module, "AttentionInputs", "See client/native/kernels/attention_inputs.h.")
        .def("__init__", &make_kernel<AttentionInputs>, "workers"_a, "dtype"_a, "instruction_set"_a = nb::none(),
             nb::keep_alive<1, 2>())
        .def(
            "compute", &compute, "query"_a, "key"_a, "value"_a, "pairs"_a, "x"_a.noconvert(),
            "cos"_a.noconvert().none(), "sin"_a.noconvert().none(), "query_out"_a.noconvert(), "key_out"_a.noconvert(),
            "value_out"_a.noconvert(),
            "Queries, keys and values [sequences, heads, tokens, elements] of x [sequences, tokens, columns]. cos, sin "
            "[sequences or 1, tokens, width]; pairs: none, halves or neighbours rotate together.");
}

// ---- Attention ----

// `rows` is [sequences, heads, tokens or keys, elements]. The stride of a dimension of size 1 is not used.
size_t stride_of(const Rows& rows, size_t dimension) {
    if (rows.shape(dimension) <= 1) return 0;
    require(rows.stride(dimension) >= 0, "strides must not be negative");
    return static_cast<size_t>(rows.stride(dimension));
}

AttentionRows rows_of(const Rows& rows, Dtype dtype, const char* name) {
    require(is_of(rows.dtype(), dtype), std::string(name) + " is not of the kernel's dtype");
    require(rows.shape(3) <= 1 || rows.stride(3) == 1, "the elements of a row must be contiguous");
    return {aligned(rows, name).data(), stride_of(rows, 0), stride_of(rows, 1), stride_of(rows, 2)};
}

AttentionMask mask_of(const std::optional<Rows>& mask, bool causal, const AttentionShape& shape) {
    require(!mask || !causal, "causal is for attention without a mask");
    if (!mask) return {causal ? AttentionMask::Kind::causal : AttentionMask::Kind::none};
    const bool boolean = mask->dtype() == nb::dtype<bool>();
    require(boolean || mask->dtype() == nb::dtype<float>(), "a mask must be of bool or float32");
    const size_t sizes[4] = {shape.sequences, shape.heads, shape.tokens, shape.keys};
    for (size_t i = 0; i < 4; i++) {
        require(mask->shape(i) == sizes[i] || mask->shape(i) == 1,
                "a mask must be [sequences, heads, tokens, keys], or 1 where it is the same for all");
    }
    const auto kind = boolean ? AttentionMask::Kind::boolean : AttentionMask::Kind::additive;
    return {kind,
            aligned(*mask, "the mask").data(),
            stride_of(*mask, 0),
            stride_of(*mask, 1),
            stride_of(*mask, 2),
            stride_of(*mask, 3)};
}

void attend(const Attention& attention, const Rows& query, const Rows& key, const Rows& value,
            const std::optional<Rows>& mask, bool causal, float scale, const AttendedRows& out) {
    const AttentionShape shape{query.shape(0), query.shape(1), key.shape(1),   query.shape(2),
                               key.shape(2),   key.shape(3),   value.shape(3), scale};
    require(shape.key_heads > 0 && shape.heads % shape.key_heads == 0, "heads must be a multiple of key heads");
    require(query.shape(3) == key.shape(3), "query and key must have the same elements");
    require(key.shape(0) == shape.sequences && value.shape(0) == shape.sequences && value.shape(1) == shape.key_heads &&
                value.shape(2) == shape.keys,
            "query, key and value must have the same sequences, key and value the same heads and rows");
    require(aligned(out, "out").shape(0) == shape.sequences && out.shape(1) == shape.tokens &&
                out.shape(2) == shape.heads && out.shape(3) == shape.value_elements,
            "out must be [sequences, tokens, heads, elements of a value]");
    require(is_of(out.dtype(), attention.dtype()), "out is not of the kernel's dtype");
    const AttentionRows queries = rows_of(query, attention.dtype(), "query");
    const AttentionRows keys = rows_of(key, attention.dtype(), "key");
    const AttentionRows values = rows_of(value, attention.dtype(), "value");
    const AttentionMask masked = mask_of(mask, causal, shape);
    const nb::gil_scoped_release released;
    attention.attend(shape, queries, keys, values, masked, out.data());
}

void bind_kernel(nb::module_& module) {
    nb::class_<Attention>(module, "Attention",
                          "Attention over keys and values in place; see client/native/kernels/attention.h.")
        .def("__init__", &make_kernel<Attention>, "workers"_a, "dtype"_a, "instruction_set"_a = nb::none(),
             nb::keep_alive<1, 2>())
        .def("attend", &attend, "query"_a.noconvert(), "key"_a.noconvert(), "value"_a.noconvert(),
             "mask"_a.noconvert().none(), "causal"_a, "scale"_a, "out"_a.noconvert(),
             "query [sequences, heads, tokens, elements]; key, value [sequences, key heads, keys, elements], with "
             "any strides between rows. mask [sequences, heads, tokens, keys], 1 where it is the same for all: "
             "bool (False: masked) or float32 (added; -inf: masked). causal, without a mask: token t attends to the "
             "keys up to t. out [sequences, tokens, heads, elements of a value].")
        .def_prop_ro("instruction_set", &Attention::instruction_set);
}

// ---- AttentionBlocks ----

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
    require(is_of(aligned(room, "a room").dtype(), dtype) && room.shape(0) == sequences &&
                room.shape(1) * elements == block.attention.key.weight.rows && room.shape(2) >= begin &&
                room.shape(2) - begin >= tokens && room.shape(3) == elements,
            "rooms must be [sequences, key heads, tokens and more, elements] of the kernel's dtype");
    HeadRows rows = heads_of(room);
    rows.data = static_cast<char*>(rows.data) + begin * elements * flashclient::bytes_of(dtype);
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
                            room_of(values, dtype, block, x.shape(0), begin, tokens), held};
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

// Returns the times of the FFN.
std::tuple<double, double, double, double> layer(const AttentionBlocks& blocks, const LentBlock& lent, const Tokens& x,
                                                 const std::optional<Angles>& cos, const std::optional<Angles>& sin,
                                                 const AttendedRows& keys, const AttendedRows& values, size_t begin,
                                                 size_t held, const std::optional<Rows>& mask, bool causal,
                                                 LayerFfn& ffn, const LentNorm* after_ffn, const TokensOut& out) {
    const Dtype dtype = blocks.dtype();
    require_like(out, x);
    require(is_of(out.dtype(), dtype) && ffn.hidden() == x.shape(2), "out and the FFN must be like x");
    const BlockCall call = checked_call(blocks, lent, x, cos, sin, keys, values, begin, held, mask, causal);
    std::optional<Norm> norm;
    if (after_ffn != nullptr) norm = after_ffn->checked(dtype, x.shape(2));
    const nb::gil_scoped_release released;
    StepTimes times;
    const auto of_rows = [&](const float* input, size_t rows, float* y) { times = ffn.run(input, rows, y); };
    blocks.layer(call.block, x.data(), x.shape(0), x.shape(1), call.rotation, call.room, call.mask, of_rows, norm,
                 out.data());
    return {times.predict_s, times.acquire_s, times.compute_s, times.wait_s};
}

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

void bind_attention_blocks(nb::module_& module) {
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
            "Attention.attend(), over all keys. ffn_input may be float32.")
        .def("layer", &layer, "block"_a, "x"_a.noconvert(), "cos"_a.noconvert().none(), "sin"_a.noconvert().none(),
             "keys"_a.noconvert(), "values"_a.noconvert(), "begin"_a, "held"_a, "mask"_a.noconvert().none(), "causal"_a,
             "ffn"_a, "after_ffn"_a.none(), "out"_a.noconvert(),
             "out = compute(), the FFN, and finish(), with the same bits. Returns the seconds that the FFN took for "
             "predicting, acquiring, computing and waiting.")
        .def("finish", &finish_block, "y"_a.noconvert(), "norm"_a.none(), "sum"_a.noconvert(), "out"_a.noconvert(),
             "out = sum + y [rows, hidden] float32, rounded and normed.");
}

}  // namespace

void bind_attention(nb::module_& module) {
    bind_kernel(module);
    bind_norm(module);
    bind_attention_inputs(module);
    bind_attention_blocks(module);
}
