// Models that compete for --dram, with an engine that reads their cells.
#include <gtest/gtest.h>

#include <numeric>

#include "bare_model.h"
#include "engine/engine.h"
#include "flash_file.h"
#include "memory/model_cost.h"
#include "settle.h"

namespace weightd {
namespace {

struct EngineMemoryTest : testing::Test {
    std::string note;
    std::unique_ptr<Reader> reader = make_reader("threads", 2, 32, note);
    Verifier verifier{1};
    FlashModel first{1, 800, "first"};
    FlashModel second{1, 800, "second"};

    static CountingSession& open(Engine& engine, uint32_t model, uint32_t share) {
        EXPECT_TRUE(engine.models().activate(model));
        const uint32_t cells = engine.model(model).spec.cell_count();
        return static_cast<CountingSession&>(engine.open(std::make_unique<CountingSession>(model, cells, share, true)));
    }

    static std::vector<uint32_t> cells(uint32_t begin, uint32_t end) {
        std::vector<uint32_t> numbers(end - begin);
        std::iota(numbers.begin(), numbers.end(), begin);
        return numbers;
    }

    // Acquires cells one by one and gives each back: they stay in the pool.
    static void sweep(Engine& engine, Session& session, uint32_t count) {
        for (const uint32_t cell : cells(0, count)) {
            EXPECT_TRUE(engine.acquire(session, 0, std::array{cell}, 0));
            settle(engine);
            EXPECT_TRUE(engine.release(session, 0, std::array{cell}));
        }
    }

    // A session of the first model whose pool grows as far as it can.
    CountingSession& grow_first_of_two(Engine& engine) const {
        engine.models().add(first.spec, false);
        engine.models().add(second.spec, false);
        CountingSession& session = open(engine, 0, 40);
        sweep(engine, session, 200);
        return session;
    }

    static void leave(Engine& engine, Session& session) {
        const uint32_t model = session.model;
        engine.close(session.id);
        engine.models().leave(model);
    }

