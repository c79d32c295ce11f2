// flashclient._native: the FFN of one layer for native decoder layers, and that of exact mode.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>

#include <cstdint>
#include <tuple>

#include "array_arguments.h"
#include "layer_ffn.h"
#include "ring/exact_step.h"

namespace nb = nanobind;
using namespace nb::literals;
using flashclient::aligned;
using flashclient::Array;
using flashclient::ChunkSource;
using flashclient::ExactStep;
using flashclient::Ffn;
using flashclient::LayerFfn;
using flashclient::require;
using flashclient::StepTimes;

namespace {

class ExactLayer : public LayerFfn {
  public:
    ExactLayer(const Ffn& ffn, ChunkSource& source, uint32_t layer, const Biases& biases, const OutputBias& output_bias)
        : LayerFfn(ffn.shape(), layer, neurons_of(ffn, source, layer), biases, output_bias), step_(ffn, source) {}

  protected:
    StepTimes sum(const float* x, size_t tokens, float* y) override {
        return step_.run(layer(), {bias(), up_bias(), x, tokens}, y);
    }

  private:
    static size_t neurons_of(const Ffn& ffn, const ChunkSource& source, uint32_t layer) {
        require(layer < source.bundles().size(), "there is no such layer");
        return source.bundles()[layer] * ffn.shape().neurons;
    }

    ExactStep step_;
};

std::tuple<double, double, double, double> run(LayerFfn& ffn, const Array<const float, 2>& x,
                                               const Array<float, 2>& y) {
    require(aligned(x, "x").shape(1) == ffn.hidden(), "x must be [tokens, hidden_size]");
    require(aligned(y, "y").shape(0) == x.shape(0) && y.shape(1) == x.shape(1), "x and y must have the same shape");
    const nb::gil_scoped_release released;
    const StepTimes times = ffn.run(x.data(), x.shape(0), y.data());
    return {times.predict_s, times.acquire_s, times.compute_s, times.wait_s};
}

}  // namespace

void bind_exact(nb::module_& module) {
    nb::class_<LayerFfn>(module, "LayerFfn", "The FFN of one layer; see client/native/layer_ffn.h. One call at a time.")
        .def("run", &run, "x"_a.noconvert(), "y"_a.noconvert(),
             "y [tokens, hidden] = the FFN of x. Returns the seconds of predicting, acquiring, computing and waiting.");
    nb::class_<ExactLayer, LayerFfn>(module, "ExactLayer", "All neurons, chunk after chunk.")
        .def(nb::init<const Ffn&, ChunkSource&, uint32_t, const LayerFfn::Biases&, const LayerFfn::OutputBias&>(),
             "ffn"_a, "source"_a, "layer"_a, "biases"_a.noconvert().none(), "output_bias"_a.noconvert().none(),
             nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(),
             "biases [1, or 2 with a gate; neurons]: of [gate and] up, by position. output_bias: [hidden].");
}
