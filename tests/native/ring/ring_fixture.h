// Both ends of the ring in one process, over real sockets: the daemon's engine and sessions of its clients.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "flash_file.h"
#include "ring/session.h"
#include "ring/sweep.h"
#include "service/engine_thread.h"

using flashclient::Sweep;
using weightd::EngineThread;
using weightd::FlashModel;
namespace ring = weightd::ring;
using ClientSession = flashclient::Session;

struct RingFixture : testing::Test {
    weightd::TestFolder folder;

    std::string socket_path() const { return folder.file("data"); }

    static uint64_t dram_for(const FlashModel& model, uint32_t slots) {
        return weightd::minimum_dram_bytes(model.spec) + slots * uint64_t{model.spec.cell_bytes};
    }

    std::unique_ptr<EngineThread> serve(const FlashModel& model, uint32_t slots, const std::string& reader = "auto") {
        auto engine = std::make_unique<EngineThread>(
            weightd::EngineOptions{dram_for(model, slots), {reader, 8, 32, false}, socket_path()});
        EXPECT_EQ(engine->add_model(model.spec), 0U);
        return engine;
    }

    std::unique_ptr<ClientSession> attach(EngineThread& engine, uint32_t slots = 8) {
        return std::make_unique<ClientSession>(socket_path(), engine.open_session(0, slots).token, 20.0);
    }

    static flashclient::Layout layout(const FlashModel& model) {
        flashclient::Layout layout{model.spec.bundles_per_cell, model.spec.stride_bytes, model.spec.cell_bytes, {}};
        for (const auto& layer : model.spec.layers) layout.bundles.push_back(layer.neurons);
        return layout;
    }

    static std::vector<ring::Grant> grants(ClientSession& session, size_t count) {
        std::vector<ring::Grant> got;
        while (got.size() < count) session.take_grants(got, true);
        return got;
    }

    static void wait_until(const std::function<bool()>& condition) {
        const auto deadline = weightd::Clock::now() + std::chrono::seconds(10);
        while (!condition()) {
            ASSERT_LT(weightd::Clock::now(), deadline);
            std::this_thread::yield();
        }
    }

    static void expect_sweep(const FlashModel& model, Sweep& sweep, uint32_t turns) {
        for (uint32_t turn = 0; turn < turns; turn++) {
            for (uint32_t layer = 0; layer < model.spec.layers.size(); layer++) {
                uint32_t position = 0;
                while (const Sweep::Bundles* chunk = sweep.next(layer)) {
                    ASSERT_EQ(chunk->first_position, position);
                    for (const uint64_t address : chunk->addresses) {
                        ASSERT_EQ(std::memcmp(reinterpret_cast<const void*>(address),
                                              model.bytes.data() + model.offset(layer, position++), 1000),
                                  0);
                    }
                }
                ASSERT_EQ(position, model.spec.layers[layer].neurons);
            }
        }
    }
};
