#include "memory/sessions.h"

#include <gtest/gtest.h>

#include "bare_model.h"
#include "memory/model_cost.h"

namespace weightd {
namespace {

struct SessionsTest : testing::Test {
    static constexpr uint64_t DRAM_SLOTS = 1600;
    ModelList models;
    Memory memory{DRAM_SLOTS * BARE_CELL_BYTES};
    Pressure pressure{memory};
    Sessions sessions{models, memory, pressure};
    Model& model = add_active(models, 4000);

    CountingSession& add(uint32_t share_slots, bool borrows = true, uint32_t index = 0) {
        const uint32_t cells = models[index]->spec.cell_count();
        auto& added = sessions.add(std::make_unique<CountingSession>(index, cells, share_slots, borrows));
        sessions.update_limits();
        return static_cast<CountingSession&>(added);
    }
};

TEST_F(SessionsTest, LendsEqualPartsOfWhatIsNoShare) {
    CountingSession& one = add(100);
    EXPECT_EQ(one.lease_limit, DRAM_SLOTS - DRAM_SLOTS / LENT_NEVER_DIVISOR);
    CountingSession& two = add(300);
    EXPECT_EQ(one.lease_limit, 100U + (1500 - 400) / 2);
    EXPECT_EQ(two.lease_limit, 300U + (1500 - 400) / 2);
    EXPECT_EQ(two.told_limit, two.lease_limit);
    EXPECT_EQ(sessions.share_slots(model), 400U);
    sessions.remove(two.id);
    sessions.update_limits();
    EXPECT_EQ(one.lease_limit, 1500U);
    EXPECT_EQ(sessions.share_slots(model), 100U);
}

TEST_F(SessionsTest, AFetchDoesNotBorrowAndIsPaidFromWhatIsNeverLent) {
    CountingSession& one = add(100);
    CountingSession& fetch = add(60, false);
    EXPECT_EQ(fetch.lease_limit, 60U);
    EXPECT_EQ(one.lease_limit, 1500U);
    add(140, false);
    EXPECT_EQ(one.lease_limit, 1400U) << "200 slots for fetches are more than a sixteenth";
}

TEST_F(SessionsTest, ALimitEndsAtTheModelsCells) {
    add_active(models, 50);
    EXPECT_EQ(add(10, true, 1).lease_limit, 50U);
}

TEST_F(SessionsTest, ATableBorrowsNoMoreThanALookupNeeds) {
    Memory large{uint64_t{64'000} * BARE_CELL_BYTES};
    Pressure calm{large};
    Sessions of_both{models, large, calm};
    add_active(models, 20'000).spec.is_table = true;
    model.spec = bare_spec("model", 100'000);
    Session& table = of_both.add(std::make_unique<CountingSession>(1, 20'000, 2, true));
    Session& session = of_both.add(std::make_unique<CountingSession>(0, 100'000, 100, true));
    of_both.update_limits();
    EXPECT_EQ(table.lease_limit, 2 + TABLE_LENT_BYTES_MAX / BARE_CELL_BYTES);
    const uint64_t kept_slots = 2 * FETCH_SLOTS_MAX + large.segment_bytes() / BARE_CELL_BYTES;
    EXPECT_EQ(session.lease_limit, 64'000 - kept_slots - table.lease_limit);
}

TEST_F(SessionsTest, AModelNobodyUsesKeepsNothingBack) {
    Model& idle = add_active(models, 4000);
    idle.users = 0;
    EXPECT_EQ(add(100).lease_limit, 1500U);
    idle.users = 1;
    sessions.update_limits();
    EXPECT_EQ(sessions.find(1)->lease_limit, 1500U - 100 - memory.segment_bytes() / BARE_CELL_BYTES);
}

TEST_F(SessionsTest, WhileASegmentDrainsSessionsAreToldToHoldLittle) {
    CountingSession& one = add(100);
    add_slots(model, 10);
    ASSERT_TRUE(model.pool->start_draining());
    sessions.update_limits();
    EXPECT_EQ(one.told_limit, SHARE_SLOTS_MIN);
    EXPECT_EQ(one.lease_limit, 1500U) << "what it may still be granted";
}

TEST_F(SessionsTest, OwesASessionItsShareOrWhatItHoldsWithinItsLimit) {
    CountingSession& one = add(100);
    add(50);
    EXPECT_EQ(sessions.owed_slots(model), 150U);
    one.held_cells = 120;
    EXPECT_EQ(sessions.owed_slots(model), 170U);
    one.held_cells = 100'000;
    EXPECT_EQ(sessions.owed_slots(model), 50U + one.lease_limit);
}

TEST_F(SessionsTest, FindsTheOpenOnesAndTellsThemOfTheirSegments) {
    add_active(models, 50);
    CountingSession& one = add(10);
    CountingSession& other = add(10, true, 1);
    EXPECT_EQ(sessions.find(one.id), &one);
    EXPECT_EQ(sessions.remove(77), nullptr);
    sessions.tell_segment_gone(model, 5);
    EXPECT_EQ(one.gone, std::vector<uint32_t>{5});
    EXPECT_TRUE(other.gone.empty());
    const uint32_t id = one.id;
    sessions.remove(id);
    EXPECT_EQ(sessions.find(id), nullptr);
}

}  // namespace
}  // namespace weightd
