// The store's checksum, for what a client publishes into it.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace nb = nanobind;
using namespace nb::literals;

void bind_checksum(nb::module_& module);

void bind_checksum(nb::module_& module) {
    using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
    module.def(
        "checksum",
        [](const Bytes& bytes) {
            const nb::gil_scoped_release released;
            return static_cast<uint64_t>(XXH3_64bits(bytes.data(), bytes.size()));
        },
        "bytes"_a.noconvert(), "XXH3-64, the checksum of everything in a store.");
}
