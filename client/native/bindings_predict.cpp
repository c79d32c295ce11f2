// flashclient._native: the native part of predict mode for Python. See client/native/predict/.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <nanobind/trampoline.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "array_arguments.h"
#include "layer_ffn.h"
#include "predict/predict_step.h"
#include "predict/repeated_memory.h"
#include "predict/window.h"

namespace nb = nanobind;
using namespace nb::literals;
using flashclient::aligned;
using flashclient::Array;
using flashclient::Arrival;
using flashclient::CellSource;
using flashclient::ChunkSource;
using flashclient::Ffn;
using flashclient::LayerFfn;
using flashclient::Predictor;
using flashclient::PredictStep;
using flashclient::RepeatedCells;
using flashclient::RepeatedChunks;
using flashclient::RepeatedMemory;
using flashclient::require;
using flashclient::require_cells;
using flashclient::StepTimes;
using flashclient::Window;

namespace {

// A CellSource that is a subclass in Python. Its methods are called with the GIL.
struct PythonCells : CellSource {
    NB_TRAMPOLINE(CellSource, 6);
    using Cells = std::vector<uint32_t>;
    uint32_t share_slots() override { NB_OVERRIDE_PURE(share_slots); }
    uint32_t lease_limit() override { NB_OVERRIDE_PURE(lease_limit); }
    void exchange(uint32_t layer, const Cells& acquire, const Cells& release) override {
        NB_OVERRIDE_PURE(exchange, layer, acquire, release);
    }
    void extend(const Cells& acquire, const Cells& release) override { NB_OVERRIDE_PURE(extend, acquire, release); }
    std::vector<Arrival> arrived() override { NB_OVERRIDE_PURE(arrived); }
    void cancel() override { NB_OVERRIDE_PURE(cancel); }
};

void bind_cell_source(nb::module_& module) {
    using Release = nb::call_guard<nb::gil_scoped_release>;
    nb::class_<CellSource, PythonCells>(module, "CellSource",
                                        "Where cells are leased one by one; subclasses define all methods.")
        .def(nb::init<>())
        .def("share_slots", &CellSource::share_slots, Release(), "Cells that may always be leased at once; at least 1.")
        .def("lease_limit", &CellSource::lease_limit, Release(),
             "Cells that may be leased at once now: the share, and what may be borrowed above it.")
        .def("exchange", &CellSource::exchange, "layer"_a, "acquire"_a, "release"_a, Release(),
             "Gives back cells of a layer that have arrived, then asks for others. Does not wait.")
        .def("extend", &CellSource::extend, "acquire"_a, "release"_a, Release(),
             "The same for the layer of the last exchange(), while cells that it asked for may be on their way.")
        .def("arrived", &CellSource::arrived, Release(),
             "Waits for more of the cells asked for and returns each with its address, 0 where the lease was refused; "
             "an empty list where none is on its way.")
        .def("cancel", &CellSource::cancel, Release(),
             "Gives back what was asked for and was not returned by arrived().");
}

void bind_repeated(nb::module_& module) {
    nb::class_<RepeatedMemory>(module, "RepeatedMemory", "Memory that the cells of a model share, to try the model.")
        .def(
            "__init__",
            [](RepeatedMemory* self, uint64_t address, uint64_t cells, uint32_t bundles_per_cell, uint32_t stride_bytes,
               std::vector<uint32_t> bundles) {
                require(cells > 0 && bundles_per_cell > 0 && stride_bytes > 0,
                        "cells, bundles_per_cell and stride_bytes must be positive");
                require_cells(bundles);
                new (self) RepeatedMemory{address, cells, bundles_per_cell, stride_bytes, std::move(bundles)};
            },
            "address"_a, "cells"_a, "bundles_per_cell"_a, "stride_bytes"_a, "bundles"_a,
            "cells: that lie at the address, which must be lent to the kernels. bundles: of the model, by layer.");
    nb::class_<RepeatedChunks, ChunkSource>(module, "RepeatedChunks", "All bundles of a model that is tried.")
        .def(
            "__init__",
            [](RepeatedChunks* self, const RepeatedMemory& memory, uint32_t chunk_bundles) {
                require(chunk_bundles > 0, "chunk_bundles must be positive");
                new (self) RepeatedChunks(memory, chunk_bundles);
            },
            "memory"_a, "chunk_bundles"_a, "chunk_bundles: how many are given out at once.");
    nb::class_<RepeatedCells, CellSource>(module, "RepeatedCells", "The cells of a model that is tried.")
        .def(nb::init<const RepeatedMemory&>(), "memory"_a);
}

template <auto method>
auto used(Window& window) {
    const auto use = window.use();
    return (window.*method)();
}

void bind_window(nb::module_& module) {
    using Release = nb::call_guard<nb::gil_scoped_release>;
    nb::class_<Window>(module, "Window", "The cells that are leased: those that the last k tokens wanted.")
        .def(
            "__init__",
            [](Window* self, CellSource& source, uint32_t tokens, uint32_t bundles_per_cell, uint32_t stride_bytes,
               std::vector<uint32_t> cells) {
                require(tokens <= flashclient::WINDOW_TOKENS_MAX, "a window has at most 1024 tokens");
                require(bundles_per_cell > 0 && stride_bytes > 0, "bundles_per_cell and stride_bytes must be positive");
                require_cells(cells);
                new (self) Window(source, tokens, {bundles_per_cell, stride_bytes, std::move(cells)});
            },
            "source"_a, "tokens"_a, "bundles_per_cell"_a, "stride_bytes"_a, "cells"_a, nb::keep_alive<1, 2>(),
            "tokens: k, that of the step included; 0 keeps nothing. cells: their number, by layer.")
        .def("clear", &used<&Window::clear>, Release(), "Gives everything back.")
        .def("forget", &used<&Window::forget>, Release(), "The source has lost all that was leased.")
        .def_prop_ro("cells_held", &used<&Window::cells_held>, Release(), "cells that are leased or on their way");
}

struct BoundStep {
    nb::tuple predictors;  // keeps them alive
    PredictStep step;
};

void make_step(BoundStep* self, const Ffn& ffn, Window& window, const nb::sequence& predictors) {
    const nb::tuple kept(predictors);
    std::vector<const Predictor*> of_layers;
    for (const nb::handle predictor : kept) {
        of_layers.push_back(&nb::cast<const Predictor&>(predictor));
        require(of_layers.back()->hidden() == ffn.shape().hidden, "a predictor must be of the FFN's hidden_size");
    }
    new (self) BoundStep{kept, {ffn, window, std::move(of_layers)}};
}

std::tuple<double, double, double, double> run(BoundStep& bound, uint32_t layer, uint32_t past_tokens, uint32_t columns,
                                               uint16_t wanting, const std::optional<Array<const float, 2>>& biases,
                                               const Array<const float, 2>& x, const Array<float, 2>& y) {
    PredictStep& step = bound.step;
    const Predictor& predictor = step.predictor(layer);
    require(aligned(x, "x").shape(1) == predictor.hidden(), "x must be [tokens, hidden_size]");
    require(x.shape(0) <= flashclient::TOKENS_MAX, "a step has at most 16 tokens");
    require(columns > 0 && x.shape(0) % columns == 0, "the rows of x must be whole sequences of `columns` tokens");
    require(aligned(y, "y").shape(0) == x.shape(0) && y.shape(1) == x.shape(1), "x and y must have the same shape");
    const size_t neurons = predictor.neurons(), rows = step.parts() - 1;
    require(!biases || (aligned(*biases, "biases").shape(0) == rows && biases->shape(1) == neurons),
            "biases must be [parts of a bundle but down, neurons]");
    const float* bias = biases ? biases->data() : nullptr;
    const float* up_bias = biases && rows > 1 ? biases->data() + neurons : nullptr;
    const nb::gil_scoped_release released;
    const auto use = step.window().use();
    const auto times = step.run(layer, {past_tokens, columns, wanting, bias, up_bias, x.data(), x.shape(0)}, y.data());
    return {times.predict_s, times.acquire_s, times.compute_s, times.wait_s};
}

void bind_step(nb::module_& module) {
    nb::class_<BoundStep>(module, "PredictStep", "A layer of predict mode; see client/native/predict/predict_step.h.")
        .def("__init__", &make_step, "ffn"_a, "window"_a, "predictors"_a, nb::keep_alive<1, 2>(),
             nb::keep_alive<1, 3>(),
             nb::sig("def __init__(self, ffn: Ffn, window: Window, predictors: Sequence[Predictor]) -> None"),
             "predictors: one for each layer.")
        .def("run", &run, "layer"_a, "past_tokens"_a, "columns"_a, "wanting"_a, "biases"_a.noconvert().none(),
             "x"_a.noconvert(), "y"_a.noconvert(),
             "y [tokens, hidden] = the sum over the neurons that each row of x wants, for at most 16 rows. Row t is "
             "column t % columns, which is token past_tokens + column of its sequence. wanting: bit t, row t wants "
             "anything. biases [1, or 2 with a gate; neurons]: of [gate and] up, by position. Returns the seconds of "
             "predicting, acquiring, computing and waiting.");
}

class PredictLayer : public LayerFfn {
  public:
    PredictLayer(BoundStep& bound, uint32_t layer, const Biases& biases, const OutputBias& output_bias)
        : LayerFfn(bound.step.shape(), layer, bound.step.predictor(layer).neurons(), biases, output_bias),
          step_(bound.step) {}

