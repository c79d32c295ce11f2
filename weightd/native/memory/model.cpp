#include "memory/model.h"

#include <stdexcept>

namespace weightd {

std::unique_ptr<Model> open_model(ModelSpec spec, bool allow_buffered) {
    spec.require_sound();
    auto model = std::make_unique<Model>();
    model->file = std::make_unique<DirectFile>(spec.bundles_path, allow_buffered);
    for (const LayerSpec& layer : spec.layers) {
        if (model->file->size_bytes() >= layer.offset_bytes + uint64_t{layer.cells} * spec.cell_bytes) continue;
        throw std::invalid_argument(spec.bundles_path + ": shorter than the catalog says (import the model again)");
    }
    model->spec = std::move(spec);
    return model;
}

}  // namespace weightd
