// The io_uring engine: registered files and buffers where the system allows them, plain reads where it does not.
#include <fcntl.h>
#include <liburing.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cassert>
#include <cerrno>
#include <cstring>

#include "device/read_turns.h"
#include "device/system_error.h"

namespace weightd {
namespace {

constexpr uint32_t FILES_MAX = 1024;    // two per model
constexpr uint32_t BUFFERS_MAX = 4096;  // one per segment
// The kernel starts the reads of a submission only after it has seen all of them. Random reads of 16 KiB reach 0.93 of
// fio's speed if all waiting reads go into one submission, and 0.995 in submissions of eight, for the same CPU time.
// Submissions of one read take more CPU time.
constexpr uint32_t SUBMISSION_READS_MAX = 8;

class UringReader final : public Reader {
  public:
    UringReader(uint32_t depth, std::string& note)
        : event_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)), flights_(reads_in_all(depth)), turns_(depth) {
        start_ring(reads_in_all(depth));
        if (::io_uring_register_eventfd(&ring_, event_.get()) < 0) {
            ::io_uring_queue_exit(&ring_);
            fail("io_uring_register_eventfd");
        }
        files_ = ::io_uring_register_files_sparse(&ring_, FILES_MAX) == 0;
        buffers_ = ::io_uring_register_buffers_sparse(&ring_, BUFFERS_MAX) == 0;
        if (buffers_ && !memory_can_be_locked()) {
            buffers_ = false;
            note = "the memlock limit refuses registered buffers (raise it: LimitMEMLOCK=infinity, ulimit -l)";
        }
        free_files_ = descending(FILES_MAX);
        free_buffers_ = descending(BUFFERS_MAX);
        registered_.resize(BUFFERS_MAX);
        free_flights_ = descending(reads_in_all(depth));
    }

    ~UringReader() override { ::io_uring_queue_exit(&ring_); }

    std::string level() const override {
        return buffers_ ? "io_uring with registered file and buffers" : "io_uring, buffers not registered";
    }

    int register_file(const DirectFile& file) override {
        if (!files_ || free_files_.empty()) return -1;
        const int index = static_cast<int>(free_files_.back());
        int fd = file.fd();
        if (::io_uring_register_files_update(&ring_, static_cast<unsigned>(index), &fd, 1) != 1) return -1;
        free_files_.pop_back();
        return index;
    }

    void unregister_file(int index) override {
        if (index < 0) return;
        int none = -1;
        ::io_uring_register_files_update(&ring_, static_cast<unsigned>(index), &none, 1);
        free_files_.push_back(static_cast<uint32_t>(index));
    }

    int register_memory(std::span<std::byte> memory) override {
        if (!buffers_ || free_buffers_.empty()) return -1;
        const int index = static_cast<int>(free_buffers_.back());
        free_buffers_.pop_back();
        registered_[static_cast<size_t>(index)] = {memory, false};
        return index;
    }

    void pin_memory(int index) override {
        if (index < 0) return;
        Registered& one = registered_[static_cast<size_t>(index)];
        one.pinned = update_buffer(index, {one.memory.data(), one.memory.size()});
    }

    void unregister_memory(int index) override {
        if (index < 0) return;
        if (registered_[static_cast<size_t>(index)].pinned) update_buffer(index, {nullptr, 0});
        free_buffers_.push_back(static_cast<uint32_t>(index));
    }

    void submit(std::vector<Read> reads) override {
        for (Read& read : reads) turns_.push(std::move(read));
        start_waiting();
    }

    void reap(std::vector<Completion>& completions) override {
        if (in_flight() == 0) return;
        const bool deferred = (IO_URING_READ_ONCE(*ring_.sq.kflags) & IORING_SQ_TASKRUN) != 0;
        if (deferred) ::io_uring_get_events(&ring_);  // completions wait until this thread asks for them
        io_uring_cqe* cqe = nullptr;
        unsigned head = 0;
        unsigned seen = 0;
        const auto now = Clock::now();
        io_uring_for_each_cqe(&ring_, head, cqe) {
            seen++;
            finish(static_cast<uint32_t>(::io_uring_cqe_get_data64(cqe)), cqe->res, now, completions);
        }
        ::io_uring_cq_advance(&ring_, seen);
        start_waiting();
    }

    void wait() override {
        io_uring_cqe* cqe = nullptr;
        while (::io_uring_wait_cqe(&ring_, &cqe) == -EINTR) {
        }
    }

    ReadQueue queue() const override {
        return {static_cast<uint32_t>(in_flight()), in_flight_max_, static_cast<uint32_t>(flights_.size()),
                static_cast<uint32_t>(turns_.waiting())};
    }

    // Not the ring's own descriptor: epoll on a ring with deferred completions missed wake-ups (Linux 6.18).
    int event_fd() const override { return event_.get(); }

  private:
    struct Registered {
        std::span<std::byte> memory;
        bool pinned = false;
    };
    static std::vector<uint32_t> descending(uint32_t count) {
        std::vector<uint32_t> numbers(count);
        for (uint32_t i = 0; i < count; i++) numbers[i] = count - 1 - i;
        return numbers;
    }

