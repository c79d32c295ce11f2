// Uncached reads into memory, many in flight at once. One interface, two engines: io_uring and threads.
//
// A reader belongs to one thread, which alone calls submit(), reap() and wait(). Registered memory and files must stay
// valid until they are unregistered, and the memory of a read until its completion.
#pragma once

#include <sys/uio.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "device/block_size.h"
#include "device/clock.h"
#include "device/direct_file.h"

namespace weightd {

inline constexpr uint32_t PIECES_MAX = 256;  // of one read; the kernel takes 1024, devices split reads far earlier
inline constexpr uint32_t READ_BYTES_MAX = 1U << 20;  // larger requests gain nothing and delay their neighbours
inline constexpr uint32_t DEPTH_DEFAULT = 64;
// With O_DIRECT, a short read is continued at the last multiple of it.
inline constexpr size_t READ_STEP_BYTES = BLOCK_BYTES_MIN;

struct Read {
    uint64_t tag = 0;
    const DirectFile* file = nullptr;
    int file_index = -1;    // of register_file, or -1
    int buffer_index = -1;  // of register_memory, if there is one piece and it lies inside; else -1
    uint64_t offset_bytes = 0;
    std::vector<iovec> pieces;     // in order of the file; 1 to PIECES_MAX
    Clock::time_point asked_at{};  // time of the first submission to the device; set by the reader

    size_t length_bytes() const;
    size_t expected_bytes() const;  // less than length_bytes() at the end of the file
    // Drops the first `done_bytes`, rounded down to the block from which reading can resume. Returns what is left.
    enum class Left { nothing, more, stuck };  // stuck: not even one block was read
    Left advance(size_t done_bytes);
};

struct Completion {
    uint64_t tag;
    int error;                         // 0, or an errno; EIO also if the file ends early
    std::chrono::nanoseconds took{0};  // from the first submission to the device to completion
};

struct ReadQueue {  // requests of one reader
    uint32_t in_flight = 0;
    uint32_t in_flight_max = 0;  // the most since the start
    uint32_t depth_limit = 0;
    uint32_t waiting = 0;  // not submitted yet, because too many are in flight

    template <typename Visit>
    void each_field(Visit visit) const {
        visit("in_flight", in_flight);
        visit("in_flight_max", in_flight_max);
        visit("depth_limit", depth_limit);
        visit("waiting", waiting);
    }
};

class Reader {
  public:
    virtual ~Reader() = default;
    virtual std::string level() const = 0;                  // in words, for the log
    virtual int register_file(const DirectFile& file) = 0;  // index, or -1
    virtual void unregister_file(int index) = 0;
    virtual int register_memory(std::span<std::byte> memory) = 0;  // index, or -1
    // Registered memory has all its pages from now on: reads into it may cost less.
    virtual void pin_memory(int index) = 0;
    virtual void unregister_memory(int index) = 0;
    // Takes any number of reads; those beyond the depth wait inside.
    virtual void submit(std::vector<Read> reads) = 0;
    // Moves what has completed to the end of `completions`; never blocks.
    virtual void reap(std::vector<Completion>& completions) = 0;
    virtual void wait() = 0;  // blocks until reap() would return something; call it only with reads in flight
    virtual ReadQueue queue() const = 0;
    virtual int event_fd() const = 0;  // signalled when reap has something new: to be watched edge-triggered
};

// kind: "auto", "io_uring" or "threads". "auto" takes the best that the system allows; `note` says why a better level
// was refused. `threads` and `depth`: the most reads of one file in flight, for each engine; other files may have some
// more beside them (read_turns.h). Throws std::system_error if `kind` is io_uring and the system refuses it.
std::unique_ptr<Reader> make_reader(const std::string& kind, uint32_t threads, uint32_t depth, std::string& note);

// Each engine. The io_uring one throws std::system_error where the kernel refuses it.
std::unique_ptr<Reader> make_thread_reader(uint32_t threads);
std::unique_ptr<Reader> make_uring_reader(uint32_t depth, std::string& note);

}  // namespace weightd
