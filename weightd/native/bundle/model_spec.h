// The description of one model for the engine: its cells on flash, their checksums, and the resident file.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace weightd {

struct LayerSpec {
    uint64_t offset_bytes;  // where cell 0 begins in bundles.bin
    uint32_t neurons;
    uint32_t cells;
    uint32_t first_cell;      // number of cell 0, counted through all layers of the model
    uint32_t first_checksum;  // index in ModelSpec::checksums of the first bundle's checksum
    uint32_t experts = 0;     // of a mixture, all of the same size; 0: the layer is one FFN
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
    bool is_table = false;  // rows that are looked up, not FFNs
    std::vector<LayerSpec> layers;
    std::vector<uint64_t> checksums;  // of bundles, by layer and position
    std::vector<TensorSpec> tensors;

    bool has_experts() const;
    uint64_t ranges() const;  // its experts, and its layers without experts
    uint32_t cell_count() const { return layers.back().first_cell + layers.back().cells; }
    // `cell` counts through all layers, except in bundles_in(), where it counts within the layer.
    uint32_t layer_of(uint32_t cell) const;
    uint32_t bundles_in(uint32_t layer, uint32_t cell) const;  // the last cell of a layer may hold fewer
    uint64_t offset_of(uint32_t cell) const;                   // where the cell begins in bundles.bin
    // The part that holds `offset_bytes` when bundles.bin is cut into `regions` equal parts.
    uint32_t region_of(uint64_t offset_bytes, uint32_t regions) const;
    void require_sound() const;  // throws std::invalid_argument if numbers contradict each other
};

}  // namespace weightd
