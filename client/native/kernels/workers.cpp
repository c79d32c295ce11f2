#include "kernels/workers.h"

#include <unistd.h>

#include <chrono>

namespace flashclient {
namespace {

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

// Waits until `value` is no longer `old`: spins, then sleeps.
void wait_for_change(std::atomic<uint32_t>& value, uint32_t old, uint64_t spin_nanoseconds) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::nanoseconds(spin_nanoseconds);
    do {
        for (int turn = 0; turn < 32; turn++) {
            if (value.load(std::memory_order_acquire) != old) return;
            relax();
        }
    } while (std::chrono::steady_clock::now() < deadline);
    value.wait(old, std::memory_order_acquire);
}

}  // namespace

Workers::Workers(size_t threads) : owner_(::getpid()) {
    try {
        for (size_t worker = 1; worker < threads; worker++) workers_.emplace_back([this] { serve(); });
    } catch (...) {  // the system gives no more threads
        stop();
        throw;
    }
}

Workers::~Workers() { stop(); }

void Workers::stop() {
    if (::getpid() != owner_) {  // the threads stayed in the parent: nothing to join
        for (std::thread& worker : workers_) worker.detach();
        return;
    }
    stop_.store(true);
    signal_.fetch_add(1);
    signal_.notify_all();
    for (std::thread& worker : workers_) worker.join();
}

void Workers::run(size_t count, const std::function<void(size_t)>& item) {
    if (workers_.empty() || count < 2 || busy_.test_and_set(std::memory_order_acquire)) {
        for (size_t i = 0; i < count; i++) item(i);
        return;
    }
    share(count, item);
    busy_.clear(std::memory_order_release);
}

void Workers::share(size_t count, const std::function<void(size_t)>& item) {
    item_ = &item;
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    gate_.store(OPEN, std::memory_order_release);
    signal_.fetch_add(1, std::memory_order_release);
    signal_.notify_all();
    take_items();
    uint32_t inside = gate_.fetch_and(~OPEN, std::memory_order_acq_rel) & ~OPEN;
    while (inside != 0) {
        wait_for_change(gate_, inside, SPIN_NANOSECONDS);
        inside = gate_.load(std::memory_order_acquire);
    }
}

void Workers::take_items() {
    for (size_t i = next_.fetch_add(1); i < count_; i = next_.fetch_add(1)) (*item_)(i);
}

bool Workers::enter() {
    uint32_t gate = gate_.load(std::memory_order_acquire);
    while ((gate & OPEN) != 0) {
        if (gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel)) return true;
    }
    return false;
}

void Workers::leave() {
    gate_.fetch_sub(1, std::memory_order_acq_rel);
    gate_.notify_one();
}

void Workers::serve() {
    uint32_t seen = 0;
    while (true) {
        wait_for_change(signal_, seen, SPIN_NANOSECONDS);
        seen = signal_.load(std::memory_order_acquire);
        if (stop_.load()) return;
        if (!enter()) continue;
        take_items();
        leave();
    }
}

}  // namespace flashclient
