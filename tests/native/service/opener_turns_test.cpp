// Openers of one model come one after another, and do not wait for a silent device for ever.
#include "service/opener_turns.h"

#include <gtest/gtest.h>

#include <atomic>
#include <future>
#include <optional>

#include "memory/resident.h"
#include "service/commands.h"

namespace weightd {
namespace {

using Turn = OpenerTurns::Turn;
constexpr std::chrono::minutes LONG{10};

struct OpenerTurnsTest : testing::Test {
    std::atomic<bool> stopping = false;
    OpenerTurns turns{LONG, [this] { return stopping.load(); }};
};

TEST_F(OpenerTurnsTest, TheNextOpenerOfAModelWaits) {
    std::optional<Turn> first(std::in_place, turns, 0, "model");
    std::atomic<bool> ended = false;
    auto second = std::async(std::launch::async, [&] {
        const Turn turn(turns, 0, "model");
        return ended.load();
    });
    { const Turn other(turns, 1, "other"); }  // an opener of another model does not
    ended = true;
    first.reset();
    EXPECT_TRUE(second.get()) << "the second turn began before the first had ended";
}

TEST_F(OpenerTurnsTest, WaitingEndsWhenTheDaemonStops) {
    const Turn first(turns, 0, "model");
    stopping = true;
    EXPECT_THROW(Turn(turns, 0, "model"), Stopping);
}

TEST(SilentOpenerTurnsTest, WaitingEndsWhenTheDeviceIsSilent) {
    OpenerTurns turns(std::chrono::milliseconds(0), [] { return false; });
    Turn first(turns, 0, "model");
    try {
        const Turn second(turns, 0, "model");
        FAIL() << "the turn was given twice";
    } catch (const Unanswered& error) {
        EXPECT_NE(std::string(error.what()).find("model model"), std::string::npos) << error.what();
    }
    first.note_progress();
}

}  // namespace
}  // namespace weightd
