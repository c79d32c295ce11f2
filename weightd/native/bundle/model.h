// One model as the engine sees it: cells on flash, their checksums, and the resident file.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace weightd {

struct LayerSpec {
    uint64_t offset_bytes;  // of cell 0 in bundles.bin
    uint32_t neurons;
    uint32_t cells;
    uint32_t first_cell;      // in the model's numbering through all layers
    uint32_t first_checksum;  // likewise of bundles
};

struct TensorSpec {
    std::string name;
    uint64_t offset_bytes;
    uint64_t size_bytes;
    uint64_t checksum;
};

struct ModelSpec {
    std::string name;
    std::string bundles_path;
    std::string resident_path;
    uint64_t resident_bytes = 0;
    uint32_t cell_bytes = 0;
    uint32_t stride_bytes = 0;
    uint32_t bundle_bytes = 0;
    uint32_t bundles_per_cell = 0;
    std::vector<LayerSpec> layers;
    std::vector<uint64_t> checksums;  // by layer and position
    std::vector<TensorSpec> tensors;

    uint32_t cell_count() const { return layers.back().first_cell + layers.back().cells; }
    uint32_t layer_of(uint32_t cell) const;                    // of the model's numbering
    uint32_t bundles_in(uint32_t layer, uint32_t cell) const;  // cell within the layer; the last may hold fewer
    uint64_t offset_of(uint32_t cell) const;                   // of the model's numbering
    uint32_t region_of(uint64_t offset_bytes, uint32_t regions) const;  // of bundles.bin cut in equal parts
    void require_sound() const;  // throws std::invalid_argument when numbers contradict each other
};

}  // namespace weightd
