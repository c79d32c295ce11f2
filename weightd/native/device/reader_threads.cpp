// The portable engine: threads that take one read after the other and call preadv().
#include <fcntl.h>
#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "device/outbox.h"
#include "device/read_turns.h"

namespace weightd {
namespace {

int read_whole(Read& read) {
    while (true) {
        const ssize_t got = ::preadv(read.file->fd(), read.pieces.data(), static_cast<int>(read.pieces.size()),
                                     static_cast<off_t>(read.offset_bytes));
        if (got < 0 && (errno == EINTR || errno == EAGAIN)) continue;
        if (got < 0) return errno;
        if (got == 0) return EIO;  // the file ends early
        if (read.file->buffered()) {
            ::posix_fadvise(read.file->fd(), static_cast<off_t>(read.offset_bytes), got, POSIX_FADV_DONTNEED);
        }
        const Read::Left left = read.advance(static_cast<size_t>(got));
        if (left != Read::Left::more) return left == Read::Left::nothing ? 0 : EIO;
    }
}

class ThreadReader final : public Reader {
  public:
    explicit ThreadReader(uint32_t threads) : threads_(threads), turns_(threads) {
        for (uint32_t i = 0; i < reads_in_all(threads); i++) workers_.emplace_back([this] { work(); });
    }

    ~ThreadReader() override {
        {
            const std::lock_guard guard(queue_lock_);
            stopping_ = true;
        }
        queued_.notify_all();
        for (std::thread& worker : workers_) worker.join();
    }

    std::string level() const override { return std::to_string(threads_) + " reading threads"; }
    int register_file(const DirectFile&) override { return -1; }
    void unregister_file(int) override {}
    int register_memory(std::span<std::byte>) override { return -1; }
    void pin_memory(int) override {}
    void unregister_memory(int) override {}
    int event_fd() const override { return done_.event_fd(); }

    void submit(std::vector<Read> reads) override {
        size_t wanted = 0;  // one idle thread for each read that can start; busy threads look for more by themselves
        {
            const std::lock_guard guard(queue_lock_);
            for (Read& read : reads) turns_.push(std::move(read));
            wanted = std::min(turns_.startable(), idle_);
        }
        for (size_t i = 0; i < wanted; i++) queued_.notify_one();
    }

    void reap(std::vector<Completion>& completions) override { done_.take(completions); }

    ReadQueue queue() const override {
        const std::lock_guard guard(queue_lock_);
        return {busy_, busy_max_, static_cast<uint32_t>(workers_.size()), static_cast<uint32_t>(turns_.waiting())};
    }

    void wait() override {
        pollfd event{done_.event_fd(), POLLIN, 0};
        while (::poll(&event, 1, -1) < 0 && errno == EINTR) {
        }
    }

  private:
    void work() {
        std::unique_lock guard(queue_lock_);
        while (true) {
            std::optional<Read> read;
            idle_++;
            queued_.wait(guard, [&] { return stopping_ || (read = turns_.next()); });
            idle_--;
            if (stopping_) return;
            busy_max_ = std::max(busy_max_, ++busy_);
            guard.unlock();
            read->asked_at = Clock::now();
            const int error = read_whole(*read);
            done_.put({read->tag, error, Clock::now() - read->asked_at});
            guard.lock();
            busy_--;
            turns_.ended(read->file);  // wakes no thread: only one more read may start now, and this thread takes it
        }
    }

    const uint32_t threads_;
    Outbox<Completion> done_;
    std::vector<std::thread> workers_;
    mutable std::mutex queue_lock_;  // guards turns_, idle_, busy_, busy_max_, stopping_
    std::condition_variable queued_;
    ReadTurns turns_;
    size_t idle_ = 0;
    uint32_t busy_ = 0;  // workers with a read; those about to take one are neither idle nor busy
    uint32_t busy_max_ = 0;
    bool stopping_ = false;
};

}  // namespace

std::unique_ptr<Reader> make_thread_reader(uint32_t threads) { return std::make_unique<ThreadReader>(threads); }

}  // namespace weightd
