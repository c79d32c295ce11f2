// Bundles: cut from the matrices of an FFN, converted or quantised, checksummed.
//
// A bundle is [row of each row part][column of the down matrix], hidden_size values each, little endian, each part in
// its own encoding. Bundles lie in cells: at every stride_bytes while a cell has room, the next cell cell_bytes on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "bundle/quantise.h"
#include "encoding.h"

namespace weightd {

// Converts `count` elements of `source` into `target`, which may not overlap it: F32, BF16 and F16 into each other,
// std::invalid_argument for any other dtype. Rounds to nearest even. Infinities and the sign of zero stay, a value that
// is too large becomes infinite, a NaN stays a NaN. Elements of equal dtypes are copied bit for bit.
void convert(const std::byte* source, Dtype source_dtype, std::byte* target, Dtype target_dtype, size_t count);

// The layout of weightd.v1.BundleLayout, as far as cutting and checking need it.
struct BundleShape {
    std::vector<Encoding> parts;  // gate and up, or up; then down. Or a row of a table
    size_t hidden_size;           // values of a part
    size_t stride_bytes;
    size_t bundles_per_cell;
    size_t cell_bytes;

    size_t part_bytes(size_t part) const { return parts[part].bytes_of(hidden_size); }
    size_t part_offset_bytes(size_t part) const {
        size_t offset = 0;
        for (size_t i = 0; i < part; i++) offset += part_bytes(i);
        return offset;
    }
    size_t bundle_bytes() const { return part_offset_bytes(parts.size()); }
    size_t cells(size_t bundles) const { return (bundles + bundles_per_cell - 1) / bundles_per_cell; }
    size_t offset_bytes(size_t position) const {
        return position / bundles_per_cell * cell_bytes + position % bundles_per_cell * stride_bytes;
    }
};

// No published model interleaves more than two matrices column by column.
inline constexpr size_t COLUMN_STEP_MAX = 8;

// A matrix that holds one part of a run of neurons: a row or a column of each.
struct PartMatrix {
    const std::byte* data;
    Dtype dtype;
    bool columns;  // the values are columns, already in the dtype of a part that is plain
    size_t width;  // values of a row of the matrix
    size_t first;  // row or column of the run's first neuron
    size_t step;   // rows or columns from one neuron to the next; of columns at most COLUMN_STEP_MAX
};

// Cuts a run of checksums.size() neurons, whose parts lie in `parts`, into `cells`, which starts with the first of them
// and holds cells(checksums.size()) cells. Zeroes the padding. Of columns, whole steps are read: the matrix has them.
// Returns what quantising has changed. std::invalid_argument for a part that is neither plain F32, BF16 or F16 nor in
// whole blocks of a format with a quantiser; UnquantisableValue.
QuantisationError cut_bundles(const BundleShape& shape, std::span<const PartMatrix> parts, std::byte* cells,
                              std::span<uint64_t> checksums);

}  // namespace weightd
