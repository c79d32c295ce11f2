// The engine in its caller's own process and thread: a CellSource with one session, no ring, no doorbell, no socket.
//
// scripts/bench_ipc.py measures the shared-memory path against it. Pool, reader and verifier are the same, and the
// client's window leases from it as it does from a ring. It has one model and one thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <unordered_set>
#include <vector>

#include "engine/engine.h"
#include "predict/cell_source.h"

namespace weightd {

class InProcessEngine final : public flashclient::CellSource {
  public:
    // Gets each segment of the pool once, before the first cell of it is returned.
    using Lend = std::function<void(std::span<const std::byte>)>;
    // Throws std::system_error where the files cannot be opened for direct reading, NoRoom.
    InProcessEngine(uint64_t dram_bytes, const ModelSpec& spec, const ReaderChoice& choice, uint32_t slots_wanted,
                    Lend lend);
    ~InProcessEngine() override;
    InProcessEngine(const InProcessEngine&) = delete;
    InProcessEngine& operator=(const InProcessEngine&) = delete;

    uint32_t share_slots() override { return session_->share_slots; }
    uint32_t lease_limit() override { return session_->lease_limit; }
    // Throws std::invalid_argument where cells to release are not held, or cells to acquire do not exist.
    void exchange(uint32_t layer, const std::vector<uint32_t>& acquire, const std::vector<uint32_t>& release) override;
    void extend(const std::vector<uint32_t>& acquire, const std::vector<uint32_t>& release) override;
    // Throws std::runtime_error where a cell cannot be read.
    std::vector<flashclient::Arrival> arrived() override;
    void cancel() override;

    // Leases `count` neighbouring cells, at most the share, waits for them and returns their addresses.
    std::vector<uint64_t> lease_range(uint32_t layer, uint32_t first, uint32_t count);
    void release_range(uint32_t layer, uint32_t first, uint32_t count);

    uint32_t cells_held() const { return session_->held_cells; }
    uint64_t misses() const { return session_->misses; }  // cells that had to be read

  private:
    class Answers;
    void take();
    void wait() const;

    std::unique_ptr<Reader> reader_;
    Verifier verifier_;
    std::unique_ptr<Engine> engine_;
    Session* session_ = nullptr;
    Lend lend_;                                  // what it keeps goes before the segments do
    std::unordered_set<uint32_t> lent_;          // segments, by number
    uint32_t layer_ = 0;                         // of what was asked for
    std::vector<flashclient::Arrival> arrived_;  // not yet returned
    bool failed_ = false;
    Descriptor epoll_;
};

}  // namespace weightd
