// A session beside others of the same engine: it has counters of its own, and a flood of requests delays it little.
#include <gtest/gtest.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <set>
#include <thread>

#include "flash_file.h"
#include "memory/model_cost.h"
#include "ring/sweep.h"
#include "service/engine_thread.h"

namespace weightd {
namespace {

using ClientSession = flashclient::Session;

struct RingPartsTest : testing::Test {
    TestFolder folder;
    FlashModel model{1, 20'000};
    static constexpr uint32_t CELLS = 5'000;
    EngineThread engine{{minimum_dram_bytes(model.spec) + (CELLS + 200) * uint64_t{4096},
                         {"threads", 2, 32, false},
                         folder.file("data")}};

    void SetUp() override { ASSERT_EQ(engine.add_model(model.spec), 0U); }

    std::unique_ptr<ClientSession> attach(uint32_t slots, const User& user = std::nullopt) {
        return std::make_unique<ClientSession>(folder.file("data"), engine.open_session(0, slots, user).token, 20.0);
    }

    static std::vector<ring::Grant> grants(ClientSession& session, size_t count) {
        std::vector<ring::Grant> got;
        while (got.size() < count) session.take_grants(got, true);
        return got;
    }

    static void use(ClientSession& session, const std::vector<uint32_t>& cells) {
        session.acquire(0, ring::CELLS, cells, 0);
        grants(session, cells.size());
        session.release(0, ring::CELLS, cells);
    }
};

TEST_F(RingPartsTest, CountsWhatItDidForTheSession) {
    const auto session = attach(8), other = attach(8);
    use(*session, {1, 2, 3});
    use(*other, {3, 90});
    use(*session, {2, 90, 91});
    const flashclient::SessionCounters counted = session->counters();
    EXPECT_EQ(counted.hits, 2U);
    EXPECT_EQ(counted.misses, 4U);
    EXPECT_EQ(counted.read_bytes, 4U * 4096);
    EXPECT_EQ(other->counters().hits, 1U);
    session->attach(folder.file("data"), engine.open_session(0, 8).token);
    EXPECT_EQ(session->counters().misses, 4U) << "the counters continue in another session";
    use(*session, {2, 120});
    EXPECT_EQ(session->counters().hits, 3U);
    EXPECT_EQ(session->counters().misses, 5U);
    session->close();
    EXPECT_EQ(session->counters().misses, 5U);
}

TEST_F(RingPartsTest, WhatIsReadBetweenCellsCounts) {
    const auto session = attach(64);
    std::vector<uint32_t> cells;
    for (uint32_t cell = 0; cell < 40; cell++) {
        if (cell != 20) cells.push_back(cell);
    }
    use(*session, cells);
    EXPECT_EQ(session->counters().misses, 39U);
    EXPECT_EQ(session->counters().read_bytes, 40U * 4096);
    EXPECT_EQ(engine.report().models[0].counts.read_bytes, 40U * 4096);
}

TEST_F(RingPartsTest, AnswersARunOfAnyLength) {
    const auto session = attach(CELLS);
    const uint32_t limit = session->lease_limit();
    session->acquire(0, ring::RANGES, std::array{0U, 2'500U, 2'500U, CELLS, 17U, 17U}, 3);
    std::set<uint32_t> cells;
    for (const ring::Grant& grant : grants(*session, CELLS)) {
        EXPECT_EQ(grant.tag, 3U);
        if (ClientSession::status(grant) == ring::GRANTED) cells.insert(grant.cell);
    }
    EXPECT_EQ(cells.size(), limit);
    session->acquire(0, ring::CELLS, {}, 0);
    session->release(0, ring::RANGES, std::array{0U, limit});
    use(*session, {CELLS - 1});
}

// Sessions of one user that ask for the whole model again and again; another's single cells are answered in between.
TEST_F(RingPartsTest, AFloodKeepsNobodyWaiting) {
    const auto honest = attach(8);
    use(*honest, {7});
    std::vector<std::unique_ptr<ClientSession>> flooding;
    for (uint32_t i = 0; i < 8; i++) flooding.push_back(attach(2, ::getuid()));
    std::atomic<bool> enough = false;
    std::atomic<uint64_t> answers = 0;
    std::thread flood([&] {
        std::vector<ring::Grant> got;
        while (!enough) {
            for (const auto& session : flooding) session->acquire(0, ring::RANGES, std::array{0U, CELLS}, 0);
            for (const auto& session : flooding) {
                got.clear();
                while (got.size() < CELLS) session->take_grants(got, true);
                answers += got.size();
                std::vector<uint32_t> held;
                for (const ring::Grant& grant : got) {
                    if (ClientSession::status(grant) == ring::GRANTED) held.push_back(grant.cell);
                }
                session->release(0, ring::CELLS, held);
            }
        }
    });
    while (answers < 8 * CELLS) std::this_thread::yield();
    std::vector<uint64_t> between;  // the median of them: a turn also counts what came while this thread did not run
    for (uint32_t i = 0; i < 51; i++) {
        const uint64_t before = answers;
        use(*honest, {7});
        between.push_back(answers - before);
    }
    enough = true;
    flood.join();
    std::sort(between.begin(), between.end());
    EXPECT_LT(between[25], CELLS) << "less than one session of the flood asks for; in turn it would be four of them";
}

}  // namespace
}  // namespace weightd
