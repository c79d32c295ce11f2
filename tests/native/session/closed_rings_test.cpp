// Rings of closed sessions that clients keep: their memory is freed at once, and they count for their users.
#include "session/closed_rings.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>

#include "ring.h"
#include "session/ring_session.h"

namespace weightd {
namespace {

constexpr size_t RING_BYTES = (sizeof(ring::Ring) + 4095) / 4096 * 4096;
constexpr User ONE = 1, OTHER = 2;

SharedMemory used_ring() {
    SharedMemory ring("weightd-ring", RING_BYTES);
    ring.fix();
    std::memset(ring.data(), 1, RING_BYTES);
    return ring;
}

uint64_t charged_bytes(int fd) {
    struct stat facts {};
    EXPECT_EQ(::fstat(fd, &facts), 0);
    return static_cast<uint64_t>(facts.st_blocks) * 512;
}

struct ClosedRingsTest : testing::Test {
    ClosedRings rings;

    void close(SharedMemory ring, const User& user) {
        ring.abandon(sizeof(ring::Header));
        rings.add(std::move(ring), user);
        rings.forget_released();
    }
};

TEST_F(ClosedRingsTest, GivesBackAllButTheHeader) {
    SharedMemory ring = used_ring();
    const Descriptor kept(::dup(ring.shared_fd()));
    EXPECT_GE(charged_bytes(kept.get()), RING_BYTES);
    close(std::move(ring), ONE);
    EXPECT_LE(charged_bytes(kept.get()), sizeof(ring::Header));
    char first = 0;
    EXPECT_EQ(::pread(kept.get(), &first, 1, 0), 1);
    EXPECT_EQ(first, 1) << "a client that maps it reads there that it was closed";
}

TEST_F(ClosedRingsTest, ForgetsWhatNobodyHolds) {
    close(used_ring(), ONE);
    EXPECT_EQ(rings.size(), 0U);
}

TEST_F(ClosedRingsTest, ADescriptorHoldsIt) {
    SharedMemory ring = used_ring();
    Descriptor kept(::dup(ring.shared_fd()));
    close(std::move(ring), ONE);
    EXPECT_EQ(rings.of(ONE), 1U);
    EXPECT_EQ(rings.of(OTHER), 0U);
    kept.reset();
    rings.forget_released();
    EXPECT_EQ(rings.size(), 0U);
}

TEST_F(ClosedRingsTest, AMappingHoldsItAndSoDoesAForkedChild) {
    SharedMemory ring = used_ring();
    void* mapped = ::mmap(nullptr, RING_BYTES, PROT_READ, MAP_SHARED, ring.shared_fd(), 0);
    ASSERT_NE(mapped, MAP_FAILED);
    int pipe[2];
    ASSERT_EQ(::pipe(pipe), 0);
    const pid_t child = ::fork();
    if (child == 0) {
        char byte = 0;
        ::close(pipe[1]);
        ::_exit(::read(pipe[0], &byte, 1) == 0 ? 0 : 1);  // until the parent closes it
    }
    ::munmap(mapped, RING_BYTES);
    close(std::move(ring), ONE);
    EXPECT_EQ(rings.of(ONE), 1U) << "the child inherited the mapping";
    ::close(pipe[0]);
    ::close(pipe[1]);
    ASSERT_EQ(::waitpid(child, nullptr, 0), child);
    rings.forget_released();
    EXPECT_EQ(rings.size(), 0U);
}

TEST_F(ClosedRingsTest, AMessageThatNobodyReadsHoldsIt) {
    SharedMemory ring = used_ring();
    int sockets[2];
    ASSERT_EQ(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sockets), 0);
    ASSERT_TRUE(send_with_descriptors(sockets[0], "x", 1, std::array{ring.shared_fd()}));
    close(std::move(ring), OTHER);
    EXPECT_EQ(rings.of(OTHER), 1U);
    ::close(sockets[0]);
    ::close(sockets[1]);
    rings.forget_released();
    EXPECT_EQ(rings.size(), 0U);
}

}  // namespace
}  // namespace weightd
