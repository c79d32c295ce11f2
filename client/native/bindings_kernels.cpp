// flashclient._native: workers and kernels for Python. Every computation runs without the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <array>
#include <map>
#include <optional>
#include <stdexcept>
#include <tuple>

#include "attention.h"
#include "ffn.h"
#include "linear.h"
#include "memory_read.h"
#include "owned_array.h"
#include "predictor.h"
#include "workers.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using flashclient::Activation;
using flashclient::Attention;
using flashclient::AttentionMask;
using flashclient::AttentionRows;
using flashclient::AttentionShape;
using flashclient::Dtype;
using flashclient::Ffn;
using flashclient::kTokensMax;
using flashclient::Linear;
using flashclient::LowRankPredictor;
using flashclient::Matrix;
using flashclient::Neurons;
using flashclient::owned_array;
using flashclient::Prediction;
using flashclient::SignPredictor;
using flashclient::Workers;

template <typename T, std::size_t dimensions>
using Array = nb::ndarray<T, nb::ndim<dimensions>, nb::c_contig, nb::device::cpu>;
using Addresses = Array<const std::uint64_t, 1>;
using Index = Array<const std::uint32_t, 1>;
using RowMasks = Array<const std::uint16_t, 1>;
using GroupMasks = nb::ndarray<const std::uint16_t, nb::ndim<2>, nb::device::cpu>;
using Bias = Array<const float, 1>;
using Input = Array<const float, 2>;
using Output = Array<float, 2>;
// Bits of weights: float32, or uint16 for BF16 and F16.
using Weight = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using InstructionSet = std::optional<std::string>;

void require(bool condition, const char* what) {
    if (!condition) throw std::invalid_argument(what);
}

Dtype dtype_of(const std::string& name) {
    if (name == "F32") return Dtype::f32;
    if (name == "BF16") return Dtype::bf16;
    if (name == "F16") return Dtype::f16;
    throw std::invalid_argument("no kernel for weights of dtype '" + name + "': F32, BF16 and F16 have one");
}

Activation activation_of(const std::string& name) {
    static const std::map<std::string, Activation> activations = {{"relu", Activation::relu},
                                                                  {"relu_squared", Activation::relu_squared},
                                                                  {"fatrelu", Activation::fatrelu},
                                                                  {"silu", Activation::silu},
                                                                  {"gelu", Activation::gelu},
                                                                  {"gelu_tanh", Activation::gelu_tanh},
                                                                  {"gated_relu", Activation::gated_relu}};
    const auto found = activations.find(name);
    if (found != activations.end()) return found->second;
    std::string known;
    for (const auto& [each, _] : activations) known += (known.empty() ? "" : ", ") + each;
    throw std::invalid_argument("no kernel for activation '" + name + "': " + known + " have one");
}

const char* name_of(const InstructionSet& instruction_set) {
    return instruction_set ? instruction_set->c_str() : nullptr;
}

Matrix matrix_of(const Weight& weight, Dtype dtype) {
    const nb::dlpack::dtype bits = dtype == Dtype::i8 ? nb::dtype<std::int8_t>() : nb::dtype<std::uint16_t>();
    require(weight.dtype() == (dtype == Dtype::f32 ? nb::dtype<float>() : bits),
            "weights must be float32 for dtype F32, uint16, their bits, for BF16 and F16, and int8 with a scale");
    return {weight.data(), weight.shape(0), weight.shape(1)};
}

void require_tokens(std::size_t tokens) {
    if (tokens > kTokensMax)
        throw std::invalid_argument("too many tokens: " + std::to_string(tokens) + ", the kernels take " +
                                    std::to_string(kTokensMax));
}

// ---- Ffn ----

void require_input(const Ffn& ffn, const Input& x) {
    require(x.shape(1) == ffn.shape().hidden, "x must be [tokens, hidden_size]");
}

