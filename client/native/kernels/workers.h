// A few threads that share the work of one caller at a time. They sleep between calls. One pool serves all kernels.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace flashclient {

// The calling thread takes part, so `threads` = 1 starts none. Items are handed out one by one, and run() waits only
// for workers that have begun. So a worker that wakes late delays nobody: the others do its items.
//
// Where the workers are busy for another thread, the calling thread does all items alone. A child after fork has no
// workers, so its calling threads always do.
class Workers {
  public:
    explicit Workers(size_t threads);
    ~Workers();
    Workers(const Workers&) = delete;
    Workers& operator=(const Workers&) = delete;

    // Calls item(i) for every i below `count`, in any order, and returns when all have returned. `item` must not throw.
    void run(size_t count, const std::function<void(size_t)>& item);

    size_t threads() const { return workers_.size() + 1; }

  private:
    // A worker spins for this long before it sleeps: the next phase of a layer often begins within it, and waking costs
    // more.
    static constexpr uint64_t SPIN_NANOSECONDS = 20'000;
    static constexpr uint32_t OPEN = 1U << 31;

    void stop();
    void serve();
    void share(size_t count, const std::function<void(size_t)>& item);
    void take_items();
    bool enter();
    void leave();

    std::vector<std::thread> workers_;
    pid_t owner_;
    std::atomic_flag busy_;                              // guards item_, count_ and next_ between callers
    const std::function<void(size_t)>* item_ = nullptr;  // published by gate_
    size_t count_ = 0;                                   // published by gate_
    std::atomic<size_t> next_{0};
    std::atomic<uint32_t> gate_{0};    // OPEN while a run takes workers in; below it how many are inside
    std::atomic<uint32_t> signal_{0};  // changes with every run, and at the end
    std::atomic<bool> stop_{false};
};

}  // namespace flashclient
