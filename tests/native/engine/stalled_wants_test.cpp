#include "engine/stalled_wants.h"

#include <gtest/gtest.h>

#include "bare_model.h"

namespace weightd {
namespace {

TEST(StalledWants, AreServedInTheOrderInWhichTheyWereAsked) {
    StalledWants stalled;
    stalled.push({1, 7, 0});
    stalled.push({2, 8, 0});
    EXPECT_EQ(stalled.front().cell, 7U);
    stalled.pop();
    EXPECT_EQ(stalled.front().session, 2U);
    stalled.pop();
    EXPECT_TRUE(stalled.empty());
}

TEST(StalledWants, ThoseOfASessionThatClosesAreWithdrawn) {
    CountingSession closing(0, 20, 4);
    closing.id = 1;
    StalledWants stalled;
    for (const uint32_t cell : {5U, 6U}) {
        closing.ask(cell);
        stalled.push({closing.id, cell, 0});
    }
    stalled.push({2, 5, 3});
    stalled.withdraw(closing);
    EXPECT_EQ(stalled.front().session, 2U);
    EXPECT_EQ(closing.held_cells, 0U);
    EXPECT_EQ(closing.unanswered, 0U);
    stalled.pop();
    EXPECT_TRUE(stalled.empty());
}

}  // namespace
}  // namespace weightd
