#include "device/populator.h"

#include <sys/mman.h>

#include <algorithm>
#include <utility>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // since Linux 5.14
#endif

namespace weightd {
namespace {

constexpr size_t STEP_BYTES = 2U << 20;  // a huge page

}  // namespace

Populator::Populator() : worker_([this] { work(); }) {}

Populator::~Populator() {
    {
        const std::lock_guard guard(lock_);
        stopping_ = true;
    }
    changed_.notify_all();
    worker_.join();
}

void Populator::add(std::span<std::byte> memory) {
    {
        const std::lock_guard guard(lock_);
        queue_.push_back({memory, memory});
    }
    changed_.notify_all();
}

void Populator::withdraw(std::span<std::byte> memory) {
    const auto is_it = [&](std::span<std::byte> other) { return other.data() == memory.data(); };
    std::unique_lock guard(lock_);
    changed_.wait(guard, [&] { return !populating_ || !is_it(queue_.front().memory); });
    std::erase_if(queue_, [&](const Work& work) { return is_it(work.memory); });
    std::erase_if(complete_, is_it);
}

std::vector<std::span<std::byte>> Populator::take_complete() {
    const std::lock_guard guard(lock_);
    return std::exchange(complete_, {});
}

void Populator::work() {
    std::unique_lock guard(lock_);
    while (true) {
        changed_.wait(guard, [this] { return stopping_ || !queue_.empty(); });
        if (stopping_) return;
        Work& work = queue_.front();  // stays where it is while others are added or withdrawn
        const std::span<std::byte> step = work.left.first(std::min(STEP_BYTES, work.left.size()));
        populating_ = true;
        guard.unlock();
        // Where the kernel refuses it, the first use of each page clears it.
        const bool refused = ::madvise(step.data(), step.size(), MADV_POPULATE_WRITE) < 0;
        guard.lock();
        populating_ = false;
        work.left = work.left.subspan(refused ? work.left.size() : step.size());
        if (work.left.empty()) {
            complete_.push_back(work.memory);
            queue_.pop_front();
        }
        changed_.notify_all();
    }
}

}  // namespace weightd
