// Where exact mode takes all bundles of a layer from, chunk after chunk: from the daemon's pool over a ring
// (ring/sweep.h), or from memory that a model on trial has (repeated_memory.h).
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

namespace flashclient {

class ChunkSource {
  public:
    struct Bundles {
        uint32_t first_position = 0;
        std::vector<uint64_t> addresses;  // in order of position
    };

    virtual ~ChunkSource() = default;
    // One thread at a time uses it, and holds use() while it calls next() and leave().
    [[nodiscard]] virtual std::unique_lock<std::mutex> use() = 0;
    // Takes back the bundles it gave out, and gives out the next ones of `layer`; null at the end of the layer. A layer
    // that is not the expected one begins at its start. Blocks.
    virtual const Bundles* next(uint32_t layer) = 0;
    virtual void leave() = 0;                                  // the caller goes on no further in this layer
    virtual const std::vector<uint32_t>& bundles() const = 0;  // neurons or slabs, by layer
};

}  // namespace flashclient
