#include "bundle/bundle.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>

#include "bundle/half_precision.h"
#include "device/checksum.h"

namespace weightd {

static_assert(std::endian::native == std::endian::little, "the store is little endian and read in place");

namespace {

float widen_bf16(uint16_t half) { return std::bit_cast<float>(static_cast<uint32_t>(half) << 16); }

uint16_t narrow_bf16(float value) {
    const auto bits = std::bit_cast<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
    const uint32_t quiet_nan = (bits >> 16) | 0x40U;  // rounding could carry a NaN into infinity
    return static_cast<uint16_t>((bits & 0x7fffffffU) > 0x7f800000U ? quiet_nan : rounded);
}

struct F32 {
    using Bits = float;
    static float widen(Bits bits) { return bits; }
    static Bits narrow(float value) { return value; }
};
struct Bf16 {
    using Bits = uint16_t;
    static float widen(Bits bits) { return widen_bf16(bits); }
    static Bits narrow(float value) { return narrow_bf16(value); }
};
struct F16 {
    using Bits = uint16_t;
    static float widen(Bits bits) { return widen_f16(bits); }
    static Bits narrow(float value) { return narrow_f16(value); }
};

template <typename Source, typename Target>
void convert_elements(const std::byte* source_bytes, std::byte* target_bytes, size_t count) {
    for (size_t i = 0; i < count; i++) {  // memcpy: tensors of a file need not be aligned
        typename Source::Bits bits;
        std::memcpy(&bits, source_bytes + i * sizeof(bits), sizeof(bits));
        const typename Target::Bits narrowed = Target::narrow(Source::widen(bits));
        std::memcpy(target_bytes + i * sizeof(narrowed), &narrowed, sizeof(narrowed));
    }
}

[[noreturn]] void refuse_dtype(Dtype dtype) {
    throw std::invalid_argument("no conversion from or to " + plain_encoding(dtype).format);
}

template <typename Source>
void convert_from(const std::byte* source, std::byte* target, Dtype target_dtype, size_t count) {
    switch (target_dtype) {
        case Dtype::f32:
            return convert_elements<Source, F32>(source, target, count);
        case Dtype::bf16:
            return convert_elements<Source, Bf16>(source, target, count);
        case Dtype::f16:
            return convert_elements<Source, F16>(source, target, count);
        case Dtype::i8:
            break;
    }
    refuse_dtype(target_dtype);
}

// Square blocks of 16-byte vectors, transposed by log2(LANES) rounds that interleave row i with row i + LANES / 2.
template <typename Element>
struct Block {
    static constexpr size_t LANES = 16 / sizeof(Element);
    typedef Element Vector __attribute__((vector_size(16)));

    static Vector low(Vector a, Vector b) {
        if constexpr (LANES == 4) return __builtin_shufflevector(a, b, 0, 4, 1, 5);
        if constexpr (LANES == 8) return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    }
    static Vector high(Vector a, Vector b) {
        if constexpr (LANES == 4) return __builtin_shufflevector(a, b, 2, 6, 3, 7);
        if constexpr (LANES == 8) return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
    }

