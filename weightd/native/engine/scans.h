// The scans of one model: sessions that read all its cells in order, again and again, as in exact mode.
//
// Several scans read everything once only if they go together. A scan finds little of what earlier scans have read,
// because most of it is evicted before the scan gets there (replacement.h). So a read that only scans far ahead want is
// deferred until the slowest scan gets there. In the end no scan is slower: once aligned, all scans share each read.
//
// Reads are deferred for at most a second, for all scans of the model together, and afterwards for an eighth of the
// time, because some scans are permanently slower. No scan waits for one that has got what it asked for and
// has been silent for half a second.
//
// Invariants: a deferred read has a slot, and is either deferred here or handed over exactly once. With fewer than two
// scans nothing is deferred for longer than one step.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "engine/loader.h"
#include "memory/model.h"
#include "memory/session.h"

namespace weightd {

inline constexpr std::chrono::seconds SCANS_WAIT_MAX{1};  // devices read 1 to 7 GB meanwhile

class Scans {
  public:
    explicit Scans(const Model& model) : model_(model) {}

    // The session has asked for these cells of a layer: tells a scan by their order, and notes how far it has come.
    void note(Session& session, uint32_t layer, std::span<const uint32_t> cells, Clock::time_point now);
    void end(Session& session);  // the session scans no more, or closes
    size_t count() const { return scanning_.size(); }

    bool defers(const Session& session) const { return session.scan.active && scanning_.size() > 1; }
    void defer(const Missing& missing);
    // Moves the reads that need not wait any longer to `missing`.
    void take_due(std::vector<Missing>& missing, Clock::time_point now);
    size_t deferred() const { return deferred_.size(); }

  private:
    struct Laggard {  // the last of the scans that do not rest
        uint32_t session = 0;
        uint32_t cell = 0;
        uint32_t first_distance = 0;  // cells from it to the scan that is furthest ahead
    };
    struct Patience {
        Clock::duration left = SCANS_WAIT_MAX;  // how long reads may still be deferred
        Clock::time_point noted_at;
        bool used = false;  // something has been deferred since noted_at
    };

    void start(Session& session);
    bool has_patience(Clock::time_point now);
    Laggard laggard(Clock::time_point now) const;
    bool is_ahead(const Laggard& laggard, const Missing& wanted) const;

    const Model& model_;
    std::vector<Session*> scanning_;
    std::vector<Missing> deferred_;
    Patience patience_;
};

}  // namespace weightd
