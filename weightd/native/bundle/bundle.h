// Bundles: cut from the matrices of an FFN, converted, checksummed.
//
// A bundle is [row of each row part][column of the down matrix], hidden_size elements each, in the bundle dtype,
// little endian. Bundles lie in cells: at every stride_bytes while a cell has room, the next cell cell_bytes on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace weightd {

enum class Dtype : std::uint8_t { f32, bf16, f16 };

// Of safetensors' spelling F32, BF16 or F16; std::invalid_argument for any other.
Dtype dtype_named(const std::string& name);
std::size_t dtype_bytes(Dtype dtype);

// `count` elements of `source` into `target`, which may not overlap it. Rounds to nearest even; infinities and the
// sign of zero stay, what is too large becomes infinite, a NaN stays a NaN. Equal dtypes: bit for bit.
void convert(const std::byte* source, Dtype source_dtype, std::byte* target, Dtype target_dtype, std::size_t count);

// The layout of weightd.v1.BundleLayout, as far as cutting needs it.
struct BundleShape {
    Dtype dtype;
    std::size_t hidden_size;  // elements of a part
    std::size_t row_parts;    // 2: gate and up, 1: up
    std::size_t stride_bytes;
    std::size_t bundles_per_cell;
    std::size_t cell_bytes;

    std::size_t part_bytes() const { return hidden_size * dtype_bytes(dtype); }
    std::size_t bundle_bytes() const { return (row_parts + 1) * part_bytes(); }
    std::size_t cells(std::size_t bundles) const { return (bundles + bundles_per_cell - 1) / bundles_per_cell; }
    std::size_t offset_bytes(std::size_t position) const {
        return position / bundles_per_cell * cell_bytes + position % bundles_per_cell * stride_bytes;
    }
};

// A run of neurons of a row part: rows of hidden_size elements.
struct Rows {
    const std::byte* data;
    Dtype dtype;
};

// The whole down matrix, hidden_size x neurons, already in the bundle dtype.
struct DownMatrix {
    const std::byte* data;
    std::size_t neurons;
};

// Cuts neurons [first, first + checksums.size()) of `down`, whose rows are `rows` (one entry per row part), into
// `cells`, which starts with the first of them and holds cells(checksums.size()) cells. Padding is zeroed.
void cut_bundles(const BundleShape& shape, std::span<const Rows> rows, DownMatrix down, std::size_t first,
                 std::byte* cells, std::span<std::uint64_t> checksums);

}  // namespace weightd
