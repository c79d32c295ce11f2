// The arrays that the bindings take: of one dtype, contiguous, in host memory and aligned to their elements. They are
// never converted, so what a kernel writes reaches the caller. numpy arrays, torch tensors and the capsules of
// torch.utils.dlpack.to_dlpack() are accepted; capsules are the fastest.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace flashclient {

template <typename T, size_t dimensions>
using Array = nanobind::ndarray<T, nanobind::ndim<dimensions>, nanobind::c_contig, nanobind::device::cpu>;
using U16Array = Array<const uint16_t, 1>;
using U32Array = Array<const uint32_t, 1>;
using U64Array = Array<const uint64_t, 1>;

inline void require(bool condition, const std::string& what) {
    if (!condition) throw std::invalid_argument(what);
}

inline void require(bool condition, const char* what) {
    if (!condition) throw std::invalid_argument(what);
}

inline constexpr uint32_t CELLS_MAX = 1U << 26;  // of a model: the tables have an entry for each

inline void require_cells(const std::vector<uint32_t>& cells) {
    uint64_t sum = 0;
    for (const uint32_t count : cells) sum += count;
    require(sum <= CELLS_MAX, "a model has at most 67108864 cells");
}

// Checks an array before it is used: numpy makes arrays at any address.
template <typename Anything>
const Anything& aligned(const Anything& array, const char* name) {
    if (reinterpret_cast<uintptr_t>(array.data()) % array.itemsize() != 0) {
        throw std::invalid_argument(std::string(name) + " is not aligned to its elements");
    }
    return array;
}

}  // namespace flashclient
