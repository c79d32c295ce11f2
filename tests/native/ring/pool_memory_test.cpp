// Memory that is revoked while it is read: the reader reads zeros, can tell, and goes on.
#include "ring/pool_memory.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <string>
#include <thread>
#include <vector>

namespace {

using flashclient::PoolMemory;

constexpr size_t BYTES = 64 * 4096;

int filled_memory(char value) {
    const int fd = ::memfd_create("segment", MFD_CLOEXEC);
    const std::string content(BYTES, value);
    EXPECT_EQ(::write(fd, content.data(), BYTES), static_cast<ssize_t>(BYTES));
    return fd;
}

size_t count(const PoolMemory::Segment* segment, char value) {
    return static_cast<size_t>(std::count(segment->data, segment->data + segment->bytes, std::byte(value)));
}

TEST(PoolMemory, ASegmentThatIsCutToNothingReadsAsZerosAndIsTold) {
    const int fd = filled_memory('x');
    PoolMemory pool;
    ASSERT_TRUE(pool.map(7, ::dup(fd), BYTES));
    EXPECT_EQ(count(pool.find(7), 'x'), BYTES);
    EXPECT_FALSE(pool.revoked());
    ASSERT_EQ(::ftruncate(fd, 0), 0);
    EXPECT_EQ(count(pool.find(7), '\0'), BYTES);
    EXPECT_TRUE(pool.revoked());
    ::close(fd);
}

TEST(PoolMemory, CutToNothingWhileSeveralThreadsRead) {
    const int fd = filled_memory('x');
    PoolMemory pool;
    ASSERT_TRUE(pool.map(1, ::dup(fd), BYTES));
    const PoolMemory::Segment* segment = pool.find(1);  // one thread calls find(), any number of threads read
    std::vector<std::thread> readers;
    for (int i = 0; i < 4; i++) {
        readers.emplace_back([&] {
            while (count(segment, 'x') > 0) std::this_thread::yield();  // else it may be read once
        });
    }
    ASSERT_EQ(::ftruncate(fd, 0), 0);
    for (auto& reader : readers) reader.join();
    EXPECT_TRUE(pool.revoked());
    ::close(fd);
}

TEST(PoolMemory, RevokingFreesTheMemoryUntilNewSegmentsAreMapped) {
    PoolMemory pool;
    ASSERT_TRUE(pool.map(1, filled_memory('x'), BYTES));
    std::thread([&] { pool.revoke(); }).join();
    EXPECT_TRUE(pool.revoked());
    EXPECT_EQ(count(pool.find(1), '\0'), BYTES);
    EXPECT_FALSE(pool.map(2, filled_memory('y'), BYTES)) << "nothing is mapped after revoke()";
    pool.clear();
    EXPECT_EQ(pool.find(1), nullptr);
    ASSERT_TRUE(pool.map(2, filled_memory('y'), BYTES));
    EXPECT_EQ(count(pool.find(2), 'y'), BYTES);
    EXPECT_FALSE(pool.revoked());
}

TEST(PoolMemory, AForkedChildHoldsNothingOfIt) {
    PoolMemory pool;
    ASSERT_TRUE(pool.map(1, filled_memory('x'), BYTES));
    const pid_t child = ::fork();
    if (child == 0) {
        unsigned char resident = 0;
        ::_exit(::mincore(pool.find(1)->data, 4096, &resident) < 0 && errno == ENOMEM ? 0 : 1);
    }
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    EXPECT_EQ(status, 0);
}

TEST(PoolMemoryDeathTest, ABusErrorElsewhereIsNotOurs) {
    PoolMemory pool;
    const int fd = filled_memory('x');
    auto* other = static_cast<volatile char*>(::mmap(nullptr, BYTES, PROT_READ, MAP_SHARED, fd, 0));
    ASSERT_EQ(::ftruncate(fd, 0), 0);
    EXPECT_DEATH({ [[maybe_unused]] const char read = other[0]; }, "");
    ::close(fd);
}

}  // namespace