void add_rows(const Ffn& ffn, const Addresses& bundles, const std::optional<Bias>& bias,
              const std::optional<GroupMasks>& masks, const Input& x, const Output& y) {
    const std::size_t count = bundles.shape(0), tokens = x.shape(0);
    require_input(ffn, x);
    require(tokens == y.shape(0) && x.shape(1) == y.shape(1), "x and y must have the same shape");
    require(!bias || bias->shape(0) == count, "there must be a bias per bundle");
    require(!masks || (masks->shape(0) == (tokens + kTokensMax - 1) / kTokensMax && masks->shape(1) == count),
            "row_masks must be [groups of 16 tokens, bundles]");
    require(!masks || count < 2 || masks->stride(1) == 1, "the masks of a group must be contiguous");
    const Neurons list{bundles.data(), bias ? bias->data() : nullptr, masks ? masks->data() : nullptr,
                       masks ? static_cast<std::size_t>(masks->stride(0)) : 0};
    const nb::gil_scoped_release release;
    ffn.add_rows(list, count, x.data(), tokens, y.data());
}

void fire(const Ffn& ffn, const Addresses& addresses, const Index& index, const RowMasks& row_masks,
          const std::optional<Bias>& bias, const Input& x, const Output& h) {
    const std::size_t count = addresses.shape(0);
    require_input(ffn, x);
    require_tokens(x.shape(0));
    require(row_masks.shape(0) == count, "there must be a row mask per address");
    require(!bias || bias->shape(0) == count, "there must be a bias per address");
    require(h.shape(0) == count && h.shape(1) == x.shape(0), "h must be [addresses, tokens]");
    const std::uint32_t* end = index.data() + index.shape(0);
    require(std::all_of(index.data(), end, [&](std::uint32_t entry) { return entry < count; }),
            "an index is beyond the list of addresses");
    const nb::gil_scoped_release release;
    ffn.fire({addresses.data(), bias ? bias->data() : nullptr, row_masks.data()}, index.data(), index.shape(0),
             x.data(), x.shape(0), h.data());
}

void accumulate(const Ffn& ffn, const Addresses& addresses, const Input& h, const Output& y) {
    require_tokens(y.shape(0));
    require(y.shape(1) == ffn.shape().hidden, "y must be [tokens, hidden_size]");
    require(h.shape(0) == addresses.shape(0) && h.shape(1) == y.shape(0), "h must be [addresses, tokens]");
    const nb::gil_scoped_release release;
    ffn.accumulate(addresses.data(), addresses.shape(0), h.data(), y.shape(0), y.data());
}

void make_ffn(Ffn* self, Workers& workers, const std::string& dtype, std::size_t hidden_size, bool gated,
              const std::string& activation, float activation_parameter, const InstructionSet& instruction_set) {
    require(hidden_size > 0, "hidden_size must be positive");
    new (self) Ffn(workers, {dtype_of(dtype), hidden_size, gated, activation_of(activation), activation_parameter},
                   name_of(instruction_set));
}

void bind_ffn(nb::module_& module) {
    nb::class_<Ffn>(module, "Ffn", "Sums over neurons from bundles in place; see client/native/ffn.h.")
        .def("__init__", &make_ffn, "workers"_a, "dtype"_a, "hidden_size"_a, "gated"_a, "activation"_a,
             "activation_parameter"_a = 0.0f, "instruction_set"_a = nb::none(), nb::keep_alive<1, 2>(),
             "activation: relu, relu_squared, fatrelu (activation_parameter: its threshold), silu, gelu, gelu_tanh or "
             "gated_relu.")
        .def("fire", &fire, "addresses"_a, "index"_a, "row_masks"_a, "bias"_a.none(), "x"_a, "h"_a,
             "Computes the rows of h [addresses, tokens] that index names; bit t of row_masks: row t wants the neuron.")
        .def("accumulate", &accumulate, "addresses"_a, "h"_a, "y"_a,
             "Adds to y [tokens, hidden] the down columns of the neurons that fired, in the order of the list.")
        .def("add_rows", &add_rows, "bundles"_a, "bias"_a.none(), "row_masks"_a.none(), "x"_a, "y"_a,
             "Adds to y [tokens, hidden] what the neurons at these addresses make of x, for any number of tokens; "
             "row_masks: [groups of 16 tokens, bundles].")
        .def_prop_ro("instruction_set", &Ffn::instruction_set)
        .def_ro_static("TOKENS_MAX", &kTokensMax, "tokens of a row mask, and of one fire().");
}

// ---- Linear ----

void multiply(const Linear& linear, std::uint64_t weight, const Input& x, const Output& y) {
    require(x.shape(0) == y.shape(0), "x and y must have the same tokens");
    const nb::gil_scoped_release release;
    linear.multiply({reinterpret_cast<const void*>(weight), y.shape(1), x.shape(1)}, x.data(), x.shape(0), y.data());
}

