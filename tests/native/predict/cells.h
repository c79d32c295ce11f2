// A CellSource for tests: cell c of layer l lies at address_of(l, c), and arrives with the others or one by one.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <set>
#include <stdexcept>
#include <utility>
#include <vector>

#include "predict/cell_source.h"

namespace flashclient {

class TestCells : public CellSource {
  public:
    using Cells = std::vector<uint32_t>;

    static uint64_t address_of(uint32_t layer, uint32_t cell) { return (layer + 1) * 0x100000 + cell * 0x1000; }

    uint32_t share_slots() override { return share; }
    uint32_t lease_limit() override { return limit; }

    void exchange(uint32_t layer, const Cells& acquire, const Cells& release) override {
        if (unreachable) {
            for (const uint32_t cell : release) owed_.emplace_back(layer, cell);
            throw std::runtime_error("unreachable");
        }
        EXPECT_TRUE(coming_.empty()) << "what was asked for has not been waited for";
        for (const uint32_t cell : release) {
            EXPECT_EQ(held.erase({layer, cell}), 1U) << "what is not leased cannot be given back";
        }
        EXPECT_LE(held.size() + acquire.size(), std::max(limit, share));
        for (const uint32_t cell : acquire) {
            EXPECT_EQ(held.count({layer, cell}), 0U) << "asked for twice";
            coming_.push_back(cell);
        }
        layer_ = layer;
        acquired = acquire;
        released = release;
        exchanges++;
    }

    std::vector<Arrival> arrived() override {
        if (lost) throw std::runtime_error("lost");
        std::vector<Arrival> arrivals;
        while (!coming_.empty() && (arrivals.empty() || !one_by_one)) {
            const uint32_t cell = coming_.back();
            coming_.pop_back();
            const bool refused = refusals > 0 && refusals-- > 0;
            arrivals.emplace_back(cell, refused ? 0 : address(layer_, cell));
            if (!refused) held.insert({layer_, cell});
        }
        return arrivals;
    }

    void cancel() override {
        coming_.clear();
        for (const auto& cell : owed_) EXPECT_EQ(held.erase(cell), 1U) << "what is not leased cannot be given back";
        owed_.clear();
    }

    std::function<uint64_t(uint32_t, uint32_t)> address = address_of;
    uint32_t share = 1'000'000;
    uint32_t limit = 1'000'000;
    uint32_t refusals = 0;  // of the next cells
    bool one_by_one = false;
    bool lost = false;
    bool unreachable = false;                      // exchange() throws
    std::set<std::pair<uint32_t, uint32_t>> held;  // layer, cell
    Cells acquired;                                // by the last exchange
    Cells released;
    uint32_t exchanges = 0;

  private:
    uint32_t layer_ = 0;
    Cells coming_;
    std::vector<std::pair<uint32_t, uint32_t>> owed_;  // layer, cell
};

}  // namespace flashclient
