// What is begun and not finished: who has most of it loses it first.
#include "session/half_open.h"

#include <gtest/gtest.h>

#include <map>

namespace weightd {
namespace {

using Seconds = std::chrono::seconds;
constexpr User GREEDY = 1, MODEST = 2, UNKNOWN = std::nullopt;
const HalfOpen::Time BEGAN{};

TEST(HalfOpenTest, WhoHasMostLosesTheOldest) {
    HalfOpen half_open(4, Seconds(10));
    EXPECT_EQ(half_open.begin(50, MODEST, BEGAN), std::nullopt);
    for (const uint32_t id : {9U, 8U, 7U}) EXPECT_EQ(half_open.begin(id, GREEDY, BEGAN), std::nullopt);
    EXPECT_EQ(half_open.begin(6, GREEDY, BEGAN), 9U);
    EXPECT_EQ(half_open.begin(51, MODEST, BEGAN), 8U);
    EXPECT_EQ(half_open.begin(52, UNKNOWN, BEGAN), 50U) << "of two who have as many, the one whose oldest came first";
}

TEST(HalfOpenTest, ANewcomerTakesNothingFromOneWhoHasAsLittle) {
    HalfOpen half_open(2, Seconds(10));
    half_open.begin(1, GREEDY, BEGAN);
    half_open.begin(2, MODEST, BEGAN);
    EXPECT_EQ(half_open.begin(3, UNKNOWN, BEGAN), 3U) << "it must come again";
}

TEST(HalfOpenTest, EachOfManyUsersKeepsAsMuchAsTheOthers) {
    constexpr uint32_t ROOM = 60, USERS = 6;
    HalfOpen half_open(ROOM, Seconds(10));
    std::map<uint32_t, uint32_t> user_of, counts;
    for (uint32_t id = 0; id < 5000; id++) {
        const uint32_t user = id % 10 < 5 ? 0 : id % USERS;  // one comes five times as often
        user_of[id] = user;
        counts[user]++;
        if (const auto gone = half_open.begin(id, user, BEGAN)) counts[user_of[*gone]]--;
    }
    for (const auto& [user, count] : counts) EXPECT_NEAR(count, ROOM / USERS, 1) << "user " << user;
}

TEST(HalfOpenTest, IsGivenUpInTime) {
    HalfOpen half_open(4, Seconds(10));
    half_open.begin(1, GREEDY, BEGAN);
    half_open.begin(2, MODEST, BEGAN + Seconds(5));
    EXPECT_TRUE(half_open.take_expired(BEGAN + Seconds(10)).empty());
    EXPECT_EQ(half_open.take_expired(BEGAN + Seconds(11)), std::vector<uint32_t>{1});
    half_open.end(2);
    half_open.end(2);
    EXPECT_TRUE(half_open.empty());
}

TEST(HalfOpenTest, WhoLacksSomethingTakesItFromWhoHasMore) {
    HalfOpen half_open(9, Seconds(10));
    half_open.begin(1, GREEDY, BEGAN);
    EXPECT_EQ(half_open.take_from_greedier(MODEST), std::nullopt) << "the only one of a user is his";
    half_open.begin(2, GREEDY, BEGAN);
    half_open.begin(3, GREEDY, BEGAN);
    EXPECT_EQ(half_open.take_from_greedier(GREEDY), std::nullopt);
    EXPECT_EQ(half_open.take_from_greedier(MODEST), 1U);
    half_open.begin(10, MODEST, BEGAN);
    EXPECT_EQ(half_open.take_from_greedier(MODEST), std::nullopt) << "with one more he would have as many";
}

TEST(UserTest, NobodyGetsToMoreThanAMultipleOfWhatIsLeft) {
    EXPECT_TRUE(may_take(0, 100, 100)) << "who has nothing may take it all";
    EXPECT_FALSE(may_take(0, 101, 100));
    EXPECT_EQ(most_for(0, 100), 100U);
    for (const uint64_t has : {1U, 10U, 500U, 699U, 700U, 5000U}) {
        const uint64_t most = most_for(has, 100);
        EXPECT_TRUE(most == 0 || may_take(has, most, 100)) << has;
        EXPECT_FALSE(may_take(has, most + 1, 100)) << has;
    }
}

TEST(UserTest, HoweverManyUsersTakeWhatTheyCanTheNextFindsSomething) {
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
