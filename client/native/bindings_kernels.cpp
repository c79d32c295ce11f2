// flashclient._native: workers and kernels for Python. Every computation runs without the GIL.
//
// No argument from Python makes a kernel read or write out of bounds: each array is checked against the others here,
// and the address of each bundle is checked against readable memory (readable_memory.h).
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "array_arguments.h"
#include "encoding_argument.h"
#include "ffn/ffn.h"
#include "ffn/ffn_sum.h"
#include "kernel_arguments.h"
#include "kernels/attention.h"
#include "kernels/linear.h"
#include "kernels/predictor.h"
#include "kernels/readable_memory.h"
#include "kernels/workers.h"
#include "owned_array.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using flashclient::Activation;
using flashclient::activation_of;
using flashclient::aligned;
using flashclient::AnyWeight;
using flashclient::Array;
using flashclient::Attention;
using flashclient::bias_of;
using flashclient::Dtype;
using flashclient::EncodedMatrix;
using flashclient::Encoding;
using flashclient::Ffn;
using flashclient::FfnSum;
using flashclient::GatePredictor;
using flashclient::InstructionSet;
using flashclient::is_of;
using flashclient::Linear;
using flashclient::LowRankPredictor;
using flashclient::Matrix;
using flashclient::matrix_of;
using flashclient::name_of;
using flashclient::Neurons;
using flashclient::owned_array;
using flashclient::Prediction;
using flashclient::Predictor;
using flashclient::ReadableMemory;
using flashclient::Reading;
using flashclient::require;
using flashclient::RowsIn;
using flashclient::RowsOut;
using flashclient::RowValues;
using flashclient::SignPredictor;
using flashclient::TOKENS_MAX;
using flashclient::U16Array;
using flashclient::U32Array;
using flashclient::U64Array;
using flashclient::Weight;
using flashclient::Workers;

using Bias = Array<const float, 1>;
using Biases = nb::ndarray<const float, nb::ndim<2>, nb::device::cpu>;  // with strides
using Input = Array<const float, 2>;
using Output = Array<float, 2>;
using GroupMasks = nb::ndarray<const uint16_t, nb::ndim<2>, nb::device::cpu>;  // with strides
using RowBiases = nb::ndarray<const float, nb::ndim<3>, nb::device::cpu>;      // with strides
using RowH = nb::ndarray<float, nb::ndim<2>, nb::device::cpu>;                 // with strides
using Bytes = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;

constexpr size_t HIDDEN_MAX = size_t{1} << 24;  // elements; the bytes of a bundle fit into 32 bits
constexpr size_t THREADS_MAX = 1024;

void require_tokens(size_t tokens) {
    if (tokens > TOKENS_MAX) {
        throw std::invalid_argument("too many tokens: " + std::to_string(tokens) + ", the kernels take " +
                                    std::to_string(TOKENS_MAX));
    }
}

// ---- Ffn ----

void require_input(const Ffn& ffn, const Input& x) {
    require(aligned(x, "x").shape(1) == ffn.shape().hidden, "x must be [tokens, hidden_size]");
}

const float* data_of(const std::optional<Bias>& bias, size_t count, const char* missing) {
    if (!bias) return nullptr;
    require(aligned(*bias, "bias").shape(0) == count, missing);
    return bias->data();
}

// Sets the biases of a list: one for each part of a bundle but down.
void set_biases(Neurons& list, const Ffn& ffn, const std::optional<Biases>& biases) {
    if (!biases) return;
    const size_t rows = ffn.shape().parts.size() - 1;
    const size_t neurons = list.bundles.size() * ffn.shape().neurons;
    require(aligned(*biases, "biases").shape(0) == rows && biases->shape(1) == neurons,
            "biases must be [parts of a bundle but down, neurons]");
    require(biases->shape(1) <= 1 || biases->stride(1) == 1, "the biases of a part must be contiguous");
    require(rows <= 1 || biases->stride(0) >= 0, "strides must not be negative");
    list.bias = biases->data();
    if (rows > 1) list.up_bias = biases->data() + biases->stride(0);
}

std::span<const uint64_t> addresses_of(const U64Array& bundles) {
    return {aligned(bundles, "the list of addresses").data(), bundles.shape(0)};
}

