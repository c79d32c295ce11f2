// Windows of several clients on one small pool, through real rings: whoever lets go when refused gets on, and what is
// held is always the bytes asked for.
#include "ring/leases.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <thread>

#include "flash_file.h"
#include "memory/model_cost.h"
#include "ring/window.h"
#include "service/engine_thread.h"

namespace {

using flashclient::LeaseRefused;
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
          leases_(session_, model.spec.bundles_per_cell, model.spec.cell_bytes, cells()),
          window_(4, model.spec.bundles_per_cell, cells()),
          random_(seed) {}

    void run() {
        for (uint32_t token = 0; token < TOKENS; token++) {
            for (uint32_t layer = 0; layer < LAYERS; layer++) step(layer, token);
        }
        leases_.release_all();
    }

  private:
    std::vector<uint32_t> cells() const {
        std::vector<uint32_t> counts;
        for (const auto& layer : model_.spec.layers) counts.push_back(layer.cells);
        return counts;
    }

    void step(uint32_t layer, uint32_t token);
    void in_pieces(uint32_t layer, const std::vector<uint32_t>& positions);
    void check(uint32_t layer, const std::vector<uint32_t>& positions);

    const FlashModel& model_;
    flashclient::Session session_;
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
    const Window::Slide& slide = window_.slide(layer, {token, 1, positions, masks}, session_.lease_limit());
    try {
        if (slide.fits) {
            for (const auto& [other, cells] : slide.elsewhere) leases_.exchange(other, {}, cells);
            leases_.exchange(layer, slide.acquire, slide.release);
            while (leases_.arrived() > 0) {
            }
            return check(layer, positions);
        }
    } catch (const LeaseRefused&) {
        window_.clear();
    }
    leases_.release_all();
    in_pieces(layer, positions);
}

void Walker::in_pieces(uint32_t layer, const std::vector<uint32_t>& positions) {
    for (const uint32_t position : positions) {
        const uint32_t cell = position / model_.spec.bundles_per_cell;
        leases_.exchange(layer, {&cell, 1}, {});
        while (leases_.arrived() > 0) {
        }
        check(layer, {position});
        leases_.exchange(layer, {}, {&cell, 1});
    }
    ASSERT_EQ(leases_.cells_held(), 0U);
}

void Walker::check(uint32_t layer, const std::vector<uint32_t>& positions) {
    const auto table = leases_.addresses(layer);
    for (const uint32_t position : positions) {
        const uint64_t cell = table[position / model_.spec.bundles_per_cell];
        ASSERT_NE(cell, 0U);
        const uint64_t bundle = cell + position % model_.spec.bundles_per_cell * model_.spec.stride_bytes;
        ASSERT_EQ(std::memcmp(reinterpret_cast<const void*>(bundle),
                              model_.bytes.data() + model_.offset(layer, position), 1000),
                  0);
    }
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
