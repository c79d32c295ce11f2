// Which sessions are served next, and how much, if some ask for more than others.
#include "session/rounds.h"

#include <gtest/gtest.h>

namespace weightd {
namespace {

constexpr User GREEDY = 1, MODEST = 2;
constexpr uint32_t PART = Rounds::USER_WORK / 2;

struct TurnsTest : testing::Test {
    Rounds turns;

    // The sessions that a round serves, each with a part.
    std::vector<uint32_t> served(const std::vector<Rounds::Waiting>& waiting) {
        std::vector<uint32_t> sessions;
        turns.round(waiting, [&](uint32_t session) {
            sessions.push_back(session);
            return PART;
        });
        return sessions;
    }
};

TEST_F(TurnsTest, ManySessionsOfOneUserKeepAnotherWaitingNoLongerThanItsPart) {
    std::vector<Rounds::Waiting> waiting;
    for (uint32_t session = 0; session < 200; session++) waiting.push_back({GREEDY, session});
    waiting.push_back({MODEST, 77'000});
    for (uint32_t round = 0; round < 10; round++) {
        EXPECT_EQ(served(waiting), (std::vector<uint32_t>{2 * round, 2 * round + 1, 77'000}));
    }
}

TEST_F(TurnsTest, SessionsOfOneUserTakeTurns) {
    const std::vector<Rounds::Waiting> waiting{{GREEDY, 3}, {GREEDY, 8}, {GREEDY, 9}};
    EXPECT_EQ(served(waiting), (std::vector<uint32_t>{3, 8}));
    EXPECT_EQ(served(waiting), (std::vector<uint32_t>{9, 3}));
    EXPECT_EQ(served({{GREEDY, 3}, {GREEDY, 5}, {GREEDY, 9}}), (std::vector<uint32_t>{5, 9})) << "others come and go";
    EXPECT_EQ(served(waiting), (std::vector<uint32_t>{3, 8})) << "after the last comes the first";
}

TEST_F(TurnsTest, WhoAsksForLittleIsServedAtOnce) {
    std::vector<Rounds::Waiting> waiting;
    for (uint32_t session = 0; session < 20; session++) waiting.push_back({GREEDY, session});
    uint32_t count = 0;
    turns.round(waiting, [&](uint32_t) {
        count++;
        return 20U;
    });
    EXPECT_EQ(count, 20U);
}

}  // namespace
}  // namespace weightd
