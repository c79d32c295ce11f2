// flashclient._native: routers, and the FFN of a mixture for native decoder layers. See client/native/experts/.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "experts/expert_step.h"
#include "experts/router.h"
#include "kernel_arguments.h"
#include "layer_ffn.h"

namespace nb = nanobind;
using namespace nb::literals;
using flashclient::aligned;
using flashclient::Array;
using flashclient::bias_of;
using flashclient::bytes_of;
using flashclient::Dtype;
using flashclient::ExpertStep;
using flashclient::Guess;
using flashclient::GuessNext;
using flashclient::InstructionSet;
using flashclient::is_of;
using flashclient::LayerFfn;
using flashclient::matrix_of;
using flashclient::name_of;
using flashclient::PickedRows;
using flashclient::require;
using flashclient::Router;
using flashclient::Routers;
using flashclient::RowsIn;
using flashclient::RowsOut;
using flashclient::RowValues;
using flashclient::StepTimer;
using flashclient::StepTimes;
using flashclient::Weight;
using flashclient::Workers;

namespace {

// A router whose arrays Python has lent, for as long as this lives.
struct LentRouter {
    Weight weight;
    std::optional<RowValues> bias;
    size_t picks;
    bool normalised;
    bool rounded;

    Router checked(Dtype dtype) const {
        const auto matrix = matrix_of(weight, dtype);
        return {matrix, bias_of(bias, matrix.rows, dtype), picks, normalised, rounded};
    }
};

void make_router(LentRouter* self, const Weight& weight, const std::optional<RowValues>& bias, size_t picks,
                 bool normalised, bool rounded) {
    require(picks > 0 && picks <= weight.shape(0), "a router picks some of its experts");
    new (self) LentRouter{weight, bias, picks, normalised, rounded};
}

void pick(const Routers& routers, const LentRouter& lent, const RowsIn& logits, const Array<float, 2>& weights,
          const Array<int64_t, 2>& experts) {
    const Router router = lent.checked(routers.dtype());
    const size_t rows = logits.shape(0);
    require(is_of(aligned(logits, "logits").dtype(), routers.dtype()) && logits.shape(1) == router.weight.rows,
            "logits must be [rows, experts] of the kernel's dtype");
    require(aligned(weights, "weights").shape(0) == rows && weights.shape(1) == router.picks &&
                aligned(experts, "experts").shape(0) == rows && experts.shape(1) == router.picks,
            "weights and experts must be [rows, picks]");
    const nb::gil_scoped_release released;
    routers.pick(router, logits.data(), rows, weights.data(), experts.data());
}

void project(const Routers& routers, const LentRouter& lent, const RowsIn& x, const RowsOut& logits) {
    const Router router = lent.checked(routers.dtype());
    require(is_of(aligned(x, "x").dtype(), routers.dtype()) && x.shape(1) == router.weight.columns,
            "x must be [rows, columns of the weight] of the kernel's dtype");
    require(is_of(aligned(logits, "logits").dtype(), routers.dtype()) && logits.shape(0) == x.shape(0) &&
                logits.shape(1) == router.weight.rows,
            "logits must be [rows, experts] of the kernel's dtype");
    const nb::gil_scoped_release released;
    routers.project(router, x.data(), x.shape(0), logits.data());
}

void bind_router(nb::module_& module) {
    nb::class_<LentRouter>(module, "Router", "A router; see client/native/experts/router.h.")
        .def("__init__", &make_router, "weight"_a.noconvert(), "bias"_a.noconvert().none(), "picks"_a, "normalised"_a,
             "rounded"_a, "weight [experts, columns] and bias [experts], read in place.");
    nb::class_<Routers>(module, "Routers")
        .def(
            "__init__",
            [](Routers* self, Workers& workers, const std::string& dtype, const InstructionSet& instruction_set) {
                new (self) Routers(workers, weightd::compute_dtype_named(dtype), name_of(instruction_set));
            },
            "workers"_a, "dtype"_a, "instruction_set"_a = nb::none(), nb::keep_alive<1, 2>())
        .def("project", &project, "router"_a, "x"_a.noconvert(), "logits"_a.noconvert(),
             "logits [rows, experts] of x [rows, columns].")
        .def("pick", &pick, "router"_a, "logits"_a.noconvert(), "weights"_a.noconvert(), "experts"_a.noconvert(),
             "Of each row's logits: weights [rows, picks] float32, and experts likewise, the greatest first.");
}

// ---- MixtureLayer ----

class MixtureLayer : public LayerFfn {
  public:
    using ExpertBiases = std::optional<Array<const float, 2>>;  // [experts, hidden], of each expert's output

    MixtureLayer(ExpertStep& step, uint32_t layer, const Biases& biases, const OutputBias& output_bias,
                 const ExpertBiases& expert_biases, const Routers* routers, const LentRouter* router)
        : LayerFfn(step.ffn().shape(), layer, step.layer(layer).neurons, biases, output_bias),
          step_(step),
          expert_biases_(expert_biases),
          routers_(routers),
          router_(router) {
        const uint32_t experts = step.layer(layer).experts;
        require((routers == nullptr) == (router == nullptr), "a router needs its kernel");
        require(router != nullptr || experts == 1, "a layer with several experts needs a router");
        require(!expert_biases || (aligned(*expert_biases, "the experts' biases").shape(0) == experts &&
                                   expert_biases->shape(1) == hidden()),
                "the experts' biases must be [experts, hidden_size]");
        if (router != nullptr) checked(*router, experts);
    }

