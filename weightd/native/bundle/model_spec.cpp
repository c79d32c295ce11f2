#include "bundle/model_spec.h"

#include <algorithm>
#include <stdexcept>

#include "device/block_size.h"

namespace weightd {

bool ModelSpec::has_experts() const {
    return std::any_of(layers.begin(), layers.end(), [](const LayerSpec& layer) { return layer.experts > 0; });
}

uint64_t ModelSpec::ranges() const {
    uint64_t count = 0;
    for (const LayerSpec& layer : layers) count += std::max(1U, layer.experts);
    return count;
}

uint32_t ModelSpec::layer_of(uint32_t cell) const {
    const auto after = std::upper_bound(layers.begin(), layers.end(), cell,
                                        [](uint32_t c, const LayerSpec& layer) { return c < layer.first_cell; });
    return static_cast<uint32_t>(after - layers.begin()) - 1;
}

uint32_t ModelSpec::bundles_in(uint32_t layer, uint32_t cell) const {
    return std::min(bundles_per_cell, layers[layer].neurons - cell * bundles_per_cell);
}

uint64_t ModelSpec::offset_of(uint32_t cell) const {
    const LayerSpec& layer = layers[layer_of(cell)];
    return layer.offset_bytes + uint64_t{cell - layer.first_cell} * cell_bytes;
}

uint32_t ModelSpec::region_of(uint64_t offset_bytes, uint32_t regions) const {
    const uint64_t end_bytes = layers.back().offset_bytes + uint64_t{layers.back().cells} * cell_bytes;
    return static_cast<uint32_t>(offset_bytes * regions / end_bytes);
}

void ModelSpec::require_sound() const {
    const auto require = [this](bool sound, const char* what) {
        if (!sound) throw std::invalid_argument(name + ": " + what);
    };
    require(!layers.empty(), "no layers");
    require(cell_bytes > 0 && cell_bytes % SECTOR_BYTES_MIN == 0, "cell_bytes is not a multiple of 512");
    require(bundles_per_cell > 0 && bundle_bytes <= stride_bytes, "a bundle is larger than its stride");
    require(uint64_t{bundles_per_cell - 1} * stride_bytes + bundle_bytes <= cell_bytes, "bundles exceed their cell");
    uint64_t cells = 0;
    uint64_t bundles = 0;
    for (const LayerSpec& layer : layers) {
        require(layer.neurons > 0, "a layer without neurons");
        require(layer.cells == (uint64_t{layer.neurons} + bundles_per_cell - 1) / bundles_per_cell, "wrong cell count");
        require(layer.experts == 0 || layer.neurons % (uint64_t{layer.experts} * bundles_per_cell) == 0,
                "an expert begins within a cell");
        require(layer.first_cell == cells && layer.first_checksum == bundles, "layers out of order");
        require(layer.offset_bytes % BLOCK_BYTES_MIN == 0, "a layer is not block aligned");
        require(layer.offset_bytes <= INT64_MAX - uint64_t{layer.cells} * cell_bytes, "a layer ends beyond all files");
        cells += layer.cells;
        bundles += layer.neurons;
    }
    require(cells < UINT32_MAX, "too many cells");
    require(bundles == checksums.size(), "there are not as many checksums as bundles");
    for (const TensorSpec& tensor : tensors) {
        const bool inside =
            tensor.size_bytes <= resident_bytes && tensor.offset_bytes <= resident_bytes - tensor.size_bytes;
        require(inside, "a resident tensor ends beyond its file");
    }
}

}  // namespace weightd
