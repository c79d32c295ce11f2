// Dtypes and encodings for C++: those of encodings.py that C++ computes with, block formats (a test compares both
// tables with it), and weightd.v1.Encoding.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>

namespace weightd {

enum class Dtype : uint8_t { f32, bf16, f16, i8 };

struct DtypeRecord {
    std::string_view name;  // as safetensors spells it
    size_t bytes;
};

inline constexpr DtypeRecord DTYPES[] = {{"F32", 4}, {"BF16", 2}, {"F16", 2}, {"I8", 1}};  // in the order of Dtype

constexpr size_t bytes_of(Dtype dtype) { return DTYPES[static_cast<size_t>(dtype)].bytes; }

constexpr std::optional<Dtype> dtype_named(std::string_view name) {
    for (size_t i = 0; i < std::size(DTYPES); i++) {
        if (DTYPES[i].name == name) return static_cast<Dtype>(i);
    }
    return std::nullopt;
}

// A dtype in which models are computed: COMPUTE_DTYPES of encodings.py. Throws std::invalid_argument.
inline Dtype compute_dtype_named(std::string_view name) {
    const std::optional<Dtype> dtype = dtype_named(name);
    if (dtype && *dtype != Dtype::i8) return *dtype;
    throw std::invalid_argument("unknown dtype '" + std::string(name) + "': want F32, BF16 or F16");
}

// Formats whose blocks hold their own scales: those of GGML, FP8 and NVFP4.
enum class BlockFormat : uint8_t {
    q8_0,
    q4_0,
    q4_1,
    iq4_nl,
    q5_0,
    q5_1,
    mxfp4,
    q2_k,
    q3_k,
    q4_k,
    q5_k,
    q6_k,
    iq4_xs,
    fp8_128,
    fp8_32,
    nvfp4_256,
    nvfp4_32
};

struct BlockRecord {
    std::string_view name;
    uint32_t values;
    uint32_t bytes;
};

inline constexpr BlockRecord BLOCK_FORMATS[] = {
    {"Q8_0", 32, 34},        {"Q4_0", 32, 18},    {"Q4_1", 32, 20},     {"IQ4_NL", 32, 18},    {"Q5_0", 32, 22},
    {"Q5_1", 32, 24},        {"MXFP4", 32, 17},   {"Q2_K", 256, 84},    {"Q3_K", 256, 110},    {"Q4_K", 256, 144},
    {"Q5_K", 256, 176},      {"Q6_K", 256, 210},  {"IQ4_XS", 256, 136}, {"FP8_128", 128, 132}, {"FP8_32", 32, 36},
    {"NVFP4_256", 256, 148}, {"NVFP4_32", 32, 22}};  // in the order of BlockFormat

// Neurons of a slab. Fewer would make rows of down too short for vectors; the most are those of the largest block.
inline constexpr size_t SLAB_NEURONS_MIN = 32, SLAB_NEURONS_MAX = 256;
static_assert(std::ranges::all_of(BLOCK_FORMATS, [](const BlockRecord& record) {
    return record.values >= SLAB_NEURONS_MIN && record.values <= SLAB_NEURONS_MAX;
}));

enum class Scales : uint8_t { none, in_block, after_values };

struct Encoding {
    std::string format;
    uint32_t block_values = 1;
    uint32_t block_bytes = 0;
    Scales scales = Scales::none;

    // Of numbers that are stored one by one; none for an encoding in blocks and for a dtype that C++ does not know.
    std::optional<Dtype> plain() const {
        const std::optional<Dtype> dtype = dtype_named(format);
        const bool alone = block_values == 1 && scales == Scales::none;
        return dtype && alone && block_bytes == weightd::bytes_of(*dtype) ? dtype : std::nullopt;
    }
    // Of numbers in blocks that C++ knows; none for all others.
    std::optional<BlockFormat> block_format() const {
        for (size_t i = 0; i < std::size(BLOCK_FORMATS); i++) {
            const auto& [name, values, bytes] = BLOCK_FORMATS[i];
            if (format == name && block_values == values && block_bytes == bytes && scales == Scales::in_block) {
                return static_cast<BlockFormat>(i);
            }
        }
        return std::nullopt;
    }
    // Of `values` numbers, which must be whole blocks.
    size_t bytes_of(size_t values) const { return values / block_values * block_bytes; }
};

inline Encoding plain_encoding(Dtype dtype) {
    return {std::string(DTYPES[static_cast<size_t>(dtype)].name), 1, static_cast<uint32_t>(bytes_of(dtype))};
}

}  // namespace weightd