    // Column i of the block goes to targets[i] + offset_bytes; source_stride is in bytes.
    static void transpose(const std::byte* source, size_t source_stride, std::byte* const* targets,
                          size_t offset_bytes) {
        Vector rows[LANES];
        for (size_t i = 0; i < LANES; i++) std::memcpy(&rows[i], source + i * source_stride, 16);
        for (size_t round = 1; round < LANES; round *= 2) {
            Vector mixed[LANES];
            for (size_t i = 0; i < LANES / 2; i++) {
                mixed[2 * i] = low(rows[i], rows[i + LANES / 2]);
                mixed[2 * i + 1] = high(rows[i], rows[i + LANES / 2]);
            }
            std::memcpy(rows, mixed, sizeof(rows));
        }
        for (size_t i = 0; i < LANES; i++) std::memcpy(targets[i] + offset_bytes, &rows[i], 16);
    }
};

// A neuron group is this wide in a matrix whose columns are cut: whole cache lines are used once fetched, and the
// bundles of a group stay in the second-level cache until they are checksummed.
constexpr size_t GROUP_BYTES = 64;
constexpr size_t GROUP_MAX = GROUP_BYTES / 2;  // neurons

template <typename Element>
void copy_columns_one_by_one(const std::byte* matrix, size_t row_bytes, size_t row_begin, size_t row_end,
                             size_t columns, std::byte* const* targets) {
    for (size_t row = row_begin; row < row_end; row++) {
        for (size_t column = 0; column < columns; column++) {
            std::memcpy(targets[column] + row * sizeof(Element), matrix + row * row_bytes + column * sizeof(Element),
                        sizeof(Element));
        }
    }
}

// The columns of a group, each to where targets[column] points; `matrix` points at the group's first column.
template <typename Element>
void copy_columns(const std::byte* matrix, size_t row_bytes, size_t rows, size_t columns, std::byte* const* targets) {
    constexpr size_t LANES = Block<Element>::LANES;
    size_t row = 0;
    for (; columns % LANES == 0 && row + LANES <= rows; row += LANES) {
        for (size_t column = 0; column < columns; column += LANES) {
            Block<Element>::transpose(matrix + row * row_bytes + column * sizeof(Element), row_bytes, targets + column,
                                      row * sizeof(Element));
        }
    }
    copy_columns_one_by_one<Element>(matrix, row_bytes, row, rows, columns, targets);
}

BlockFormat quantised_format(const Encoding& encoding, size_t values) {
    const auto format = encoding.block_format();
    if (!format || !has_quantiser(*format) || values % encoding.block_values != 0) {
        throw std::invalid_argument("cannot cut parts of encoding " + encoding.format);
    }
    return *format;
}

class Cutter {
  public:
    Cutter(const BundleShape& shape, std::span<const PartMatrix> parts, std::byte* cells)
        : shape_(shape), parts_(parts), cells_(cells), unwanted_(shape.hidden_size * sizeof(float)) {
        for (size_t part = 0; part < shape.parts.size(); part++) {
            targets_.push_back({shape.part_offset_bytes(part), shape.parts[part].plain(), {}});
            if (!targets_[part].dtype) targets_[part].format = quantised_format(shape.parts[part], shape.hidden_size);
        }
        for (const PartMatrix& part : parts) {
            if (part.columns) column_bytes_ = std::max(column_bytes_, bytes_of(part.dtype));
        }
        if (std::any_of(targets_.begin(), targets_.end(), [](const Target& target) { return !target.dtype; })) {
            gathered_.resize(GROUP_MAX * shape.hidden_size * sizeof(float));
            wide_.resize(shape.hidden_size);
        }
    }

    size_t group() const { return GROUP_BYTES / column_bytes_; }

    // Bundles [begin, end) of this run, at most GROUP_MAX.
    void cut_group(size_t begin, size_t end) {
        for (size_t part = 0; part < parts_.size(); part++) {
            if (parts_[part].columns) {
                cut_columns(part, begin, end);
            } else {
                cut_rows(part, begin, end);
            }
        }
    }

    uint64_t finish(size_t index) const {
        std::byte* start = bundle(index);
        const bool last_of_cell = (index + 1) % shape_.bundles_per_cell == 0;
        const size_t room = last_of_cell ? shape_.cell_bytes - (index % shape_.bundles_per_cell) * shape_.stride_bytes
                                         : shape_.stride_bytes;
        std::memset(start + shape_.bundle_bytes(), 0, room - shape_.bundle_bytes());
        return checksum({start, shape_.bundle_bytes()});
    }

    const QuantisationError& error() const { return error_; }

  private:
    struct Target {  // of a part
        size_t offset_bytes;
        std::optional<Dtype> dtype;  // none: it is quantised
        BlockFormat format;
    };

    std::byte* bundle(size_t index) const { return cells_ + shape_.offset_bytes(index); }

    void cut_rows(size_t part, size_t begin, size_t end) {
        const PartMatrix& rows = parts_[part];
        const size_t row_bytes = rows.width * bytes_of(rows.dtype);
        for (size_t i = begin; i < end; i++) {
            put(rows.data + (rows.first + i * rows.step) * row_bytes, rows.dtype, part, i);
        }
    }

