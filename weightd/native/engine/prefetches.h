// The cells of one model that sessions may want soon (ring::PREFETCH), and that are not read yet.
//
// They are read while the device has little else to do, so a wrong guess keeps the device from what somebody waits for
// no longer than PREFETCH_READS_MAX reads take. A session's are of one hint (ring::PREFETCH) for one layer. They are
// forgotten when its step there begins, or when it gives another hint, which mostly knows better.
#pragma once

#include <cstdint>
#include <deque>

#include "memory/session.h"

namespace weightd {

inline constexpr uint32_t PREFETCHES_MAX = 1024;  // of one session: more are forgotten
// At the device at once, other reads included. With 4, 8 and 16 a token of a mixture took 189, 185 and 181 ms.
inline constexpr uint32_t PREFETCH_READS_MAX = 16;

struct Prefetch {
    uint32_t session;
    uint32_t cell;  // of the model's numbering
};

class Prefetches {
  public:
    bool empty() const { return cells_.empty(); }
    // What is added from now on is of this hint.
    void begin(Session& session, uint32_t layer, uint32_t hint) {
        if (session.prefetch_layer != layer || session.prefetch_hint != hint) forget(session);
        session.prefetch_layer = layer;
        session.prefetch_hint = hint;
    }
    void add(Session& session, uint32_t cell) {
        if (session.prefetches == PREFETCHES_MAX) return;
        session.prefetches++;
        cells_.push_back({session.id, cell});
    }
    const Prefetch& front() const { return cells_.front(); }
    void pop(Session& session) {
        session.prefetches--;
        cells_.pop_front();
    }
    void forget(Session& session) {
        if (session.prefetches == 0) return;
        std::erase_if(cells_, [&](const Prefetch& prefetch) { return prefetch.session == session.id; });
        session.prefetches = 0;
    }

  private:
    std::deque<Prefetch> cells_;
};

}  // namespace weightd
