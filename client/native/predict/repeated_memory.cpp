#include "predict/repeated_memory.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace flashclient {

uint64_t RepeatedMemory::cells_in(uint32_t layer) const {
    if (layer >= bundles.size()) throw std::out_of_range("there is no such layer");
    return (bundles[layer] + bundles_per_cell - 1) / bundles_per_cell;
}

uint64_t RepeatedMemory::first_cell(uint32_t layer) const {
    uint64_t cell = 0;
    for (uint32_t i = 0; i < layer; i++) cell += cells_in(i);
    return cell;
}

const ChunkSource::Bundles* RepeatedChunks::next(uint32_t layer) {
    if (layer >= memory_.bundles.size()) throw std::out_of_range("there is no such layer");
    const uint64_t first_cell = memory_.first_cell(layer);
    if (std::exchange(layer_, layer) != layer) next_ = 0;
    if (next_ == memory_.bundles[layer]) {
        next_ = 0;
        return nullptr;
    }
    given_.first_position = next_;
    given_.addresses.clear();
    next_ += std::min(chunk_bundles_, memory_.bundles[layer] - next_);
    const uint32_t in_cell = memory_.bundles_per_cell;
    for (uint32_t i = given_.first_position; i < next_; i++) {
        const uint64_t cell = memory_.address_of_cell(first_cell + i / in_cell);
        given_.addresses.push_back(cell + uint64_t{i % in_cell} * memory_.stride_bytes);
    }
    return &given_;
}

void RepeatedCells::exchange(uint32_t layer, const std::vector<uint32_t>& acquire,
                             const std::vector<uint32_t>& release) {
    layer_cells_ = std::max<uint64_t>(1, memory_.cells_in(layer));
    first_cell_ = memory_.first_cell(layer);
    coming_.clear();
    extend(acquire, release);
}

void RepeatedCells::extend(const std::vector<uint32_t>& acquire, const std::vector<uint32_t>& /*release*/) {
    for (const uint32_t cell : acquire) {
        coming_.emplace_back(cell, memory_.address_of_cell(first_cell_ + given_++ % layer_cells_));
    }
}

std::vector<Arrival> RepeatedCells::arrived() { return std::exchange(coming_, {}); }

}  // namespace flashclient
