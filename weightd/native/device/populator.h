// Gives memory its pages ahead of their first use, in a thread of its own: huge ones where the kernel has them.
//
// The kernel clears a page before its first use, at 1 to 3 GB/s on one core. A thread that reads into fresh memory, or
// registers it with io_uring, does that work at the moment when it should start the next read.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

namespace weightd {

// Gives memory of a memfd a huge page wherever a whole one fits; what it holds stays. Reading weights in pages of 4 KiB
// takes up to 1.3 times as long. Kernels before Linux 6.1 give none, nor where shmem_enabled says "deny", and none to
// a place that a device is reading into. Returns whether each place has got one.
bool give_huge_pages(std::span<std::byte> memory);

class Populator {
  public:
    Populator();
    ~Populator();
    void add(std::span<std::byte> memory);  // mapped writable, until withdraw() or the populator's end
    // The memory may be unmapped afterwards. Waits for at most a few huge pages to be cleared.
    void withdraw(std::span<std::byte> memory);
    // What is complete since the last call, in the order of add(). Never blocks for long.
    std::vector<std::span<std::byte>> take_complete();

  private:
    struct Work {
        std::span<std::byte> memory;
        std::span<std::byte> left;
        bool missed = false;  // a place got no huge page
        bool again = false;   // all have their pages: those places are asked for once more
    };
    void work();

    std::mutex lock_;  // guards everything below
    std::condition_variable changed_;
    std::deque<Work> queue_;
    std::vector<std::span<std::byte>> complete_;
    bool populating_ = false;  // a part of queue_.front(), without the lock
    bool stopping_ = false;
    std::thread worker_;
};

}  // namespace weightd
