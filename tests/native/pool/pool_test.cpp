#include "pool/pool.h"

#include <gtest/gtest.h>

#include <random>
#include <set>

namespace weightd {
namespace {

constexpr uint32_t CELL_BYTES = 4096;

SharedMemory segment(uint32_t slots) { return {"test", size_t{slots} * CELL_BYTES}; }

// Makes the same random calls on a pool and on plain sets, and checks the invariants of pool.h after each.
TEST(Pool, KeepsItsInvariantsUnderRandomUse) {
    std::mt19937 random(3);
    Pool pool(200, CELL_BYTES);
    uint32_t segments = 0;
    pool.add_segment(segments++, segment(20));
    std::multiset<uint32_t> leased;
    std::set<uint32_t> reading;
    for (int step = 0; step < 50'000; step++) {
        const uint32_t cell = random() % 200;
        const Place place = pool.find(cell);
        if (place) {
            ASSERT_EQ(place.slot().cell, cell);
        }
        switch (random() % 8) {
            case 0:
            case 1:
            case 2: {
                if (place) {
                    if (!place.slot().reading) pool.touched(cell);
                    break;
                }
                const Place got = pool.insert(cell);
                if (got) reading.insert(cell);
                ASSERT_TRUE(got || leased.size() + reading.size() > 0);
                break;
            }
            case 3:
                if (reading.erase(cell) == 1) pool.loaded(place);
                break;
            case 4:
                if (place && leased.size() < 10) {
                    pool.lease(place);
                    leased.insert(cell);
                }
                break;
            case 5:
            case 6:
                if (const auto held = leased.find(cell); held != leased.end()) {
                    leased.erase(held);
                    pool.unlease(place);
                }
                break;
            case 7:
                if (step % 500 == 7 && pool.slots() < 60) pool.add_segment(segments++, segment(10 + random() % 10));
                if (step % 500 == 263 && pool.slots() > 30) pool.start_draining();
                pool.retire_drained();
                break;
        }
        for (const uint32_t held : leased) ASSERT_TRUE(pool.find(held)) << "a leased cell left the pool";
        for (const uint32_t unread : reading) ASSERT_TRUE(pool.find(unread)) << "a cell left while it was being read";
        std::set<uint32_t> busy(leased.begin(), leased.end());
        busy.insert(reading.begin(), reading.end());
        ASSERT_EQ(pool.busy(), busy.size());
    }
    EXPECT_GT(pool.evictions(), 100U);
    EXPECT_GT(segments, 5U);
}

TEST(Pool, RetiresADrainedSegmentWhenItsLastLeaseEnds) {
    Pool pool(10, CELL_BYTES);
    pool.add_segment(0, segment(4));
    const Place place = pool.insert(3);
    pool.lease(place);
    pool.loaded(place);
    ASSERT_TRUE(pool.start_draining());
    EXPECT_TRUE(pool.retire_drained().empty());
    EXPECT_FALSE(pool.insert(4)) << "a draining segment takes nothing new";
    pool.unlease(place);
    EXPECT_EQ(pool.retire_drained().size(), 1U);
    EXPECT_FALSE(pool.find(3));
}

TEST(Pool, DrainsTheLargestSegmentThatMayGo) {
    Pool pool(20, CELL_BYTES);
    const uint32_t sizes[] = {2, 4, 4, 8};
    for (uint32_t number = 0; number < 4; number++) pool.add_segment(number, segment(sizes[number]));
    for (uint32_t cell = 0; cell < 3; cell++) pool.loaded(pool.insert(cell));
    pool.lease(pool.find(2));  // in the first segment of 4
    const auto drained = [&pool](uint64_t slots_max, bool idle_only) -> int64_t {
        if (!pool.start_draining(slots_max, idle_only)) return -1;
        const auto gone = pool.retire_drained();
        return gone.empty() ? -2 : int64_t{gone.front()->number};
    };
    EXPECT_FALSE(pool.can_drain(1));
    EXPECT_EQ(drained(1, false), -1);
    EXPECT_EQ(drained(7, false), 2) << "as large as the other, and not busy";
    EXPECT_EQ(drained(7, true), 0) << "the busy one stays";
    EXPECT_EQ(drained(20, false), 3);
    EXPECT_TRUE(pool.can_drain(4));
    EXPECT_EQ(drained(4, true), -1);
    EXPECT_EQ(drained(4, false), -2) << "its lease keeps it";
    EXPECT_FALSE(pool.can_drain(20)) << "it drains already";
}

TEST(Pool, NeverEvictsALeasedCell) {
    Pool pool(10, CELL_BYTES);
    pool.add_segment(0, segment(2));
    for (const uint32_t cell : {0U, 1U}) {
        const Place place = pool.insert(cell);
        pool.lease(place);
        pool.loaded(place);
    }
    EXPECT_FALSE(pool.insert(2));
    pool.unlease(pool.find(0));
    EXPECT_TRUE(pool.insert(2));
    EXPECT_FALSE(pool.find(0));
    EXPECT_TRUE(pool.find(1));
}

TEST(Pool, WritesHotnessOfCellsThatItHoldsAndThatItHeld) {
    Pool pool(3, CELL_BYTES);
    pool.add_segment(0, segment(1));
    for (const uint32_t cell : {0U, 1U}) {
        const Place place = pool.insert(cell);
        pool.touched(cell);
        pool.loaded(place);
    }
    std::vector<Hotness> hotness(3);
    pool.write_hotness(hotness);
    EXPECT_GT(hotness[0], 0);
    EXPECT_EQ(hotness[0] & HOTNESS_IN_POOL, 0);
    EXPECT_EQ(hotness[1] & HOTNESS_IN_POOL, HOTNESS_IN_POOL);
    EXPECT_EQ(hotness[1] & HOTNESS_MAX, hotness[0]);
    EXPECT_EQ(hotness[2], 0);
}

}  // namespace
}  // namespace weightd