    // Writes hidden_size values as a part of bundle i.
    void put(const std::byte* values, Dtype dtype, size_t part, size_t i) {
        const Target& target = targets_[part];
        std::byte* out = bundle(i) + target.offset_bytes;
        if (target.dtype) return convert(values, dtype, out, *target.dtype, shape_.hidden_size);
        convert(values, dtype, reinterpret_cast<std::byte*>(wide_.data()), Dtype::f32, shape_.hidden_size);
        try {
            quantise(target.format, wide_.data(), shape_.hidden_size, out, error_);
        } catch (const UnquantisableValue& error) {
            throw UnquantisableValue(error.what(), i);
        }
    }

    // The columns between those of interleaved parts are copied, too: to memory that nobody reads. Those of a quantised
    // part become rows first.
    void cut_columns(size_t part, size_t begin, size_t end) {
        const PartMatrix& columns = parts_[part];
        const size_t element_bytes = bytes_of(columns.dtype), column_bytes = shape_.hidden_size * element_bytes;
        const size_t phase = columns.first % columns.step;
        const size_t count = (end - begin) * columns.step;
        const Target& target = targets_[part];
        std::byte* targets[GROUP_MAX * COLUMN_STEP_MAX];
        for (size_t i = 0; i < count; i++) {
            const size_t neuron = i / columns.step;
            std::byte* wanted =
                target.dtype ? bundle(begin + neuron) + target.offset_bytes : gathered_.data() + neuron * column_bytes;
            targets[i] = i % columns.step == phase ? wanted : unwanted_.data();
        }
        const size_t first = columns.first - phase + begin * columns.step;
        const auto copy = element_bytes == 2 ? copy_columns<uint16_t> : copy_columns<uint32_t>;
        copy(columns.data + first * element_bytes, columns.width * element_bytes, shape_.hidden_size, count, targets);
        if (target.dtype) return;
        for (size_t i = begin; i < end; i++) put(gathered_.data() + (i - begin) * column_bytes, columns.dtype, part, i);
    }

    const BundleShape& shape_;
    std::span<const PartMatrix> parts_;
    std::byte* cells_;
    std::vector<Target> targets_;  // by part
    size_t column_bytes_ = 2;      // of the widest element in a column
    std::vector<std::byte> unwanted_;
    std::vector<std::byte> gathered_;  // columns of a group
    std::vector<float> wide_;          // values that are quantised next
    QuantisationError error_;
};

}  // namespace

void convert(const std::byte* source, Dtype source_dtype, std::byte* target, Dtype target_dtype, size_t count) {
    if (source_dtype == target_dtype) {
        std::memcpy(target, source, count * bytes_of(source_dtype));
        return;
    }
    switch (source_dtype) {
        case Dtype::f32:
            return convert_from<F32>(source, target, target_dtype, count);
        case Dtype::bf16:
            return convert_from<Bf16>(source, target, target_dtype, count);
        case Dtype::f16:
            return convert_from<F16>(source, target, target_dtype, count);
        case Dtype::i8:
            break;
    }
    refuse_dtype(source_dtype);
}

QuantisationError cut_bundles(const BundleShape& shape, std::span<const PartMatrix> parts, std::byte* cells,
                              std::span<uint64_t> checksums) {
    const size_t count = checksums.size();
    Cutter cutter(shape, parts, cells);
    const size_t group = cutter.group();
    // The last cell may hold fewer bundles than fit; what is left of it is zero.
    if (count % shape.bundles_per_cell != 0) {
        const size_t used = shape.offset_bytes(count);
        std::memset(cells + used, 0, shape.cells(count) * shape.cell_bytes - used);
    }
    for (size_t begin = 0; begin < count; begin += group) {
        const size_t end = begin + group < count ? begin + group : count;
        cutter.cut_group(begin, end);
        for (size_t i = begin; i < end; i++) checksums[i] = cutter.finish(i);
    }
    return cutter.error();
}

}  // namespace weightd