    // What the next step may pick is guessed with the router of that layer; null: it is not guessed.
    void guess(uint32_t layer, const LentRouter* router) {
        if (router != nullptr) {
            require(routers_ != nullptr, "a layer without a router guesses nothing");
            checked(*router, step_.layer(layer).experts);
        }
        next_layer_ = layer;
        next_ = router;
    }

    // Whether its router guesses before the layer's attention.
    void guess_early(bool guesses) { guesses_early_ = guesses; }

    bool expects(Dtype dtype) const override {
        return guesses_early_ && router_ != nullptr && routers_->dtype() == dtype && step_.asks();
    }

    void expect(const void* x, size_t tokens) override {
        const auto use = step_.walk().use();
        StepTimer timer;
        step_.expect(guess_by(*router_, layer(), x, tokens), tokens);
        timer.lap(expect_s_);
    }

  protected:
    StepTimes sum(const float* x, size_t tokens, float* y) override {
        const auto use = step_.walk().use();
        PickedRows rows{x, tokens, nullptr, nullptr, 0, bias(), up_bias(), nullptr};
        if (expert_biases_) rows.output_bias = expert_biases_->data();
        if (router_ == nullptr) return step_.run(layer(), rows, y);
        StepTimer timer;
        const void* narrow = narrowed(x, tokens * hidden());
        const Router router = router_->checked(routers_->dtype());
        Picks picks;
        pick(router, narrow, tokens, picks);
        rows.experts = picks.experts.data();
        rows.weights = picks.weights.data();
        rows.picks = router.picks;
        timer.lap(timer.times.predict_s);
        StepTimes times = step_.run(layer(), rows, y, next_ == nullptr ? GuessNext{} : guess_of(narrow, tokens));
        times.predict_s += timer.times.predict_s + std::exchange(expect_s_, 0);
        return times;
    }

  private:
    struct Picks {
        std::vector<char> logits;
        std::vector<float> weights;
        std::vector<int64_t> experts;
    };

    void checked(const LentRouter& router, size_t experts) const {
        const Router made = router.checked(routers_->dtype());
        require(made.weight.rows == experts && made.weight.columns == hidden(),
                "a router's weight must be [experts, hidden_size]");
    }

    void pick(const Router& router, const void* x, size_t rows, Picks& picks) const {
        picks.logits.resize(rows * router.weight.rows * bytes_of(routers_->dtype()));
        picks.weights.resize(rows * router.picks);
        picks.experts.resize(rows * router.picks);
        routers_->project(router, x, rows, picks.logits.data());
        routers_->pick(router, picks.logits.data(), rows, picks.weights.data(), picks.experts.data());
    }

    // x in the routers' dtype, which holds it exactly.
    const void* narrowed(const float* x, size_t count) {
        if (routers_->dtype() == Dtype::f32) return x;
        x_.resize(count * bytes_of(routers_->dtype()));
        routers_->kernels().downcast(x, count, x_.data());
        return x_.data();
    }

    GuessNext guess_of(const void* x, size_t rows) const {
        return [this, x, rows]() -> Guess { return guess_by(*next_, next_layer_, x, rows); };
    }

    Guess guess_by(const LentRouter& lent, uint32_t layer, const void* x, size_t rows) const {
        const Router router = lent.checked(routers_->dtype());
        Picks picks;
        pick(router, x, rows, picks);
        Guess guess{layer, {}};
        for (size_t rank = 0; rank < router.picks; rank++) {
            for (size_t row = 0; row < rows; row++) guess.experts.push_back(picks.experts[row * router.picks + rank]);
        }
        return guess;
    }

    ExpertStep& step_;
    ExpertBiases expert_biases_;
    const Routers* routers_;
    const LentRouter* router_;
    uint32_t next_layer_ = 0;
    const LentRouter* next_ = nullptr;
    bool guesses_early_ = false;
    double expect_s_ = 0;  // of the last expect(), until it is told
    std::vector<char> x_;
};

void bind_mixture(nb::module_& module) {
    nb::class_<MixtureLayer, LayerFfn>(module, "MixtureLayer", "Some experts of each row, as its router picks them.")
        .def(nb::init<ExpertStep&, uint32_t, const LayerFfn::Biases&, const LayerFfn::OutputBias&,
                      const MixtureLayer::ExpertBiases&, const Routers*, const LentRouter*>(),
             "step"_a, "layer"_a, "biases"_a.noconvert().none(), "output_bias"_a.noconvert().none(),
             "expert_biases"_a.noconvert().none(), "routers"_a.none(), "router"_a.none(), nb::keep_alive<1, 2>(),
             nb::keep_alive<1, 7>(), nb::keep_alive<1, 8>(),
             "biases [1, or 2 with a gate; neurons]: of [gate and] up, by position. output_bias [hidden], of the sum. "
             "expert_biases [experts, hidden], of each expert's output. Without router: an FFN that is no mixture.")
        .def("guess", &MixtureLayer::guess, "layer"_a, "router"_a.none(), nb::keep_alive<1, 3>(),
             "The next calls guess what `layer` will pick, with its router, so that weightd may read it early.")
        .def("guess_early", &MixtureLayer::guess_early, "guesses"_a,
             "Whether native layers guess what their own router will pick, before their attention.");
}

}  // namespace

void bind_routers(nb::module_& module) {
    bind_router(module);
    bind_mixture(module);
}
