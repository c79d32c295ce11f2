// Shared memory: on huge pages where the system allows them, and never more of it than was asked for.
#include "memory.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstring>
#include <fstream>
#include <string>

namespace weightd {
namespace {

constexpr size_t BYTES = (5U << 20) + 4096;

bool system_allows_huge_pages() {
    std::ifstream file("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
    std::string choices;
    std::getline(file, choices);
    const bool forbidden = choices.find("[never]") != std::string::npos || choices.find("[deny]") != std::string::npos;
    return !choices.empty() && !forbidden;
}

// Of this process's mappings of memfds called `name`.
size_t huge_bytes(const std::string& name) {
    std::ifstream smaps("/proc/self/smaps");
    std::string line;
    size_t bytes = 0;
    bool ours = false;
    while (std::getline(smaps, line)) {
        const bool heading = line.find(':') > line.find(' ');
        if (heading) ours = line.find("memfd:" + name) != std::string::npos;
        if (ours && line.starts_with("ShmemPmdMapped:")) bytes += std::stoul(line.substr(15)) << 10;
    }
    return bytes;
}

TEST(SharedMemory, IsOnHugePagesWhereTheSystemAllowsThem) {
    const SharedMemory memory("huge-test", BYTES);
    std::memset(memory.data(), 1, BYTES);
    if (system_allows_huge_pages()) {
        EXPECT_GE(huge_bytes("huge-test"), 2U << 20);
    } else {
        EXPECT_EQ(huge_bytes("huge-test"), 0U);
    }
}

TEST(SharedMemory, HoldsNoMoreThanWasAskedForAndNothingOnceDrained) {
    for (const size_t bytes : {size_t{4096}, BYTES}) {
        SharedMemory memory("cap-test", bytes);
        std::memset(memory.data(), 1, bytes);
        memory.seal();
        struct stat status {};
        ASSERT_EQ(::fstat(memory.shared_fd(), &status), 0);
        EXPECT_EQ(static_cast<size_t>(status.st_blocks) * 512, bytes);
        memory.drain();
        ASSERT_EQ(::fstat(memory.shared_fd(), &status), 0);
        EXPECT_EQ(status.st_blocks, 0);
    }
}

}  // namespace
}  // namespace weightd
