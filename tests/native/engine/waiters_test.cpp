#include "engine/waiters.h"

#include <gtest/gtest.h>

namespace weightd {
namespace {

using Answers = std::vector<std::pair<uint32_t, uint32_t>>;

Answers take_all(Waiters& waiters, Slot& slot) {
    Answers answers;
    waiters.take_all(slot, [&](uint32_t session, uint32_t tag) { answers.emplace_back(session, tag); });
    return answers;
}

TEST(Waiters, AnswersThoseOfOneSlotTheLastFirst) {
    Waiters waiters;
    Slot one;
    Slot other;
    waiters.add(one, 1, 10);
    waiters.add(other, 2, 20);
    waiters.add(one, 3, 30);
    EXPECT_EQ(take_all(waiters, one), (Answers{{3, 30}, {1, 10}}));
    EXPECT_TRUE(take_all(waiters, one).empty());
    EXPECT_EQ(take_all(waiters, other), (Answers{{2, 20}}));
}

TEST(Waiters, ReusesTheEntriesOfThoseThatWereAnswered) {
    Waiters waiters;
    Slot one;
    Slot other;
    for (uint32_t round = 0; round < 3; round++) {
        for (uint32_t i = 0; i < 4; i++) waiters.add(i % 2 == 0 ? one : other, i, round);
        EXPECT_EQ(take_all(waiters, one), (Answers{{2, round}, {0, round}}));
        waiters.add(one, 9, round);
        EXPECT_EQ(take_all(waiters, other), (Answers{{3, round}, {1, round}}));
        EXPECT_EQ(take_all(waiters, one), (Answers{{9, round}}));
    }
}

TEST(Waiters, OneThatWaitsAgainWhileAnsweredWaitsForTheNextRead) {
    Waiters waiters;
    Slot slot;
    waiters.add(slot, 1, 10);
    waiters.take_all(slot, [&](uint32_t session, uint32_t tag) { waiters.add(slot, session, tag + 1); });
    EXPECT_EQ(take_all(waiters, slot), (Answers{{1, 11}}));
}

}  // namespace
}  // namespace weightd
