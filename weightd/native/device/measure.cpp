#include "device/measure.h"

#include <sys/resource.h>

#include <random>
#include <stdexcept>

#include "device/clock.h"
#include "device/reader.h"
#include "device/shared_memory.h"
#include "device/system_error.h"
#include "device/verify.h"

namespace weightd {
namespace {

double cpu_seconds() {
    rusage usage{};
    ::getrusage(RUSAGE_SELF, &usage);
    const auto of = [](const timeval& time) {
        return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) * 1e-6;
    };
    return of(usage.ru_utime) + of(usage.ru_stime);
}

// Keeps `depth` reads in flight, each into a buffer of its own. As many again wait in the reader, as they do when it
// serves sessions: so the next read starts as soon as one completes, and not only when this thread has woken up.
class Load {
  public:
    Load(const std::string& path, const MeasureOptions& options)
        : options_(options),
          file_(path, false),
          memory_("weightd-measure", options.read_bytes * 2 * options.depth),
          reader_(make_reader(options.io_engine, options.depth, options.depth, note_)),
          verifier_(options.verify ? std::make_unique<Verifier>(1) : nullptr),
          offsets_(file_.size_bytes() / options.read_bytes) {
        if (offsets_ == 0) throw std::invalid_argument(path + " is shorter than one read");
        file_index_ = reader_->register_file(file_);
        buffer_index_ = reader_->register_memory(memory_.bytes());
        reader_->pin_memory(buffer_index_);
    }

    Measurement run() {
        for (uint32_t i = 0; i < 2 * options_.depth; i++) start_read(i);
        const auto start = Clock::now();
        const double cpu_start = cpu_seconds();
        double elapsed = 0;
        while (in_flight_ > 0) {
            turn(elapsed < options_.seconds);
            elapsed = seconds(Clock::now() - start);
        }
        result_.seconds = elapsed;
        result_.cpu_seconds = cpu_seconds() - cpu_start;
        return result_;
    }

  private:
    void turn(bool go_on) {
        reader_->submit(std::move(reads_));
        reads_.clear();
        if (outstanding_ > 0) reader_->wait();
        completions_.clear();
        reader_->reap(completions_);
        std::vector<Job> jobs;
        for (const Completion& completion : completions_) {
            if (completion.error != 0) fail(file_.path(), completion.error);
            result_.reads++;
            result_.bytes += options_.read_bytes;
            outstanding_--;
            if (verifier_ != nullptr) {
                jobs.push_back({completion.tag, {{buffer(completion.tag), options_.read_bytes, 0}}, {}});
            } else {
                again(completion.tag, go_on);
            }
        }
        if (verifier_ == nullptr) return;
        verifier_->submit(std::move(jobs));
        done_.clear();
        verifier_->reap(done_);
        for (const Job& job : done_) again(job.tag, go_on);
    }

    void again(uint64_t index, bool go_on) {
        in_flight_--;
        if (go_on) start_read(static_cast<uint32_t>(index));
    }

    void start_read(uint32_t index) {
        Read read;
        read.tag = index;
        read.file = &file_;
        read.file_index = file_index_;
        read.buffer_index = buffer_index_;
        const uint64_t offset = options_.random ? random_() % offsets_ : next_offset_++ % offsets_;
        read.offset_bytes = offset * options_.read_bytes;
        read.pieces = {{buffer(index), options_.read_bytes}};
        reads_.push_back(std::move(read));
        in_flight_++;
        outstanding_++;
    }

    std::byte* buffer(uint64_t index) const { return memory_.data() + index * options_.read_bytes; }

    MeasureOptions options_;
    std::string note_;
    DirectFile file_;
    SharedMemory memory_;
    std::unique_ptr<Reader> reader_;
    std::unique_ptr<Verifier> verifier_;
    uint64_t offsets_;  // reads that the file has room for
    uint64_t next_offset_ = 0;
    std::mt19937_64 random_{1};
    int file_index_ = -1;
    int buffer_index_ = -1;
    uint32_t in_flight_ = 0;    // buffers that are being read or verified
    uint32_t outstanding_ = 0;  // buffers that are being read
    Measurement result_;
    std::vector<Read> reads_;
    std::vector<Completion> completions_;
    std::vector<Job> done_;
};

}  // namespace

Measurement measure_reads(const std::string& path, const MeasureOptions& options) {
    if (options.read_bytes == 0 || options.depth == 0) {
        throw std::invalid_argument("read_bytes and depth must be above 0");
    }
    return Load(path, options).run();
}

}  // namespace weightd