    uint64_t dram_for_slots(uint32_t models, uint64_t slots) const {
        return models * minimum_dram_bytes(first.spec) + slots * 4096;
    }
};

TEST_F(EngineMemoryTest, TellsASessionThatScansFromOneThatDoesNot) {
    Engine engine(dram_for_slots(1, 100), *reader, verifier);
    engine.models().add(first.spec, false);
    CountingSession& one = open(engine, 0, 30);
    CountingSession& other = open(engine, 0, 30);
    ASSERT_TRUE(engine.acquire(one, 0, cells(10, 30), 0));
    ASSERT_TRUE(engine.acquire(other, 0, cells(10, 30), 0));
    settle(engine);
    EXPECT_EQ(engine.scans(0).count(), 2U);
    ASSERT_TRUE(engine.acquire(one, 0, cells(30, 34), 0));  // the short last run of a layer
    settle(engine);
    EXPECT_EQ(engine.scans(0).count(), 2U);
    ASSERT_TRUE(engine.acquire(one, 0, std::array{1U, 3U, 40U, 41U}, 0));
    settle(engine);
    EXPECT_EQ(engine.scans(0).count(), 1U);
    ASSERT_TRUE(engine.release(other, 0, cells(10, 30)));
    EXPECT_EQ(engine.scans(0).count(), 0U) << "a session that holds nothing may be idle";
    ASSERT_TRUE(engine.acquire(other, 0, cells(10, 30), 0));
    settle(engine);
    EXPECT_EQ(engine.scans(0).count(), 1U);
    leave(engine, other);
    EXPECT_EQ(engine.scans(0).count(), 0U);
}

TEST_F(EngineMemoryTest, ARefusedActivationTakesNothingFromOthers) {
    Engine engine(dram_for_slots(1, 150), *reader, verifier);
    grow_first_of_two(engine);
    const uint64_t slots = engine.model(0).pool->slots();
    ASSERT_GT(slots, 100U) << "it has grown above its share, so there is something to take";
    EXPECT_THROW(engine.models().activate(1), NoRoom);
    settle(engine);
    EXPECT_EQ(engine.model(0).pool->slots(), slots);
    EXPECT_EQ(engine.model(0).pool->draining(), 0U);
    EXPECT_EQ(engine.model(1).pool, nullptr);
}

TEST_F(EngineMemoryTest, ARaisedDramHasRoomForOneMoreModel) {
    Engine engine(dram_for_slots(1, 150), *reader, verifier);
    CountingSession& session = grow_first_of_two(engine);
    const uint64_t slots = engine.model(0).pool->slots();
    EXPECT_THROW(engine.models().activate(1), NoRoom);
    const uint64_t raised_bytes = dram_for_slots(2, 300);
    engine.models().raise_dram(raised_bytes, raised_bytes / 2);
    engine.models().raise_dram(raised_bytes / 2, 0);  // --dram never falls
    EXPECT_EQ(engine.models().memory().limit_bytes(), raised_bytes);
    EXPECT_EQ(engine.models().pressure().target_bytes(), raised_bytes);
    EXPECT_EQ(engine.models().pressure().floor_bytes(), raised_bytes / 2);
    EXPECT_TRUE(engine.models().activate(1));
    engine.models().leave(1);
    sweep(engine, session, 200);
    EXPECT_GT(engine.model(0).pool->slots(), slots);
}

TEST_F(EngineMemoryTest, ARefusedActivationLeavesIdleModelsActive) {
    Engine engine(dram_for_slots(2, 20), *reader, verifier);
    engine.models().add(first.spec, false);
    engine.models().add(second.spec, false);
    FlashModel large(2, 4000, "large");
    large.spec.resident_bytes = 64U << 20;
    const uint32_t third_index = engine.models().add(large.spec, false);
    leave(engine, open(engine, 0, 4));
    open(engine, 1, 4);
    EXPECT_THROW(engine.models().activate(third_index), NoRoom);
    EXPECT_NE(engine.model(0).pool, nullptr);
}

TEST_F(EngineMemoryTest, AnIdleModelIsDeactivatedForABusyOneAfterAWhile) {
    Engine engine(dram_for_slots(2, 150), *reader, verifier);
    engine.models().add(first.spec, false);
    engine.models().add(second.spec, false);
    CountingSession& idle = open(engine, 0, 20);
    sweep(engine, idle, 60);
    leave(engine, idle);
    CountingSession& busy = open(engine, 1, 20);
    sweep(engine, busy, 200);
    const uint64_t slots = engine.model(1).pool->slots();
    EXPECT_LT(slots, 100U);
    EXPECT_NE(engine.model(0).pool, nullptr) << "a client may come back to it soon";
    for (uint32_t i = 0; i < IDLE_REBALANCES_MIN; i++) engine.models().rebalance();
    sweep(engine, busy, 200);
    EXPECT_EQ(engine.model(0).pool, nullptr);
    EXPECT_GT(engine.model(1).pool->slots(), slots + 100);
}

TEST_F(EngineMemoryTest, AShareIsTakenFromAnIdleModelAtOnce) {
    Engine engine(dram_for_slots(2, 60), *reader, verifier);
    engine.models().add(first.spec, false);
    engine.models().add(second.spec, false);
    CountingSession& idle = open(engine, 0, 20);
    sweep(engine, idle, 200);
    leave(engine, idle);
    ASSERT_TRUE(engine.models().activate(1));
    const uint32_t share = engine.models().share_for(1, 60);
    engine.models().leave(1);
    CountingSession& busy = open(engine, 1, share);
    EXPECT_TRUE(engine.acquire(busy, 0, cells(0, share), 0));
    settle(engine);
    EXPECT_EQ(busy.grants, share);
}

TEST_F(EngineMemoryTest, WhatDrainsForAnActivationIsKeptForIt) {
    Engine engine(dram_for_slots(2, 160), *reader, verifier);
    engine.models().add(first.spec, false);
    engine.models().add(second.spec, false);
    CountingSession& busy = open(engine, 0, 4);
    const std::vector<uint32_t> held = cells(0, busy.lease_limit);
    EXPECT_TRUE(engine.acquire(busy, 0, held, 0));
    settle(engine);
    ASSERT_EQ(busy.grants, held.size());
    ASSERT_FALSE(engine.models().activate(1)) << "what it needs is leased";
    for (const uint32_t cell : held) {
        EXPECT_TRUE(engine.release(busy, 0, std::array{cell}));
        engine.step();                                            // the segment retires if this was its last lease
        EXPECT_TRUE(engine.prefetch(busy, 0, cells(0, 200), 0));  // a busy model takes what is free
        settle(engine);
    }
    bool active = false;
    for (uint32_t turn = 0; turn < 100 && !active; turn++) {
        active = engine.models().activate(1);
        engine.step();
        EXPECT_TRUE(engine.prefetch(busy, 0, cells(0, 200), 0));
        settle(engine);
    }
    EXPECT_TRUE(active);
}

TEST_F(EngineMemoryTest, ANewModelTakesWhatAModelInUseHasLent) {
    Engine engine(dram_for_slots(2, 160), *reader, verifier);
    engine.models().add(first.spec, false);
    CountingSession& busy = open(engine, 0, 4);
    const std::vector<uint32_t> held = cells(0, busy.lease_limit);
    EXPECT_TRUE(engine.acquire(busy, 0, held, 0));
    settle(engine);
    sweep(engine, busy, 200);
    auto coming = open_model(second.spec, false);
    std::optional<uint32_t> index = engine.models().add(coming);
    for (uint32_t turn = 0; turn < held.size() && !index; turn++) {  // as its window shrinks
        ASSERT_NE(coming, nullptr) << "it is still the caller's";
        EXPECT_TRUE(engine.release(busy, 0, std::array{held[turn]}));
        settle(engine);
        index = engine.models().add(coming);
    }
    ASSERT_EQ(index, 1U);
    while (!engine.models().activate(1)) {
        ASSERT_GT(busy.held_cells, 0U);
        for (const uint32_t cell : held) {
            if (busy.granted_leases(cell) > 0) EXPECT_TRUE(engine.release(busy, 0, std::array{cell}));
        }
        settle(engine);
    }
}

TEST_F(EngineMemoryTest, ARefusalNamesTheModelsThatHaveTheMemory) {
    Engine engine(dram_for_slots(2, 20), *reader, verifier);
    engine.models().add(first.spec, false);
    second.spec.resident_bytes = 64U << 20;
    engine.models().add(second.spec, false);
    const auto refusal = [&]() -> std::string {
        try {
            engine.models().activate(1);
        } catch (const NoRoom& error) {
            return error.what();
        }
        return "";
    };
    const std::string alone = refusal();
    EXPECT_NE(alone.find("second: needs"), std::string::npos) << alone;
    EXPECT_NE(alone.find("raise --dram to"), std::string::npos) << alone;
    EXPECT_EQ(alone.find("user"), std::string::npos) << "there is no user: " << alone;
    open(engine, 0, 4);
    const std::string beside = refusal();
    EXPECT_NE(beside.find("first has "), std::string::npos) << beside;
    EXPECT_NE(beside.find(" for 1 user;"), std::string::npos) << beside;
    EXPECT_NE(beside.find("end a session, or raise --dram to"), std::string::npos) << beside;
}

// Two models of 1000 cells each, and memory for 1000 cells in all. The first model has filled it, and its session is
// still open.
struct EngineDemandTest : EngineMemoryTest {
    static constexpr uint32_t CELLS = 1000;
    static constexpr uint32_t SHARE = 20;
    FlashModel large{1, 4 * CELLS, "large"};
    FlashModel other_large{1, 4 * CELLS, "other_large"};
    Engine engine{2 * minimum_dram_bytes(large.spec) + CELLS * 4096, *reader, verifier};
    CountingSession* one = nullptr;
    CountingSession* other = nullptr;

