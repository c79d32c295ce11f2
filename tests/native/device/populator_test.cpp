#include "device/populator.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <thread>
#include <vector>

#include "device/shared_memory.h"
#include "huge_pages.h"
#include "smaps.h"

namespace weightd {
namespace {

constexpr size_t BYTES = 17U << 20;  // two steps and a part of one

size_t pages_there(std::span<std::byte> memory) {
    std::vector<unsigned char> there(memory.size() / static_cast<size_t>(::sysconf(_SC_PAGESIZE)));
    EXPECT_EQ(::mincore(memory.data(), memory.size(), there.data()), 0);
    return static_cast<size_t>(std::count_if(there.begin(), there.end(), [](unsigned char page) { return page & 1; }));
}

TEST(Populator, GivesMemoryItsPagesAndKeepsWhatIsWrittenMeanwhile) {
    SharedMemory first("first", BYTES);
    SharedMemory second("second", BYTES);
    first.bytes().back() = std::byte{7};
    Populator populator;
    populator.add(first.bytes());
    populator.add(second.bytes());
    std::fill(second.bytes().begin(), second.bytes().end(), std::byte{9});
    std::vector<std::byte*> complete;
    while (complete.size() < 2) {
        for (const std::span<std::byte> memory : populator.take_complete()) complete.push_back(memory.data());
    }
    EXPECT_EQ(complete, (std::vector{first.data(), second.data()}));
    EXPECT_EQ(pages_there(first.bytes()), BYTES / static_cast<size_t>(::sysconf(_SC_PAGESIZE)));
    EXPECT_EQ(first.bytes().back(), std::byte{7});
    EXPECT_TRUE(
        std::all_of(second.bytes().begin(), second.bytes().end(), [](std::byte one) { return one == std::byte{9}; }));
}

// Only then have page tables one entry for each.
TEST(Populator, GivesHugePagesToAllThatMapTheMemory) {
    SharedMemory memory("memory", BYTES);
    if (!give_huge_pages(memory.bytes().first(HUGE_PAGE_BYTES))) GTEST_SKIP() << "this kernel gives none";
    std::fill(memory.bytes().begin(), memory.bytes().end(), std::byte{3});
    memory.seal();
    auto* mapped = static_cast<std::byte*>(map_for_huge_pages(BYTES, PROT_READ, MAP_SHARED, memory.shared_fd()));
    ASSERT_NE(mapped, MAP_FAILED);
    const std::span<const std::byte> seen(mapped, BYTES);
    const auto holds_what_was_written = [&] {
        return std::all_of(seen.begin(), seen.end(), [](std::byte one) { return one == std::byte{3}; });
    };
    EXPECT_TRUE(holds_what_was_written());  // in small pages, but for the first
    Populator populator;
    populator.add(memory.bytes());
    while (populator.take_complete().empty()) std::this_thread::yield();
    EXPECT_TRUE(holds_what_was_written());
    for (const std::byte* address : {static_cast<const std::byte*>(memory.data()), seen.data()}) {
        EXPECT_NE(smaps_line(address, "ShmemPmdMapped:").find(" 16384 kB"), std::string::npos);
    }
    ::munmap(mapped, BYTES);
}

TEST(Populator, MemoryThatIsWithdrawnMayBeUnmapped) {
    Populator populator;
    for (int i = 0; i < 50; i++) {
        SharedMemory gone("gone", BYTES);
        SharedMemory other("other", BYTES);
        populator.add(gone.bytes());
        populator.add(other.bytes());
        populator.withdraw(i % 2 == 0 ? gone.bytes() : other.bytes());
        populator.withdraw(i % 2 == 0 ? other.bytes() : gone.bytes());
        EXPECT_TRUE(populator.take_complete().empty());
    }
}

TEST(Populator, EndsWithMemoryLeft) {
    SharedMemory memory("memory", size_t{64} << 20);
    Populator populator;
    populator.add(memory.bytes());
}

}  // namespace
}  // namespace weightd
