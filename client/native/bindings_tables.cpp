// flashclient._native: lookups in tables for Python. See client/native/tables/.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "array_arguments.h"
#include "tables/row_copy.h"

namespace nb = nanobind;
using namespace nb::literals;
using flashclient::aligned;
using flashclient::Array;
using flashclient::CellWalk;
using flashclient::require;

namespace {

void copy_rows(CellWalk& walk, const Array<const int64_t, 1>& rows, const Array<uint8_t, 2>& out) {
    require(out.shape(0) == rows.size() && out.shape(1) > 0, "out must have a row for each of rows");
    if (rows.size() == 0) return;  // an empty array may have no address
    std::vector<uint32_t> numbers(rows.size());
    for (size_t i = 0; i < numbers.size(); i++) {
        const int64_t row = aligned(rows, "rows").data()[i];
        require(row >= 0 && row <= std::numeric_limits<uint32_t>::max(), "a row is numbered with 32 bits");
        numbers[i] = static_cast<uint32_t>(row);
    }
    const nb::gil_scoped_release released;
    const auto use = walk.use();
    flashclient::copy_rows(walk, numbers, out.shape(1), reinterpret_cast<std::byte*>(out.data()));
}

}  // namespace

void bind_tables(nb::module_& module) {
    module.def("copy_rows", &copy_rows, "walk"_a, "rows"_a.noconvert(), "out"_a.noconvert(),
               "Copies these rows of a table, int64 [rows], to out, uint8 [rows, bytes of a row].");
}
