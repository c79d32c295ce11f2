// The ledger of what a session holds.
#include "memory/session.h"

#include <gtest/gtest.h>

#include "bare_model.h"

namespace weightd {
namespace {

TEST(Session, CountsACellOnceHoweverOftenItIsLeased) {
    CountingSession session(0, 10, 2);
    session.ask(3);
    session.ask(3);
    EXPECT_EQ(session.held_cells, 1U);
    EXPECT_EQ(session.unanswered, 2U);
    session.grant(3);
    EXPECT_EQ(session.granted_leases(3), 1U);
    EXPECT_EQ(session.leases(3), 2U);
    session.grant(3);
    session.give_back(3);
    EXPECT_TRUE(session.holds(3));
    session.give_back(3);
    EXPECT_FALSE(session.holds(3));
    EXPECT_EQ(session.held_cells, 0U);
    EXPECT_EQ(session.unanswered, 0U);
}

TEST(Session, KnowsWhatItsShareCovers) {
    CountingSession session(0, 10, 2);
    session.ask(1);
    EXPECT_TRUE(session.is_within_share(2));
    session.ask(2);
    EXPECT_FALSE(session.is_within_share(3));
    EXPECT_TRUE(session.is_within_share(1)) << "one more lease on a cell that it holds costs no slot";
    session.withdraw(2);
    EXPECT_TRUE(session.is_within_share(3));
    for (uint32_t i = 1; i < UINT16_MAX; i++) session.ask(1);
    EXPECT_FALSE(session.is_within_share(1)) << "the count is full";
}

}  // namespace
}  // namespace weightd
