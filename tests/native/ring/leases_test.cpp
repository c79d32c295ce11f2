// Windows of several clients on one small pool, through real rings. A client that gives back after a refusal goes on,
// and leased memory always has the right bytes.
#include "ring/leases.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <thread>

#include "flash_file.h"
#include "memory/model_cost.h"
#include "predict/window.h"
#include "ring/silent_weightd.h"
#include "service/engine_thread.h"

namespace {

using flashclient::Leases;
using flashclient::Window;
using weightd::EngineThread;
using weightd::FlashModel;

constexpr uint32_t LAYERS = 3;
constexpr uint32_t TOKENS = 60;
constexpr uint32_t SHARE = 8;

// A client that generates: each token wants random bundles of each layer.
class Walker {
  public:
    Walker(const FlashModel& model, const std::string& socket, const weightd::Token& token, uint32_t seed)
        : model_(model),
          session_(socket, token, 20.0),
          sweep_(session_, {model.spec.bundles_per_cell, model.spec.stride_bytes, model.spec.cell_bytes, neurons()}),
          leases_(session_, sweep_, model.spec.bundles_per_cell, model.spec.cell_bytes),
          window_(leases_, 4, {model.spec.bundles_per_cell, model.spec.stride_bytes, cells()}),
          random_(seed) {}

    void run() {
        for (uint32_t token = 0; token < TOKENS; token++) {
            for (uint32_t layer = 0; layer < LAYERS; layer++) step(layer, token);
        }
        window_.clear();
    }

  private:
    std::vector<uint32_t> cells() const {
        std::vector<uint32_t> counts;
        for (const auto& layer : model_.spec.layers) counts.push_back(layer.cells);
        return counts;
    }

    std::vector<uint32_t> neurons() const {
        std::vector<uint32_t> counts;
        for (const auto& layer : model_.spec.layers) counts.push_back(layer.neurons);
        return counts;
    }

    void step(uint32_t layer, uint32_t token);
    void in_pieces(uint32_t layer, const std::vector<uint32_t>& positions);
    bool check(uint32_t layer, std::span<const uint32_t> positions);

    const FlashModel& model_;
    flashclient::Session session_;
    flashclient::Sweep sweep_;
    Leases leases_;
    Window window_;
    std::mt19937 random_;
};

void Walker::step(uint32_t layer, uint32_t token) {
    std::vector<uint32_t> positions;
    for (uint32_t position = random_() % 20; position < model_.spec.layers[layer].neurons;
         position += 1 + random_() % 40) {
        positions.push_back(position);
    }
    const std::vector<uint16_t> masks(positions.size(), 1);
    if (window_.slide(layer, {token, 1, positions, masks}) && check(layer, positions)) {
        window_.end_step();
    } else {
        in_pieces(layer, positions);
    }
}

void Walker::in_pieces(uint32_t layer, const std::vector<uint32_t>& positions) {
    for (size_t first = 0; first < positions.size();) {
        const auto rest = std::span<const uint32_t>(positions).subspan(first);
        const size_t count = window_.lease_first(layer, rest);
        ASSERT_TRUE(check(layer, rest.first(count)));
        window_.clear();
        ASSERT_EQ(window_.cells_held(), 0U);
        first += count;
    }
}

// False where a lease was refused.
bool Walker::check(uint32_t layer, std::span<const uint32_t> positions) {
    std::vector<uint64_t> addresses(positions.size());
    std::vector<uint32_t> found;
    window_.locate(positions, addresses, found);
    while (found.size() < positions.size()) {
        if (!window_.wait()) return false;
        window_.locate(positions, addresses, found);
    }
    for (size_t i = 0; i < positions.size(); i++) {
        const std::byte* expected = model_.bytes.data() + model_.offset(layer, positions[i]);
        EXPECT_EQ(std::memcmp(reinterpret_cast<const void*>(addresses[i]), expected, 1000), 0);
    }
    return true;
}

void walk_together(uint32_t slots, uint32_t walkers) {
    const weightd::TestFolder folder;
    const FlashModel model(LAYERS, 301);
    const uint64_t dram_bytes = weightd::minimum_dram_bytes(model.spec) + slots * uint64_t{model.spec.cell_bytes};
    EngineThread engine({dram_bytes, {"auto", 8, 32, false}, folder.file("data")});
    engine.add_model(model.spec);
    std::vector<std::unique_ptr<Walker>> all;
    for (uint32_t i = 0; i < walkers; i++) {
        const auto token = engine.open_session(0, SHARE).token;
        all.push_back(std::make_unique<Walker>(model, folder.file("data"), token, i));
    }
    std::vector<std::thread> threads;
    for (auto& walker : all) threads.emplace_back([&walker] { walker->run(); });
    for (std::thread& thread : threads) thread.join();
}

TEST(LeasesTest, OneClientInAPoolOfAnySize) {
    for (const uint32_t slots : {0U, 20U, 100U, 300U}) walk_together(slots, 1);
}

TEST(LeasesTest, ClientsWhoseWindowsExceedThePool) {
    for (const uint32_t slots : {40U, 120U}) walk_together(slots, 4);
}

// A client of a daemon that answers nothing by itself.
class AbandonedLeasesTest : public testing::Test {
  protected:
    using Cells = std::vector<uint32_t>;
    using Given = std::vector<std::pair<uint32_t, Cells>>;  // layer, cells

