// Results that threads pass to one other thread, and the descriptor that wakes it.
#pragma once

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <exception>
#include <iterator>
#include <mutex>
#include <utility>
#include <vector>

#include "device/direct_file.h"
#include "device/system_error.h"

namespace weightd {

template <typename Result>
class Outbox {
  public:
    Outbox() : event_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
        if (event_.get() < 0) fail("eventfd");
    }

    int event_fd() const { return event_.get(); }  // readable while something is inside

    void put(Result result) {
        bool first = false;
        {
            const std::lock_guard guard(lock_);
            first = results_.empty();
            results_.push_back(std::move(result));
        }
        const uint64_t one = 1;
        if (first && ::write(event_.get(), &one, sizeof one) < 0) std::terminate();  // an own eventfd cannot fill up
    }

    // Moves everything to the end of `results`; never blocks.
    void take(std::vector<Result>& results) {
        uint64_t ignored = 0;
        if (::read(event_.get(), &ignored, sizeof ignored) < 0) return;  // nothing new
        const std::lock_guard guard(lock_);
        results.insert(results.end(), std::move_iterator(results_.begin()), std::move_iterator(results_.end()));
        results_.clear();
    }

  private:
    Descriptor event_;
    std::mutex lock_;  // guards results_
    std::vector<Result> results_;
};

}  // namespace weightd
