// Descriptors that are watched, and what an event says of them.
#include "session/epoll.h"

#include <gtest/gtest.h>
#include <sys/eventfd.h>

#include <system_error>

namespace weightd {
namespace {

struct EpollTest : testing::Test {
    Epoll epoll;
    Descriptor event{::eventfd(1, EFD_CLOEXEC)};
};

TEST_F(EpollTest, AnEventSaysWhatItsDescriptorIs) {
    epoll.watch(event.get(), Watched::session, 0xfffffffe, EPOLLIN);
    const auto events = epoll.wait(-1);
    ASSERT_EQ(events.size(), 1U);
    EXPECT_EQ(events[0].kind, Watched::session);
    EXPECT_EQ(events[0].id, 0xfffffffe);
    EXPECT_EQ(events[0].events, uint32_t{EPOLLIN});
}

TEST_F(EpollTest, WhatIsNotWatchedBringsNoEvents) {
    EXPECT_TRUE(epoll.wait(0).empty());
    epoll.watch(event.get(), Watched::listener, 0, EPOLLIN);
    epoll.change(event.get(), Watched::listener, 0, 0);
    EXPECT_TRUE(epoll.wait(0).empty());
    epoll.change(event.get(), Watched::listener, 0, EPOLLIN);
    EXPECT_EQ(epoll.wait(0).size(), 1U);
    epoll.unwatch(event.get());
    epoll.unwatch(event.get());
    epoll.unwatch(-1);
    EXPECT_TRUE(epoll.wait(0).empty());
}

TEST_F(EpollTest, ADescriptorThatCannotBeWatchedIsAnError) {
    EXPECT_THROW(epoll.watch(-1, Watched::session, 0, EPOLLIN), std::system_error);
}

}  // namespace
}  // namespace weightd