    void at(uint32_t past_tokens, uint32_t columns, uint16_t wanting) {
        require(columns > 0, "a step has at least one column");
        past_tokens_ = past_tokens;
        columns_ = columns;
        wanting_ = wanting;
    }

  protected:
    StepTimes sum(const float* x, size_t tokens, float* y) override {
        require(tokens <= flashclient::TOKENS_MAX, "a step has at most 16 tokens");
        require(tokens % columns_ == 0, "the rows of x must be whole sequences of `columns` tokens");
        const auto use = step_.window().use();
        return step_.run(layer(), {past_tokens_, columns_, wanting_, bias(), up_bias(), x, tokens}, y);
    }

  private:
    PredictStep& step_;
    uint32_t past_tokens_ = 0;
    uint32_t columns_ = 1;
    uint16_t wanting_ = 0;
};

void bind_layer(nb::module_& module) {
    nb::class_<PredictLayer, LayerFfn>(module, "PredictLayer", "A layer of a PredictStep.")
        .def(nb::init<BoundStep&, uint32_t, const LayerFfn::Biases&, const LayerFfn::OutputBias&>(), "step"_a,
             "layer"_a, "biases"_a.noconvert().none(), "output_bias"_a.noconvert().none(), nb::keep_alive<1, 2>(),
             "biases, output_bias: as for ExactLayer.")
        .def("at", &PredictLayer::at, "past_tokens"_a, "columns"_a, "wanting"_a,
             "Says what the rows of the next run() are; see PredictStep.run().");
}

}  // namespace

void bind_predict(nb::module_& module) {
    module.attr("WINDOW_TOKENS_MAX") = flashclient::WINDOW_TOKENS_MAX;
    bind_cell_source(module);
    bind_repeated(module);
    bind_window(module);
    bind_step(module);
    bind_layer(module);
}
