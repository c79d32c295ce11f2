// flashclient._native: attention and what surrounds it, for Python. Computed without the GIL. Each array is checked
// against the others.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <string>

#include "attention_arguments.h"
#include "kernels/attention.h"
#include "kernels/attention_inputs.h"
#include "kernels/norm.h"
#include "kernels/workers.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using flashclient::aligned;
using flashclient::Angles;
using flashclient::AnyWeight;
using flashclient::AttendedRows;
using flashclient::Attention;
using flashclient::AttentionInputs;
using flashclient::AttentionLayer;
using flashclient::AttentionMask;
using flashclient::AttentionProjection;
using flashclient::AttentionRows;
using flashclient::AttentionShape;
using flashclient::block_rows_of;
using flashclient::Dtype;
using flashclient::heads_of;
using flashclient::in_blocks;
using flashclient::is_of;
using flashclient::LentNorm;
using flashclient::LentProjection;
using flashclient::make_kernel;
using flashclient::mask_of;
using flashclient::Norm;
using flashclient::NormKind;
using flashclient::Norms;
using flashclient::pairs_named;
using flashclient::require;
using flashclient::Rotation;
using flashclient::rotation_of;
using flashclient::Rows;
using flashclient::rows_of;
using flashclient::RowsIn;
using flashclient::RowsOut;
using flashclient::RowValues;
using flashclient::Tokens;

// ---- Norm ----

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

void attend(const Attention& attention, const Rows& query, const Rows& key, const Rows& value,
            const std::optional<Rows>& mask, bool causal, float scale, const AttendedRows& out, float softcap,
            const std::optional<RowValues>& sinks) {
    const Dtype dtype = attention.dtype();
    const bool blocks = in_blocks(key.dtype());
    AttentionShape shape{query.shape(0), query.shape(1), key.shape(1), query.shape(2), key.shape(2),
                         query.shape(3), out.shape(3),   scale,        blocks,         softcap};
    require(softcap >= 0, "softcap must be 0 or more, not " + std::to_string(softcap));
    if (sinks) {
        require(sinks->dtype() == nb::dtype<float>() && sinks->shape(0) == shape.heads,
                "sinks must be float32, one of each of " + std::to_string(shape.heads) + " heads, not " +
                    std::to_string(sinks->shape(0)));
        shape.sinks = static_cast<const float*>(aligned(*sinks, "sinks").data());
    }
    require(shape.key_heads > 0 && shape.heads % shape.key_heads == 0, "heads must be a multiple of key heads");
    require(blocks || (key.shape(3) == shape.key_elements && value.shape(3) == shape.value_elements),
            "query and key must have the same elements, and so must value and out");
    require(key.shape(0) == shape.sequences && value.shape(0) == shape.sequences && value.shape(1) == shape.key_heads &&
                value.shape(2) == shape.keys,
            "query, key and value must have the same sequences, key and value the same heads and rows");
    require(
        aligned(out, "out").shape(0) == shape.sequences && out.shape(1) == shape.tokens && out.shape(2) == shape.heads,
        "out must be [sequences, tokens, heads, elements of a value]");
    require(is_of(out.dtype(), dtype), "out is not of the kernel's dtype");
    const AttentionRows queries = rows_of(query, dtype, "query");
    const AttentionRows keys = blocks ? block_rows_of(key, shape.key_elements, "key") : rows_of(key, dtype, "key");
    const AttentionRows values =
        blocks ? block_rows_of(value, shape.value_elements, "value") : rows_of(value, dtype, "value");
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
             "mask"_a.noconvert().none(), "causal"_a, "scale"_a, "out"_a.noconvert(), "softcap"_a = 0.0f,
             "sinks"_a.noconvert().none() = nb::none(),
             "query [sequences, heads, tokens, elements]; key, value [sequences, key heads, keys, elements], with "
             "any strides between rows. mask [sequences, heads, tokens, keys], 1 where it is the same for all: "
             "bool (False: masked) or float32 (added; -inf: masked). causal, without a mask: token t attends to the "
             "keys up to t. out [sequences, tokens, heads, elements of a value]. key and value may be uint8: rows in "
             "blocks of Q8_0, with zeros up to a whole block. Scores become softcap * tanh(score / softcap), 0: they "
             "stay. sinks [heads] float32 are scores without a value.")
        .def_prop_ro("instruction_set", &Attention::instruction_set);
}

}  // namespace

void bind_attention(nb::module_& module) {
    bind_kernel(module);
    bind_norm(module);
    bind_attention_inputs(module);
}
