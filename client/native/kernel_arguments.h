// The arrays of kernels that compute in the dtype of a model: bfloat16, float16 or float32.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <optional>
#include <string>

#include "array_arguments.h"
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

inline Matrix matrix_of(const Weight& weight, Dtype dtype) {
    require(is_of(weight.dtype(), dtype),
            "weights must be float32 for dtype F32, bfloat16 or float16, or uint16, their bits, for BF16 and F16, and "
            "int8 with a scale");
    return {aligned(weight, "a matrix").data(), weight.shape(0), weight.shape(1)};
}

// The bias of a matrix with so many rows.
inline MatrixBias bias_of(const std::optional<RowValues>& bias, size_t rows, Dtype dtype) {
    if (!bias) return {};
    const bool is_fp32 = is_of(bias->dtype(), Dtype::f32);
    require(is_fp32 || is_of(bias->dtype(), dtype), "bias must be of the kernel's dtype or float32");
    require(aligned(*bias, "bias").shape(0) == rows, "bias must be [rows of the weight]");
    return {bias->data(), is_fp32};
}

}  // namespace flashclient