    void SetUp() override {
        engine.models().add(large.spec, false);
        engine.models().add(other_large.spec, false);
        one = &open(engine, 0, SHARE);
        use(*one, CELLS);
        while (!engine.models().activate(1)) settle(engine);
        other = static_cast<CountingSession*>(&engine.open(std::make_unique<CountingSession>(1, CELLS, SHARE, true)));
        use(*other, SHARE);
        ASSERT_GT(slots(0), 4 * slots(1));
    }

    uint64_t slots(uint32_t model) { return engine.model(model).pool->slots(); }

    void use(Session& session, uint32_t count) {
        for (uint32_t begin = 0; begin < count; begin += SHARE) {
            const std::vector<uint32_t> part = cells(begin, std::min(count, begin + SHARE));
            EXPECT_TRUE(engine.acquire(session, 0, part, 0));
            settle(engine);
            EXPECT_TRUE(engine.release(session, 0, part));
        }
    }
};

TEST_F(EngineDemandTest, MemoryGoesToTheModelThatIsUsed) {
    for (const auto& [busy, idle] : {std::pair{other, one}, std::pair{one, other}}) {
        for (int second = 0; second < 40; second++) {
            use(*busy, CELLS);
            engine.models().rebalance();
        }
        EXPECT_GT(slots(busy->model), 4 * slots(idle->model));
        EXPECT_GE(slots(idle->model), SHARE);
        const uint64_t misses = engine.model(busy->model).counts.misses;
        use(*busy, CELLS);
        EXPECT_LT(engine.model(busy->model).counts.misses - misses, CELLS / 3);
    }
}

TEST_F(EngineDemandTest, ModelsThatAreUsedAlikeEndWithSimilarPoolsAndKeepThem) {
    const auto use_both = [this] {
        for (int second = 0; second < 20; second++) {
            use(*one, CELLS);
            use(*other, CELLS);
            engine.models().rebalance();
        }
    };
    use_both();
    const uint64_t before = slots(0);
    EXPECT_LT(before, 3 * slots(1));
    EXPECT_LT(slots(1), 3 * before);
    use_both();
    EXPECT_EQ(slots(0), before);
}

TEST_F(EngineDemandTest, NoSessionMustGiveBackLeasesForIt) {
    const std::vector<uint32_t> held = cells(0, one->lease_limit);
    one->grants = 0;
    EXPECT_TRUE(engine.acquire(*one, 0, held, 0));
    settle(engine);
    const uint32_t granted = one->grants;
    ASSERT_GT(granted, SHARE);
    for (int second = 0; second < 20; second++) {
        use(*other, CELLS);
        engine.models().rebalance();
        ASSERT_EQ(engine.model(0).pool->draining(), 0U);
        ASSERT_FALSE(engine.blocks_others(*one));
    }
    for (const uint32_t cell : cells(0, granted)) EXPECT_TRUE(engine.model(0).pool->find(cell));
}

TEST_F(EngineDemandTest, AModelThatEvictsNothingTakesNothing) {
    const uint64_t before = slots(0);
    for (int second = 0; second < 20; second++) {
        use(*other, SHARE);
        engine.models().rebalance();
    }
    EXPECT_EQ(slots(0), before);
}

}  // namespace
}  // namespace weightd
