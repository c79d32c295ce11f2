#include "memory/room.h"

#include <gtest/gtest.h>

#include "bare_model.h"
#include "memory/model_cost.h"

namespace weightd {
namespace {

constexpr uint64_t DRAM_BYTES = 64U << 20;

struct RoomTest : testing::Test {
    ModelList models;
    Memory memory{DRAM_BYTES};
    Pressure pressure{memory};
    Sessions sessions{models, memory, pressure};
    Room room{models, memory, sessions};
    Model& one = add_active(models, 100'000);
    Model& other = add_active(models, 100'000);

    std::string refusal(uint64_t model_bytes, uint64_t user_bytes, uint64_t has_bytes) const {
        try {
            room.require(one, model_bytes, user_bytes, has_bytes);
        } catch (const NoRoom& error) {
            return error.what();
        }
        return "";
    }
};

TEST_F(RoomTest, WhatIsKeptForAnOpenerIsNotFreeForOthers) {
    room.keep(one, 10 << 20);
    EXPECT_TRUE(room.keeps());
    EXPECT_EQ(room.free_bytes(one), DRAM_BYTES);
    EXPECT_EQ(room.free_bytes(other), DRAM_BYTES - (10 << 20));
    ASSERT_TRUE(memory.take(Account::pool, DRAM_BYTES - (4 << 20)));
    EXPECT_EQ(room.free_bytes(other), 0U);
    room.stop_keeping(one);
    EXPECT_EQ(room.free_bytes(other), 4U << 20);
    EXPECT_FALSE(room.keeps());
}

TEST_F(RoomTest, PoolsCanBeHadButSharesAndAModelsLastSegmentCannot) {
    ASSERT_TRUE(memory.take(Account::pool, DRAM_BYTES));
    const uint64_t left_bytes = DRAM_BYTES - memory.segment_bytes();
    EXPECT_EQ(refusal(left_bytes, 0, 0), "");
    EXPECT_NE(refusal(left_bytes + 1, 0, 0), "");
    sessions.add(std::make_unique<CountingSession>(1, 100'000, 1000, true));
    EXPECT_EQ(refusal(left_bytes - 1000 * BARE_CELL_BYTES, 0, 0), "");
    EXPECT_NE(refusal(left_bytes - 1000 * BARE_CELL_BYTES + 1, 0, 0), "");
}

TEST_F(RoomTest, AnIdleModelsResidentWeightsCanBeHad) {
    ASSERT_TRUE(memory.take(Account::tables, activation_bytes(other.spec)));
    const uint64_t left_bytes = DRAM_BYTES - activation_bytes(other.spec) - memory.segment_bytes();
    EXPECT_NE(refusal(left_bytes + 1, 0, 0), "");
    other.users = 0;
    EXPECT_EQ(refusal(DRAM_BYTES, 0, 0), "");
}

TEST_F(RoomTest, AUserWithMemoryLeavesSomeToOthers) {
    EXPECT_EQ(refusal(0, 50 << 20, 0), "");
    const std::string text = refusal(0, 50 << 20, 30 << 20);
    EXPECT_NE(text.find("model0: needs 50.0 MiB of --dram 64.0 MiB"), std::string::npos) << text;
    EXPECT_NE(text.find("your sessions have 30.0 MiB"), std::string::npos) << text;
}

TEST_F(RoomTest, AShareIsAtMostHalfOfWhatIsLeft) {
    const uint64_t left_slots = (DRAM_BYTES - memory.segment_bytes()) / BARE_CELL_BYTES;
    EXPECT_EQ(room.share_for(one, 0, 0), left_slots / 2);
    EXPECT_EQ(room.share_for(one, 10, 0), 10U);
    EXPECT_EQ(room.share_for(one, 1, 0), SHARE_SLOTS_MIN);
    EXPECT_EQ(room.share_for(one, 1'000'000, 0), left_slots / 2);
    ASSERT_TRUE(memory.take(Account::resident, DRAM_BYTES));
    EXPECT_THROW(room.share_for(one, 10, 0), NoRoom);
}

}  // namespace
}  // namespace weightd
