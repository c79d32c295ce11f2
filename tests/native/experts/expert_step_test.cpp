// The step of a layer with experts against one expert after the other, whatever its source does.
#include "experts/expert_step.h"

#include <algorithm>
#include <random>

#include "predict/cells.h"

namespace flashclient {
namespace {

constexpr size_t HIDDEN = 40, WIDTH = 24, PICKS = 3;
constexpr uint32_t EXPERTS = 7, PER_CELL = 4, DENSE = 1;  // layer 1 is not a mixture, and its last cell is not full
constexpr size_t DENSE_NEURONS = 30;
constexpr size_t ROW_BYTES = 3 * HIDDEN * sizeof(float);

std::vector<float> random_floats(size_t count, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0.0f, 1.0f);
    std::vector<float> values(count);
    for (float& value : values) value = normal(random);
    return values;
}

struct ExpertStepTest : testing::Test {
    Workers workers{2};
    Ffn ffn{workers, {{3, weightd::plain_encoding(Dtype::f32)}, HIDDEN, {Function::silu}}};
    std::vector<float> bundles = random_floats((EXPERTS * WIDTH + DENSE_NEURONS) * 3 * HIDDEN, 1);
    ReadableMemory readable{bundles.data(), bundles.size() * sizeof(float)};
    std::vector<float> bias = random_floats(EXPERTS * WIDTH, 3), up_bias = random_floats(EXPERTS * WIDTH, 4);
    std::vector<float> output_bias = random_floats(EXPERTS * HIDDEN, 5);
    TestCells cells;
    CellWalk walk{cells, {PER_CELL, ROW_BYTES}};
    ExpertStep step{ffn, walk, {{EXPERTS, EXPERTS* WIDTH}, {1, DENSE_NEURONS}}};

    ExpertStepTest() {
        cells.one_by_one = true;  // the last that was asked for arrives first
        cells.address = [this](uint32_t layer, uint32_t cell) { return address(layer, cell * PER_CELL); };
    }

    uint64_t address(size_t layer, size_t neuron) const {
        return reinterpret_cast<uint64_t>(bundles.data() + (layer * EXPERTS * WIDTH + neuron) * 3 * HIDDEN);
    }

    struct Rows {
        std::vector<float> x, weights;
        std::vector<int64_t> experts;
        size_t tokens;
    };

    static Rows rows_of(size_t tokens, unsigned seed) {
        std::mt19937 random(seed);
        Rows rows{random_floats(tokens * HIDDEN, seed), random_floats(tokens * PICKS, seed + 1), {}, tokens};
        for (size_t i = 0; i < tokens * PICKS; i++) rows.experts.push_back(random() % (EXPERTS + 2));  // some: none
        return rows;
    }

    static Rows row_of(const Rows& rows, size_t token) {
        const auto part = [&](const auto& all, size_t each) {
            return std::vector(all.begin() + token * each, all.begin() + (token + 1) * each);
        };
        return {part(rows.x, HIDDEN), part(rows.weights, PICKS), part(rows.experts, PICKS), 1};
    }

    std::vector<float> run(const Rows& rows) {
        std::vector<float> y(rows.tokens * HIDDEN, NAN);
        step.run(0,
                 {rows.x.data(), rows.tokens, rows.experts.data(), rows.weights.data(), PICKS, bias.data(),
                  up_bias.data(), output_bias.data()},
                 y.data());
        return y;
    }

    std::vector<float> run_dense(const std::vector<float>& x) {
        std::vector<float> y(x.size(), NAN);
        step.run(DENSE, {x.data(), x.size() / HIDDEN, nullptr, nullptr, 0, nullptr, nullptr, nullptr}, y.data());
        return y;
    }

    // One row, expert after expert, in ascending order.
    std::vector<float> expected(const Rows& row) {
        std::vector<float> y(HIDDEN);
        for (uint32_t expert = 0; expert < EXPERTS; expert++) {
            for (size_t pick = 0; pick < PICKS; pick++) {
                if (row.experts[pick] != expert) continue;
                std::vector<uint64_t> addresses;
                for (size_t j = 0; j < WIDTH; j++) addresses.push_back(address(0, expert * WIDTH + j));
                Neurons list{addresses, bias.data() + expert * WIDTH};
                list.up_bias = up_bias.data() + expert * WIDTH;
                std::vector<float> output(HIDDEN);
                ffn.add_rows(list, row.x.data(), 1, output.data());
                for (size_t j = 0; j < HIDDEN; j++) {
                    y[j] += row.weights[pick] * (output[j] + output_bias[expert * HIDDEN + j]);
                }
            }
        }
        return y;
    }