// The masks of a group must lie side by side; the groups may be apart.
void require_masks(const GroupMasks& masks, size_t tokens, size_t bundles) {
    require(aligned(masks, "row_masks").shape(0) == (tokens + TOKENS_MAX - 1) / TOKENS_MAX && masks.shape(1) == bundles,
            "row_masks must be [groups of 16 tokens, bundles]");
    require(bundles <= 1 || masks.stride(1) == 1, "the masks of a group must be contiguous");
    require(masks.shape(0) <= 1 || masks.stride(0) >= 0, "strides must not be negative");
}

void add_rows(const Ffn& ffn, const U64Array& bundles, const std::optional<Biases>& biases,
              const std::optional<GroupMasks>& row_masks, const Input& x, const Output& y) {
    require_input(ffn, x);
    require(aligned(y, "y").shape(0) == x.shape(0) && y.shape(1) == x.shape(1), "x and y must have the same shape");
    const auto addresses = addresses_of(bundles);
    Neurons list{addresses};
    set_biases(list, ffn, biases);
    if (row_masks) {
        require_masks(*row_masks, x.shape(0), addresses.size());
        list.row_masks = row_masks->data();
        list.mask_stride = row_masks->shape(0) <= 1 ? 0 : static_cast<size_t>(row_masks->stride(0));
    }
    const nb::gil_scoped_release released;
    ffn.add_rows(list, x.data(), x.shape(0), y.data());
}

// Sets what each row has of its own, for neurons that may be some of more.
void set_rows(Neurons& list, const Ffn& ffn, size_t tokens, const std::optional<RowBiases>& biases,
              const std::optional<RowH>& h) {
    const size_t parts = ffn.shape().parts.size() - 1;
    const size_t neurons = list.bundles.size() * ffn.shape().neurons;
    const auto stride_of = [](const auto& array, size_t dimension) {
        require(array.shape(dimension) <= 1 || array.stride(dimension) >= 0, "strides must not be negative");
        return array.shape(dimension) <= 1 ? 0 : static_cast<size_t>(array.stride(dimension));
    };
    if (biases) {
        require(aligned(*biases, "row_biases").shape(0) == parts && biases->shape(1) == tokens &&
                    biases->shape(2) == neurons && (neurons <= 1 || biases->stride(2) == 1),
                "row_biases must be [parts of a bundle but down, tokens, neurons], those of a token contiguous");
        list.rows.bias = biases->data();
        list.rows.bias_stride = stride_of(*biases, 1);
        if (parts > 1) list.rows.up_bias = biases->data() + stride_of(*biases, 0);
    }
    if (h) {
        require(aligned(*h, "h").shape(0) == tokens && h->shape(1) == neurons, "h must be [tokens, neurons]");
        list.rows.h = h->data();
        list.rows.h_stride = stride_of(*h, 0);
        require((neurons <= 1 || h->stride(1) == 1) && (tokens <= 1 || list.rows.h_stride >= neurons),
                "h of a token must be contiguous, and of no other token");
    }
}

// An FfnSum that keeps its arrays alive. Calls of several threads wait for each other.
class BoundSum {
  public:
    BoundSum(const Ffn& ffn, const Input& x, const Output& y) : ffn_(ffn), x_(x), y_(y) {
        require_input(ffn, x);
        require(aligned(y, "y").shape(0) == x.shape(0) && y.shape(1) == x.shape(1), "x and y must have the same shape");
        sum_.emplace(ffn, x.data(), x.shape(0), y.data());
    }
    void add(const U64Array& bundles, const std::optional<Biases>& biases, const std::optional<RowBiases>& row_biases,
             const std::optional<RowH>& h) {
        Neurons list{addresses_of(bundles)};
        set_biases(list, ffn_, biases);
        set_rows(list, ffn_, x_.shape(0), row_biases, h);
        const nb::gil_scoped_release released;
        const std::lock_guard lock(mutex_);
        sum_->add(list);
    }
    void finish() {
        const nb::gil_scoped_release released;
        const std::lock_guard lock(mutex_);
        sum_->finish();
    }

  private:
    const Ffn& ffn_;
    Input x_;
    Output y_;
    std::mutex mutex_;
    std::optional<FfnSum> sum_;
};

