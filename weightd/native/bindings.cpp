#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cerrno>
#include <stdexcept>
#include <system_error>

#include "block_size.h"
#include "bundle.h"

namespace nb = nanobind;

namespace {

// Flat, contiguous bytes in host memory: what np.frombuffer(buffer, np.uint8) gives.
using ReadBytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using WriteBytes = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using WriteChecksums = nb::ndarray<std::uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

const std::byte* data_of(const ReadBytes& bytes) { return reinterpret_cast<const std::byte*>(bytes.data()); }
std::byte* data_of(const WriteBytes& bytes) { return reinterpret_cast<std::byte*>(bytes.data()); }
std::span<const std::byte> span_of(const ReadBytes& bytes) { return {data_of(bytes), bytes.size()}; }

// A failed system call becomes OSError with errno and path; what() of our errors is "path: reason".
void translate_system_error(const std::exception_ptr& pointer, void*) {
    try {
        std::rethrow_exception(pointer);
    } catch (const std::system_error& error) {
        const std::string text = error.what();
        const std::string reason = ": " + error.code().message();
        const std::string path = text.substr(0, text.rfind(reason));
        nb::object arguments = nb::make_tuple(error.code().value(), error.code().message(), path);
        PyErr_SetObject(PyExc_OSError, arguments.ptr());
    }
}

void require(bool condition, const char* what) {
    if (!condition) throw std::invalid_argument(what);
}

void convert_bytes(const ReadBytes& source, const std::string& source_dtype, const WriteBytes& target,
                   const std::string& target_dtype) {
    const weightd::Dtype from = weightd::dtype_named(source_dtype);
    const weightd::Dtype to = weightd::dtype_named(target_dtype);
    const std::size_t count = source.size() / weightd::dtype_bytes(from);
    require(count * weightd::dtype_bytes(from) == source.size(), "source is not a whole number of elements");
    require(count * weightd::dtype_bytes(to) == target.size(), "source and target differ in elements");
    const nb::gil_scoped_release released;
    weightd::convert(data_of(source), from, data_of(target), to, count);
}

std::uint64_t checksum_bytes(const ReadBytes& bytes) {
    const nb::gil_scoped_release released;
    return weightd::checksum(span_of(bytes));
}

void checksum_bundles(const weightd::BundleShape& shape, const ReadBytes& cells, const WriteChecksums& checksums) {
    require(shape.cells(checksums.size()) * shape.cell_bytes <= cells.size(), "cells are too few for the checksums");
    const nb::gil_scoped_release released;
    for (std::size_t i = 0; i < checksums.size(); ++i)
        checksums.data()[i] = weightd::checksum({data_of(cells) + shape.offset_bytes(i), shape.bundle_bytes()});
}

void cut(const weightd::BundleShape& shape, const std::vector<ReadBytes>& rows, const std::vector<std::string>& dtypes,
         const ReadBytes& down, std::size_t first, const WriteBytes& cells, const WriteChecksums& checksums) {
    require(rows.size() == shape.row_parts && dtypes.size() == rows.size(), "row parts do not fit the shape");
    const std::size_t neurons = down.size() / shape.part_bytes();
    require(neurons * shape.part_bytes() == down.size(), "down matrix does not fit hidden_size");
    require(first + checksums.size() <= neurons, "neurons beyond the down matrix");
    require(shape.cells(checksums.size()) * shape.cell_bytes == cells.size(), "cells do not fit the bundles");
    std::vector<weightd::Rows> parts;
    for (std::size_t i = 0; i < rows.size(); ++i) {
        parts.push_back({data_of(rows[i]), weightd::dtype_named(dtypes[i])});
        require(rows[i].size() == checksums.size() * shape.hidden_size * weightd::dtype_bytes(parts[i].dtype),
                "rows do not fit the bundles");
    }
    const std::span<std::uint64_t> results(checksums.data(), checksums.size());
    const nb::gil_scoped_release released;
    weightd::cut_bundles(shape, parts, {data_of(down), neurons}, first, data_of(cells), results);
}

weightd::BundleShape make_shape(const std::string& dtype, std::size_t hidden_size, std::size_t row_parts,
                                std::size_t stride_bytes, std::size_t bundles_per_cell, std::size_t cell_bytes) {
    const weightd::BundleShape shape{
        weightd::dtype_named(dtype), hidden_size, row_parts, stride_bytes, bundles_per_cell, cell_bytes};
    require(row_parts == 1 || row_parts == 2, "row parts are gate and up, or up");
    require(hidden_size > 0 && bundles_per_cell > 0, "an empty bundle or cell");
    require(stride_bytes >= shape.bundle_bytes(), "stride is smaller than a bundle");
    require(cell_bytes >= shape.bundle_bytes() + (bundles_per_cell - 1) * stride_bytes, "cell is too small");
    return shape;
}

void bind_bundle(nb::module_& module) {
    nb::class_<weightd::BundleShape>(module, "BundleShape", "The layout of bundles in cells; sizes in bytes.")
        .def_static("make", &make_shape, nb::arg("dtype"), nb::arg("hidden_size"), nb::arg("row_parts"),
                    nb::arg("stride_bytes"), nb::arg("bundles_per_cell"), nb::arg("cell_bytes"));
    nb::class_<weightd::Checksum>(module, "Checksum", "XXH3-64 of bytes that come in pieces.")
        .def(nb::init<>())
        .def(
            "update",
            [](weightd::Checksum& self, const ReadBytes& bytes) {
                const nb::gil_scoped_release released;
                self.update(span_of(bytes));
            },
            nb::arg("bytes"))
        .def_prop_ro("value", &weightd::Checksum::value);
    module.def("checksum", &checksum_bytes, nb::arg("bytes"), "XXH3-64 of a uint8 array.");
    module.def("convert", &convert_bytes, nb::arg("source"), nb::arg("source_dtype"), nb::arg("target"),
               nb::arg("target_dtype"), "Converts elements between F32, BF16 and F16; both arrays are uint8.");
    module.def("cut_bundles", &cut, nb::arg("shape"), nb::arg("rows"), nb::arg("row_dtypes"), nb::arg("down"),
               nb::arg("first"), nb::arg("cells"), nb::arg("checksums"),
               "Cuts neurons [first, first + len(checksums)) into cells; arrays are uint8, checksums uint64.");
    module.def("checksum_bundles", &checksum_bundles, nb::arg("shape"), nb::arg("cells"), nb::arg("checksums"),
               "XXH3-64 of each bundle in cells (uint8) into checksums (uint64).");
    module.def("block_size_bytes", &weightd::block_size_bytes, nb::arg("path"),
               nb::call_guard<nb::gil_scoped_release>(),
               "Granularity of direct I/O where the file lies: max(4096, statx's alignment).");
}

}  // namespace

NB_MODULE(_native, module) {
    nb::register_exception_translator(translate_system_error);
    bind_bundle(module);
}
