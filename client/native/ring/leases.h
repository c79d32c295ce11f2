// The cells that a session leases one by one, over its ring: the CellSource of predict mode and of experts.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "predict/cell_source.h"
#include "ring/session.h"
#include "ring/sweep.h"

namespace flashclient {

class Leases : public CellSource {
  public:
    // `sweep` is of the same session; exchange() makes it idle. Both must outlive this.
    Leases(Session& session, Sweep& sweep, uint32_t bundles_per_cell, uint32_t cell_bytes);

    uint32_t share_slots() override;
    uint32_t lease_limit() override;
    // Sends one message if the cells fit into one. Throws SessionLost and NoAnswer.
    void exchange(uint32_t layer, const std::vector<uint32_t>& acquire, const std::vector<uint32_t>& release) override;
    void extend(const std::vector<uint32_t>& acquire, const std::vector<uint32_t>& release) override;
    void prefetch(uint32_t layer, const std::vector<CellRange>& ranges) override;
    // Throws SessionLost, NoAnswer and CorruptBundle.
    std::vector<Arrival> arrived() override;
    void cancel() override;
    void forget();  // the session was replaced: nothing is leased or on its way

  private:
    void send(const std::vector<uint32_t>& acquire, const std::vector<uint32_t>& release);
    void settle();
    void give_back(uint32_t layer, std::span<const uint32_t> cells);
    void ask_more();
    void take();

    Session& session_;
    Sweep& sweep_;
    uint32_t bundles_per_cell_;
    uint32_t cell_bytes_;
    uint32_t layer_ = 0;             // of what was asked for
    uint32_t unanswered_ = 0;        // cells that were asked for and have no grant yet
    std::vector<uint32_t> waiting_;  // cells for which the ring has no room yet, the last first
    std::vector<ring::Grant> grants_;
    std::vector<Arrival> arrived_;       // not yet returned
    std::optional<ring::Grant> failed_;  // a cell that cannot be read
    // By layer: cells that a caller gave back while weightd took no requests.
    std::vector<std::pair<uint32_t, std::vector<uint32_t>>> owed_;
};

}  // namespace flashclient
