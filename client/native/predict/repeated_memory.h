// A model of any size in little memory, which its cells share: to try it before it is there. What is leased is here at
// once.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "predict/cell_source.h"
#include "predict/chunk_source.h"

namespace flashclient {

// Cells lie one after the other, and again from the beginning of the memory.
struct RepeatedMemory {
    uint64_t address;  // of the first cell
    uint64_t cells;    // that lie there; at least 1
    uint32_t bundles_per_cell;
    uint32_t stride_bytes;          // from one bundle to the next
    std::vector<uint32_t> bundles;  // of the model, by layer: neurons or slabs

    uint64_t address_of_cell(uint64_t cell) const {
        return address + cell % cells * bundles_per_cell * uint64_t{stride_bytes};
    }
    uint64_t cells_in(uint32_t layer) const;
    uint64_t first_cell(uint32_t layer) const;
};

class RepeatedChunks : public ChunkSource {
  public:
    // chunk_bundles: how many are given out at once; at least 1.
    RepeatedChunks(RepeatedMemory memory, uint32_t chunk_bundles)
        : memory_(std::move(memory)), chunk_bundles_(chunk_bundles) {}

    std::unique_lock<std::mutex> use() override { return std::unique_lock(in_use_); }
    const Bundles* next(uint32_t layer) override;
    void leave() override { next_ = 0; }
    const std::vector<uint32_t>& bundles() const override { return memory_.bundles; }

  private:
    RepeatedMemory memory_;
    uint32_t chunk_bundles_;
    std::mutex in_use_;
    uint32_t layer_ = 0;
    uint32_t next_ = 0;  // the position in layer_ that is given out next
    Bundles given_;
};

// A step gets cells of its layer that follow those of the step before, whichever it asks for: routers pick others for
// each token, so that these are not in the processor's caches.
class RepeatedCells : public CellSource {
  public:
    explicit RepeatedCells(RepeatedMemory memory) : memory_(std::move(memory)) {}

    uint32_t share_slots() override { return CELLS_MAX; }
    uint32_t lease_limit() override { return CELLS_MAX; }
    void exchange(uint32_t layer, const std::vector<uint32_t>& acquire, const std::vector<uint32_t>& release) override;
    void extend(const std::vector<uint32_t>& acquire, const std::vector<uint32_t>& release) override;
    std::vector<Arrival> arrived() override;
    void cancel() override { coming_.clear(); }

  private:
    static constexpr uint32_t CELLS_MAX = 1U << 16;  // leased at once

    RepeatedMemory memory_;
    uint64_t first_cell_ = 0;   // of the layer
    uint64_t layer_cells_ = 1;  // its cells
    uint64_t given_ = 0;        // cells, so far
    std::vector<Arrival> coming_;
};

}  // namespace flashclient
