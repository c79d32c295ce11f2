// The engine in its caller's own process and thread: one session, no ring, no doorbell, no socket.
//
// scripts/bench_ipc.py measures the shared-memory path against it: the same pool, reader and verifier, and nothing
// between them and their user. It has one model and one thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "engine/engine.h"

namespace weightd {

class InProcessEngine {
  public:
    // Throws std::system_error where the files cannot be opened for direct reading, NoRoom.
    InProcessEngine(uint64_t dram_bytes, const ModelSpec& spec, const ReaderChoice& choice, uint32_t slots_wanted);
    ~InProcessEngine();
    InProcessEngine(const InProcessEngine&) = delete;
    InProcessEngine& operator=(const InProcessEngine&) = delete;

    // Where each cell of the layer lies; 0 where it is not held, or has not arrived.
    std::span<const uint64_t> addresses(uint32_t layer) const { return tables_[layer]; }
    // Gives back `release`, then asks for `acquire`: of cells that are held, and that are not. Does not wait.
    void exchange(uint32_t layer, std::span<const uint32_t> acquire, std::span<const uint32_t> release);
    // Waits until more of the cells asked for have arrived, and says how many are still to come. Throws
    // std::runtime_error for one that cannot be had.
    uint32_t arrived();
    void release_all();
    uint32_t share_slots() const { return session_->share_slots; }
    uint32_t lease_limit() const { return session_->lease_limit; }
    uint32_t cells_held() const { return held_; }
    uint64_t misses() const { return session_->misses; }  // cells that had to be read
    // The pool's memory, as far as cells have come to lie in it.
    const std::vector<std::span<const std::byte>>& segments() const { return segments_; }

  private:
    class Tables;
    void wait() const;

    std::unique_ptr<Reader> reader_;
    Verifier verifier_;
    std::unique_ptr<Engine> engine_;
    Session* session_ = nullptr;
    std::vector<std::vector<uint64_t>> tables_;  // by layer and cell
    std::vector<std::span<const std::byte>> segments_;
    uint32_t unanswered_ = 0;
    uint32_t held_ = 0;
    bool failed_ = false;
    Descriptor epoll_;
};

}  // namespace weightd
