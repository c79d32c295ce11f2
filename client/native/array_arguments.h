// What the bindings take as arrays: of one dtype, contiguous, in host memory, aligned to their elements, and never
// converted, so that what a kernel writes reaches its caller. Arrays of numpy and tensors of torch do, and what
// torch.utils.dlpack.to_dlpack() makes of a tensor, which is the fastest.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

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

// Every array goes through here before it is used: numpy makes arrays at any address.
template <typename Anything>
const Anything& aligned(const Anything& array, const char* name) {
    if (reinterpret_cast<uintptr_t>(array.data()) % array.itemsize() != 0) {
        throw std::invalid_argument(std::string(name) + " is not aligned to its elements");
    }
    return array;
}

}  // namespace flashclient
