#include "memory/user.h"

#include <gtest/gtest.h>

namespace weightd {
namespace {

TEST(User, AUserThatHoldsNothingMayTakeAllOfIt) {
    EXPECT_TRUE(may_take(0, 100, 100));
    EXPECT_FALSE(may_take(0, 101, 100));
    EXPECT_EQ(most_for(0, 100), 100U);
}

TEST(User, AnyOtherUserHasAtMostAMultipleOfWhatItLeaves) {
    EXPECT_TRUE(may_take(100, 775, 900)) << "it then has 875, and 125 are left";
    EXPECT_FALSE(may_take(100, 776, 900));
    EXPECT_FALSE(may_take(900, 1, 100)) << "it has more than that already";
    EXPECT_EQ(most_for(900, 100), 0U);
    for (const uint64_t has : {1U, 10U, 500U, 699U, 700U, 5000U}) {
        const uint64_t most = most_for(has, 100);
        EXPECT_TRUE(most == 0 || may_take(has, most, 100)) << has;
        EXPECT_FALSE(may_take(has, most + 1, 100)) << has;
    }
}

TEST(User, WhateverUsersTakeTheNextOneFindsSomething) {
    uint64_t free = 1000;
    for (int user = 0; user < 3; user++) {
        uint64_t has = 0;
        while (may_take(has, 1, free)) {
            has++;
            free--;
        }
        EXPECT_GT(has, 0U);
        EXPECT_GT(free, 0U);
    }
}

}  // namespace
}  // namespace weightd
