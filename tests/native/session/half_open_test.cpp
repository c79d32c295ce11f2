// Entries that users have begun and not finished: the user with the most entries loses its oldest first.
#include "session/half_open.h"

#include <gtest/gtest.h>

#include <map>

namespace weightd {
namespace {

using Seconds = std::chrono::seconds;
constexpr User HEAVY = 1, LIGHT = 2, UNKNOWN = std::nullopt;
const Clock::time_point BEGAN{};

TEST(HalfOpenTest, WhoHasMostLosesTheOldest) {
    HalfOpen half_open(4, Seconds(10));
    EXPECT_EQ(half_open.begin(50, LIGHT, BEGAN), std::nullopt);
    for (const uint32_t id : {9U, 8U, 7U}) EXPECT_EQ(half_open.begin(id, HEAVY, BEGAN), std::nullopt);
    EXPECT_EQ(half_open.begin(6, HEAVY, BEGAN), 9U);
    EXPECT_EQ(half_open.begin(51, LIGHT, BEGAN), 8U);
    EXPECT_EQ(half_open.begin(52, UNKNOWN, BEGAN), 50U)
        << "of two users with as many entries, the one with the oldest entry";
}

TEST(HalfOpenTest, ANewcomerTakesNothingFromOneWhoHasAsLittle) {
    HalfOpen half_open(2, Seconds(10));
    half_open.begin(1, HEAVY, BEGAN);
    half_open.begin(2, LIGHT, BEGAN);
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
    half_open.begin(1, HEAVY, BEGAN);
    half_open.begin(2, LIGHT, BEGAN + Seconds(5));
    EXPECT_TRUE(half_open.remove_expired(BEGAN + Seconds(10)).empty());
    EXPECT_EQ(half_open.remove_expired(BEGAN + Seconds(11)), std::vector<uint32_t>{1});
    half_open.end(2);
    half_open.end(2);
    EXPECT_TRUE(half_open.empty());
}

TEST(HalfOpenTest, WhoLacksSomethingTakesItFromWhoHasMore) {
    HalfOpen half_open(9, Seconds(10));
    half_open.begin(1, HEAVY, BEGAN);
    EXPECT_EQ(half_open.remove_from_user_with_most(LIGHT), std::nullopt) << "a user keeps its only entry";
    half_open.begin(2, HEAVY, BEGAN);
    half_open.begin(3, HEAVY, BEGAN);
    EXPECT_EQ(half_open.remove_from_user_with_most(HEAVY), std::nullopt);
    EXPECT_EQ(half_open.remove_from_user_with_most(LIGHT), 1U);
    half_open.begin(10, LIGHT, BEGAN);
    EXPECT_EQ(half_open.remove_from_user_with_most(LIGHT), std::nullopt) << "with one more entry it would have as many";
}

}  // namespace
}  // namespace weightd
