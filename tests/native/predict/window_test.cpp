// The window against a reading of its rules with sets, and what it leases where the limit is less than that.
#include "predict/window.h"

#include <algorithm>
#include <iterator>
#include <map>
#include <random>

#include "predict/cells.h"

namespace flashclient {
namespace {

constexpr uint32_t CELLS = 12, LAYERS = 3;
constexpr uint32_t NO_LIMIT = 10'000;
using Positions = std::set<uint32_t>;

// What a step wants, [columns][rows], in the form of a predictor.
struct Step {
    uint32_t layer = 0;
    uint32_t past_tokens = 0;
    std::vector<std::vector<Positions>> columns;
    std::vector<uint32_t> positions;
    std::vector<uint16_t> masks;

    void list() {
        std::map<uint32_t, uint16_t> mask_of;
        for (size_t column = 0; column < columns.size(); column++) {
            for (size_t row = 0; row < columns[column].size(); row++) {
                const auto bit = static_cast<uint16_t>(1U << (row * columns.size() + column));
                for (const uint32_t position : columns[column][row]) mask_of[position] |= bit;
            }
        }
        for (const auto& [position, mask] : mask_of) {
            positions.push_back(position);
            masks.push_back(mask);
        }
    }
    Wanted wanted() const { return {past_tokens, static_cast<uint32_t>(columns.size()), positions, masks}; }
};

// k, bundles per cell, and steps. Tokens are rejected, generations begin anew.
struct Walk {
    uint32_t tokens, per_cell;
    std::vector<Step> steps;

    explicit Walk(uint32_t seed) {
        std::mt19937 random(seed);
        tokens = random() % 9;
        per_cell = 1 + random() % 3;
        const uint32_t rows = 1 + random() % 3;
        std::vector<uint32_t> ends(LAYERS);
        for (uint32_t i = 1 + random() % 12; i > 0; i--) {
            Step step;
            step.layer = random() % LAYERS;
            uint32_t& end = ends[step.layer];
            const uint32_t rejected = std::array{0U, 0U, 0U, 1U, 3U, 100U}[random() % 6];
            step.past_tokens = end - std::min(end, rejected);
            step.columns.resize(1 + random() % 4, std::vector<Positions>(rows));
            end = step.past_tokens + static_cast<uint32_t>(step.columns.size());
            for (auto& column : step.columns) {
                for (Positions& row : column) {
                    for (uint32_t n = random() % 9; n > 0; n--) row.insert(random() % (CELLS * per_cell));
                }
            }
            step.list();
            steps.push_back(std::move(step));
        }
    }
};

struct WindowTest : testing::Test {
    TestCells cells;

    Window window(uint32_t tokens, uint32_t per_cell = 1, uint32_t layers = LAYERS) {
        return Window(cells, tokens, {per_cell, 64, std::vector<uint32_t>(layers, CELLS)});
    }

    static bool slide(Window& window, uint32_t layer, uint32_t past_tokens, const std::vector<uint32_t>& positions) {
        const std::vector<uint16_t> masks(positions.size(), 1);
        return window.slide(layer, {past_tokens, 1, positions, masks});
    }

    // A step to its end, as PredictStep makes it.
    static void finish(Window& window, const std::vector<uint32_t>& positions, uint32_t layer, uint32_t per_cell) {
        std::vector<uint64_t> addresses(positions.size());
        std::vector<uint32_t> found;
        window.locate(positions, addresses, found);
        while (found.size() < positions.size()) {
            ASSERT_TRUE(window.wait());
            window.locate(positions, addresses, found);
        }
        for (size_t i = 0; i < positions.size(); i++) {
            const uint64_t cell = TestCells::address_of(layer, positions[i] / per_cell);
            ASSERT_EQ(addresses[i], cell + positions[i] % per_cell * 64);
        }
        window.end_step();
    }