    std::vector<float> expected_rows(const Rows& rows) {
        std::vector<float> y;
        for (size_t token = 0; token < rows.tokens; token++) {
            const std::vector<float> one = expected(row_of(rows, token));
            y.insert(y.end(), one.begin(), one.end());
        }
        return y;
    }
};

TEST_F(ExpertStepTest, ARowIsTheSumOverItsExpertsAloneAndInABatch) {
    for (const size_t tokens : {1, 2, 5, 16, 17, 100}) {
        const Rows rows = rows_of(tokens, static_cast<unsigned>(tokens));
        ASSERT_EQ(run(rows), expected_rows(rows)) << tokens;
        EXPECT_TRUE(cells.held.empty());
    }
}

TEST_F(ExpertStepTest, OnlyPickedExpertsAreAskedFor) {
    Rows rows = rows_of(2, 1);
    rows.experts = {5, 2, -1, 2, 2, EXPERTS};
    EXPECT_EQ(run(rows), expected_rows(rows));
    TestCells::Cells wanted(12);
    for (uint32_t i = 0; i < 6; i++) {
        wanted[i] = 2 * 6 + i;
        wanted[i + 6] = 5 * 6 + i;
    }
    EXPECT_EQ(cells.asked_for, wanted);
}

TEST_F(ExpertStepTest, WhatIsGuessedIsOnlyAHint) {
    const Rows rows = rows_of(1, 4);
    const PickedRows given = {rows.x.data(), 1,           rows.experts.data(), rows.weights.data(),
                              PICKS,         bias.data(), up_bias.data(),      output_bias.data()};
    std::vector<float> y(HIDDEN, NAN);
    step.run(0, given, y.data(), [&]() -> Guess {
        EXPECT_EQ(cells.exchanges, 1U) << "what is picked is asked for first";
        return {0, {5, -1, EXPERTS, 2}};
    });
    EXPECT_EQ(y, expected_rows(rows));
    const std::vector<std::array<uint32_t, 3>> wanted = {{0, 30, 36}, {0, 12, 18}};
    EXPECT_EQ(cells.prefetched, wanted);
    EXPECT_THROW(step.run(0, given, y.data(), []() -> Guess { throw std::runtime_error("no guess"); }),
                 std::runtime_error);
    EXPECT_EQ(run(rows), expected_rows(rows)) << "the next step gives back what that one was granted";
}

TEST_F(ExpertStepTest, RanksWhoseGuessesAreMostlyWrongAreNotReadAhead) {
    Rows rows = rows_of(1, 1);
    rows.experts = {5, 2, 4};
    const PickedRows given = {rows.x.data(), 1,           rows.experts.data(), rows.weights.data(),
                              PICKS,         bias.data(), up_bias.data(),      output_bias.data()};
    std::vector<float> y(HIDDEN);
    const auto guessed_after = [&](int steps, const auto& guess) {
        for (int i = 0; i < steps; i++) {
            cells.prefetched.clear();
            guess();
        }
        return cells.prefetched.size();
    };
    const auto before = [&] { step.run(0, given, y.data(), [] { return Guess{0, {5, 3, 2}}; }); };
    const auto early = [&] {
        step.expect({0, {2, 4, 1}}, 1);
        step.run(0, given, y.data());
    };
    EXPECT_FALSE(step.asks());
    EXPECT_EQ(guessed_after(10, before), 3U) << "as long as nothing is known";
    EXPECT_TRUE(step.asks());
    EXPECT_EQ(guessed_after(30, before), 1U) << "nor are those after them";
    EXPECT_EQ(guessed_after(10, early), 3U) << "each kind of guess is judged by itself";
    EXPECT_EQ(guessed_after(30, early), 2U);
    rows.experts = {5, 3, 2};
    EXPECT_EQ(guessed_after(100, before), 3U) << "they are judged though they are not read";
}

TEST_F(ExpertStepTest, WhereNearlyAllExpertsArePickedTheNextLayerIsReadEarly) {
    Rows rows = rows_of(2, 1);
    rows.experts = {5, 2, 4, 2, 1, 5};
    EXPECT_EQ(run(rows), expected_rows(rows));
    EXPECT_TRUE(cells.prefetched.empty());
    rows.experts = {5, 2, 4, 0, 1, 6};
    for (const uint32_t limit : {5U, 1000U}) {
        cells.limit = limit;
        cells.prefetched.clear();
        EXPECT_EQ(run(rows), expected_rows(rows));
        const std::vector<std::array<uint32_t, 3>> wanted = {{DENSE, 0, std::min(limit, 8U)}};
        EXPECT_EQ(cells.prefetched, wanted) << "once, and no more than may be leased at once";
    }
}

TEST_F(ExpertStepTest, RowsThatPickNothingAreZero) {
    Rows rows = rows_of(1, 1);
    rows.experts.assign(PICKS, -3);
    EXPECT_EQ(run(rows), std::vector<float>(HIDDEN));
    EXPECT_EQ(cells.exchanges, 0U);
}

TEST_F(ExpertStepTest, LimitsAndRefusalsChangeNoBit) {
    for (const uint32_t limit : {1U, 2U, 3U, 7U, 100U}) {
        for (const uint32_t share : {1U, 2U, 5U}) {
            cells.limit = limit;
            cells.share = std::min(limit, share);
            for (const size_t tokens : {3, 40}) {
                cells.refusals = tokens == 3 && limit > share ? 2 : 0;  // the share is never refused
                const Rows rows = rows_of(tokens, 9);
                ASSERT_EQ(run(rows), expected_rows(rows)) << limit << " " << share << " " << tokens;
                ASSERT_TRUE(cells.held.empty());
            }
        }
    }
}

TEST_F(ExpertStepTest, ManyTokensLookNoFurtherAheadThanTheShare) {
    cells.share = 4;
    const Rows rows = rows_of(50, 2);
    EXPECT_EQ(run(rows), expected_rows(rows));
    EXPECT_LE(cells.held_most, 4U);
}

TEST_F(ExpertStepTest, AnFfnIsOneExpertThatEveryRowPicks) {
    for (const size_t tokens : {1, 3, 70}) {
        const std::vector<float> x = random_floats(tokens * HIDDEN, 6);
        std::vector<uint64_t> addresses;
        for (size_t j = 0; j < DENSE_NEURONS; j++) addresses.push_back(address(DENSE, j));
        std::vector<float> y(x.size());
        ffn.add_rows({addresses}, x.data(), tokens, y.data());
        cells.limit = tokens == 3 ? 2 : 1000;
        ASSERT_EQ(run_dense(x), y);
    }
}

TEST_F(ExpertStepTest, ALossMidwayLeavesNothingBehind) {
    const Rows rows = rows_of(4, 3);
    cells.lost_after = 3;
    EXPECT_THROW(run(rows), std::runtime_error);
    EXPECT_FALSE(cells.held.empty());
    cells.lost_after = 1'000'000;
    EXPECT_EQ(run(rows), expected_rows(rows));
    EXPECT_TRUE(cells.held.empty());
    cells.lost_after = 3;
    EXPECT_THROW(run(rows), std::runtime_error);
    walk.clear();
    EXPECT_TRUE(cells.held.empty());
}

TEST_F(ExpertStepTest, CellsThatCouldNotBeGivenBackAreGivenBackLater) {
    const Rows rows = rows_of(4, 3);
    cells.limit = 8;
    cells.unreachable_after = 4;
    EXPECT_THROW(run(rows), std::runtime_error);
    cells.unreachable_after = 1'000'000;
    EXPECT_EQ(run(rows), expected_rows(rows));
    EXPECT_TRUE(cells.held.empty());
}

constexpr uint32_t CELLS = EXPERTS * WIDTH / PER_CELL + (DENSE_NEURONS + PER_CELL - 1) / PER_CELL;

// The session may lease all cells of the model at once.
struct KeepingStepTest : ExpertStepTest {
    CellWalk keeping{cells, {PER_CELL, ROW_BYTES}, CELLS};
    ExpertStep kept_step{ffn, keeping, {{EXPERTS, EXPERTS* WIDTH}, {1, DENSE_NEURONS}}};

