// The segments of all pools: which pool gets a new one, and which gives one up.
//
// Invariants: every segment is paid from --dram until it is dropped. A pool grows above the memory target only as far
// as its sessions' shares need it. A segment that drains is dropped when its last lease ends. A segment is pinned
// for the reader when all its pages are there, and read into from the start.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>

#include "device/populator.h"
#include "device/reader.h"
#include "memory/memory.h"
#include "memory/model.h"
#include "memory/pressure.h"
#include "memory/room.h"
#include "memory/sessions.h"

namespace weightd {

class Segments {
  public:
    Segments(const ModelList& models, Memory& memory, const Pressure& pressure, Reader& reader, Sessions& sessions,
             const Room& room)
        : models_(models), memory_(memory), pressure_(pressure), reader_(reader), sessions_(sessions), room_(room) {}

    bool grow(Model& model);                   // false: the model has all the slots that it can use or get
    bool can_spare(const Model& model) const;  // a segment, without touching the shares
    // Starts to drain a segment of the model that can spare most. True: some segment drains now. `asking` (or none) is
    // the model that wants memory; its own segments are taken only if `own`, and only if it has twice as much to spare.
    bool drain_surplus(const Model* asking, bool own);
    void drain_all(Model& model);  // nothing of it is leased or being read
    void retire(Model& model);     // drops its segments that have drained
    void pin_populated();          // tells the reader which segments have all their pages

    // Takes a segment without leases from one model, if it has one. What becomes free is reserved for the other model
    // until it has grown by as much, or until end_reservation().
    void transfer(Model& from, const Model& to);
    void end_reservation() { reservation_ = {}; }

  private:
    uint64_t growth_bytes(const Model& model) const;
    uint64_t spare_slots(const Model& model) const;
    void drop(const Model& model, std::unique_ptr<Segment> segment);

    struct Reservation {
        uint32_t model = 0;
        uint64_t bytes = 0;
    };

    const ModelList& models_;
    Memory& memory_;
    const Pressure& pressure_;
    Reader& reader_;
    Sessions& sessions_;
    const Room& room_;
    uint32_t next_number_ = 0;
    Reservation reservation_;
    std::unordered_map<const std::byte*, int> unpopulated_;  // the reader's index, by where the memory begins
    Populator populator_;
};

}  // namespace weightd
