#include "engine/engine.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <random>
#include <set>

#include "flash_file.h"
#include "memory/model_cost.h"
#include "settle.h"

namespace weightd {
namespace {

class Recorder final : public Session {
  public:
    using Session::Session;
    struct Answer {
        const std::byte* address;
        ring::Status status;
        uint32_t detail;
    };
    void granted(uint32_t tag, uint32_t, Place place, const Pool& pool) override {
        answers.emplace(tag, Answer{pool.address(place), ring::GRANTED, 0});
    }
    void failed(uint32_t tag, uint32_t, ring::Status status, uint32_t detail) override {
        answers.emplace(tag, Answer{nullptr, status, detail});
    }
    void flush() override { flushes++; }
    std::multimap<uint32_t, Answer> answers;
    int flushes = 0;
};

struct EngineTest : testing::TestWithParam<std::string> {
    std::string note;
    std::unique_ptr<Reader> reader = make_reader(GetParam(), 8, 32, note);
    Verifier verifier{1};

    uint64_t dram_for(const FlashModel& model, uint32_t slots) {
        return minimum_dram_bytes(model.spec) + (slots - 3 * SHARE_SLOTS_MIN) * uint64_t{model.spec.cell_bytes};
    }

    Recorder& open(Engine& engine, uint32_t model, uint32_t share, bool borrows = false) {
        EXPECT_TRUE(engine.models().activate(model));
        const uint32_t cells = engine.model(model).spec.cell_count();
        return static_cast<Recorder&>(engine.open(std::make_unique<Recorder>(model, cells, share, borrows)));
    }

    static std::vector<uint32_t> numbers(uint32_t begin, uint32_t end) {
        std::vector<uint32_t> cells(end - begin);
        std::iota(cells.begin(), cells.end(), begin);
        return cells;
    }