void bind_linear(nb::module_& module) {
    nb::class_<Linear>(module, "Linear", "Products of a matrix with rows; see client/native/linear.h.")
        .def(
            "__init__",
            [](Linear* self, Workers& workers, const std::string& dtype, const InstructionSet& instruction_set) {
                new (self) Linear(workers, dtype_of(dtype), name_of(instruction_set));
            },
            "workers"_a, "dtype"_a, "instruction_set"_a = nb::none(), nb::keep_alive<1, 2>())
        .def("multiply", &multiply, "weight"_a, "x"_a, "y"_a,
             "y [tokens, out] = x [tokens, hidden] times the matrix [out, hidden] at address `weight`, transposed.")
        .def_prop_ro("instruction_set", &Linear::instruction_set);
}

// ---- Attention ----

template <std::size_t dimensions>
using Strides = std::array<std::size_t, dimensions>;
using Mask = std::tuple<std::uint64_t, Strides<4>, bool>;

const void* at(std::uint64_t address) { return reinterpret_cast<const void*>(address); }

AttentionRows rows_of(std::uint64_t address, const Strides<4>& strides) {
    require(strides[3] == 1, "the elements of a row must be contiguous");
    return {at(address), strides[0], strides[1], strides[2]};
}

AttentionMask mask_of(const std::optional<Mask>& mask, bool causal) {
    require(!mask || !causal, "causal is for attention without a mask");
    if (!mask) return {causal ? AttentionMask::Kind::causal : AttentionMask::Kind::none};
    const auto& [address, strides, boolean] = *mask;
    const auto kind = boolean ? AttentionMask::Kind::boolean : AttentionMask::Kind::additive;
    return {kind, at(address), strides[0], strides[1], strides[2], strides[3]};
}

void attend(const Attention& attention, const std::array<std::size_t, 7>& sizes, float scale, std::uint64_t query,
            const Strides<4>& query_strides, std::uint64_t key, const Strides<4>& key_strides, std::uint64_t value,
            const Strides<4>& value_strides, const std::optional<Mask>& mask, bool causal, std::uint64_t out) {
    const auto [sequences, heads, key_heads, tokens, positions, key_elements, value_elements] = sizes;
    require(key_heads > 0 && heads % key_heads == 0, "heads must be a multiple of key heads");
    const AttentionShape shape{sequences, heads, key_heads, tokens, positions, key_elements, value_elements, scale};
    const AttentionRows queries = rows_of(query, query_strides), keys = rows_of(key, key_strides);
    const AttentionRows values = rows_of(value, value_strides);
    const AttentionMask masked = mask_of(mask, causal);
    const nb::gil_scoped_release release;
    attention.attend(shape, queries, keys, values, masked, reinterpret_cast<float*>(out));
}

// Addresses and strides, as torch's tensors give them: an array object for each would take longer than the work.
void bind_attention(nb::module_& module) {
    nb::class_<Attention>(module, "Attention",
                          "Attention over keys and values in place; see client/native/attention.h.")
        .def(
            "__init__",
            [](Attention* self, Workers& workers, const std::string& dtype, const InstructionSet& instruction_set) {
                new (self) Attention(workers, dtype_of(dtype), name_of(instruction_set));
            },
            "workers"_a, "dtype"_a, "instruction_set"_a = nb::none(), nb::keep_alive<1, 2>())
        .def("attend", &attend, "sizes"_a, "scale"_a, "query"_a, "query_strides"_a, "key"_a, "key_strides"_a, "value"_a,
             "value_strides"_a, "mask"_a.none(), "causal"_a, "out"_a,
             "sizes: sequences, heads, key heads, tokens, positions, elements of a key, of a value. mask: address, "
             "strides, and whether it is of bytes (0: masked) or fp32 (added; -inf: masked). causal, without a mask: "
             "token t attends to the positions up to t. out: address of [sequences, tokens, heads, elements of a "
             "value] fp32.")
        .def_prop_ro("instruction_set", &Attention::instruction_set);
}

// ---- predictors ----

nb::object as_tuple(Prediction&& prediction) {
    return nb::make_tuple(owned_array(std::move(prediction.positions)), owned_array(std::move(prediction.row_masks)));
}