    bool step(Window& window, uint32_t layer, uint32_t past_tokens, const std::vector<uint32_t>& positions) {
        if (!slide(window, layer, past_tokens, positions)) return false;
        finish(window, positions, layer, 1);
        return true;
    }
};

TEST_F(WindowTest, HoldsWhatTheLastTokensWanted) {
    for (uint32_t seed = 0; seed < 2'000; seed++) {
        const Walk walk(seed);
        cells.held.clear();
        cells.one_by_one = seed % 2 == 0;
        Window window = this->window(walk.tokens, walk.per_cell);
        std::vector<std::map<uint32_t, std::set<uint32_t>>> reference(LAYERS);  // by layer and token: cells
        for (const Step& step : walk.steps) {
            auto& layer = reference[step.layer];
            std::erase_if(layer, [&](const auto& token) {
                return token.first >= step.past_tokens || token.first + walk.tokens <= step.past_tokens;
            });
            for (uint32_t column = 0; column < step.columns.size(); column++) {
                std::set<uint32_t>& wanted = layer[step.past_tokens + column];
                for (const Positions& row : step.columns[column]) {
                    for (const uint32_t position : row) wanted.insert(position / walk.per_cell);
                }
            }
            ASSERT_TRUE(window.slide(step.layer, step.wanted()));
            finish(window, step.positions, step.layer, walk.per_cell);
            if (walk.tokens == 0) layer.clear();
            std::set<std::pair<uint32_t, uint32_t>> expected;
            for (uint32_t i = 0; i < LAYERS; i++) {
                for (const auto& [token, wanted] : reference[i]) {
                    for (const uint32_t cell : wanted) expected.insert({i, cell});
                }
            }
            ASSERT_EQ(cells.held, expected) << seed;
            ASSERT_EQ(window.cells_held(), expected.size()) << seed;
        }
    }
}

// TestCells checks that no more is leased than the limit, nothing twice, and nothing given back that is not leased.
TEST_F(WindowTest, ALimitShrinksItFromItsOldestToken) {
    for (uint32_t seed = 0; seed < 2'000; seed++) {
        const Walk walk(seed);
        cells.held.clear();
        cells.limit = cells.share = 1 + seed % 20;
        Window window = this->window(walk.tokens, walk.per_cell);
        for (const Step& step : walk.steps) {
            std::set<uint32_t> need;
            for (const uint32_t position : step.positions) need.insert(position / walk.per_cell);
            const bool fits = window.slide(step.layer, step.wanted());
            ASSERT_EQ(fits, need.size() <= cells.limit);
            if (fits) finish(window, step.positions, step.layer, walk.per_cell);
            ASSERT_EQ(window.cells_held(), cells.held.size());
        }
        window.clear();
        ASSERT_TRUE(cells.held.empty());
    }
}

TEST_F(WindowTest, TheOldestTokenOfAllLayersGivesWay) {
    Window window = this->window(4);
    cells.limit = 6;
    ASSERT_TRUE(step(window, 1, 0, {1, 2}));
    ASSERT_TRUE(step(window, 0, 0, {3, 4}));
    ASSERT_TRUE(step(window, 0, 1, {5, 6}));
    ASSERT_TRUE(step(window, 0, 2, {7}));
    EXPECT_EQ(cells.acquired, (TestCells::Cells{7}));
    EXPECT_EQ(cells.held, (std::set<std::pair<uint32_t, uint32_t>>{{0, 3}, {0, 4}, {0, 5}, {0, 6}, {0, 7}}));
    ASSERT_TRUE(step(window, 2, 0, {8, 9}));
    EXPECT_EQ(cells.held, (std::set<std::pair<uint32_t, uint32_t>>{{0, 5}, {0, 6}, {0, 7}, {2, 8}, {2, 9}}));
}

TEST_F(WindowTest, RejectedTokensLeaveAndAcceptedOnesStay) {
    Window window = this->window(2);
    const std::vector<uint32_t> positions = {1, 2, 3};
    const std::vector<uint16_t> masks = {0b001, 0b010, 0b100};
    ASSERT_TRUE(window.slide(0, {0, 3, positions, masks}));
    finish(window, positions, 0, 1);
    ASSERT_TRUE(step(window, 0, 2, {9}));  // the third was rejected, the second is the last accepted
    EXPECT_EQ(cells.acquired, (TestCells::Cells{9}));
    std::sort(cells.released.begin(), cells.released.end());
    EXPECT_EQ(cells.released, (TestCells::Cells{1, 3}));
}

TEST_F(WindowTest, NothingIsLeasedAfterAStepThatDoesNotFit) {
    Window window = this->window(4);
    cells.limit = 2;
    ASSERT_TRUE(step(window, 0, 0, {1, 2}));
    EXPECT_FALSE(slide(window, 0, 1, {3, 4, 5}));
    EXPECT_EQ(window.cells_held(), 0U);
    EXPECT_TRUE(cells.held.empty());
    ASSERT_TRUE(step(window, 0, 2, {1}));
    EXPECT_EQ(cells.acquired, (TestCells::Cells{1}));
}

TEST_F(WindowTest, AStepThatFindsEverythingSendsNothing) {
    Window window = this->window(4);
    ASSERT_TRUE(step(window, 0, 0, {1, 2}));
    const uint32_t exchanges = cells.exchanges;
    ASSERT_TRUE(step(window, 0, 1, {2}));
    EXPECT_EQ(cells.exchanges, exchanges);
}

TEST_F(WindowTest, ARefusalEmptiesIt) {
    Window window = this->window(4);
    ASSERT_TRUE(step(window, 1, 0, {1, 2}));
    cells.refusals = 1;
    ASSERT_TRUE(slide(window, 0, 0, {3, 4, 5}));
    EXPECT_FALSE(window.wait());
    EXPECT_EQ(window.cells_held(), 0U);
    EXPECT_TRUE(cells.held.empty());
    ASSERT_TRUE(step(window, 0, 0, {3, 4, 5}));
}

TEST_F(WindowTest, AStepThatEndsEarlyIsGivenBackBeforeTheNext) {
    cells.one_by_one = true;
    Window window = this->window(4);
    ASSERT_TRUE(step(window, 0, 0, {1, 2}));
    ASSERT_TRUE(slide(window, 0, 1, {2, 3, 4}));
    ASSERT_TRUE(window.wait());
    cells.lost = true;
    EXPECT_THROW(window.wait(), std::runtime_error);
    cells.lost = false;
    ASSERT_TRUE(step(window, 0, 1, {2, 3, 4}));
    EXPECT_EQ(cells.held, (std::set<std::pair<uint32_t, uint32_t>>{{0, 2}, {0, 3}, {0, 4}}));
}

TEST_F(WindowTest, WhatASlideCouldNotGiveBackIsGivenBackBeforeTheNext) {
    cells.limit = 6;
    Window window = this->window(1);
    ASSERT_TRUE(step(window, 0, 0, {1, 2}));
    ASSERT_TRUE(step(window, 1, 0, {3, 4}));
    ASSERT_TRUE(step(window, 2, 0, {5, 6}));
    cells.unreachable = true;  // the slide wants to give back cells of all three layers
    EXPECT_THROW(slide(window, 2, 1, {6, 7, 8, 9, 10, 11}), std::runtime_error);
    EXPECT_THROW(window.clear(), std::runtime_error);
    cells.unreachable = false;
    ASSERT_TRUE(step(window, 2, 1, {6, 7, 8, 9, 10, 11}));
    EXPECT_EQ(cells.held.size(), 6U);
    window.clear();
    EXPECT_TRUE(cells.held.empty());
}

TEST_F(WindowTest, ForgetsWhatTheSourceHasLost) {
    Window window = this->window(4);
    ASSERT_TRUE(step(window, 0, 0, {1, 2}));
    cells.held.clear();
    window.forget();
    ASSERT_TRUE(step(window, 0, 1, {1, 2}));
    EXPECT_EQ(cells.held.size(), 2U);
}

TEST_F(WindowTest, AStepInPiecesAsksForTheShare) {
    cells.share = 2;
    cells.limit = 1;  // it may fall below the share for a moment
    Window window = this->window(4, 2);
    const std::vector<uint32_t> positions = {0, 1, 2, 5, 6, 7, 20};
    std::vector<size_t> counts;
    for (size_t first = 0; first < positions.size(); first += counts.back()) {
        const auto rest = std::span(positions).subspan(first);
        counts.push_back(window.lease_first(0, rest));
        finish(window, {rest.begin(), rest.begin() + static_cast<ptrdiff_t>(counts.back())}, 0, 2);
        EXPECT_THROW(window.lease_first(0, rest), std::logic_error);
        window.clear();
        EXPECT_TRUE(cells.held.empty());
    }
    EXPECT_EQ(counts, (std::vector<size_t>{3, 3, 1}));
}

TEST_F(WindowTest, WrongArgumentsAreRefused) {
    Window window = this->window(1, 2);
    EXPECT_THROW(slide(window, 0, 0, {2 * CELLS}), std::out_of_range);
    EXPECT_THROW(slide(window, LAYERS, 0, {0}), std::out_of_range);
    EXPECT_THROW(window.lease_first(0, std::array{2 * CELLS}), std::out_of_range);
    const std::vector<uint32_t> positions = {0};
    EXPECT_THROW(window.slide(0, {0, 1, positions, {}}), std::invalid_argument);
    const std::vector<uint16_t> masks = {1};
    EXPECT_THROW(window.slide(0, {0, 0, positions, masks}), std::invalid_argument);
    EXPECT_THROW(window.slide(0, {0, 17, positions, masks}), std::invalid_argument);
    EXPECT_THROW(window.wait(), std::logic_error);
}

}  // namespace
}  // namespace flashclient
