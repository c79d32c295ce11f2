// The arguments of kernels of attention, as Python lends them, with their checks.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <optional>
#include <string>

#include "kernel_arguments.h"
#include "kernels/attention.h"
#include "kernels/attention_inputs.h"
#include "kernels/norm.h"
#include "kernels/workers.h"

namespace flashclient {

using Rows = nanobind::ndarray<nanobind::ro, nanobind::ndim<4>, nanobind::device::cpu>;  // with strides
using AttendedRows = nanobind::ndarray<nanobind::ndim<4>, nanobind::c_contig, nanobind::device::cpu>;
using Tokens = nanobind::ndarray<nanobind::ro, nanobind::ndim<3>, nanobind::c_contig, nanobind::device::cpu>;
using TokensOut = nanobind::ndarray<nanobind::ndim<3>, nanobind::c_contig, nanobind::device::cpu>;
using Angles = nanobind::ndarray<nanobind::ro, nanobind::ndim<3>, nanobind::device::cpu>;  // with strides

template <typename Kernel>
void make_kernel(Kernel* self, Workers& workers, const std::string& dtype, const InstructionSet& instruction_set) {
    new (self) Kernel(workers, weightd::compute_dtype_named(dtype), name_of(instruction_set));
}

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

inline Pairs pairs_named(const std::string& name) {
    if (name == "none") return Pairs::none;
    if (name == "halves") return Pairs::halves;
    require(name == "neighbours", "pairs are none, halves or neighbours");
    return Pairs::neighbours;
}

// cos or sin: the elements of a position are contiguous.
inline Rotation rotation_of(Pairs pairs, const std::optional<Angles>& given_cos, const std::optional<Angles>& given_sin,
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

inline HeadRows heads_of(const AttendedRows& rows) {
    const size_t head = rows.shape(2) * rows.shape(3);
    return {rows.data(), rows.shape(1) * head, head};
}

// `rows` is [sequences, heads, tokens or keys, elements]. The stride of a dimension of size 1 is not used.
inline size_t stride_of(const Rows& rows, size_t dimension) {
    if (rows.shape(dimension) <= 1) return 0;
    require(rows.stride(dimension) >= 0, "strides must not be negative");
    return static_cast<size_t>(rows.stride(dimension));
}

inline AttentionRows strided(const Rows& rows, const char* name) {
    require(rows.shape(3) <= 1 || rows.stride(3) == 1, "the elements of a row must be contiguous");
    const size_t bytes = rows.itemsize();
    return {aligned(rows, name).data(), stride_of(rows, 0) * bytes, stride_of(rows, 1) * bytes,
            stride_of(rows, 2) * bytes};
}

inline AttentionRows rows_of(const Rows& rows, Dtype dtype, const char* name) {
    require(is_of(rows.dtype(), dtype), std::string(name) + " is not of the kernel's dtype");
    return strided(rows, name);
}

// Keys and values in Attention::BLOCKS are arrays of bytes.
inline bool in_blocks(const nanobind::dlpack::dtype& dtype) { return dtype == nanobind::dtype<uint8_t>(); }

inline AttentionRows block_rows_of(const Rows& rows, size_t elements, const char* name) {
    require(in_blocks(rows.dtype()) && rows.shape(3) == Attention::block_row_bytes(elements),
            "keys and values in blocks must both be uint8, with rows of whole blocks");
    return strided(rows, name);
}

inline AttentionMask mask_of(const std::optional<Rows>& mask, bool causal, const AttentionShape& shape) {
    require(!mask || !causal, "causal is for attention without a mask");
    if (!mask) return {causal ? AttentionMask::Kind::causal : AttentionMask::Kind::none};
    const bool boolean = mask->dtype() == nanobind::dtype<bool>();
    require(boolean || mask->dtype() == nanobind::dtype<float>(), "a mask must be of bool or float32");
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

}  // namespace flashclient