    static size_t count(const Recorder& session, ring::Status status) {
        return static_cast<size_t>(std::count_if(session.answers.begin(), session.answers.end(),
                                                 [&](const auto& entry) { return entry.second.status == status; }));
    }
};

TEST_P(EngineTest, GrantsTheBytesOnFlash) {
    FlashModel flash(2, 101);
    Engine engine(dram_for(flash, 20), *reader, verifier);
    const uint32_t model = engine.models().add(flash.spec, false);
    Recorder& session = open(engine, model, 8);
    for (uint32_t layer = 0; layer < 2; layer++) {
        for (uint32_t cell = 0; cell < 26; cell++) {
            session.answers.clear();
            ASSERT_TRUE(engine.acquire(session, layer, std::array{cell}, 9));
            settle(engine);
            ASSERT_EQ(session.answers.size(), 1U);
            const auto& answer = session.answers.find(9)->second;
            ASSERT_EQ(answer.status, ring::GRANTED);
            EXPECT_EQ(std::memcmp(answer.address, flash.cell(layer, cell), 4096), 0);
            ASSERT_TRUE(engine.release(session, layer, std::array{cell}));
        }
    }
    EXPECT_EQ(engine.model(model).counts.misses, 52U);
}

TEST_P(EngineTest, MergesNeighboursIntoOneRead) {
    FlashModel flash(1, 400);
    Engine engine(dram_for(flash, 100), *reader, verifier);
    Recorder& session = open(engine, engine.models().add(flash.spec, false), 50);
    std::vector<uint32_t> cells;
    for (uint32_t cell = 10; cell < 40; cell++) cells.push_back(cell);
    cells.push_back(60);
    ASSERT_TRUE(engine.acquire(session, 0, cells, 1));
    settle(engine);
    EXPECT_EQ(session.answers.size(), 31U);
    EXPECT_EQ(engine.model(0).counts.reads, 2U);
    EXPECT_EQ(engine.model(0).counts.read_bytes, 31U * 4096);
}

TEST_P(EngineTest, CountsReadsByRegionAndHowLongEachTook) {
    FlashModel flash(2, 256);  // 128 cells: two in a region
    Engine engine(dram_for(flash, 100), *reader, verifier);
    Recorder& session = open(engine, engine.models().add(flash.spec, false), 50);
    for (const uint32_t cell : {0U, 1U, 63U}) {
        ASSERT_TRUE(engine.acquire(session, 0, std::array{cell}, cell));
        settle(engine);
    }
    ASSERT_TRUE(engine.acquire(session, 1, numbers(62, 64), 9));  // one request, which begins in the last region
    settle(engine);
    const DeviceUse& use = engine.device_use(0);
    std::array<uint64_t, REGIONS> expected{};
    expected[0] = 2;
    expected[31] = 1;
    expected[63] = 1;
    EXPECT_EQ(use.region_reads, expected);
    const auto& counts = use.latencies.counts();
    EXPECT_EQ(std::accumulate(counts.begin(), counts.end(), uint64_t{0}), engine.model(0).counts.reads);
    EXPECT_GT(use.latencies.sum_s(), 0.0);
    EXPECT_LE(use.latencies.sum_s(), use.reading.seconds());  // one at a time
    EXPECT_EQ(session.misses, 5U);
    EXPECT_EQ(engine.model(0).pool->leases(), 5U);
}

TEST_P(EngineTest, KnowsHowLongItHasBeenReading) {
    FlashModel flash(1, 400);
    Engine engine(dram_for(flash, 50), *reader, verifier);
    Recorder& session = open(engine, engine.models().add(flash.spec, false), 20);
    EXPECT_EQ(engine.device_use(0).reading.seconds(), 0.0);
    const auto start = Clock::now();
    ASSERT_TRUE(engine.acquire(session, 0, numbers(0, 20), 1));
    settle(engine);
    const double longest_s = seconds(Clock::now() - start);
    const double reading_s = engine.device_use(0).reading.seconds();
    EXPECT_GT(reading_s, 0.0);
    EXPECT_LT(reading_s, longest_s);
    EXPECT_EQ(engine.device_use(0).reading.seconds(), reading_s) << "it does not change while nothing is read";
}

TEST_P(EngineTest, ReadsACellOnceForTwoSessions) {
    FlashModel flash(1, 400);
    Engine engine(dram_for(flash, 100), *reader, verifier);
    const uint32_t model = engine.models().add(flash.spec, false);
    Recorder& one = open(engine, model, 10);
    Recorder& two = open(engine, model, 10);
    ASSERT_TRUE(engine.acquire(one, 0, std::array{7U}, 1));
    ASSERT_TRUE(engine.acquire(two, 0, std::array{7U}, 2));
    settle(engine);
    EXPECT_EQ(engine.model(0).counts.reads, 1U);
    EXPECT_EQ(one.answers.find(1)->second.address, two.answers.find(2)->second.address);
    EXPECT_GT(one.flushes, 0);
}

TEST_P(EngineTest, RefusesCellsBeyondTheShareAndAnswersEveryCell) {
    FlashModel flash(1, 400);
    Engine engine(dram_for(flash, 50), *reader, verifier);
    Recorder& session = open(engine, engine.models().add(flash.spec, false), 3);
    ASSERT_TRUE(engine.acquire(session, 0, std::array{1U, 2U, 3U, 4U, 1U}, 1));
    settle(engine);
    std::map<ring::Status, int> statuses;
    for (const auto& [tag, answer] : session.answers) statuses[answer.status]++;
    EXPECT_EQ(statuses[ring::GRANTED], 4);  // cell 1 is leased twice, and counts once against the share
    EXPECT_EQ(statuses[ring::REFUSED], 1);
    EXPECT_TRUE(engine.release(session, 0, std::array{1U, 1U, 2U}));
    EXPECT_FALSE(engine.release(session, 0, std::array{1U})) << "it has no lease on the cell any more";
}

TEST_P(EngineTest, NamesTheCorruptBundleAndServesItsNeighbours) {
    FlashModel flash(2, 100);
    flip_byte(flash.spec.bundles_path, flash.offset(1, 42) + 17);
    Engine engine(dram_for(flash, 50), *reader, verifier);
    Recorder& session = open(engine, engine.models().add(flash.spec, false), 25);
    std::vector<uint32_t> cells;
    for (uint32_t cell = 0; cell < 25; cell++) cells.push_back(cell);
    for (const uint32_t cell : cells) ASSERT_TRUE(engine.acquire(session, 1, std::array{cell}, cell));
    settle(engine);
    for (const auto& [tag, answer] : session.answers) {
        EXPECT_EQ(answer.status, tag == 10 ? ring::CORRUPT : ring::GRANTED) << tag;
        if (tag == 10) {
            EXPECT_EQ(answer.detail, 2U);
        }
    }
    EXPECT_EQ(engine.model(0).counts.verify_errors, 1U);
    EXPECT_FALSE(engine.release(session, 1, std::array{10U})) << "a failed cell is not held";
}

TEST_P(EngineTest, ReportsATruncatedFileForTheMissingCellsOnly) {
    FlashModel flash(1, 400);
    Engine engine(dram_for(flash, 60), *reader, verifier);
    Recorder& session = open(engine, engine.models().add(flash.spec, false), 30);
    ASSERT_EQ(::truncate(flash.spec.bundles_path.c_str(), 20 * 4096), 0);
    std::vector<uint32_t> cells;
    for (uint32_t cell = 10; cell < 30; cell++) cells.push_back(cell);
    for (const uint32_t cell : cells) ASSERT_TRUE(engine.acquire(session, 0, std::array{cell}, cell));
    settle(engine);
    EXPECT_EQ(session.answers.size(), 20U);
    for (const auto& [tag, answer] : session.answers) {
        EXPECT_EQ(answer.status, tag < 20 ? ring::GRANTED : ring::UNREADABLE) << tag;
    }
}

TEST_P(EngineTest, FreesTheLeasesOfASessionThatDiesInTheMiddleOfItsReads) {
    FlashModel flash(1, 400);
    Engine engine(dram_for(flash, 12), *reader, verifier);
    const uint32_t model = engine.models().add(flash.spec, false);
    Recorder& dying = open(engine, model, 5);
    Recorder& other = open(engine, model, 5);
    ASSERT_TRUE(engine.acquire(dying, 0, std::array{1U, 2U, 3U, 4U, 5U}, 1));
    ASSERT_TRUE(engine.acquire(other, 0, std::array{5U, 6U}, 1));
    engine.close(dying.id);
    settle(engine);
    EXPECT_EQ(other.answers.size(), 2U);
    EXPECT_EQ(engine.model(0).pool->busy(), 2U);
}

TEST_P(EngineTest, ServesManySessionsWhoseSharesFillThePool) {
    FlashModel flash(3, 400);
    Engine engine(dram_for(flash, 16), *reader, verifier);
    const uint32_t model = engine.models().add(flash.spec, false);
    std::vector<Recorder*> sessions;
    for (int i = 0; i < 4; i++) sessions.push_back(&open(engine, model, 4));
    std::mt19937 random(9);
    std::vector<std::multiset<std::pair<uint32_t, uint32_t>>> held(4);
    for (int round = 0; round < 400; round++) {
        for (size_t i = 0; i < 4; i++) {
            const uint32_t layer = random() % 3;
            std::vector<uint32_t> cells;
            while (held[i].size() + cells.size() < 4) cells.push_back(random() % 100);
            ASSERT_TRUE(engine.acquire(*sessions[i], layer, cells, 1));
            for (const uint32_t cell : cells) held[i].emplace(layer, cell);
        }
        settle(engine);
        for (size_t i = 0; i < 4; i++) {
            for (const auto& [tag, answer] : sessions[i]->answers) ASSERT_EQ(answer.status, ring::GRANTED);
            sessions[i]->answers.clear();
            ASSERT_LE(sessions[i]->held_cells, 4U);
            const auto [layer, cell] = *held[i].begin();
            ASSERT_TRUE(engine.release(*sessions[i], layer, std::array{cell}));
            held[i].erase(held[i].begin());
        }
    }
    EXPECT_GT(engine.model(0).pool->evictions(), 100U);
    EXPECT_LE(engine.models().memory().used_bytes(Account::pool), 16U * 4096);
}

TEST_P(EngineTest, LendsNearlyAllOfThePoolToASessionThatIsAlone) {
    FlashModel flash(1, 400);
    Engine engine(dram_for(flash, 50), *reader, verifier);
    Recorder& alone = open(engine, engine.models().add(flash.spec, false), 10, true);
    EXPECT_EQ(alone.lease_limit, 47U);
    ASSERT_TRUE(engine.acquire(alone, 0, numbers(0, 60), 1));
    settle(engine);
    EXPECT_EQ(count(alone, ring::GRANTED), 47U);
    EXPECT_EQ(count(alone, ring::REFUSED), 13U);
    EXPECT_FALSE(engine.waiting());
    ASSERT_TRUE(engine.release(alone, 0, numbers(0, 5)));
    alone.answers.clear();
    ASSERT_TRUE(engine.acquire(alone, 0, numbers(60, 70), 1));
    settle(engine);
    EXPECT_EQ(count(alone, ring::GRANTED), 5U);
}

TEST_P(EngineTest, ANewcomerGetsItsShareAsABorrowerGivesBack) {
    FlashModel flash(1, 400);
    Engine engine(dram_for(flash, 50), *reader, verifier);
    const uint32_t model = engine.models().add(flash.spec, false);
    Recorder& borrower = open(engine, model, 10, true);
    ASSERT_TRUE(engine.acquire(borrower, 0, numbers(0, 47), 1));
    settle(engine);
    Recorder& newcomer = open(engine, model, 20, true);
    EXPECT_EQ(borrower.lease_limit, 18U) << "half of 50 - 10 - 20 - 3 above its share";
    EXPECT_EQ(newcomer.lease_limit, 28U);
    EXPECT_FALSE(engine.blocks_others(borrower)) << "nobody waits yet";
    ASSERT_TRUE(engine.acquire(newcomer, 0, numbers(50, 70), 1));
    settle(engine);
    EXPECT_EQ(count(newcomer, ring::GRANTED), 3U) << "the slots that are never lent";
    EXPECT_EQ(count(newcomer, ring::REFUSED), 0U) << "within its share it waits";
    EXPECT_TRUE(engine.waiting());
    EXPECT_TRUE(engine.blocks_others(borrower));
    EXPECT_FALSE(engine.blocks_others(newcomer));

    borrower.answers.clear();
    ASSERT_TRUE(engine.acquire(borrower, 0, numbers(80, 84), 2));
    EXPECT_EQ(count(borrower, ring::REFUSED), 4U) << "it is above its limit, so it is answered at once";
    ASSERT_TRUE(engine.release(borrower, 0, numbers(0, 10)));
    settle(engine);
    EXPECT_EQ(count(newcomer, ring::GRANTED), 13U) << "cells are granted as slots become free";
    ASSERT_TRUE(engine.release(borrower, 0, numbers(10, 47)));
    settle(engine);
    EXPECT_EQ(count(newcomer, ring::GRANTED), 20U);
    EXPECT_FALSE(engine.waiting());

    borrower.answers.clear();
    ASSERT_TRUE(engine.acquire(borrower, 0, numbers(0, 30), 3));
    settle(engine);
    EXPECT_EQ(count(borrower, ring::GRANTED), 18U);
    engine.close(newcomer.id);
    engine.models().leave(model);
    EXPECT_EQ(borrower.lease_limit, 47U);
}

TEST_P(EngineTest, WhatASessionCannotUseIsLentToTheOthers) {
    FlashModel large(1, 16000), small(1, 24);  // 4000 and 6 cells
    Engine engine(dram_for(large, 1600), *reader, verifier);
    const Recorder& first = open(engine, engine.models().add(large.spec, false), 10, true);
    const Recorder& second = open(engine, engine.models().add(small.spec, false), 2, true);
    EXPECT_EQ(second.lease_limit, 6U) << "all of its model";
    const uint32_t limit = first.lease_limit;
    EXPECT_GT(limit, 800U) << "of 1600 slots, some of which belong to the second model";
    open(engine, first.model, 10, true);
    EXPECT_EQ(second.lease_limit, 6U);
    EXPECT_NEAR(first.lease_limit, limit / 2, 10) << "sessions of one model have equal parts";
}

TEST_P(EngineTest, NothingIsLentWhileASessionWaits) {
    FlashModel flash(1, 400);
    Engine engine(dram_for(flash, 50), *reader, verifier);
    const uint32_t model = engine.models().add(flash.spec, false);
    Recorder& large = open(engine, model, 4, true);
    ASSERT_TRUE(engine.acquire(large, 0, numbers(0, 46), 1));
    settle(engine);
    Recorder& waiting = open(engine, model, 10, true);
    Recorder& third = open(engine, model, 2, true);
    ASSERT_TRUE(engine.acquire(waiting, 0, numbers(50, 58), 1));
    ASSERT_TRUE(engine.acquire(third, 0, numbers(0, 4), 1));
    settle(engine);
    EXPECT_EQ(count(third, ring::GRANTED), 2U) << "its share, of cells that are in the pool";
    EXPECT_EQ(count(third, ring::REFUSED), 2U) << "leases on them would keep slots from the session that waits";
    ASSERT_TRUE(engine.release(large, 0, numbers(0, 46)));
    settle(engine);
    EXPECT_EQ(count(waiting, ring::GRANTED), 8U);
}

// Clients with windows. Each waits for its answers, and gives its window back when it is refused or reaches its limit.
struct Clients {
    struct Client {
        std::set<uint32_t> held;
        std::set<uint32_t> asked;
    };
    Engine& engine;
    std::vector<std::pair<Recorder*, Client>> all;
    std::mt19937 random{3};

