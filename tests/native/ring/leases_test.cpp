// Windows of several clients on one small pool, through real rings: whoever lets go when refused gets on, and what is
// held is always the bytes asked for.
#include "ring/leases.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <thread>

#include "flash_file.h"
#include "memory/model_cost.h"
#include "predict/window.h"
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

}  // namespace
