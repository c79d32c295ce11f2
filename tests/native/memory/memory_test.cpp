#include "memory/memory.h"

#include <gtest/gtest.h>

namespace weightd {
namespace {

TEST(Memory, TakesWhatFitsAndNothingElse) {
    Memory memory(1000);
    EXPECT_TRUE(memory.take(Account::pool, 600));
    EXPECT_TRUE(memory.take(Account::tables, 300));
    EXPECT_FALSE(memory.take(Account::resident, 101));
    EXPECT_EQ(memory.used_bytes(Account::resident), 0U);
    EXPECT_EQ(memory.used_bytes(), 900U);
    EXPECT_EQ(memory.free_bytes(), 100U);
    memory.give(Account::pool, 600);
    EXPECT_EQ(memory.used_bytes(Account::pool), 0U);
    EXPECT_EQ(memory.free_bytes(), 700U);
}

TEST(Memory, ItsLimitOnlyRises) {
    Memory memory(1000);
    memory.raise_limit(2000);
    memory.raise_limit(500);
    EXPECT_EQ(memory.limit_bytes(), 2000U);
}

TEST(Memory, ASegmentIsASixteenthWithinBounds) {
    EXPECT_EQ(Memory(1000).segment_bytes(), 4096U);
    EXPECT_EQ(Memory(64U << 20).segment_bytes(), 4U << 20);
    EXPECT_EQ(Memory(uint64_t{64} << 30).segment_bytes(), SEGMENT_BYTES_MAX);
}

TEST(Memory, APoolsSegmentsDoubleUpToTheUsualSize) {
    const Memory memory(uint64_t{64} << 30);
    EXPECT_EQ(memory.next_segment_bytes(0), SEGMENT_BYTES_MIN);
    EXPECT_EQ(memory.next_segment_bytes(SEGMENT_BYTES_MIN), SEGMENT_BYTES_MIN);
    EXPECT_EQ(memory.next_segment_bytes(6U << 20), 6U << 20);
    EXPECT_EQ(memory.next_segment_bytes(uint64_t{1} << 30), SEGMENT_BYTES_MAX);
    EXPECT_EQ(Memory(16U << 20).next_segment_bytes(0), 1U << 20) << "no larger than a sixteenth";
}

}  // namespace
}  // namespace weightd
