#include "verify.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

#include "checksum.h"

namespace weightd {

Verifier::Verifier(uint32_t threads) : event_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    if (event_.get() < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
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

void Verifier::reap(std::vector<Job>& done) {
    uint64_t ignored = 0;
    if (::read(event_.get(), &ignored, sizeof ignored) < 0) return;
    const std::lock_guard guard(done_lock_);
    for (Job& job : done_) done.push_back(std::move(job));
    done_.clear();
}

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
        report(std::move(job));
        guard.lock();
    }
}

void Verifier::report(Job job) {
    bool first = false;
    {
        const std::lock_guard guard(done_lock_);
        first = done_.empty();
        done_.push_back(std::move(job));
    }
    const uint64_t one = 1;
    if (first && ::write(event_.get(), &one, sizeof one) < 0) std::terminate();  // an own eventfd cannot fill up
}

}  // namespace weightd
