#include "device/verify.h"

#include <utility>

#include "device/checksum.h"

namespace weightd {

Verifier::Verifier(uint32_t threads) {
    for (uint32_t i = 0; i < threads; i++) workers_.emplace_back([this] { work(); });
}

Verifier::~Verifier() {
    {
        const std::lock_guard guard(queue_lock_);
        stopping_ = true;
    }
    queued_.notify_all();
    for (std::thread& worker : workers_) worker.join();
}

void Verifier::submit(std::vector<Job> jobs) {
    if (jobs.empty()) return;
    const bool several = jobs.size() > 1;
    {
        const std::lock_guard guard(queue_lock_);
        for (Job& job : jobs) queue_.push_back(std::move(job));
    }
    several ? queued_.notify_all() : queued_.notify_one();
}

void Verifier::reap(std::vector<Job>& done) { done_.take(done); }

void Verifier::work() {
    std::unique_lock guard(queue_lock_);
    while (true) {
        queued_.wait(guard, [this] { return stopping_ || !queue_.empty(); });
        if (stopping_) return;
        Job job = std::move(queue_.front());
        queue_.pop_front();
        guard.unlock();
        for (uint32_t i = 0; i < job.checks.size(); i++) {
            const Check& check = job.checks[i];
            if (checksum({check.data, check.bytes}) != check.expected) job.wrong.push_back(i);
        }
        done_.put(std::move(job));
        guard.lock();
    }
}

}  // namespace weightd
