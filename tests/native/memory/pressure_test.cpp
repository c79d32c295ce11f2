#include "memory/pressure.h"

#include <gtest/gtest.h>

namespace weightd {
namespace {

constexpr uint64_t MIB = 1U << 20;

struct PressureTest : testing::Test {
    Memory memory{64 * MIB};
    Pressure pressure{memory};
};

TEST_F(PressureTest, APressTakesAnEighthOfDramDownToTheFloor) {
    ASSERT_TRUE(memory.take(Account::pool, 60 * MIB));
    EXPECT_FALSE(pressure.pressed());
    for (const uint64_t target : {52 * MIB, 44 * MIB, 36 * MIB, 32 * MIB, 32 * MIB}) {
        pressure.press();
        EXPECT_EQ(pressure.target_bytes(), target);
    }
    EXPECT_TRUE(pressure.pressed());
    EXPECT_TRUE(pressure.exceeded());
    EXPECT_EQ(pressure.left_bytes(), 0U);
    memory.give(Account::pool, 40 * MIB);
    EXPECT_FALSE(pressure.exceeded());
    EXPECT_EQ(pressure.left_bytes(), 12 * MIB);
}

TEST_F(PressureTest, APressBeginsAtWhatIsUsed) {
    ASSERT_TRUE(memory.take(Account::pool, 48 * MIB));
    pressure.press();
    EXPECT_EQ(pressure.target_bytes(), 40 * MIB);
}

TEST_F(PressureTest, ReliefsEndAtDram) {
    ASSERT_TRUE(memory.take(Account::resident, 64 * MIB));
    pressure.press();
    for (uint32_t i = 0; i < 3; i++) pressure.relieve();
    EXPECT_TRUE(pressure.pressed());
    pressure.relieve();
    EXPECT_FALSE(pressure.pressed());
    EXPECT_EQ(pressure.target_bytes(), 64 * MIB);
}

TEST_F(PressureTest, ARaisedDramRaisesTheTargetAndAFloorIsAtMostDram) {
    memory.raise_limit(80 * MIB);
    pressure.limit_raised(16 * MIB);
    EXPECT_EQ(pressure.target_bytes(), 80 * MIB);
    pressure.set_floor(UINT64_MAX);
    EXPECT_EQ(pressure.floor_bytes(), 80 * MIB);
    ASSERT_TRUE(memory.take(Account::pool, 80 * MIB));
    pressure.press();
    EXPECT_FALSE(pressure.pressed()) << "nothing is taken from it";
}

}  // namespace
}  // namespace weightd