    KeepingStepTest() { cells.limit = CELLS; }

    void check(const Rows& rows, const GuessNext& guess = {}) {
        std::vector<float> y(rows.tokens * HIDDEN, NAN);
        kept_step.run(0,
                      {rows.x.data(), rows.tokens, rows.experts.data(), rows.weights.data(), PICKS, bias.data(),
                       up_bias.data(), output_bias.data()},
                      y.data(), guess);
        ASSERT_EQ(y, expected_rows(rows));
    }

    void run_dense_kept() {
        const std::vector<float> x = random_floats(HIDDEN, 6);
        std::vector<float> y(HIDDEN, NAN);
        kept_step.run(DENSE, {x.data(), 1, nullptr, nullptr, 0, nullptr, nullptr, nullptr}, y.data());
        EXPECT_FALSE(std::isnan(y.front()));
    }
};

TEST_F(KeepingStepTest, WhatIsHeldNeedsNoMessage) {
    cells.share = 5;
    check(rows_of(40, 1));  // every expert, a few cells at a time
    EXPECT_EQ(cells.held.size(), EXPERTS * WIDTH / PER_CELL);
    run_dense_kept();
    EXPECT_EQ(cells.held.size(), CELLS);
    const uint32_t exchanges = cells.exchanges;
    cells.prefetched.clear();
    for (const size_t tokens : {1, 3, 40}) {
        check(rows_of(tokens, 2), [] { return Guess{0, {1, 4}}; });
    }
    EXPECT_EQ(cells.exchanges, exchanges);
    EXPECT_TRUE(cells.prefetched.empty());
    keeping.clear();
    EXPECT_TRUE(cells.held.empty());
}

TEST_F(KeepingStepTest, OnlyWhatIsMissingIsAskedForAndGuessed) {
    Rows rows = rows_of(1, 1);
    rows.experts = {5, 2, -1};
    check(rows);
    cells.asked_for.clear();
    rows.experts = {6, 2, 5};
    check(rows, [] { return Guess{0, {2, 0}}; });
    EXPECT_EQ(cells.asked_for, (TestCells::Cells{36, 37, 38, 39, 40, 41}));
    const std::vector<std::array<uint32_t, 3>> wanted = {{0, 0, 6}};
    EXPECT_EQ(cells.prefetched, wanted);
}

TEST_F(KeepingStepTest, EverythingIsGivenBackOnceTheLimitHasFallen) {
    check(rows_of(40, 1));
    for (const uint32_t limit : {CELLS - 1, 1U}) {
        cells.limit = limit;
        cells.share = 1;
        run_dense_kept();
        EXPECT_TRUE(cells.held.empty());
        cells.limit = CELLS;
        check(rows_of(3, 2));
        EXPECT_FALSE(cells.held.empty()) << "it may keep cells again";
    }
}

TEST_F(KeepingStepTest, ARefusalGivesEverythingBackUntilTheNextClear) {
    for (const uint32_t share : {1U, 2U, 100U}) {
        Rows rows = rows_of(1, 1);
        rows.experts = {5, 2, -1};
        check(rows);
        cells.share = share;
        cells.refusals = 2;
        rows.experts = {6, 2, 5};
        check(rows);
        EXPECT_TRUE(cells.held.empty());
        check(rows);
        EXPECT_TRUE(cells.held.empty());
        keeping.clear();
        check(rows);
        EXPECT_FALSE(cells.held.empty());
        keeping.clear();
    }
}

TEST_F(KeepingStepTest, ALossMidwayLeavesNothingBehind) {
    const Rows rows = rows_of(4, 3);
    Rows few = rows_of(1, 1);
    few.experts = {5, 2, -1};
    check(few);
    cells.lost_after = 3;
    EXPECT_THROW(check(rows), std::runtime_error);
    cells.lost_after = 1'000'000;
    check(rows);
    keeping.clear();
    EXPECT_TRUE(cells.held.empty());
    cells.unreachable_after = 1;  // the last cells cannot be given back
    check(few);
    EXPECT_THROW(keeping.clear(), std::runtime_error);
    cells.unreachable_after = 1'000'000;
    keeping.clear();
    EXPECT_TRUE(cells.held.empty());
    check(few);
    cells.held.clear();
    keeping.forget();
    check(few);
}

TEST_F(ExpertStepTest, RefusesExpertsWithoutWholeCells) {
    EXPECT_THROW(ExpertStep(ffn, walk, {{3, 3 * 22}}), std::invalid_argument);
    EXPECT_THROW(ExpertStep(ffn, walk, {{0, 24}}), std::invalid_argument);
    EXPECT_THROW(ExpertStep(ffn, walk, {{1, 0}}), std::invalid_argument);
    EXPECT_THROW(ExpertStep(ffn, walk, {{7, 24}}), std::invalid_argument);
}

}  // namespace
}  // namespace flashclient