void fire(const Ffn& ffn, const U64Array& addresses, const U32Array& index, const U16Array& row_masks,
          const std::optional<Biases>& biases, const Input& x, const Output& h) {
    Neurons list{addresses_of(addresses)};
    require_input(ffn, x);
    require_tokens(x.shape(0));
    const size_t count = list.bundles.size();
    require(aligned(row_masks, "row_masks").shape(0) == count, "there must be a row mask per address");
    list.row_masks = row_masks.data();
    set_biases(list, ffn, biases);
    require(aligned(h, "h").shape(0) == count && h.shape(1) == x.shape(0), "h must be [addresses, tokens]");
    const uint32_t* first = aligned(index, "index").data();
    const nb::gil_scoped_release released;
    // A copy, which Python cannot change during the call.
    const std::vector<uint32_t> entries(first, first + index.shape(0));
    require(entries.empty() || *std::max_element(entries.begin(), entries.end()) < count,
            "an index is beyond the list of addresses");
    ffn.fire(list, entries, x.data(), x.shape(0), h.data());
}

void accumulate(const Ffn& ffn, const U64Array& addresses, const Input& h, const Output& y) {
    const auto list = addresses_of(addresses);
    const size_t tokens = aligned(y, "y").shape(0);
    require_tokens(tokens);
    require(y.shape(1) == ffn.shape().hidden, "y must be [tokens, hidden_size]");
    require(aligned(h, "h").shape(0) == list.size() && h.shape(1) == tokens, "h must be [addresses, tokens]");
    const nb::gil_scoped_release released;
    ffn.accumulate(list, h.data(), tokens, y.data());
}

void copy_bundles(const U64Array& bundles, const Array<uint8_t, 2>& out) {
    const auto addresses = addresses_of(bundles);
    require(out.shape(0) == addresses.size(), "out must have a row per bundle");
    const nb::gil_scoped_release released;
    Reading reading(out.shape(1), 1);
    const auto checked = reading.checked(addresses);
    for (size_t i = 0; i < checked.size(); i++) {
        std::memcpy(out.data() + i * out.shape(1), reinterpret_cast<const void*>(checked[i]), out.shape(1));
    }
}

void decode_rows(const Encoding& encoding, const Array<const uint8_t, 2>& rows, const Output& out,
                 const InstructionSet& instruction_set) {
    require(encoding.block_format().has_value(), "only rows in blocks are decoded");
    require(rows.shape(1) % encoding.block_bytes == 0, "rows are not whole blocks");
    const size_t values = rows.shape(1) / encoding.block_bytes * encoding.block_values;
    require(aligned(out, "out").shape(0) == rows.shape(0) && out.shape(1) == values, "out must be [rows, values]");
    const flashclient::Kernels& kernels = flashclient::kernels_for(encoding, name_of(instruction_set));
    const nb::gil_scoped_release released;
    for (size_t i = 0; i < rows.shape(0); i++) {
        kernels.upcast(rows.data() + i * rows.shape(1), values, out.data() + i * values);
    }
}

void encode_rows(const Array<const float, 2>& values, const Array<uint8_t, 2>& out) {
    const size_t row_bytes = Attention::block_row_bytes(values.shape(1));
    require(aligned(values, "values").shape(0) == out.shape(0) && out.shape(1) == row_bytes,
            "out must have a row of whole blocks for each of values");
    const nb::gil_scoped_release released;
    for (size_t i = 0; i < values.shape(0); i++) {
        flashclient::encode_q8_0(values.data() + i * values.shape(1), values.shape(1), out.data() + i * row_bytes);
    }
}

void make_ffn(Ffn* self, Workers& workers, std::vector<Encoding> parts, size_t hidden_size,
              const nb::object& activation, const InstructionSet& instruction_set, size_t neurons) {
    require(hidden_size > 0 && hidden_size <= HIDDEN_MAX, "hidden_size must be positive and at most 16777216");
    require(neurons > 0, "a bundle has at least one neuron");
    flashclient::FfnShape shape{std::move(parts), hidden_size, activation_of(activation), neurons};
    new (self) Ffn(workers, std::move(shape), name_of(instruction_set));
}

