// flashclient._native: the ring client for Python. Every call that can block runs without the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <system_error>

#include "session.h"
#include "sweep.h"

namespace nb = nanobind;
using namespace nb::literals;
using flashclient::Session;
using flashclient::Sweep;

void bind_checksum(nb::module_& module);  // bindings_checksum.cpp
void bind_kernels(nb::module_& module);  // bindings_kernels.cpp

namespace {

using U32Array = nb::ndarray<const uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void translate(const std::exception_ptr& pointer, void*) {
    try {
        std::rethrow_exception(pointer);
    } catch (const std::system_error& error) {
        const nb::object arguments = nb::make_tuple(error.code().value(), error.what());
        PyErr_SetObject(PyExc_OSError, arguments.ptr());
    }
}

nb::object resident(const nb::handle_t<Session>& self) {
    const auto bytes = nb::cast<Session&>(self).resident();
    using Array = nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>;
    return nb::cast(Array(bytes.data(), {bytes.size()}, self));  // keeps the session alive
}

// (position of the first bundle, addresses of all of them), or None at the layer's end. The array is a view of the
// sweep's own memory and, like the bundles, valid until the next call.
nb::object next_chunk(const nb::handle_t<Sweep>& self, uint32_t layer) {
    auto& sweep = nb::cast<Sweep&>(self);
    const Sweep::Chunk* chunk = nullptr;
    {
        const nb::gil_scoped_release released;
        chunk = sweep.next(layer);
    }
    if (chunk == nullptr) return nb::none();
    using Array = nb::ndarray<nb::numpy, const uint64_t, nb::ndim<1>>;
    return nb::make_tuple(chunk->first_position, Array(chunk->addresses.data(), {chunk->addresses.size()}, self));
}

size_t acquire_cells(Session& session, uint32_t layer, const U32Array& cells) {
    const nb::gil_scoped_release released;
    session.acquire(layer, flashclient::ring::CELLS, std::span(cells.data(), cells.size()), 0);
    std::vector<flashclient::ring::Grant> grants;
    while (grants.size() < cells.size()) session.take_grants(grants, true);
    size_t granted = 0;
    for (const auto& grant : grants) granted += Session::status(grant) == flashclient::ring::GRANTED;
    return granted;
}

void release_cells(Session& session, uint32_t layer, const U32Array& cells) {
    const nb::gil_scoped_release released;
    session.release(layer, flashclient::ring::CELLS, std::span(cells.data(), cells.size()));
}

void bind_session(nb::module_& m) {
    nb::exception<flashclient::SessionLost>(m, "SessionLost", PyExc_ConnectionError);
    nb::exception<flashclient::WrongProcess>(m, "WrongProcess", PyExc_RuntimeError);
    nb::exception<flashclient::CorruptBundle>(m, "CorruptBundle", PyExc_RuntimeError);
    nb::class_<Session>(m, "Session", "One attachment to weightd's data socket.")
        .def(
            "__init__",
            [](Session* self, const std::string& data_socket, const nb::bytes& token, double timeout_s) {
                const std::span bytes(static_cast<const uint8_t*>(token.data()), token.size());
                const nb::gil_scoped_release released;
                new (self) Session(data_socket, bytes, timeout_s);
            },
            "data_socket"_a, "token"_a, "timeout_s"_a)
        .def_prop_ro("resident", &resident, nb::for_getter(nb::sig("def resident(self, /) -> NDArray[numpy.uint8]")),
                     "resident.safetensors as uint8[bytes], private and writable")
        .def_prop_ro("share_slots", &Session::share_slots)
        .def("acquire", &acquire_cells, "layer"_a, "cells"_a, "Leases cells and waits; returns how many were granted.")
        .def("release", &release_cells, "layer"_a, "cells"_a)
        .def("require_alive", &Session::require_alive)
        .def("close", &Session::close, "Ends it; only the resident weights stay mapped.");
    nb::class_<Sweep>(m, "Sweep", "A walk through all bundles, layer after layer, round and round.")
        .def(
            "__init__",
            [](Sweep* self, Session& session, uint32_t bundles_per_cell, uint32_t stride_bytes, uint32_t cell_bytes,
               std::vector<uint32_t> neurons) {
                new (self) Sweep(session, {bundles_per_cell, stride_bytes, cell_bytes, std::move(neurons)});
            },
            "session"_a, "bundles_per_cell"_a, "stride_bytes"_a, "cell_bytes"_a, "neurons"_a, nb::keep_alive<1, 2>())
        .def("next", &next_chunk, "layer"_a,
             nb::sig("def next(self, layer: int) -> tuple[int, NDArray[numpy.uint64]] | None"))
        .def("idle", &Sweep::idle, nb::call_guard<nb::gil_scoped_release>(), "Gives everything back.")
        .def_prop_ro(
            "wait_s", [](const Sweep& sweep) { return sweep.times().wait_s; }, "seconds spent waiting")
        .def_prop_ro(
            "cells", [](const Sweep& sweep) { return sweep.times().cells; }, "cells answered");
}

}  // namespace

NB_MODULE(_native, m) {
    nb::register_exception_translator(&translate);
    bind_session(m);
    bind_checksum(m);
    bind_kernels(m);
}
