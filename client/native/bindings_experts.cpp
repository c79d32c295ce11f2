// flashclient._native: the layers of models with experts for Python. See client/native/experts/.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "array_arguments.h"
#include "experts/cell_walk.h"
#include "experts/expert_step.h"

namespace nb = nanobind;
using namespace nb::literals;
using flashclient::aligned;
using flashclient::Array;
using flashclient::CellSource;
using flashclient::CellWalk;
using flashclient::ExpertLayer;
using flashclient::ExpertStep;
using flashclient::Ffn;
using flashclient::Guess;
using flashclient::GuessNext;
using flashclient::PickedRows;
using flashclient::require;

namespace {

constexpr uint32_t NEURONS_MAX = 1U << 26;  // of a layer: a step has tables of them

template <auto method>
void used(CellWalk& walk) {
    const auto use = walk.use();
    (walk.*method)();
}

void bind_walk(nb::module_& m) {
    using Release = nb::call_guard<nb::gil_scoped_release>;
    nb::class_<CellWalk>(m, "CellWalk", "The cells that a step of a layer wants, leased in order.")
        .def(
            "__init__",
            [](CellWalk* self, CellSource& source, uint32_t bundles_per_cell, uint32_t stride_bytes,
               std::optional<uint32_t> cells_of_model) {
                require(bundles_per_cell > 0, "bundles_per_cell must be positive");
                new (self)
                    CellWalk(source, {bundles_per_cell, stride_bytes}, cells_of_model.value_or(CellWalk::NEVER_KEPT));
            },
            "source"_a, "bundles_per_cell"_a, "stride_bytes"_a, "cells_of_model"_a = nb::none(), nb::keep_alive<1, 2>(),
            "cells_of_model: used cells stay leased where the session may lease so many. None: they never do.")
        .def("clear", &used<&CellWalk::clear>, Release(), "Gives everything back.")
        .def("forget", &used<&CellWalk::forget>, Release(), "The source has lost all that was leased.");
}

// `ffns`: a tuple, which keeps them alive and cannot change.
void make_step(ExpertStep* self, const nb::tuple& ffns, CellWalk& walk,
               const std::vector<std::pair<uint32_t, uint32_t>>& layers) {
    require(!layers.empty() && ffns.size() == layers.size(), "there must be an FFN for each layer");
    std::vector<ExpertLayer> of_layers;
    for (const auto& [experts, neurons] : layers) {
        require(neurons <= NEURONS_MAX, "a layer has at most 67108864 neurons");
        of_layers.push_back({experts, neurons, &nb::cast<const Ffn&>(ffns[of_layers.size()])});
    }
    const Ffn& first = *of_layers.front().ffn;
    new (self) ExpertStep(first, walk, std::move(of_layers));
}

using Picks = std::optional<Array<const int64_t, 2>>;
using Guessed = std::optional<std::pair<uint32_t, Array<const int64_t, 1>>>;
using Floats = std::optional<Array<const float, 2>>;

const float* data_of(const Floats& floats, size_t rows, size_t columns, const char* wanted) {
    if (!floats) return nullptr;
    require(aligned(*floats, "an array").shape(0) == rows && floats->shape(1) == columns, wanted);
    return floats->data();
}

GuessNext guess_of(const ExpertStep& step, const nb::callable& guess) {
    return [&]() -> Guess {
        const nb::gil_scoped_acquire acquire;
        const auto guessed = nb::cast<Guessed>(guess());
        if (!guessed) return {};
        const auto& [layer, experts] = *guessed;
        step.layer(layer);  // throws where there is none
        const int64_t* first = aligned(experts, "a guess").data();
        return {layer, std::vector<int64_t>(first, first + experts.size())};
    };
}

std::tuple<double, double, double, double> run(ExpertStep& step, uint32_t index, const Picks& experts,
                                               const Floats& weights, const Floats& biases, const Floats& output_bias,
                                               const Array<const float, 2>& x, const Array<float, 2>& y,
                                               const std::optional<nb::callable>& guess) {
    const ExpertLayer& layer = step.layer(index);
    const size_t tokens = x.shape(0), hidden = step.ffn().shape().hidden, parts = step.ffn().shape().parts.size() - 1;
    require(aligned(x, "x").shape(1) == hidden, "x must be [tokens, hidden_size]");
    require(aligned(y, "y").shape(0) == tokens && y.shape(1) == hidden, "x and y must have the same shape");
    require(experts.has_value() == weights.has_value(), "experts and weights belong together");
    require(experts.has_value() || layer.experts == 1, "a layer with several experts needs picks");
    if (experts && experts->size() == 0) {  // an empty array may have no address
        std::fill_n(y.data(), y.size(), 0.0f);
        return {0.0, 0.0, 0.0, 0.0};
    }
    PickedRows rows{x.data(), tokens, nullptr, nullptr, 0, nullptr, nullptr, nullptr};
    if (experts) {
        require(aligned(*experts, "experts").shape(0) == tokens, "experts must be [tokens, picks]");
        rows.experts = experts->data();
        rows.picks = experts->shape(1);
        rows.weights = data_of(weights, tokens, rows.picks, "weights must be [tokens, picks]");
    }
    rows.bias = data_of(biases, parts, layer.neurons, "biases must be [parts of a bundle but down, neurons]");
    if (biases) rows.up_bias = rows.bias + (parts - 1) * layer.neurons;
    rows.output_bias = data_of(output_bias, layer.experts, hidden, "output_bias must be [experts, hidden_size]");
    const nb::gil_scoped_release release;
    const auto use = step.walk().use();
    const auto times = step.run(index, rows, y.data(), guess ? guess_of(step, *guess) : GuessNext{});
    return {times.predict_s, times.acquire_s, times.compute_s, times.wait_s};
}

void bind_step(nb::module_& m) {
    nb::class_<ExpertStep>(m, "ExpertStep", "Layers of a model with experts; see client/native/experts/expert_step.h.")
        .def(
            "__init__", &make_step, "ffns"_a, "walk"_a, "layers"_a, nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(),
            nb::sig(
                "def __init__(self, ffns: tuple[Ffn, ...], walk: CellWalk, layers: Sequence[tuple[int, int]]) -> None"),
            "ffns: by layer. layers: (experts, neurons of all of them) of each layer, 1 expert for an FFN that is not "
            "a mixture.")
        .def("run", &run, "layer"_a, "experts"_a.noconvert().none(), "weights"_a.noconvert().none(),
             "biases"_a.noconvert().none(), "output_bias"_a.noconvert().none(), "x"_a.noconvert(), "y"_a.noconvert(),
             "guess"_a = nb::none(),
             "y [tokens, hidden] = the weighted sum over each row's experts. experts [tokens, picks] int64. "
             "weights [tokens, picks]. A pick with weight 0, or outside of the layer's experts, is not computed. None "
             "for both: every row "
             "picks the only expert. biases [1, or 2 with a gate; neurons]: of [gate and] up, by position. output_bias "
             "[experts, hidden]. guess: called once the experts were asked for; returns a later layer and the experts "
             "[any] int64 that it may pick, the likeliest first, which weightd may read early, or None. Returns the "
             "seconds of predicting, acquiring, computing and waiting.");
}

}  // namespace

void bind_experts(nb::module_& module) {
    bind_walk(module);
    bind_step(module);
}