void bind_ffn(nb::module_& module) {
    nb::class_<Ffn>(module, "Ffn", "Sums over neurons from bundles in place; see client/native/ffn/ffn.h.")
        .def("__init__", &make_ffn, "workers"_a, "parts"_a, "hidden_size"_a, "activation"_a,
             "instruction_set"_a = nb::none(), "neurons"_a = 1, nb::keep_alive<1, 2>(),
             "neurons: of a bundle, more than one in a slab. parts: the encodings of [gate,] up and down. activation: "
             "the name of a function, or a message Activation "
             "of weightd.proto; client/native/kernels/activation.h has the functions.")
        .def("fire", &fire, "addresses"_a.noconvert(), "index"_a.noconvert(), "row_masks"_a.noconvert(),
             "biases"_a.noconvert().none(), "x"_a.noconvert(), "h"_a.noconvert(),
             "Computes the rows of h [addresses, tokens] that index names; bit t of row_masks: row t wants the neuron. "
             "biases [1, or 2 with a gate; addresses]: of [gate and] up.")
        .def("accumulate", &accumulate, "addresses"_a.noconvert(), "h"_a.noconvert(), "y"_a.noconvert(),
             "Adds to y [tokens, hidden] the down columns of the neurons that fired, in the order of the list.")
        .def("add_rows", &add_rows, "bundles"_a.noconvert(), "biases"_a.noconvert().none(),
             "row_masks"_a.noconvert().none(), "x"_a.noconvert(), "y"_a.noconvert(),
             "Adds to y [tokens, hidden] the sum over the neurons at these addresses, for any number of tokens of x. "
             "biases: as for fire(). row_masks [groups of 16 tokens, bundles]: bit t of group g, row 16 * g + t wants "
             "the neuron.")
        .def_prop_ro("instruction_set", &Ffn::instruction_set)
        .def_prop_ro(
            "neurons", [](const Ffn& ffn) { return ffn.shape().neurons; }, "of a bundle")
        .def_ro_static("TOKENS_MAX", &TOKENS_MAX, "tokens of a row mask, and of one fire()");
    nb::class_<BoundSum>(
        module, "FfnSum",
        "Adds to y [tokens, hidden] the sum over all neurons of a layer, which come in chunks, in order, "
        "for x [tokens, hidden]; see client/native/ffn/ffn_sum.h. y is undefined until finish().")
        .def(nb::init<const Ffn&, const Input&, const Output&>(), "ffn"_a, "x"_a.noconvert(), "y"_a.noconvert(),
             nb::keep_alive<1, 2>())
        .def("add", &BoundSum::add, "bundles"_a.noconvert(), "biases"_a.noconvert().none(),
             "row_biases"_a.noconvert().none() = nb::none(), "h"_a.noconvert().none() = nb::none(),
             "The next neurons. biases: as for Ffn.fire(). row_biases [1, or 2 with a gate; tokens; neurons]: of each "
             "row of x, added to these. h [tokens, neurons]: set to what the neurons give.")
        .def("finish", &BoundSum::finish, "There are no more neurons.");
}

// ---- Linear ----

void multiply(const Linear& linear, const AnyWeight& weight, const Input& x, const Output& y) {
    const Matrix matrix = matrix_of(weight, linear.dtype());
    require(aligned(x, "x").shape(0) == aligned(y, "y").shape(0), "x and y must have the same tokens");
    require(x.shape(1) == matrix.columns && y.shape(1) == matrix.rows, "weight must be [columns of y, columns of x]");
    const nb::gil_scoped_release released;
    linear.multiply(matrix, x.data(), x.shape(0), y.data());
}

Linear::Projection projection_of(const Linear& linear, const AnyWeight& weight, const std::optional<RowValues>& bias,
                                 const RowsIn& x, const RowsOut& y) {
    const Dtype dtype = linear.dtype();
    const Matrix matrix = matrix_of(weight, dtype);
    require(is_of(x.dtype(), dtype) && is_of(y.dtype(), dtype), "x and y must be of the kernel's dtype");
    require(aligned(x, "x").shape(0) == aligned(y, "y").shape(0), "x and y must have the same tokens");
    require(x.shape(1) == matrix.columns && y.shape(1) == matrix.rows, "weight must be [columns of y, columns of x]");
    return {matrix, bias_of(bias, matrix.rows, dtype), y.data()};
}

void project(const Linear& linear, const AnyWeight& weight, const std::optional<RowValues>& bias, const RowsIn& x,
             const RowsOut& y) {
    const Linear::Projection projection = projection_of(linear, weight, bias, x, y);
    const nb::gil_scoped_release released;
    linear.project({&projection, 1}, x.data(), x.shape(0));
}

