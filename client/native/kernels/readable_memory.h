// The memory that kernels may read bundles from. Kernels get addresses as numbers, through Python. A Reading checks
// that bundles lie there, and keeps that memory mapped as long as it lives.
//
// Readable are the mapped segments of weightd's pool (pool_memory.h) and the arrays that a caller lends. A child after
// fork() has no readable memory: the mappings are its parent's.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace flashclient {

// Bytes that may be read from construction to destruction. The destructor waits until no Reading uses them.
class ReadableMemory {
  public:
    ReadableMemory(const void* data, size_t bytes);
    ~ReadableMemory();
    ReadableMemory(const ReadableMemory&) = delete;
    ReadableMemory& operator=(const ReadableMemory&) = delete;

  private:
    friend class Reading;
    uintptr_t begin_;
    uintptr_t end_;
    uint32_t readings_ = 0;
};

// The checks of one kernel call. Several may exist at once, in any threads.
class Reading {
  public:
    // Bundles of `bundle_bytes`, at addresses that are multiples of `alignment`, a power of two.
    Reading(size_t bundle_bytes, size_t alignment) : bundle_bytes_(bundle_bytes), alignment_(alignment) {}
    ~Reading();
    Reading(const Reading&) = delete;
    Reading& operator=(const Reading&) = delete;

    // A copy of `addresses`, which Python cannot change during the call. for_each_wanted(check) calls check(i) for
    // every entry that will be read. The other entries are replaced by one that was checked, so they may be read as
    // well. Empty where no entry is wanted. Throws std::invalid_argument for a bundle outside of readable memory.
    template <typename ForEachWanted>
    std::vector<uint64_t> checked(std::span<const uint64_t> addresses, const ForEachWanted& for_each_wanted);
    std::vector<uint64_t> checked(std::span<const uint64_t> addresses) {
        return checked(addresses, [&](auto&& check) {
            for (size_t i = 0; i < addresses.size(); i++) check(i);
        });
    }

  private:
    void require(uint64_t address) {
        if (address - begin_ >= beyond_ || (address & (alignment_ - 1)) != 0) require_elsewhere(address);
    }
    void require_elsewhere(uint64_t address);

    size_t bundle_bytes_;
    size_t alignment_;                       // a power of two
    uint64_t begin_ = 0;                     // of the memory of the last bundle
    uint64_t beyond_ = 0;                    // a bundle fits there at begin_ + i for i < beyond_
    std::vector<ReadableMemory*> memories_;  // in which checked bundles lie
};

// Locks the table of all readable memory; one at a time.
class TableLock {
  public:
    TableLock();
    ~TableLock();
    TableLock(const TableLock&) = delete;
    TableLock& operator=(const TableLock&) = delete;
};

template <typename ForEachWanted>
std::vector<uint64_t> Reading::checked(std::span<const uint64_t> addresses, const ForEachWanted& for_each_wanted) {
    std::vector<uint64_t> copy(addresses.size());
    uint64_t any = 0;
    const TableLock lock;
    for_each_wanted([&](size_t i) {
        any = copy[i] = addresses[i];
        require(any);
    });
    if (any == 0) return {};
    std::replace(copy.begin(), copy.end(), uint64_t{0}, any);
    return copy;
}

}  // namespace flashclient
