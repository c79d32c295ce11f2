// How many chunks a sweep has ahead: as many as its session's share, and more where that is too little.
//
// It is too little while the chunks that are ahead arrive before the caller is back from what lies between two layers,
// so that the device rests, and the caller then waits for more.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

namespace flashclient {

class AheadDepth {
  public:
    void begin(uint32_t share_chunks) { *this = {}, share_ = chunks_ = share_chunks; }
    uint32_t chunks() const { return chunks_; }
    void at_most(uint32_t chunks) { chunks_ = std::min(chunks_, std::max(share_, chunks)); }

    // A chunk of the layer that is not kept is wanted. `rested`: all that was ahead had arrived.
    void wants(bool rested) {
        if (!std::exchange(streams_, true)) rested_ = rested;
    }
    void waits() { rests_ += std::exchange(rested_, false); }  // for that chunk
    void layer_ends() { streams_ = rested_ = false; }
    // By half, if the device rested in a quarter of the layers.
    void turn_ends(uint32_t layers) {
        if (4 * std::exchange(rests_, 0) > layers) chunks_ += (chunks_ + 1) / 2;
    }

  private:
    uint32_t share_ = 0;
    uint32_t chunks_ = 0;
    bool streams_ = false;  // chunks of this layer were wanted
    bool rested_ = false;   // when the first one was
    uint32_t rests_ = 0;    // of this turn, each in another layer
};

}  // namespace flashclient
