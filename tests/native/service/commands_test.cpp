// Functions that other threads pass to one thread.
#include "service/commands.h"

#include <gtest/gtest.h>
#include <poll.h>

#include <atomic>
#include <thread>

namespace weightd {
namespace {

// A thread that runs commands until it is told to stop.
struct CommandsTest : testing::Test {
    Commands commands;
    std::thread loop{[this] {
        while (!commands.stopping()) {
            pollfd event{commands.event_fd(), POLLIN, 0};
            ::poll(&event, 1, -1);
            commands.run();
        }
        commands.run_all();
    }};

    ~CommandsTest() override {
        commands.stop();
        loop.join();
    }
};

TEST_F(CommandsTest, RunsOnTheLoopAndReturnsTheResult) {
    EXPECT_EQ(commands.on_loop([] { return std::this_thread::get_id(); }), loop.get_id());
}

TEST_F(CommandsTest, PassesOnWhatIsThrown) {
    EXPECT_THROW(commands.on_loop([] { throw std::out_of_range("cell"); }), std::out_of_range);
    EXPECT_EQ(commands.on_loop([] { return 7; }), 7) << "the loop goes on";
}

TEST_F(CommandsTest, CommandsOfManyThreadsRunOneAtATime) {
    uint64_t count = 0;  // without a lock: only the loop touches it
    std::vector<std::thread> callers;
    for (int i = 0; i < 8; i++) {
        callers.emplace_back([&] {
            for (int j = 0; j < 200; j++) commands.on_loop([&] { count++; });
        });
    }
    for (std::thread& caller : callers) caller.join();
    EXPECT_EQ(commands.on_loop([&] { return count; }), 1600U);
}

TEST(StoppedCommandsTest, RefusesCommandsAfterTheEnd) {
    Commands commands;
    EXPECT_TRUE(commands.stop());
    EXPECT_TRUE(commands.stopping());
    EXPECT_THROW(commands.on_loop([] {}), Stopping);
    EXPECT_EQ(commands.failure(), "");
}

TEST(StoppedCommandsTest, AFaultStopsAndIsTold) {
    Commands commands;
    commands.fail("epoll_wait: bad file descriptor");
    EXPECT_THROW(commands.on_loop([] {}), Stopping);
    EXPECT_EQ(commands.failure(), "epoll_wait: bad file descriptor");
}

}  // namespace
}  // namespace weightd
