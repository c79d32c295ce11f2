// The predict step against the sum over the same list of neurons at once, whatever the window and its source do.
#include "predict/predict_step.h"

#include "predict/cells.h"
#include "random_floats.h"

namespace flashclient {
namespace {

constexpr size_t HIDDEN = 40, NEURONS = 96;

// Row t wants the neurons whose number is a multiple of t + 2.
class Multiples : public Predictor {
  public:
    Prediction predict(const float*, size_t tokens) const override {
        Prediction prediction;
        for (uint32_t position = 0; position < NEURONS; position++) {
            uint16_t mask = 0;
            for (size_t t = 0; t < tokens; t++) mask |= static_cast<uint16_t>((position % (t + 2) == 0) << t);
            if (mask == 0) continue;
            prediction.positions.push_back(position);
            prediction.row_masks.push_back(mask);
        }
        return prediction;
    }
    size_t hidden() const override { return HIDDEN; }
    size_t neurons() const override { return NEURONS; }
};

struct PredictStepTest : testing::Test {
    static constexpr uint32_t PER_CELL = 2;
    static constexpr size_t LAYERS = 2, ROWS = 3;
    Workers workers{2};
    Ffn ffn{workers, {{3, weightd::plain_encoding(Dtype::f32)}, HIDDEN, {Function::relu}}};
    std::vector<float> bundles = random_floats(LAYERS * NEURONS * 3 * HIDDEN, 1);
    ReadableMemory readable{bundles.data(), bundles.size() * sizeof(float)};
    std::vector<float> x = random_floats(ROWS * HIDDEN, 2), bias = random_floats(NEURONS, 3);
    Multiples predictor;
    TestCells cells;

    PredictStepTest() {
        cells.one_by_one = true;
        cells.address = [this](uint32_t layer, uint32_t cell) { return address(layer, cell * PER_CELL); };
    }

    uint64_t address(size_t layer, size_t position) const {
        return reinterpret_cast<uint64_t>(bundles.data() + (layer * NEURONS + position) * 3 * HIDDEN);
    }

    Window window(uint32_t tokens) {
        const std::vector<uint32_t> counts(LAYERS, NEURONS / PER_CELL);
        return Window(cells, tokens, {PER_CELL, 3 * HIDDEN * sizeof(float), counts});
    }

    std::vector<float> run(Window& window, uint32_t layer, uint32_t token, uint16_t wanting = 0b111) {
        PredictStep step(ffn, window, {&predictor, &predictor});
        std::vector<float> y(ROWS * HIDDEN, NAN);
        const StepTimes times = step.run(layer, {token, 1, wanting, bias.data(), nullptr, x.data(), ROWS}, y.data());
        EXPECT_GE(std::min({times.predict_s, times.acquire_s, times.compute_s, times.wait_s}), 0.0);
        return y;
    }

    std::vector<float> expected(uint32_t layer, uint16_t wanting = 0b111) {
        const Prediction wanted = predictor.predict(x.data(), ROWS);
        std::vector<uint64_t> addresses;
        std::vector<float> biases, y(ROWS * HIDDEN);
        std::vector<uint16_t> masks;
        for (size_t i = 0; i < wanted.positions.size(); i++) {
            addresses.push_back(address(layer, wanted.positions[i]));
            biases.push_back(bias[wanted.positions[i]]);
            masks.push_back(wanted.row_masks[i] & wanting);
        }
        ffn.add_rows({addresses, biases.data(), nullptr, masks.data()}, x.data(), ROWS, y.data());
        return y;
    }
};

TEST_F(PredictStepTest, IsTheSumOverWhatEachRowWants) {
    for (const uint32_t tokens : {0U, 1U, 4U}) {
        Window window = this->window(tokens);
        for (uint32_t token = 0; token < 3; token++) {
            for (uint32_t layer = 0; layer < LAYERS; layer++) ASSERT_EQ(run(window, layer, token), expected(layer));
        }
        EXPECT_EQ(window.cells_held() == 0, tokens == 0);
        window.clear();
    }
}

TEST_F(PredictStepTest, RowsThatWantNothingAreZero) {
    Window window = this->window(4);
    const std::vector<float> y = run(window, 0, 0, 0b010);
    EXPECT_EQ(y, expected(0, 0b010));
    EXPECT_EQ(std::vector<float>(y.begin(), y.begin() + HIDDEN), std::vector<float>(HIDDEN));
    window.clear();
    EXPECT_EQ(run(window, 0, 0, 0), std::vector<float>(ROWS * HIDDEN));
    EXPECT_TRUE(cells.held.empty());
}

TEST_F(PredictStepTest, LimitsAndRefusalsChangeNoBit) {
    for (const uint32_t limit : {1U, 3U, 40U, 100U}) {
        cells.limit = limit;
        cells.share = std::min(limit, 3U);
        Window window = this->window(4);
        for (uint32_t token = 0; token < 6; token++) {
            // The share is never refused.
            cells.refusals = limit == 100 && token % 2 == 1 ? 1 : 0;
            if (cells.refusals > 0) window.clear();
            for (uint32_t layer = 0; layer < LAYERS; layer++) ASSERT_EQ(run(window, layer, token), expected(layer));
        }
        window.clear();
        EXPECT_TRUE(cells.held.empty());
    }
}

TEST_F(PredictStepTest, ALossMidwayLeavesNothingBehind) {
    Window window = this->window(4);
    run(window, 0, 0);
    cells.lost = true;
    EXPECT_THROW(run(window, 1, 0), std::runtime_error);
    cells.lost = false;
    EXPECT_EQ(run(window, 1, 0), expected(1));
    EXPECT_EQ(window.cells_held(), cells.held.size());
}

}  // namespace
}  // namespace flashclient
