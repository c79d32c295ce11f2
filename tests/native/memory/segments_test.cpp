#include "memory/segments.h"

#include <gtest/gtest.h>

#include "bare_model.h"

namespace weightd {
namespace {

struct SegmentsTest : testing::Test {
    static constexpr uint64_t SEGMENT_SLOTS = 10;
    static constexpr uint64_t DRAM_SLOTS = 16 * SEGMENT_SLOTS;
    ModelList models;
    Memory memory{DRAM_SLOTS * BARE_CELL_BYTES};
    Pressure pressure{memory};
    Sessions sessions{models, memory, pressure};
    Room room{models, memory, sessions};
    IdleReader reader;
    Segments segments{models, memory, pressure, reader, sessions, room};
    Model& one = add_active(models, 1000);
    Model& other = add_active(models, 1000);

    uint64_t grow_all(Model& model) {
        while (segments.grow(model)) {
        }
        return model.pool->slots();
    }
    CountingSession& add_share(const Model& model, uint32_t slots) {
        auto session = std::make_unique<CountingSession>(model.index, model.spec.cell_count(), slots, true);
        return static_cast<CountingSession&>(sessions.add(std::move(session)));
    }
};

TEST_F(SegmentsTest, APoolGrowsUntilDramOrItsCellsEnd) {
    Model& small = add_active(models, 25);
    EXPECT_EQ(grow_all(small), 25U) << "the last segment is as large as is useful";
    EXPECT_EQ(grow_all(one), DRAM_SLOTS - 25);
    EXPECT_EQ(memory.free_bytes(), 0U);
    EXPECT_EQ(reader.registered, 3 + 14);
}

TEST_F(SegmentsTest, ASegmentIsPinnedWhenItsPagesAreThere) {
    Model& small = add_active(models, 25);
    EXPECT_EQ(grow_all(small), 25U);
    EXPECT_EQ(reader.registered, 3);
    while (reader.pinned < 3) segments.pin_populated();
    segments.drain_all(small);
    EXPECT_EQ(reader.registered, 0);
    grow_all(one);
    segments.drain_all(one);  // some are not pinned yet
    const int pinned = reader.pinned;
    segments.pin_populated();
    EXPECT_EQ(reader.pinned, pinned);
    EXPECT_EQ(reader.registered, 0);
}

TEST_F(SegmentsTest, AReservationLastsUntilTheModelHasGrownByAsMuch) {
    add_slots(one, DRAM_SLOTS / 2);
    memory.take(Account::pool, DRAM_SLOTS * BARE_CELL_BYTES);
    segments.transfer(one, other);
    ASSERT_EQ(memory.free_bytes(), DRAM_SLOTS / 2 * BARE_CELL_BYTES);
    EXPECT_TRUE(segments.grow(other));
    EXPECT_FALSE(segments.grow(one)) << "the rest is still reserved";
    EXPECT_EQ(grow_all(other), DRAM_SLOTS / 2);
}

// With a --dram of which a sixteenth is more than the smallest segment.
struct GrowingSegmentsTest : testing::Test {
    static constexpr uint64_t SLOTS_MIN = SEGMENT_BYTES_MIN / BARE_CELL_BYTES;
    static constexpr uint64_t SLOTS_MAX = SEGMENT_BYTES_MAX / BARE_CELL_BYTES;
    ModelList models;
    Memory memory{16 * SEGMENT_BYTES_MAX};
    Pressure pressure{memory};
    Sessions sessions{models, memory, pressure};
    Room room{models, memory, sessions};
    IdleReader reader;
    Segments segments{models, memory, pressure, reader, sessions, room};
    Model& model = add_active(models, 1'000'000);
};

TEST_F(GrowingSegmentsTest, APoolThatIsLittleUsedTakesLittle) {
    uint64_t last = 0;
    for (const uint64_t slots : {1, 2, 4, 8, 16, 32, 64, 96}) {
        ASSERT_TRUE(segments.grow(model));
        EXPECT_EQ(model.pool->slots(), slots * SLOTS_MIN);
        EXPECT_LE(model.pool->slots() - last, SLOTS_MAX);
        last = model.pool->slots();
    }
}

TEST_F(GrowingSegmentsTest, APoolGivesUpNearlyAllThatIsNoShare) {
    while (segments.grow(model)) {
    }
    EXPECT_EQ(memory.free_bytes(), 0U);
    sessions.add(std::make_unique<CountingSession>(model.index, model.spec.cell_count(), 2, true));
    while (segments.drain_surplus(nullptr, true)) segments.retire(model);
    EXPECT_EQ(model.pool->slots(), SLOTS_MIN);
}

TEST_F(SegmentsTest, AboveTheTargetItGrowsOnlyForShares) {
    pressure.set_floor(0);
    for (uint32_t i = 0; i < 20; i++) pressure.press();
    ASSERT_EQ(pressure.target_bytes(), 0U);
    EXPECT_EQ(grow_all(one), 0U);
    add_share(one, 25);
    EXPECT_EQ(grow_all(one), 25U);
}

TEST_F(SegmentsTest, WhatIsKeptForAnOpenerIsNotTaken) {
    room.keep(other, 100 * BARE_CELL_BYTES);
    EXPECT_EQ(grow_all(one), DRAM_SLOTS - 100);
}

TEST_F(SegmentsTest, ASurplusIsTakenFromTheModelThatHasMost) {
    for (uint32_t i = 0; i < 6; i++) segments.grow(one);
    for (uint32_t i = 0; i < 4; i++) segments.grow(other);
    add_share(one, 45);
    EXPECT_TRUE(segments.can_spare(one));
    EXPECT_TRUE(segments.drain_surplus(nullptr, true));
    EXPECT_EQ(other.pool->draining(), 1U) << "40 slots to spare, against 15";
    EXPECT_TRUE(segments.drain_surplus(nullptr, true)) << "that is under way";
    EXPECT_EQ(one.pool->draining(), 0U);
    segments.retire(other);
    EXPECT_EQ(other.pool->slots(), 30U);
    EXPECT_EQ(memory.used_bytes(Account::pool), 90U * BARE_CELL_BYTES);
    EXPECT_TRUE(segments.drain_surplus(&other, false)) << "never one of the model's own";
    EXPECT_EQ(one.pool->draining(), 1U);
}

TEST_F(SegmentsTest, SharesAreNeverSurplus) {
    for (uint32_t i = 0; i < 6; i++) segments.grow(one);
    add_share(one, 55);
    EXPECT_FALSE(segments.can_spare(one));
    EXPECT_FALSE(segments.drain_surplus(nullptr, true));
    one.users = 0;
    EXPECT_TRUE(segments.can_spare(one)) << "nobody uses it";
}

TEST_F(SegmentsTest, ATransferredSegmentIsReservedForTheOtherModel) {
    grow_all(one);
    CountingSession& session = add_share(one, 10);
    segments.transfer(one, other);
    EXPECT_EQ(session.gone.size(), 1U);
    EXPECT_EQ(one.pool->slots(), DRAM_SLOTS - SEGMENT_SLOTS);
    EXPECT_FALSE(segments.grow(one));
    EXPECT_TRUE(segments.grow(other));
    EXPECT_EQ(other.pool->slots(), SEGMENT_SLOTS);
    segments.transfer(one, other);
    segments.end_reservation();
    EXPECT_TRUE(segments.grow(one));
}

TEST_F(SegmentsTest, ATransferTakesNoSegmentWithLeases) {
    grow_all(one);
    for (uint32_t cell = 0; cell < DRAM_SLOTS; cell++) one.pool->lease(one.pool->insert(cell));
    segments.transfer(one, other);
    EXPECT_EQ(one.pool->draining(), 0U);
    EXPECT_EQ(one.pool->slots(), DRAM_SLOTS);
}

}  // namespace
}  // namespace weightd
