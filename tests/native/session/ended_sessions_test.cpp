// An ended session counts as a session of its user as long as a process holds memory of it.
#include "session/ended_sessions.h"

#include <gtest/gtest.h>
#include <sys/socket.h>

namespace weightd {
namespace {

struct EndedSessionsTest : testing::Test {
    static constexpr User ONE = 1, OTHER = 2;
    static constexpr uint32_t SESSION = 7, MODEL = 3;
    Epoll epoll;
    EndedSessions ended{epoll};
    Descriptor client;  // of the socket of a kept session

    EndedSession ended_session() {
        int sockets[2];
        EXPECT_EQ(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sockets), 0);
        client = Descriptor(sockets[0]);
        epoll.watch(sockets[1], Watched::session, SESSION, EPOLLIN | EPOLLRDHUP);
        return {MODEL, ONE, ring(), Descriptor(sockets[1]), {}, nullptr};
    }

    static SharedMemory ring() {
        SharedMemory memory("weightd-ring", 8192);
        memory.fix();
        memory.abandon(4096);
        return memory;
    }
};

TEST_F(EndedSessionsTest, IsKeptUntilTheClientHangsUp) {
    ended.keep(SESSION, ended_session());
    EXPECT_EQ(ended.size(), 1U);
    EXPECT_EQ(ended.of(ONE), 1U);
    EXPECT_EQ(ended.of(OTHER), 0U);
    client.reset();
    const auto events = epoll.wait(0);
    ASSERT_EQ(events.size(), 1U);
    EXPECT_EQ(events[0].id, SESSION);
    EXPECT_EQ(ended.forget_client(SESSION), MODEL);
    EXPECT_EQ(ended.forget_client(SESSION), std::nullopt) << "a second event of the same end";
    ended.forget_released();
    EXPECT_EQ(ended.size(), 0U);
}

TEST_F(EndedSessionsTest, ARingThatSomebodyHoldsCounts) {
    SharedMemory memory("weightd-ring", 8192);
    memory.fix();
    Descriptor held(::dup(memory.shared_fd()));
    memory.abandon(4096);
    ended.keep_ring(std::move(memory), OTHER);
    ended.forget_released();
    EXPECT_TRUE(ended.holds_rings());
    EXPECT_EQ(ended.of(OTHER), 1U);
    held.reset();
    ended.forget_released();
    EXPECT_FALSE(ended.holds_rings());
}

}  // namespace
}  // namespace weightd
