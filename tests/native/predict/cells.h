// A CellSource for tests: cell c of layer l lies at address_of(l, c), and arrives with the others or one by one.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
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
        if (!unreachable) {
            EXPECT_TRUE(coming_.empty()) << "what was asked for has not been waited for";
        }
        layer_ = layer;
        give_and_ask(acquire, release);
    }

    void extend(const Cells& acquire, const Cells& release) override { give_and_ask(acquire, release); }

    void prefetch(uint32_t layer, const std::vector<CellRange>& ranges) override {
        for (const auto& [begin, end] : ranges) prefetched.push_back({layer, begin, end});
    }

    std::vector<Arrival> arrived() override {
        if (lost || lost_after-- == 0) throw std::runtime_error("lost");
        std::vector<Arrival> arrivals;
        while (!coming_.empty() && (arrivals.empty() || !one_by_one)) {
            const uint32_t cell = coming_.back();
            coming_.pop_back();
            const bool refused = refusals > 0 && refusals-- > 0;
            arrivals.emplace_back(cell, refused ? 0 : address(layer_, cell));
            if (!refused) held.insert({layer_, cell});
        }
        held_most = std::max(held_most, held.size());
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
    uint32_t lost_after = 1'000'000;         // so many calls of arrived()
    bool unreachable = false;                // exchange() and extend() throw
    uint32_t unreachable_after = 1'000'000;  // so many of their calls
    Cells asked_for;                         // by all calls
    size_t held_most = 0;
    std::set<std::pair<uint32_t, uint32_t>> held;  // layer, cell
    Cells acquired;                                // by the last exchange
    Cells released;
    uint32_t exchanges = 0;
    std::vector<std::array<uint32_t, 3>> prefetched;  // layer, first cell, end

  private:
    void give_and_ask(const Cells& acquire, const Cells& release) {
        if (unreachable || unreachable_after-- == 0) {
            for (const uint32_t cell : release) owed_.emplace_back(layer_, cell);
            throw std::runtime_error("unreachable");
        }
        for (const uint32_t cell : release) {
            EXPECT_EQ(held.erase({layer_, cell}), 1U) << "what is not leased cannot be given back";
        }
        EXPECT_LE(held.size() + acquire.size(), std::max(limit, share));
        for (const uint32_t cell : acquire) {
            EXPECT_EQ(held.count({layer_, cell}), 0U) << "asked for twice";
            coming_.push_back(cell);
            asked_for.push_back(cell);
        }
        acquired = acquire;
        released = release;
        exchanges++;
    }

    uint32_t layer_ = 0;
    Cells coming_;
    std::vector<std::pair<uint32_t, uint32_t>> owed_;  // layer, cell
};

}  // namespace flashclient
