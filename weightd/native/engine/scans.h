// The scans of one model: sessions that read all its cells in order, again and again, as in exact mode.
//
// Several scans share their reads only if they go together. A scan finds little of what earlier scans have read,
// because most of it is evicted before the scan gets there (replacement.h). So a read that only scans far ahead want is
// deferred until the slowest scan gets there. In the end no scan is slower: once aligned, all scans share each read.
//
// Reads are deferred for at most a second, for all scans of the model together, and afterwards for an eighth of the
// time, because some scans are permanently slower. A scan that has got what it asked for and has been silent for half a
// second rests: no other scan waits for it.
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

    // The session has asked for these cells of a layer. Their order tells whether it scans, and how far it is.
    void note(Session& session, uint32_t layer, std::span<const uint32_t> cells, Clock::time_point now);
    void end(const Session& session);  // the session no longer scans, or closes
    size_t count() const { return scans_.size(); }
    bool scanning(const Session& session) const;

    bool defers(const Session& session) const { return scans_.size() > 1 && scanning(session); }
    void defer(const Missing& missing);
    // Moves the reads that are deferred no longer to `missing`.
    void take_due(std::vector<Missing>& missing, Clock::time_point now);
    size_t deferred() const { return deferred_.size(); }

  private:
    struct Scan {  // a session's way through all cells of the model
        Session* session;
        uint32_t cell = 0;  // the last one that it asked for
    };
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
    std::vector<Scan> scans_;
    std::vector<Missing> deferred_;
    Patience patience_;
};

}  // namespace weightd
