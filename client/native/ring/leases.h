// The cells of a model that a session holds one by one, and where they lie: what the window asked for.
#pragma once

#include <cstdint>
#include <span>
#include <stdexcept>
#include <vector>

#include "ring/session.h"

namespace flashclient {

struct CorruptBundle : std::runtime_error {  // or one that flash does not give; names layer and position
    using std::runtime_error::runtime_error;
};

struct LeaseRefused : std::runtime_error {  // the limit has sunk: let go of what is held, then ask again
    using std::runtime_error::runtime_error;
};

// Throws what weightd's refusal of a cell stands for: CorruptBundle or LeaseRefused.
[[noreturn]] void raise_refusal(uint32_t layer, const ring::Grant& grant, uint32_t bundles_per_cell);

class Leases {
  public:
    // `cells` is their number by layer.
    Leases(Session& session, uint32_t bundles_per_cell, uint32_t cell_bytes, const std::vector<uint32_t>& cells);

    // Where each cell of the layer lies; 0 where it is not held, or has not arrived.
    std::span<const uint64_t> addresses(uint32_t layer) const { return tables_.at(layer); }

    // Gives back `release` and asks for `acquire`, in one message if it holds them. Neither blocks nor waits. Throws
    // std::out_of_range for a cell that is none, before anything is done.
    void exchange(uint32_t layer, std::span<const uint32_t> acquire, std::span<const uint32_t> release);
    // Waits until more of the cells asked for have arrived, and says how many are still to come. Throws SessionLost,
    // and for a cell that cannot be had CorruptBundle or LeaseRefused.
    uint32_t arrived();
    void release_all();
    void forget();  // the session is another one: nothing is held or on its way
    uint32_t cells_held() const { return held_; }
    Session& session() const { return session_; }

  private:
    void ask_more();
    void take(bool block);
    void settle();

    Session& session_;
    uint32_t bundles_per_cell_;
    uint32_t cell_bytes_;
    std::vector<std::vector<uint64_t>> tables_;  // by layer and cell
    uint32_t layer_ = 0;                         // of what was asked for
    uint32_t unanswered_ = 0;
    uint32_t held_ = 0;
    std::vector<uint32_t> waiting_;  // cells for which the ring's grants have no room yet, the last first
    std::vector<ring::Grant> grants_;
    std::vector<ring::Grant> failed_;
};

}  // namespace flashclient