    AbandonedLeasesTest() { weightd_.join(); }

    // The cells of layer 0 become leased.
    void lease(const Cells& cells) {
        leases_.exchange(0, cells, {});
        weightd_.take();
        weightd_.grant(cells);
        ASSERT_EQ(leases_.arrived().size(), cells.size());
    }

    // No more requests fit, until weightd takes them.
    void fill_the_ring(uint32_t free = 0) {
        for (uint32_t i = free; i < flashclient::ring::REQUESTS; i++) {
            session_.release(FILLING_LAYER, flashclient::ring::CELLS, Cells{0});
        }
    }

    // The cells that were given back since the last call.
    Given given_back() {
        Given given;
        for (const auto& [request, words] : weightd_.take()) {
            const bool release = request.op == flashclient::ring::RELEASE;
            const size_t count = release ? words.size() : request.release_count;
            if (request.layer == FILLING_LAYER || count == 0) continue;
            given.emplace_back(request.layer, Cells(words.end() - static_cast<ptrdiff_t>(count), words.end()));
        }
        return given;
    }

    static constexpr uint32_t CELL_BYTES = 4096, SLOTS = 8, FILLING_LAYER = 1000;
    static constexpr double TIMEOUT_S = 0.2;
    static constexpr weightd::Token TOKEN{};
    weightd::TestFolder folder_;
    flashclient::SilentWeightd weightd_{folder_.file("data"), SLOTS, CELL_BYTES};
    flashclient::Session session_{folder_.file("data"), TOKEN, TIMEOUT_S};
    flashclient::Sweep sweep_{session_, {1, 64, CELL_BYTES, {9000, 9000}}};
    Leases leases_{session_, sweep_, 1, CELL_BYTES};
};

TEST_F(AbandonedLeasesTest, CellsThatWereNeverAskedForAreNotWaitedFor) {
    fill_the_ring();
    EXPECT_THROW(leases_.exchange(0, {1, 2, 3}, {}), flashclient::NoAnswer);
    weightd_.take();
    leases_.cancel();  // throws NoAnswer where it waits for grants
    lease({1, 2, 3});
}

TEST_F(AbandonedLeasesTest, CellsOfALargeRequestCountAsTheyAreAskedFor) {
    Cells cells(flashclient::ring::WORDS + 1);
    std::iota(cells.begin(), cells.end(), 0U);
    fill_the_ring(1);  // the first part still fits
    EXPECT_THROW(leases_.exchange(0, cells, {}), flashclient::NoAnswer);
    weightd_.take();
    weightd_.grant(std::span(cells).first(flashclient::ring::WORDS));
    leases_.cancel();
    const Given given = given_back();
    ASSERT_EQ(given.size(), 1U);
    EXPECT_EQ(given[0].second, Cells(cells.begin(), cells.end() - 1));
}

TEST_F(AbandonedLeasesTest, WhatCouldNotBeGivenBackIsGivenBackLater) {
    for (const Cells& acquire : {Cells{}, Cells{4}}) {
        lease({1, 2, 3});
        fill_the_ring();
        EXPECT_THROW(leases_.exchange(0, acquire, {1, 3}), flashclient::NoAnswer);
        EXPECT_THROW(leases_.cancel(), flashclient::NoAnswer);
        weightd_.take();
        leases_.exchange(1, {}, {7});
        EXPECT_EQ(given_back(), (Given{{0, {1, 3}}, {1, {7}}}));
        leases_.cancel();
        EXPECT_EQ(given_back(), Given{});
    }
}

}  // namespace
