// flashclient._native: the ring client for Python. Every call that can block runs without the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <span>
#include <system_error>
#include <vector>

#include "array_arguments.h"
#include "owned_array.h"
#include "ring/leases.h"
#include "ring/session.h"
#include "ring/sweep.h"

namespace nb = nanobind;
using namespace nb::literals;
using flashclient::aligned;
using flashclient::CellSource;
using flashclient::ChunkSource;
using flashclient::Leases;
using flashclient::owned_array;
using flashclient::require;
using flashclient::require_cells;
using flashclient::Session;
using flashclient::Sweep;
using flashclient::U32Array;

void bind_checksum(nb::module_& module);   // bindings_checksum.cpp
void bind_exact(nb::module_& module);      // bindings_exact.cpp
void bind_experts(nb::module_& module);    // bindings_experts.cpp
void bind_routers(nb::module_& module);    // bindings_routers.cpp
void bind_attention(nb::module_& module);  // bindings_attention.cpp
void bind_layers(nb::module_& module);     // bindings_layers.cpp
void bind_kernels(nb::module_& module);    // bindings_kernels.cpp
void bind_predict(nb::module_& module);    // bindings_predict.cpp
void bind_tables(nb::module_& module);     // bindings_tables.cpp

namespace {

constexpr double TIMEOUT_S_MAX = 1e6;

std::span<const uint32_t> span_of(const U32Array& cells) { return {aligned(cells, "cells").data(), cells.size()}; }

// The kernels check every address as well. This check fails earlier and says why.
void require_layout(uint32_t bundles_per_cell, uint32_t stride_bytes, uint32_t cell_bytes) {
    require(bundles_per_cell > 0 && stride_bytes > 0, "bundles_per_cell and stride_bytes must be positive");
    require(uint64_t{bundles_per_cell - 1} * stride_bytes < cell_bytes, "a cell must hold its bundles");
}

PyObject* corrupt_bundle = nullptr;  // the exception's type, which lives as long as the module

void translate(const std::exception_ptr& pointer, void*) {
    try {
        std::rethrow_exception(pointer);
    } catch (const std::system_error& error) {
        const nb::object arguments = nb::make_tuple(error.code().value(), error.what());
        PyErr_SetObject(PyExc_OSError, arguments.ptr());
    } catch (const flashclient::CorruptBundle& error) {
        nb::object raised = nb::borrow(corrupt_bundle)(error.what());
        raised.attr("layer") = error.layer;
        raised.attr("position") = error.position;
        raised.attr("why") = error.why;
        PyErr_SetObject(corrupt_bundle, raised.ptr());
    }
}

// Calls a method of Session, or of a source of chunks, while no other thread uses it. Called without the GIL.
template <auto method>
auto used(Session& session) {
    const auto use = session.use();
    return (session.*method)();
}

template <auto method, typename Source>
void used_source(Source& source) {
    const auto use = source.use();
    (source.*method)();
}

nb::object resident(const nb::handle_t<Session>& self) {
    const auto bytes = nb::cast<Session&>(self).resident();
    using Array = nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>;
    return nb::cast(Array(bytes.data(), {bytes.size()}, self));  // keeps the session alive
}

nb::object calibration(const nb::handle_t<Session>& self) {
    const auto bytes = nb::cast<Session&>(self).calibration();
    using Array = nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>>;
    return nb::cast(Array(bytes.data(), {bytes.size()}, self));
}

// Returns (position of the first bundle, addresses of all bundles), or None at the end of the layer. The bundles are
// valid until the next call.
nb::object next_chunk(ChunkSource& source, uint32_t layer) {
    uint32_t first_position = 0;
    std::vector<uint64_t> addresses;
    {
        const nb::gil_scoped_release released;
        const auto use = source.use();
        const ChunkSource::Bundles* chunk = source.next(layer);
        if (chunk != nullptr) {
            first_position = chunk->first_position;
            addresses = chunk->addresses;
        }
    }
    if (addresses.empty()) return nb::none();
    return nb::make_tuple(first_position, owned_array(std::move(addresses)));
}

size_t acquire_cells(Session& session, uint32_t layer, const U32Array& cells) {
    const auto asked = span_of(cells);
    const nb::gil_scoped_release released;
    const auto use = session.use();
    session.acquire(layer, flashclient::ring::CELLS, asked, 0);
    std::vector<flashclient::ring::Grant> grants;
    while (grants.size() < asked.size()) session.take_grants(grants, true);
    size_t granted = 0;
    for (const auto& grant : grants) granted += Session::status(grant) == flashclient::ring::GRANTED;
    return granted;
}

void release_cells(Session& session, uint32_t layer, const U32Array& cells) {
    const auto held = span_of(cells);
    const nb::gil_scoped_release released;
    const auto use = session.use();
    session.release(layer, flashclient::ring::CELLS, held);
}

std::span<const uint8_t> bytes_of(const nb::bytes& token) {
    return {static_cast<const uint8_t*>(token.data()), token.size()};
}

void attach(Session& session, const std::string& data_socket, const nb::bytes& token) {
    const auto bytes = bytes_of(token);
    const nb::gil_scoped_release released;
    const auto use = session.use();
    session.attach(data_socket, bytes);
}

void bind_session(nb::module_& module) {
    nb::exception<flashclient::SessionLost>(module, "SessionLost", PyExc_ConnectionError);
    nb::exception<flashclient::NoAnswer>(module, "NoAnswer", PyExc_TimeoutError);
    nb::exception<flashclient::WrongProcess>(module, "WrongProcess", PyExc_RuntimeError);
    nb::object bundle = nb::exception<flashclient::CorruptBundle>(module, "CorruptBundle", PyExc_RuntimeError);
    bundle.attr("layer") = 0;
    bundle.attr("position") = 0;
    bundle.attr("why") = "";
    corrupt_bundle = bundle.ptr();
    nb::class_<Session>(module, "Session", "One attachment to weightd's data socket.")
        .def(
            "__init__",
            [](Session* self, const std::string& data_socket, const nb::bytes& token, double timeout_s) {
                const auto bytes = bytes_of(token);
                require(timeout_s > 0 && timeout_s <= TIMEOUT_S_MAX, "timeout_s must be positive and at most 1e6");
                const nb::gil_scoped_release released;
                new (self) Session(data_socket, bytes, timeout_s);
            },
            "data_socket"_a, "token"_a, "timeout_s"_a)
        .def("attach", &attach, "data_socket"_a, "token"_a,
             "Opens another session of the same model in place of this one; nothing is leased then.")
        .def_prop_ro("resident", &resident, nb::for_getter(nb::sig("def resident(self, /) -> NDArray[numpy.uint8]")),
                     "resident.safetensors as uint8[bytes], private and writable")
        .def_prop_ro("calibration", &calibration,
                     nb::for_getter(nb::sig("def calibration(self, /) -> NDArray[numpy.uint8]")),
                     "predictors.safetensors as uint8[bytes], read-only; empty for a model without")
        .def_prop_ro(
            "counters",
            [](Session& session) {
                const nb::gil_scoped_release released;
                const flashclient::SessionCounters counted = used<&Session::counters>(session);
                return std::make_tuple(counted.hits, counted.misses, counted.read_bytes, counted.prefetched,
                                       counted.prefetched_used);
            },
            "hits, misses, bytes read from flash, and cells prefetched and of those used, of this session and of those "
            "that it replaced")
        .def("acquire", &acquire_cells, "layer"_a, "cells"_a.noconvert(),
             "Leases cells and waits; returns how many were granted.")
        .def("release", &release_cells, "layer"_a, "cells"_a.noconvert())
        .def("require_alive", &used<&Session::require_alive>, nb::call_guard<nb::gil_scoped_release>())
        .def("close", &Session::close, nb::call_guard<nb::gil_scoped_release>(),
             "Ends the session for good, from any thread; only the resident weights stay mapped.");
}

void bind_sweep(nb::module_& module) {
    nb::class_<ChunkSource>(module, "ChunkSource", "Gives out all bundles of a layer, chunk after chunk.")
        .def("next", &next_chunk, "layer"_a,
             nb::sig("def next(self, layer: int) -> tuple[int, NDArray[numpy.uint64]] | None"))
        .def("leave", &used_source<&ChunkSource::leave, ChunkSource>, nb::call_guard<nb::gil_scoped_release>(),
             "The next layer begins at its start, also if this one is not at its end.");
    nb::class_<Sweep, ChunkSource>(module, "Sweep", "A walk through all bundles, layer after layer, round and round.")
        .def(
            "__init__",
            [](Sweep* self, Session& session, uint32_t bundles_per_cell, uint32_t stride_bytes, uint32_t cell_bytes,
               std::vector<uint32_t> bundles) {
                require_layout(bundles_per_cell, stride_bytes, cell_bytes);
                require_cells(bundles);
                require(!bundles.empty() && std::find(bundles.begin(), bundles.end(), 0U) == bundles.end(),
                        "a model has at least one layer, and each layer at least one neuron");
                new (self) Sweep(session, {bundles_per_cell, stride_bytes, cell_bytes, std::move(bundles)});
            },
            "session"_a, "bundles_per_cell"_a, "stride_bytes"_a, "cell_bytes"_a, "bundles"_a, nb::keep_alive<1, 2>())
        .def("idle", &used_source<&Sweep::idle, Sweep>, nb::call_guard<nb::gil_scoped_release>(),
             "Gives everything back.")
        .def("forget", &used_source<&Sweep::forget, Sweep>, nb::call_guard<nb::gil_scoped_release>(),
             "The session was replaced: nothing is leased or on its way.");
}

void bind_leases(nb::module_& module) {
    nb::class_<Leases, CellSource>(module, "Leases", "The cells that a session leases one by one.")
        .def(
            "__init__",
            [](Leases* self, Session& session, Sweep& sweep, uint32_t bundles_per_cell, uint32_t cell_bytes) {
                require_layout(bundles_per_cell, 1, cell_bytes);
                require(&sweep.session() == &session, "the sweep must be of the same session");
                new (self) Leases(session, sweep, bundles_per_cell, cell_bytes);
            },
            "session"_a, "sweep"_a, "bundles_per_cell"_a, "cell_bytes"_a, nb::keep_alive<1, 2>(),
            nb::keep_alive<1, 3>())
        .def("forget", &Leases::forget, nb::call_guard<nb::gil_scoped_release>(),
             "The session was replaced: nothing is leased or on its way.");
}

}  // namespace

NB_MODULE(_native, module) {
    // Tensors view resident weights, and a client that a script never closes outlives this module.
    nb::set_leak_warnings(false);
    bind_session(module);
    nb::register_exception_translator(&translate);  // the last is asked first: it gives CorruptBundle its parts
    bind_sweep(module);
    bind_checksum(module);
    bind_kernels(module);
    bind_exact(module);
    bind_attention(module);
    bind_layers(module);
    bind_predict(module);
    bind_experts(module);
    bind_routers(module);
    bind_tables(module);
    bind_leases(module);
}
