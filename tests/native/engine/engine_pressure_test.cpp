// What pools give back while the system lacks memory, and how they grow again.
#include <gtest/gtest.h>

#include <numeric>

#include "bare_model.h"
#include "engine/engine.h"
#include "flash_file.h"
#include "memory/model_cost.h"
#include "settle.h"

namespace weightd {
namespace {

struct EnginePressureTest : testing::Test {
    std::string note;
    std::unique_ptr<Reader> reader = make_reader("threads", 2, 32, note);
    Verifier verifier{1};
    FlashModel flash{1, 12000};  // 3000 cells
    uint64_t dram_bytes = minimum_dram_bytes(flash.spec) + 2400 * 4096;
    Engine engine{dram_bytes, *reader, verifier};

    EnginePressureTest() { engine.models().add(flash.spec, false); }

    CountingSession& open(uint32_t share) {
        EXPECT_TRUE(engine.models().activate(0));
        return static_cast<CountingSession&>(
            engine.open(std::make_unique<CountingSession>(0, flash.spec.cell_count(), share, true)));
    }

    void sweep(Session& session, uint32_t count) {
        for (uint32_t cell = 0; cell < count; cell++) {
            EXPECT_TRUE(engine.acquire(session, 0, std::array{cell}, 0));
            settle(engine);
            EXPECT_TRUE(engine.release(session, 0, std::array{cell}));
        }
    }

    static std::vector<uint32_t> cells(uint32_t count) {
        std::vector<uint32_t> numbers(count);
        std::iota(numbers.begin(), numbers.end(), 0);
        return numbers;
    }

    uint64_t used_bytes() const { return dram_bytes - engine.models().memory().free_bytes(); }
    const Pool& pool() { return *engine.model(0).pool; }
};

TEST_F(EnginePressureTest, EachPressTakesAPartDownToTheFloor) {
    CountingSession& session = open(20);
    sweep(session, 3000);
    engine.models().set_floor(dram_bytes / 2);
    uint64_t before = used_bytes();
    ASSERT_GT(before, dram_bytes * 9 / 10);
    for (uint32_t i = 0; i < 20 && before > dram_bytes / 2; i++) {
        engine.models().press();
        settle(engine);
        EXPECT_LT(used_bytes(), before);
        EXPECT_GE(engine.models().pressure().target_bytes(), dram_bytes / 2);
        before = used_bytes();
    }
    EXPECT_LE(used_bytes(), dram_bytes / 2);
    EXPECT_GT(used_bytes(), dram_bytes / 4) << "it takes little more than was asked";
    engine.models().press();
    settle(engine);
    EXPECT_EQ(used_bytes(), before) << "never below the floor";
    sweep(session, 3000);
    EXPECT_LE(used_bytes(), dram_bytes / 2) << "it goes on serving, and stays small";
    EXPECT_EQ(session.grants, 6000U);
}

TEST_F(EnginePressureTest, ItGrowsAgainWhenThePressureEnds) {
    CountingSession& session = open(20);
    sweep(session, 3000);
    const uint64_t before = used_bytes();
    engine.models().set_floor(dram_bytes / 2);
    for (uint32_t i = 0; i < 8; i++) engine.models().press();
    settle(engine);
    EXPECT_TRUE(engine.models().pressure().pressed());
    for (uint32_t i = 0; i <= RELIEF_DIVISOR; i++) engine.models().relieve();
    EXPECT_FALSE(engine.models().pressure().pressed());
    sweep(session, 3000);
    EXPECT_EQ(used_bytes(), before);
}

TEST_F(EnginePressureTest, SharesAreKeptBelowTheFloor) {
    CountingSession& session = open(300);
    engine.models().set_floor(0);
    for (uint32_t i = 0; i < 30; i++) engine.models().press();
    EXPECT_TRUE(engine.acquire(session, 0, cells(300), 0));
    settle(engine);
    EXPECT_EQ(session.grants, 300U);
    EXPECT_TRUE(engine.release(session, 0, cells(300)));
    sweep(session, 3000);
    engine.models().press();
    settle(engine);
    EXPECT_GE(pool().slots(), 300U);
}

TEST_F(EnginePressureTest, LimitsFallAndALeasedSegmentRetiresAfterItsLastLease) {
    CountingSession& session = open(20);
    const uint32_t lent = session.lease_limit;
    ASSERT_GT(lent, 300U);
    EXPECT_TRUE(engine.acquire(session, 0, cells(lent), 0));
    settle(engine);
    ASSERT_EQ(session.grants, lent);
    engine.models().set_floor(dram_bytes / 2);
    const uint64_t before = used_bytes();
    for (uint32_t i = 0; i < 8; i++) engine.models().press();
    settle(engine);
    EXPECT_LT(session.lease_limit, lent);
    EXPECT_LT(session.told_limit, lent);
    EXPECT_GT(used_bytes(), dram_bytes / 2) << "leases stay whole";
    EXPECT_TRUE(engine.waiting()) << "so the loop tries again";
    for (const uint32_t cell : cells(lent)) EXPECT_TRUE(engine.release(session, 0, std::array{cell}));
    settle(engine);
    EXPECT_LE(used_bytes(), dram_bytes / 2);
    EXPECT_LT(used_bytes(), before);
}

TEST_F(EnginePressureTest, AnIdleModelIsDeactivatedFirst) {
    CountingSession& session = open(20);
    sweep(session, 500);
    engine.close(session.id);
    engine.models().leave(0);
    engine.models().set_floor(0);
    for (uint32_t i = 0; i < IDLE_REBALANCES_MIN; i++) engine.models().rebalance();
    engine.models().press();
    EXPECT_EQ(engine.model(0).pool, nullptr);
}

}  // namespace
}  // namespace weightd
