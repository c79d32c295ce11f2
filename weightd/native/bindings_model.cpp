// ModelSpec for Python: a record of the catalog in the engine's terms.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <filesystem>

#include "bundle/model.h"

namespace nb = nanobind;
using namespace nb::literals;
using weightd::ModelSpec;

namespace {

using U64Array = nb::ndarray<const uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using TensorTuple = std::tuple<std::string, uint64_t, uint64_t, uint64_t>;

void add_layers(ModelSpec& spec, const std::vector<uint64_t>& offsets, const std::vector<uint32_t>& neurons,
                const std::vector<uint32_t>& cells, const std::vector<uint32_t>& experts,
                const std::vector<U64Array>& checksums) {
    uint32_t first_cell = 0;
    uint32_t first_checksum = 0;
    for (size_t i = 0; i < offsets.size(); i++) {
        spec.layers.push_back({offsets[i], neurons.at(i), cells.at(i), first_cell, first_checksum, experts.at(i)});
        first_cell += cells[i];
        first_checksum += neurons[i];
    }
    for (const U64Array& layer : checksums)
        spec.checksums.insert(spec.checksums.end(), layer.data(), layer.data() + layer.size());
}

}  // namespace

void bind_model(nb::module_& m) {
    nb::class_<ModelSpec>(m, "ModelSpec", "A model as the engine sees it; sizes and offsets in bytes.")
        .def(
            "__init__",
            [](ModelSpec* self, std::string name, const std::filesystem::path& bundles_path,
               const std::filesystem::path& resident_path, uint64_t resident_bytes, uint32_t cell_bytes,
               uint32_t stride_bytes, uint32_t bundle_bytes, uint32_t bundles_per_cell,
               const std::vector<uint64_t>& layer_offsets, const std::vector<uint32_t>& layer_neurons,
               const std::vector<uint32_t>& layer_cells, const std::vector<uint32_t>& layer_experts,
               const std::vector<U64Array>& checksums, const std::vector<TensorTuple>& tensors) {
                ModelSpec& spec = *new (self) ModelSpec{std::move(name),
                                                        bundles_path,
                                                        resident_path,
                                                        resident_bytes,
                                                        cell_bytes,
                                                        stride_bytes,
                                                        bundle_bytes,
                                                        bundles_per_cell,
                                                        {},
                                                        {},
                                                        {}};
                add_layers(spec, layer_offsets, layer_neurons, layer_cells, layer_experts, checksums);
                for (const auto& [tensor, offset, size, checksum] : tensors)
                    spec.tensors.push_back({tensor, offset, size, checksum});
            },
            "name"_a, "bundles_path"_a, "resident_path"_a, "resident_bytes"_a, "cell_bytes"_a, "stride_bytes"_a,
            "bundle_bytes"_a, "bundles_per_cell"_a, "layer_offsets"_a, "layer_neurons"_a, "layer_cells"_a,
            "layer_experts"_a, "checksums"_a, "tensors"_a,
            "layer_experts: 0 for a layer without. checksums: uint64[neurons] of each layer; tensors: (name, offset, "
            "size, checksum) each.");
}
