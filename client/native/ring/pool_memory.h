// The segments of weightd's pool as this process maps them, read-only.
//
// Their memory can be taken away at any moment: weightd empties a segment once it has closed this session for blocking
// others, and when weightd has died, what is mapped here must not live beside its successor's pool. A kernel may be
// reading there meanwhile. So what is taken away reads as zeros from then on: that costs no memory and stops nobody,
// and taken_away() says that what was computed is worth nothing. It is asked before a result is used.
//
// One thread maps, finds and unmaps; any thread may take away. What a kernel is reading is unmapped when it is done.
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
        std::unique_ptr<ReadableMemory> readable = nullptr;  // by kernels, as long as it is mapped
    };

    PoolMemory();
    ~PoolMemory() { clear(); }
    PoolMemory(const PoolMemory&) = delete;
    PoolMemory& operator=(const PoolMemory&) = delete;

    // Takes the descriptor. False where all has been taken away already. Throws std::system_error.
    bool map(uint32_t number, int fd, size_t bytes);
    const Segment* find(uint32_t number);  // null: there is no such one
    void unmap(uint32_t number);
    void clear();  // unmaps all, and can be filled anew

    void take_away();
    bool taken_away() const { return taken_away_.load(std::memory_order_acquire); }

  private:
    void drop(Segment& segment) const;

    pid_t owner_;
    std::atomic<bool> taken_away_ = false;
    std::mutex lock_;  // guards segments_ where they change, and where another thread takes them away
    std::map<uint32_t, Segment> segments_;
    const Segment* found_ = nullptr;  // by find(), the last time: neighbours are mostly in one segment
    uint32_t found_number_ = 0;
};

}  // namespace flashclient