    void start_ring(uint32_t depth) {
        io_uring_params params{};
        // Completions are processed when this thread asks for them, and do not interrupt it (since Linux 6.1).
        params.flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG |
                       IORING_SETUP_R_DISABLED;
        int error = ::io_uring_queue_init_params(depth, &ring_, &params);
        if (error == -EINVAL) {
            params = {};
            params.flags = IORING_SETUP_R_DISABLED;
            error = ::io_uring_queue_init_params(depth, &ring_, &params);
        }
        if (error < 0) fail("io_uring refused", -error);
    }

    // The ring belongs to the thread that enables it: the one that submits.
    void enable_once() {
        if (enabled_) return;
        // liburing 2.3 declares io_uring_enable_rings() but does not export it.
        ::syscall(SYS_io_uring_register, ring_.ring_fd, IORING_REGISTER_ENABLE_RINGS, nullptr, 0);
        enabled_ = true;
    }

    bool update_buffer(int index, iovec buffer) {
        __u64 tag = 0;
        return ::io_uring_register_buffers_update_tag(&ring_, static_cast<unsigned>(index), &buffer, &tag, 1) == 1;
    }

    bool memory_can_be_locked() {
        static constexpr size_t PROBE_BYTES = 16U << 20;  // an ordinary user's limit is 8 MiB on most systems
        std::vector<std::byte> probe(PROBE_BYTES);
        if (!update_buffer(0, {probe.data(), probe.size()})) return false;
        return update_buffer(0, {nullptr, 0});
    }

    size_t in_flight() const { return flights_.size() - free_flights_.size(); }

    void start_waiting() {
        enable_once();
        uint32_t prepared = 0;
        const auto now = Clock::now();
        while (!free_flights_.empty()) {
            std::optional<Read> next = turns_.next();
            if (!next) break;
            const uint32_t flight = free_flights_.back();
            free_flights_.pop_back();
            flights_[flight] = std::move(*next);
            if (flights_[flight].asked_at == decltype(now){}) flights_[flight].asked_at = now;
            prepare(flight);
            if (++prepared % SUBMISSION_READS_MAX == 0) submit_all();
        }
        in_flight_max_ = std::max(in_flight_max_, static_cast<uint32_t>(in_flight()));
        if (prepared % SUBMISSION_READS_MAX != 0) submit_all();
    }

    void submit_all() {
        while (true) {
            const int done = ::io_uring_submit(&ring_);
            if (done >= 0) return;
            if (done != -EINTR && done != -EAGAIN && done != -EBUSY) fail("io_uring_submit", -done);
        }
    }

    void prepare(uint32_t flight) {
        Read& read = flights_[flight];
        io_uring_sqe* sqe = ::io_uring_get_sqe(&ring_);
        assert(sqe != nullptr);  // there are as many entries as flights
        const int file = read.file_index >= 0 ? read.file_index : read.file->fd();
        const iovec& first = read.pieces[0];
        const unsigned length = static_cast<unsigned>(first.iov_len);
        if (read.pieces.size() > 1) {
            ::io_uring_prep_readv(sqe, file, read.pieces.data(), static_cast<unsigned>(read.pieces.size()),
                                  read.offset_bytes);
        } else if (read.buffer_index >= 0 && registered_[static_cast<size_t>(read.buffer_index)].pinned) {
            ::io_uring_prep_read_fixed(sqe, file, first.iov_base, length, read.offset_bytes, read.buffer_index);
        } else {
            ::io_uring_prep_read(sqe, file, first.iov_base, length, read.offset_bytes);
        }
        if (read.file_index >= 0) sqe->flags |= IOSQE_FIXED_FILE;
        ::io_uring_sqe_set_data64(sqe, flight);
    }

    void finish(uint32_t flight, int result, Clock::time_point now, std::vector<Completion>& completions) {
        Read& read = flights_[flight];
        turns_.ended(read.file);
        free_flights_.push_back(flight);
        bool again = result == -EINTR || result == -EAGAIN;
        int error = result < 0 ? -result : EIO;  // 0 bytes: the file ends early
        if (result > 0) {
            const Read::Left left = read.advance(static_cast<size_t>(result));
            again = left == Read::Left::more;
            error = left == Read::Left::stuck ? EIO : 0;
        }
        if (again) return turns_.push_first(std::move(read));
        if (read.file->buffered() && result > 0) ::posix_fadvise(read.file->fd(), 0, 0, POSIX_FADV_DONTNEED);
        completions.push_back({read.tag, error, now - read.asked_at});
    }

    Descriptor event_;
    io_uring ring_{};
    bool enabled_ = false;
    bool files_ = false;
    bool buffers_ = false;
    std::vector<uint32_t> free_files_;
    std::vector<uint32_t> free_buffers_;
    std::vector<Registered> registered_;  // by index
    std::vector<Read> flights_;           // by user_data
    std::vector<uint32_t> free_flights_;
    ReadTurns turns_;
    uint32_t in_flight_max_ = 0;
};

}  // namespace

std::unique_ptr<Reader> make_uring_reader(uint32_t depth, std::string& note) {
    return std::make_unique<UringReader>(depth, note);
}

}  // namespace weightd