void bind_linear(nb::module_& module) {
    nb::class_<EncodedMatrix>(module, "EncodedMatrix",
                              "A matrix in one of BLOCK_FORMATS, which kernels take in the place of an array.")
        .def(nb::init<const Encoding&, const Array<const uint8_t, 2>&, size_t>(), "encoding"_a, "rows"_a.noconvert(),
             "columns"_a, "rows: [rows, bytes], read in place.")
        .def_prop_ro("address",
                     [](const EncodedMatrix& matrix) { return reinterpret_cast<uintptr_t>(matrix.rows.data()); });
    nb::class_<Linear>(module, "Linear", "Products of a matrix with rows of x; see client/native/kernels/linear.h.")
        .def(
            "__init__",
            [](Linear* self, Workers& workers, const std::string& dtype, const InstructionSet& instruction_set) {
                new (self) Linear(workers, weightd::compute_dtype_named(dtype), name_of(instruction_set));
            },
            "workers"_a, "dtype"_a, "instruction_set"_a = nb::none(), nb::keep_alive<1, 2>())
        .def("multiply", &multiply, "weight"_a.noconvert(), "x"_a.noconvert(), "y"_a.noconvert(),
             "y [tokens, out] = x [tokens, hidden] times weight [out, hidden], transposed; x and y in fp32.")
        .def("project", &project, "weight"_a.noconvert(), "bias"_a.noconvert().none(), "x"_a.noconvert(),
             "y"_a.noconvert(),
             "The same plus bias [out], all in the kernel's dtype, bias also in fp32; summed in fp32 and rounded once.")
        .def_prop_ro("instruction_set", &Linear::instruction_set);
}

// ---- predictors ----

// The predictor reads the arrays in place, so it holds references to them.
struct LowRankArrays : LowRankPredictor {
    LowRankArrays(Workers& workers, Dtype dtype, const Weight& input, const Weight& output, const Bias& bias,
                  const std::optional<Bias>& scale, const char* instruction_set)
        : LowRankPredictor(workers, dtype, matrix_of(input, dtype), matrix_of(output, scale ? Dtype::i8 : dtype),
                           bias.data(), scale ? scale->data() : nullptr, instruction_set),
          held(input, output, bias, scale) {}
    std::tuple<Weight, Weight, Bias, std::optional<Bias>> held;
};

struct GateArrays : GatePredictor {
    GateArrays(Workers& workers, const Weight& gate, const Bias& scale, const Bias& bias, const Bias& threshold,
               const Activation& activation, const char* instruction_set)
        : GatePredictor(workers, matrix_of(gate, Dtype::i8), scale.data(), bias.data(), threshold.data(), activation,
                        instruction_set),
          held(gate, scale, bias, threshold) {}
    std::tuple<Weight, Bias, Bias, Bias> held;
};

struct Sign : SignPredictor {
    using Signs = Array<const uint8_t, 2>;
    using Margin = Array<const int32_t, 1>;
    Sign(Workers& workers, const Signs& signs, size_t hidden, const Margin& margin, const char* instruction_set)
        : SignPredictor(workers, signs.data(), signs.shape(0), hidden, margin.data(), instruction_set),
          held(signs, margin) {}
    std::tuple<Signs, Margin> held;
};

nb::object predict(const Predictor& predictor, const Input& x) {
    require(aligned(x, "x").shape(1) == predictor.hidden(), "x must be [tokens, hidden_size]");
    require_tokens(x.shape(0));
    Prediction prediction;
    {
        const nb::gil_scoped_release released;
        prediction = predictor.predict(x.data(), x.shape(0));
    }
    return nb::make_tuple(owned_array(std::move(prediction.positions)), owned_array(std::move(prediction.row_masks)));
}

void make_low_rank(LowRankArrays* self, Workers& workers, const std::string& dtype, const Weight& input,
                   const Weight& output, const Bias& bias, const std::optional<Bias>& scale,
                   const InstructionSet& instruction_set) {
    require(input.shape(0) == output.shape(1), "input must be [rank, hidden_size] and output [neurons, rank]");
    require(aligned(bias, "bias").shape(0) == output.shape(0), "there must be a bias per neuron");
    static_cast<void>(data_of(scale, output.shape(0), "there must be a scale per neuron"));
    new (self) LowRankArrays(workers, weightd::compute_dtype_named(dtype), input, output, bias, scale,
                             name_of(instruction_set));
}