    void let_go(Recorder& session, Client& client) {
        ASSERT_TRUE(engine.release(session, 0, std::vector<uint32_t>(client.held.begin(), client.held.end())));
        client.held.clear();
    }

    void ask(Recorder& session, Client& client) {
        if (!client.asked.empty()) return;
        if (client.held.size() + 12 > session.lease_limit) let_go(session, client);  // also when the limit fell
        for (uint32_t count = session.lease_limit - session.held_cells; count > 0; count--) {
            const uint32_t cell = random() % 1000;
            if (client.held.contains(cell) || !client.asked.insert(cell).second) continue;
            ASSERT_TRUE(engine.acquire(session, 0, std::array{cell}, cell));
        }
    }

    void take_answers(Recorder& session, Client& client) {
        bool refused = false;
        for (const auto& [cell, answer] : session.answers) {
            client.asked.erase(cell);
            if (answer.status == ring::GRANTED) client.held.insert(cell);
            refused = refused || answer.status == ring::REFUSED;
        }
        session.answers.clear();
        ASSERT_EQ(session.held_cells, client.held.size() + client.asked.size());
        if (refused) let_go(session, client);
    }
};

TEST_P(EngineTest, BorrowersThatObeyTheirLimitsBlockNobody) {
    FlashModel flash(1, 4000);
    Engine engine(dram_for(flash, 64), *reader, verifier);
    const uint32_t model = engine.models().add(flash.spec, false);
    Clients clients{engine, {}};
    uint64_t waited = 0;
    for (int round = 0; round < 600; round++) {
        const size_t count = clients.all.size();
        if (count < 1 || (count < SESSIONS_RESERVED && clients.random() % 3 == 0)) {
            clients.all.emplace(clients.all.begin(), &open(engine, model, 12, true), Clients::Client{});  // asks first
        } else if (clients.random() % 4 == 0) {
            Recorder* gone = clients.all.back().first;
            clients.all.pop_back();
            engine.close(gone->id);
            engine.models().leave(model);
        }
        for (auto& [session, client] : clients.all) {
            if (clients.random() % 2 == 0) clients.ask(*session, client);  // the others compute
        }
        settle(engine);
        waited += engine.waiting() ? 1 : 0;
        uint64_t limits = 0;
        for (auto& [session, client] : clients.all) {
            clients.take_answers(*session, client);
            limits += session->lease_limit;
        }
        ASSERT_LE(limits, 64U);
    }
    EXPECT_GT(waited, 10U) << "otherwise the test shows nothing";
    for (int round = 0; round < 3; round++) {
        for (auto& [session, client] : clients.all) {
            clients.let_go(*session, client);
            settle(engine);
            clients.take_answers(*session, client);
        }
    }
    EXPECT_FALSE(engine.waiting());
    for (auto& [session, client] : clients.all) EXPECT_TRUE(client.asked.empty());
}

TEST_P(EngineTest, TakesTheMemoryOfAnIdleModelForBorrowers) {
    FlashModel first(1, 400, "first");
    FlashModel second(1, 400, "second");
    Engine engine(dram_for(second, 60) + 8 * (first.spec.checksums.size() + 30'000), *reader, verifier);
    const uint32_t a = engine.models().add(first.spec, false);
    const uint32_t b = engine.models().add(second.spec, false);
    Recorder& before = open(engine, a, 2, true);
    ASSERT_TRUE(engine.acquire(before, 0, numbers(0, 2), 1));
    settle(engine);
    engine.close(before.id);
    engine.models().leave(a);
    Recorder& session = open(engine, b, 20, true);
    ASSERT_TRUE(engine.acquire(session, 0, numbers(0, 20), 1));
    settle(engine);
    EXPECT_EQ(count(session, ring::GRANTED), 20U);
}

TEST_P(EngineTest, MovesMemoryToAnotherModelWhenTheFirstIsIdle) {
    FlashModel first(1, 400, "first");
    FlashModel second(1, 400, "second", 8192);
    Engine engine(dram_for(second, 40) + second.spec.checksums.size() * 8, *reader, verifier);
    const uint32_t a = engine.models().add(first.spec, false);
    const uint32_t b = engine.models().add(second.spec, false);
    Recorder& session = open(engine, a, 20);
    std::vector<uint32_t> cells;
    for (uint32_t cell = 0; cell < 20; cell++) cells.push_back(cell);
    ASSERT_TRUE(engine.acquire(session, 0, cells, 1));
    settle(engine);
    EXPECT_THROW(engine.models().activate(b), NoRoom);
    engine.close(session.id);
    engine.models().leave(a);
    settle(engine);
    Recorder& other = open(engine, b, 4);
    ASSERT_TRUE(engine.acquire(other, 0, std::array{49U}, 1));
    settle(engine);
    EXPECT_EQ(std::memcmp(other.answers.find(1)->second.address, second.cell(0, 49), 8192), 0);
    EXPECT_EQ(engine.model(a).pool, nullptr);
}

TEST_P(EngineTest, RefusesACellOrLayerThatDoesNotExist) {
    FlashModel flash(1, 400);
    Engine engine(dram_for(flash, 50), *reader, verifier);
    Recorder& session = open(engine, engine.models().add(flash.spec, false), 3);
    EXPECT_FALSE(engine.acquire(session, 0, std::array{100U}, 1));
    EXPECT_FALSE(engine.acquire(session, 1, std::array{0U}, 1));
    EXPECT_FALSE(engine.release(session, 0, std::array{0U}));
    EXPECT_FALSE(engine.prefetch(session, 7, std::array{0U}, 0));
}

TEST_P(EngineTest, PrefetchesWithoutLeases) {
    FlashModel flash(1, 400);
    Engine engine(dram_for(flash, 50), *reader, verifier);
    Recorder& session = open(engine, engine.models().add(flash.spec, false), 3);
    ASSERT_TRUE(engine.prefetch(session, 0, std::array{5U, 6U, 7U, 8U}, 0));
    settle(engine);
    EXPECT_EQ(session.held_cells, 0U);
    ASSERT_TRUE(engine.acquire(session, 0, std::array{5U, 8U}, 1));
    EXPECT_EQ(session.answers.size(), 2U) << "both are in the pool";
    EXPECT_EQ(engine.model(0).counts.hits, 2U);
}

INSTANTIATE_TEST_SUITE_P(Readers, EngineTest, testing::Values("auto", "threads"));

}  // namespace
}  // namespace weightd
