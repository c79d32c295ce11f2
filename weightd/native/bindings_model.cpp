// ModelSpec for Python: a record of the catalog in the engine's terms.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <filesystem>

#include "bundle/model_spec.h"

namespace nb = nanobind;
using namespace nb::literals;
using weightd::ModelSpec;

namespace {

using U64Array = nb::ndarray<const uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using LayerTuple = std::tuple<uint64_t, uint32_t, uint32_t, uint32_t>;
using TensorTuple = std::tuple<std::string, uint64_t, uint64_t, uint64_t>;

void add_layers(ModelSpec& spec, const std::vector<LayerTuple>& layers, const std::vector<U64Array>& checksums) {
    uint32_t first_cell = 0;
    uint32_t first_checksum = 0;
    for (const auto& [offset_bytes, neurons, cells, experts] : layers) {
        spec.layers.push_back({offset_bytes, neurons, cells, first_cell, first_checksum, experts});
        first_cell += cells;
        first_checksum += neurons;
    }
    for (const U64Array& layer : checksums) {
        spec.checksums.insert(spec.checksums.end(), layer.data(), layer.data() + layer.size());
    }
}

void make_model(ModelSpec* self, std::string name, const std::filesystem::path& bundles_path,
                const std::filesystem::path& resident_path, uint64_t resident_bytes, uint32_t cell_bytes,
                uint32_t stride_bytes, uint32_t bundle_bytes, uint32_t bundles_per_cell, bool is_table,
                const std::vector<LayerTuple>& layers, const std::vector<U64Array>& checksums,
                const std::vector<TensorTuple>& tensors) {
    ModelSpec spec;
    spec.name = std::move(name);
    spec.bundles_path = bundles_path;
    spec.resident_path = resident_path;
    spec.resident_bytes = resident_bytes;
    spec.cell_bytes = cell_bytes;
    spec.stride_bytes = stride_bytes;
    spec.bundle_bytes = bundle_bytes;
    spec.bundles_per_cell = bundles_per_cell;
    spec.is_table = is_table;
    add_layers(spec, layers, checksums);
    for (const auto& [tensor, offset, size, checksum] : tensors) {
        spec.tensors.push_back({tensor, offset, size, checksum});
    }
    new (self) ModelSpec(std::move(spec));
}

}  // namespace

void bind_model(nb::module_& module) {
    nb::class_<ModelSpec>(module, "ModelSpec", "A model as the engine sees it; sizes and offsets in bytes.")
        .def(
            "__init__", &make_model, nb::kw_only(), "name"_a, "bundles_path"_a, "resident_path"_a, "resident_bytes"_a,
            "cell_bytes"_a, "stride_bytes"_a, "bundle_bytes"_a, "bundles_per_cell"_a, "is_table"_a, "layers"_a,
            "checksums"_a, "tensors"_a,
            "layers: (offset, neurons, cells, experts) each; checksums: uint64[neurons] of each layer; tensors: (name, "
            "offset, size, checksum) each.");
}