nb::object predict_low_rank(const LowRankPredictor& predictor, const Input& x) {
    require(x.shape(1) == predictor.hidden(), "x must be [tokens, hidden_size]");
    require_tokens(x.shape(0));
    Prediction prediction;
    {
        const nb::gil_scoped_release release;
        prediction = predictor.predict(x.data(), x.shape(0));
    }
    return as_tuple(std::move(prediction));
}

nb::object predict_sign(const SignPredictor& predictor, const Input& x) {
    require((x.shape(1) + 7) / 8 == predictor.row_bytes(), "x must be [tokens, hidden_size], with a sign bit for each");
    require_tokens(x.shape(0));
    Prediction prediction;
    {
        const nb::gil_scoped_release release;
        prediction = predictor.predict(x.data(), x.shape(1), x.shape(0));
    }
    return as_tuple(std::move(prediction));
}

void make_low_rank(LowRankPredictor* self, Workers& workers, const std::string& dtype, const Weight& input,
                   const Weight& output, const Bias& bias, const std::optional<Bias>& scale,
                   const InstructionSet& instruction_set) {
    require(input.shape(0) == output.shape(1), "input must be [rank, hidden_size] and output [neurons, rank]");
    require(bias.shape(0) == output.shape(0), "there must be a bias per neuron");
    require(!scale || scale->shape(0) == output.shape(0), "there must be a scale per neuron");
    const Dtype stored = dtype_of(dtype);
    new (self)
        LowRankPredictor(workers, stored, matrix_of(input, stored), matrix_of(output, scale ? Dtype::i8 : stored),
                         bias.data(), scale ? scale->data() : nullptr, name_of(instruction_set));
}

void make_sign(SignPredictor* self, Workers& workers, const Array<const std::uint8_t, 2>& signs,
               const Array<const std::int32_t, 1>& margin, const InstructionSet& instruction_set) {
    require(margin.shape(0) == signs.shape(0), "there must be a margin per neuron");
    new (self)
        SignPredictor(workers, signs.data(), signs.shape(0), signs.shape(1), margin.data(), name_of(instruction_set));
}

// The arrays are read where they lie: kept alive by the predictor, and never converted into a temporary one.
void bind_predictors(nb::module_& module) {
    const auto signature =
        nb::sig("def predict(self, x: NDArray[numpy.float32]) -> tuple[NDArray[numpy.uint32], NDArray[numpy.uint16]]");
    const char* result = "x [tokens, hidden] -> positions, rising, and which rows want each (bit t: row t).";
    nb::class_<LowRankPredictor>(module, "LowRankPredictor", "See client/native/predictor.h.")
        .def("__init__", &make_low_rank, "workers"_a, "dtype"_a, "input"_a.noconvert(), "output"_a.noconvert(),
             "bias"_a.noconvert(), "scale"_a.noconvert() = nb::none(), "instruction_set"_a = nb::none(),
             nb::keep_alive<1, 2>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>(),
             nb::keep_alive<1, 7>())
        .def("predict", &predict_low_rank, "x"_a, signature, result);
    nb::class_<SignPredictor>(module, "SignPredictor", "See client/native/predictor.h.")
        .def("__init__", &make_sign, "workers"_a, "signs"_a.noconvert(), "margin"_a.noconvert(),
             "instruction_set"_a = nb::none(), nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>())
        .def("predict", &predict_sign, "x"_a, signature, result);
}

}  // namespace

void bind_kernels(nb::module_& module) {
    nb::class_<Workers>(module, "Workers", "Threads that all kernels of a process share, the caller's included.")
        .def(
            "__init__",
            [](Workers* self, std::size_t threads) {
                require(threads > 0, "threads must be positive");
                new (self) Workers(threads);
            },
            "threads"_a)
        .def_prop_ro("threads", &Workers::threads);
    module.def(
        "read_memory",
        [](Workers& workers, std::uint64_t address, std::size_t size_bytes) {
            return flashclient::read_memory(workers, reinterpret_cast<const void*>(address), size_bytes);
        },
        "workers"_a, "address"_a, "size_bytes"_a, nb::call_guard<nb::gil_scoped_release>(),
        "The exclusive or of the 64-bit words there: what reading alone takes, for benchmarks to compare with.");
    bind_ffn(module);
    bind_linear(module);
    bind_attention(module);
    bind_predictors(module);
}
