// The memory that kernels may read bundles from. Addresses come to them as numbers, through Python: a Reading says
// which of them are bundles, and keeps those mapped for as long as it lives.
//
// That is what the process maps of weightd's pool (pool_memory.h), and arrays that a caller lends. A child after fork()
// has none of it: what its parent maps is not its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace flashclient {

// Bytes that may be read from construction to destruction. The destructor waits until no Reading is at them.
class ReadableMemory {
  public:
    ReadableMemory(const void* data, std::size_t bytes);
    ~ReadableMemory();
    ReadableMemory(const ReadableMemory&) = delete;
    ReadableMemory& operator=(const ReadableMemory&) = delete;

  private:
    friend class Reading;
    std::uintptr_t begin_;
    std::uintptr_t end_;
    std::uint32_t readings_ = 0;
};

// One kernel's call. Safe beside others in any thread.
class Reading {
  public:
    // Bundles of `bundle_bytes`, at addresses that are multiples of `alignment`.
    Reading(std::size_t bundle_bytes, std::size_t alignment) : bundle_bytes_(bundle_bytes), alignment_(alignment) {}
    ~Reading();
    Reading(const Reading&) = delete;
    Reading& operator=(const Reading&) = delete;

    // A copy of `addresses`, so that nobody changes them meanwhile, in which those that `wanted(i)` asks for have been
    // checked. The others are copies of one that was: they may be read as well. Empty where none is wanted. Throws
    // std::invalid_argument for a bundle outside of readable memory.
    template <typename Wanted>
    std::vector<std::uint64_t> checked(std::span<const std::uint64_t> addresses, const Wanted& wanted);
    std::vector<std::uint64_t> checked(std::span<const std::uint64_t> addresses) {
        return checked(addresses, [](std::size_t) { return true; });
    }

  private:
    void require(std::uint64_t address);

    std::size_t bundle_bytes_;
    std::size_t alignment_;
    ReadableMemory* last_ = nullptr;         // where the bundle before lies: neighbours are mostly together
    std::vector<ReadableMemory*> memories_;  // where any lies
};

// Locks the table of all readable memory; one at a time.
class TableLock {
  public:
    TableLock();
    ~TableLock();
    TableLock(const TableLock&) = delete;
    TableLock& operator=(const TableLock&) = delete;
};

template <typename Wanted>
std::vector<std::uint64_t> Reading::checked(std::span<const std::uint64_t> addresses, const Wanted& wanted) {
    std::vector<std::uint64_t> copy(addresses.size());
    std::vector<std::size_t> unwanted;
    const TableLock lock;
    std::uint64_t any = 0;
    for (std::size_t i = 0; i < addresses.size(); ++i) {
        if (!wanted(i)) {
            unwanted.push_back(i);
            continue;
        }
        any = copy[i] = addresses[i];
        require(any);
    }
    if (any == 0) return {};
    for (const std::size_t i : unwanted) copy[i] = any;
    return copy;
}

}  // namespace flashclient
