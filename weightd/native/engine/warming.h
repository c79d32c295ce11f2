// Reads the hot cells of one model in the background after its activation, so that the first tokens after a restart are
// not much slower than later ones.
//
// Invariants: warming takes only free slots and free memory, and evicts nothing. A cell that it has read is evicted
// like any other. (The engine adds: it reads nothing while somebody waits, or while another read is in flight.)
#pragma once

#include <cstdint>
#include <vector>

#include "engine/loader.h"
#include "memory/models.h"

namespace weightd {

inline constexpr uint64_t WARM_BYTES_MAX = 256U << 10;   // in flight: a session's read waits for no more than that
inline constexpr uint32_t WARM_EXAMINED_MAX = 1U << 14;  // cells examined in one step
inline constexpr uint32_t WARM_HOTNESS_STEP = 2;         // a quarter of an octave: within it, cells go in flash order

class Warming {
  public:
    Warming(Model& model, bool enabled) : model_(model), enabled_(enabled) {}

    // Begins with the first session of an activation: the resident weights are there by then.
    void begin();
    bool pending() const;  // whether there are cells left to look for
    // Gives a place to some of the hottest cells that are not in the pool, and adds them to `missing`.
    void add_hot(Models& models, std::vector<Missing>& missing);

  private:
    Model& model_;
    const bool enabled_;
    uint32_t activation_ = 0;  // the one that it has begun for
    uint32_t hotness_ = 0;     // cells of this hotness, and a little less, come next; 0: none are left
    uint32_t next_cell_ = 0;
};

}  // namespace weightd