void make_gate(GateArrays* self, Workers& workers, const Weight& gate, const Bias& scale, const Bias& bias,
               const Bias& threshold, const nb::object& activation, const InstructionSet& instruction_set) {
    for (const Bias* one : {&scale, &bias, &threshold}) {
        require(aligned(*one, "an array").shape(0) == gate.shape(0),
                "there must be a scale, a bias and a threshold per neuron");
    }
    new (self) GateArrays(workers, gate, scale, bias, threshold, activation_of(activation), name_of(instruction_set));
}

void make_sign(Sign* self, Workers& workers, const Sign::Signs& signs, size_t hidden_size, const Sign::Margin& margin,
               const InstructionSet& instruction_set) {
    require(hidden_size > 0 && hidden_size <= HIDDEN_MAX, "hidden_size must be positive and at most 16777216");
    require(signs.shape(1) == (hidden_size + 7) / 8, "signs must be [neurons, ceil(hidden_size / 8)]");
    require(aligned(margin, "margin").shape(0) == signs.shape(0), "there must be a margin per neuron");
    new (self) Sign(workers, signs, hidden_size, margin, name_of(instruction_set));
}

void bind_predictors(nb::module_& module) {
    nb::class_<Predictor>(module, "Predictor", "See client/native/kernels/predictor.h.")
        .def("predict", &predict, "x"_a.noconvert(),
             nb::sig("def predict(self, x: NDArray[numpy.float32]) -> tuple[NDArray[numpy.uint32], "
                     "NDArray[numpy.uint16]]"),
             "x [tokens, hidden] -> positions, rising, and which rows want each (bit t: row t).");
    nb::class_<LowRankArrays, Predictor>(module, "LowRankPredictor")
        .def("__init__", &make_low_rank, "workers"_a, "dtype"_a, "input"_a.noconvert(), "output"_a.noconvert(),
             "bias"_a.noconvert(), "scale"_a.noconvert() = nb::none(), "instruction_set"_a = nb::none(),
             nb::keep_alive<1, 2>());
    nb::class_<GateArrays, Predictor>(module, "GatePredictor")
        .def("__init__", &make_gate, "workers"_a, "gate"_a.noconvert(), "scale"_a.noconvert(), "bias"_a.noconvert(),
             "threshold"_a.noconvert(), "activation"_a, "instruction_set"_a = nb::none(), nb::keep_alive<1, 2>());
    nb::class_<Sign, Predictor>(module, "SignPredictor")
        .def("__init__", &make_sign, "workers"_a, "signs"_a.noconvert(), "hidden_size"_a, "margin"_a.noconvert(),
             "instruction_set"_a = nb::none(), nb::keep_alive<1, 2>());
}

// ---- memory ----

struct LentMemory {
    Bytes array;
    ReadableMemory memory;
};

void make_lent(LentMemory* self, const Bytes& array) { new (self) LentMemory{array, {array.data(), array.nbytes()}}; }

void bind_memory(nb::module_& module) {
    nb::class_<LentMemory>(
        module, "LentMemory",
        "Lets kernels read bundles in an array, as long as this object lives. Kernels refuse addresses "
        "outside of such arrays and of the pool.")
        .def("__init__", &make_lent, "array"_a.noconvert());
    module.def("copy_bundles", &copy_bundles, "bundles"_a.noconvert(), "out"_a.noconvert(),
               "Copies the bundles at these addresses to the rows of out [bundles, bytes].");
    module.def("decode_rows", &decode_rows, "encoding"_a, "rows"_a.noconvert(), "out"_a.noconvert(),
               "instruction_set"_a = nb::none(),
               "out [rows, values] = the values in fp32 of rows [rows, bytes] in blocks (formats/block_formats.h).");
    module.def("encode_rows", &encode_rows, "values"_a.noconvert(), "out"_a.noconvert(),
               "out [rows, bytes] = values [rows, elements] as keys and values in blocks: Q8_0, with zeros up to a "
               "whole block (kernels/attention.h).");
}

}  // namespace

void bind_kernels(nb::module_& module) {
    nb::class_<Workers>(module, "Workers", "Threads that all kernels of a process share, the caller's included.")
        .def(
            "__init__",
            [](Workers* self, size_t threads) {
                require(threads > 0 && threads <= THREADS_MAX, "threads must be positive and at most 1024");
                new (self) Workers(threads);
            },
            "threads"_a)
        .def_prop_ro("threads", &Workers::threads);
    bind_ffn(module);
    bind_linear(module);
    bind_predictors(module);
    bind_memory(module);
}
