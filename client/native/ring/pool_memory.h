// The segments of weightd's pool, mapped read-only into this process.
//
// weightd may revoke a segment at any time: it empties segments after it has closed this session for blocking others.
// The client revokes all segments when weightd has died, because the old pool must not stay in memory beside the pool
// of the next weightd. Revoked pages are remapped to zero pages, which take no memory, so running kernels do not fault.
// Check revoked() before a result is used: if it is true, the result is worthless.
//
// One thread maps, finds and unmaps segments; any thread may revoke them. A segment that a kernel reads is unmapped
// when the kernel returns.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

#include "kernels/readable_memory.h"

namespace flashclient {

class PoolMemory {
  public:
    struct Segment {
        std::byte* data = nullptr;
        size_t bytes = 0;
        std::unique_ptr<ReadableMemory> readable = nullptr;  // lets kernels read it, as long as it is mapped
    };

    PoolMemory();
    ~PoolMemory() { clear(); }
    PoolMemory(const PoolMemory&) = delete;
    PoolMemory& operator=(const PoolMemory&) = delete;

    // Takes ownership of the descriptor. False if everything was revoked already. Throws std::system_error.
    bool map(uint32_t number, int fd, size_t bytes);
    const Segment* find(uint32_t number);  // null where there is none
    void unmap(uint32_t number);
    void clear();  // unmaps all; segments can be mapped again

    void revoke();  // replaces all segments by zero pages
    bool revoked() const { return revoked_.load(std::memory_order_acquire); }

  private:
    void drop(Segment& segment) const;

    pid_t owner_;
    std::atomic<bool> revoked_ = false;
    std::mutex lock_;  // guards changes of segments_, and its use by revoke()
    std::map<uint32_t, Segment> segments_;
    const Segment* found_ = nullptr;  // the last result of find(): neighbours mostly lie in one segment
    uint32_t found_number_ = 0;
};

}  // namespace flashclient
