// The client's end of a session (proto/ring.h): leases cells of the daemon's pool and finds them in shared memory.
//
// One thread at a time uses it, and holds use() meanwhile. It belongs to the process that opened it: a child after
// fork() keeps nothing of it. A thread of the session notices when weightd has ended or has closed the session, even if
// no other thread uses the session, and revokes the memory of the pool at once (pool_memory.h).
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "ring.h"
#include "ring/pool_memory.h"

namespace flashclient {

namespace ring = weightd::ring;

struct SessionLost : std::runtime_error {  // weightd is gone or has closed the session: attach again
    using std::runtime_error::runtime_error;
};

struct NoAnswer : std::runtime_error {  // weightd is there and did not answer in time
    using std::runtime_error::runtime_error;
};

struct WrongProcess : std::logic_error {  // used after fork
    using std::logic_error::logic_error;
};

struct CorruptBundle : std::runtime_error {  // or one that the device cannot read
    CorruptBundle(uint32_t layer, uint32_t position, const std::string& why);
    uint32_t layer;
    uint32_t position;
    std::string why;
};

struct SessionCounters {  // of cells that were requested
    uint64_t hits = 0;
    uint64_t misses = 0;
    uint64_t read_bytes = 0;
    uint64_t prefetched = 0;
    uint64_t prefetched_used = 0;
};

class Session {
  public:
    // Throws std::system_error when the socket cannot be reached, SessionLost when the token is refused, NoAnswer.
    Session(const std::string& data_socket, std::span<const uint8_t> token, double timeout_s);
    ~Session();
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;

    // The thread that holds it may call all methods below except close(). Throws WrongProcess after fork.
    [[nodiscard]] std::unique_lock<std::mutex> use();

    // Opens another session of the same model in place of this one; nothing is leased then. Resident weights and
    // predictors stay at their addresses. Parts that are equal to weightd's are mapped again, so that they are in
    // memory once. Other parts (changed by the caller, or predictors of another version) stay as they are. Throws as
    // the constructor does.
    void attach(const std::string& data_socket, std::span<const uint8_t> token);

    // resident.safetensors, a private copy-on-write mapping; valid as long as the session.
    std::span<std::byte> resident() const { return {resident_, resident_bytes_}; }
    // predictors.safetensors, read-only; empty for a model without. Valid as long as the session.
    std::span<const std::byte> calibration() const { return {calibration_, calibration_bytes_}; }
    uint32_t share_slots() const { return share_slots_; }
    uint32_t lease_limit() const;  // cells that may be leased at once now: the share, and what may be borrowed above it

    // What weightd counted for this session and for those that it replaced, up to the last grants that were taken.
    SessionCounters counters() const;

    // Each posts one or more requests. For `words` see ring::Form.
    void acquire(uint32_t layer, ring::Form form, std::span<const uint32_t> words, uint32_t tag);
    void release(uint32_t layer, ring::Form form, std::span<const uint32_t> words);
    void prefetch(uint32_t layer, std::span<const uint32_t> ranges);  // in place of what was hinted before
    // Gives back the cells `release` and acquires the cells `acquire`, in one request of at most WORDS cells.
    void exchange(uint32_t layer, std::span<const uint32_t> acquire, std::span<const uint32_t> release, uint32_t tag);

    // Appends the grants that have arrived. With `block`, waits until there is one; throws NoAnswer at the timeout.
    void take_grants(std::vector<ring::Grant>& grants, bool block);
    // The address of a granted cell.
    const std::byte* address(const ring::Grant& grant, uint32_t cell_bytes);
    static ring::Status status(const ring::Grant& grant) {
        return static_cast<ring::Status>(grant.segment >> ring::STATUS_SHIFT);
    }
    // Throws SessionLost where cells that were leased may have changed; WrongProcess after fork.
    void require_alive() const;
    // Ends the session for good, from any thread. A thread that uses it or waits for weightd gets SessionLost first.
    // Only resident weights and predictors stay mapped.
    void close();

  private:
    friend class ForkableSessions;
    void end();
    void abandon_in_child();
    void greet(std::span<const uint8_t> token);
    void take_resident(int fd, size_t bytes);
    void take_calibration(int fd, size_t bytes);
    std::string gone() const;
    void watch();
    void start_watching();
    void stop_watching();
    void post(ring::Op op, uint32_t layer, ring::Form form, std::span<const uint32_t> words, uint32_t tag);
    void wait_for_room();
    void put(const ring::Request& request);
    void ring_doorbell();
    double wait_for_bell(uint32_t seen, double left_s) const;
    bool take_ready(std::vector<ring::Grant>& grants);
    bool read_news(uint32_t cell_bytes, int timeout_ms);

    pid_t owner_;
    double timeout_s_;
    std::mutex in_use_;
    std::mutex ending_;                 // guards socket_ where it changes
    std::atomic<bool> closed_ = false;  // for good
    int socket_ = -1;
    int doorbell_ = -1;
    ring::Ring* ring_ = nullptr;
    std::byte* resident_ = nullptr;
    size_t resident_bytes_ = 0;
    std::byte* calibration_ = nullptr;
    size_t calibration_bytes_ = 0;
    uint32_t share_slots_ = 0;
    SessionCounters counted_before_;  // by the sessions that this one replaced
    uint32_t hints_ = 0;              // of prefetch()
    uint32_t request_tail_ = 0;
    uint32_t grant_head_ = 0;
    PoolMemory pool_;
    int stop_event_ = -1;                   // eventfd: the watcher should end
    std::unique_ptr<std::thread> watcher_;  // touches socket_, stop_event_, ring_ and pool_, which outlive it
};

// Throws the error for a cell that weightd did not grant: CorruptBundle.
[[noreturn]] void raise_corrupt(uint32_t layer, const ring::Grant& grant, uint32_t bundles_per_cell);

}  // namespace flashclient
