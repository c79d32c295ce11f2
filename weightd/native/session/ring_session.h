// A session of another process: the daemon's end of one ring (proto/ring.h).
//
// Nothing that the client writes is trusted: indices are kept here, requests are copied before they are checked, and
// nothing here can block on the client.
#pragma once

#include <sys/socket.h>

#include <array>
#include <optional>
#include <set>
#include <span>
#include <vector>

#include "device/shared_memory.h"
#include "memory/memory.h"
#include "memory/resident.h"
#include "memory/session.h"
#include "memory/user.h"
#include "ring.h"

namespace weightd {

using Token = std::array<uint8_t, ring::TOKEN_BYTES>;

// What the daemon keeps of a session that it has closed, as long as the client lives: the client still maps resident
// weights and predictors.
struct EndedSession {
    uint32_t model;
    User user;
    SharedMemory ring;
    Descriptor socket;
    Descriptor process;
    std::shared_ptr<const LoadedPredictors> predictors;
};

class RingSession final : public Session {
  public:
    RingSession(uint32_t model, uint32_t cells, uint32_t share_slots, const Token& token, const User& user,
                std::shared_ptr<const LoadedPredictors> predictors);

    // The client has connected: passes it the ring, the doorbell, the resident weights and the predictors, if any.
    // False: they cannot be sent.
    bool attach(Descriptor socket, Descriptor process, const ucred& peer, uint64_t resident_bytes, int resident_fd);
    bool attached() const { return socket_.get() >= 0; }

    struct Taken {  // a request, copied and unpacked
        ring::Op op;
        uint32_t layer;
        uint32_t tag;
        std::span<const uint32_t> cells;     // valid until the next call
        std::span<const uint32_t> released;  // cells that an ACQUIRE gives back first
    };
    // The next request, at most `cells_max` cells of it at a time; none if there is none, or if broken() is true now
    // because the client broke a rule.
    std::optional<Taken> take(uint32_t cells_max);
    bool has_requests() const;
    void announce_sleep(bool sleeps);
    void break_rule() { broken_ = true; }
    bool broken() const { return broken_; }
    void close(ring::State state);  // tells the client and wakes it
    // After close(): closes our end of the socket, and returns what is needed to notice that the client hangs up.
    EndedSession end();

    void granted(uint32_t tag, uint32_t cell, Place place, const Pool& pool) override;
    void failed(uint32_t tag, uint32_t cell, ring::Status status, uint32_t detail) override;
    void flush() override;
    void segment_gone(uint32_t segment) override;
    void limit_changed(uint32_t obey) override;
    // Called periodically with whether the session blocks others. True once it has done so for BLOCKS_AT_MOST.
    bool blocks_for_long(bool blocks);

    const Token& token() const { return token_; }
    bool is_for(uid_t user) const { return !user_ || *user_ == user; }
    const User& user() const { return user_; }
    const ucred& peer() const { return peer_; }  // all zero before it has attached
    Clock::time_point opened_at() const { return opened_at_; }
    uint64_t requests() const { return requests_; }
    int socket_fd() const { return socket_.get(); }
    int doorbell_fd() const { return doorbell_.get(); }
    int process_fd() const { return process_.get(); }

  private:
    ring::Ring& ring() const { return *reinterpret_cast<ring::Ring*>(memory_.data()); }
    bool take_request();
    bool unpack(const ring::Request& request, uint32_t index);
    void answer(const ring::Grant& grant);
    void wake();

    Token token_;
    User user_;  // whose processes may attach; none: any process with the token
    std::shared_ptr<const LoadedPredictors> predictors_;  // of the version that was the newest when it was opened
    Clock::time_point opened_at_ = Clock::now();
    SharedMemory memory_;
    Descriptor doorbell_;
    Descriptor socket_;
    Descriptor process_;  // pidfd of the client
    ucred peer_{};
    uint64_t requests_ = 0;
    uint32_t request_head_ = 0;
    uint32_t grant_tail_ = 0;
    uint32_t answers_owed_ = 0;
    bool broken_ = false;
    std::optional<Clock::time_point> blocks_since_;
    ring::Request request_{};  // the request that is being served
    std::vector<uint32_t> cells_;
    std::span<const uint32_t> left_;  // the part of cells_ that is not taken yet
    std::set<uint32_t> segments_known_;
    // The segment of the last grant: the next grant in it needs no look-up. The first value is no segment's number.
    uint32_t last_segment_ = ring::SEGMENT_MASK + 1;
};

// The process at the other end of a Unix socket; none if the kernel does not say.
std::optional<ucred> peer_of(int socket);

// A pidfd of the process at the other end of `socket`; none if that has ended, or runs in another container and Linux
// is older than 6.5 (its process number means nothing here then), or for the reason in errno.
Descriptor process_of(int socket, const ucred& peer);

// Sends one message with descriptors over a SOCK_SEQPACKET socket without blocking; false when it cannot be sent.
bool send_with_descriptors(int socket, const void* data, size_t bytes, std::span<const int> descriptors);

}  // namespace weightd
