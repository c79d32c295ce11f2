// Shared memory as the kernel sees it: huge pages where they fit, and nothing left after a drain.
#include "device/shared_memory.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstring>
#include <fstream>

#include "huge_pages.h"
#include "smaps.h"

namespace weightd {
namespace {

bool has_flag(const void* address, const std::string& flag) {
    return (smaps_line(address, "VmFlags:") + " ").find(" " + flag + " ") != std::string::npos;
}

// What shmem_enabled is set to, or nothing where the kernel has no huge pages.
std::string huge_pages_setting() {
    std::ifstream file("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
    std::string word;
    while (file >> word) {
        if (word.front() == '[') return word.substr(1, word.size() - 2);
    }
    return "";
}

TEST(SharedMemory, AsksForHugePagesWhereWholeOnesFit) {
    if (huge_pages_setting().empty()) GTEST_SKIP() << "this kernel has no huge pages for shared memory";
    SharedMemory memory("test", 4 * HUGE_PAGE_BYTES + 8192);
    std::memset(memory.data(), 1, memory.bytes().size());
    const std::byte* tail = memory.data() + 4 * HUGE_PAGE_BYTES;
    EXPECT_TRUE(has_flag(memory.data(), "hg"));
    EXPECT_FALSE(has_flag(tail, "hg"));
    EXPECT_TRUE(has_flag(tail, "nh"));
    const bool given = smaps_line(memory.data(), "ShmemPmdMapped:").find(" 0 kB") == std::string::npos;
    const std::string setting = huge_pages_setting();
    EXPECT_EQ(given, setting != "never" && setting != "deny") << setting;
}

TEST(SharedMemory, TakesNoMoreThanItsSizeAndNothingAfterADrain) {
    SharedMemory memory("test", HUGE_PAGE_BYTES + 12288);
    memory.seal();
    std::memset(memory.data(), 1, memory.bytes().size());
    struct stat facts {};
    ASSERT_EQ(::fstat(memory.shared_fd(), &facts), 0);
    EXPECT_EQ(facts.st_blocks * 512, static_cast<blkcnt_t>(HUGE_PAGE_BYTES + 12288));
    memory.drain();
    ASSERT_EQ(::fstat(memory.shared_fd(), &facts), 0);
    EXPECT_EQ(facts.st_blocks, 0);
}

}  // namespace
}  // namespace weightd
