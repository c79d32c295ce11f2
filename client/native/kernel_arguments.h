// The arrays of kernels that compute in the dtype of a model: bfloat16, float16 or float32.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "array_arguments.h"
#include "kernels/activation.h"
#include "kernels/kernels.h"
#include "kernels/linear.h"

namespace flashclient {

using Weight = nanobind::ndarray<nanobind::ro, nanobind::ndim<2>, nanobind::c_contig, nanobind::device::cpu>;
using RowValues = nanobind::ndarray<nanobind::ro, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;
using RowsIn = nanobind::ndarray<nanobind::ro, nanobind::ndim<2>, nanobind::c_contig, nanobind::device::cpu>;
using RowsOut = nanobind::ndarray<nanobind::ndim<2>, nanobind::c_contig, nanobind::device::cpu>;
using InstructionSet = std::optional<std::string>;

inline const char* name_of(const InstructionSet& instruction_set) {
    return instruction_set ? instruction_set->c_str() : nullptr;
}

// Whether elements of `given` are of `dtype`.
inline bool is_of(const nanobind::dlpack::dtype& given, Dtype dtype) {
    constexpr nanobind::dlpack::dtype BFLOAT16{static_cast<uint8_t>(nanobind::dlpack::dtype_code::Bfloat), 16, 1};
    constexpr nanobind::dlpack::dtype FLOAT16{static_cast<uint8_t>(nanobind::dlpack::dtype_code::Float), 16, 1};
    constexpr nanobind::dlpack::dtype BITS16 =
        nanobind::dtype<uint16_t>();  // the bits of either: numpy has no bfloat16
    switch (dtype) {
        case Dtype::f32:
            return given == nanobind::dtype<float>();
        case Dtype::bf16:
            return given == BFLOAT16 || given == BITS16;
        case Dtype::f16:
            return given == FLOAT16 || given == BITS16;
        case Dtype::i8:
            return given == nanobind::dtype<int8_t>();
    }
    return false;
}

// A matrix whose rows are in blocks, in the place of a Weight. The bytes are read in place.
struct EncodedMatrix {
    Array<const uint8_t, 2> rows;  // [rows, bytes]
    BlockFormat format;
    size_t columns;

    EncodedMatrix(const Encoding& encoding, const Array<const uint8_t, 2>& rows, size_t columns)
        : rows(rows), format(), columns(columns) {
        const auto known = encoding.block_format();
        require(known.has_value(), "no kernel for a matrix of encoding '" + encoding.format + "'");
        require(columns % encoding.block_values == 0 && rows.shape(1) == encoding.bytes_of(columns),
                "the rows of a matrix must be whole blocks of " + encoding.format);
        format = *known;
    }
};

using AnyWeight = std::variant<const EncodedMatrix*, Weight>;

inline Matrix matrix_of(const EncodedMatrix& weight) {
    return {weight.rows.data(), weight.rows.shape(0), weight.columns, weight.format};
}

inline Matrix matrix_of(const Weight& weight, Dtype dtype) {
    require(is_of(weight.dtype(), dtype),
            "weights must be float32 for dtype F32, bfloat16 or float16, or uint16, their bits, for BF16 and F16, and "
            "int8 with a scale");
    return {aligned(weight, "a matrix").data(), weight.shape(0), weight.shape(1)};
}

inline Matrix matrix_of(const AnyWeight& weight, Dtype dtype) {
    if (const auto* encoded = std::get_if<const EncodedMatrix*>(&weight)) {
        require(*encoded != nullptr, "a weight is missing");
        return matrix_of(**encoded);
    }
    return matrix_of(std::get<Weight>(weight), dtype);
}

// The bias of a matrix with so many rows.
inline MatrixBias bias_of(const std::optional<RowValues>& bias, size_t rows, Dtype dtype) {
    if (!bias) return {};
    const bool is_fp32 = is_of(bias->dtype(), Dtype::f32);
    require(is_fp32 || is_of(bias->dtype(), dtype), "bias must be of the kernel's dtype or float32");
    require(aligned(*bias, "bias").shape(0) == rows, "bias must be [rows of the weight]");
    return {bias->data(), is_fp32};
}

// A message Activation of weightd.proto, whose fields are as there, or the name of a function.
inline Activation activation_of(const nanobind::object& given) {
    if (nanobind::isinstance<nanobind::str>(given)) return {function_named(nanobind::cast<std::string>(given))};
    Activation activation{function_named(nanobind::cast<std::string>(given.attr("function")))};
    const auto set = [&](const char* field, float& value) {
        if (nanobind::cast<bool>(given.attr("HasField")(field))) value = nanobind::cast<float>(given.attr(field));
    };
    auto& parameters = activation.parameters;
    parameters[0] = nanobind::cast<float>(given.attr("parameter"));
    const auto further = nanobind::cast<std::vector<float>>(nanobind::list(given.attr("further")));
    require(further.size() < parameters.size(), "an activation has at most four parameters");
    std::copy(further.begin(), further.end(), parameters.begin() + 1);
    activation.up_offset = nanobind::cast<float>(given.attr("up_offset"));
    set("gate_factor", activation.gate_factor);
    set("gate_max", activation.gate_max);
    set("activation_max", activation.activation_max);
    set("up_limit", activation.up_limit);
    return activation;
}

}  // namespace flashclient
