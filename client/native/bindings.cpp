// flashclient._native: the client's C++ core in Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "ffn.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using flashclient::Activation;
using flashclient::Dtype;
using flashclient::Ffn;

using Addresses = nb::ndarray<const std::uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bias = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Input = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Staging = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

Dtype dtype_of(const std::string& name) {
    if (name == "F32") return Dtype::f32;
    if (name == "BF16") return Dtype::bf16;
    if (name == "F16") return Dtype::f16;
    throw std::invalid_argument("no kernel for bundles of dtype '" + name + "': F32, BF16 and F16 have one");
}

Activation activation_of(const std::string& name) {
    if (name == "relu") return Activation::relu;
    if (name == "silu") return Activation::silu;
    if (name == "gelu") return Activation::gelu;
    if (name == "gelu_tanh") return Activation::gelu_tanh;
    throw std::invalid_argument("no kernel for activation '" + name + "': relu, silu, gelu and gelu_tanh have one");
}

void require(bool condition, const char* what) {
    if (!condition) throw std::invalid_argument(what);
}

void add_rows(Ffn& ffn, Addresses bundles, std::optional<Bias> bias, Input x, Output y) {
    const std::size_t hidden = ffn.shape().hidden;
    require(x.shape(1) == hidden && y.shape(1) == hidden, "x and y must be [tokens, hidden_size]");
    require(x.shape(0) == y.shape(0), "x and y must have the same tokens");
    require(x.shape(0) <= Ffn::kTokensMax, "too many tokens for rows: gather the bundles instead");
    require(!bias || bias->shape(0) == bundles.shape(0), "there must be a bias per bundle");
    nb::gil_scoped_release release;
    ffn.add_rows(bundles.data(), bundles.shape(0), bias ? bias->data() : nullptr, x.data(), x.shape(0), y.data());
}

void gather(Ffn& ffn, Addresses bundles, std::size_t first, Staging out) {
    require(out.shape(0) == ffn.parts() && out.shape(2) == ffn.shape().hidden, "out must be [parts, n, hidden_size]");
    require(first + bundles.shape(0) <= out.shape(1), "out has no room for that many bundles");
    nb::gil_scoped_release release;
    ffn.gather(bundles.data(), bundles.shape(0), first, out.shape(1), out.data());
}

void bind_ffn(nb::module_& module) {
    nb::class_<Ffn>(module, "Ffn", "Sums over neurons from bundles in place; see client/native/ffn.h.")
        .def(
            "__init__",
            [](Ffn* self, const std::string& dtype, std::size_t hidden_size, bool gated, const std::string& activation,
               std::size_t threads, std::optional<std::string> instruction_set) {
                require(hidden_size > 0 && threads > 0, "hidden_size and threads must be positive");
                new (self) Ffn({dtype_of(dtype), hidden_size, gated, activation_of(activation)}, threads,
                               instruction_set ? instruction_set->c_str() : nullptr);
            },
            nb::kw_only(), "dtype"_a, "hidden_size"_a, "gated"_a, "activation"_a, "threads"_a,
            "instruction_set"_a = nb::none())
        .def("add_rows", &add_rows, "bundles"_a, "bias"_a.none(), "x"_a, "y"_a,
             "Adds to y [tokens, hidden] what the neurons at these addresses make of x; at most 16 tokens.")
        .def("gather", &gather, "bundles"_a, "first"_a, "out"_a,
             "Widens the bundles' rows to fp32 into out[:, first:first + n], out [parts, capacity, hidden].")
        .def_prop_ro("instruction_set", &Ffn::instruction_set)
        .def_prop_ro("threads", &Ffn::threads)
        .def_ro_static("TOKENS_MAX", &Ffn::kTokensMax, "tokens of one call of add_rows");
}

}  // namespace

NB_MODULE(_native, module) {
    module.doc() = "The client's C++ core.";
    bind_ffn(module);
}
