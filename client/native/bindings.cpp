// flashclient._native: the ring client for Python. Every call that can block runs without the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <span>
#include <stdexcept>
#include <system_error>
#include <vector>

#include "array_arguments.h"
#include "owned_array.h"
#include "ring/leases.h"
#include "ring/session.h"
#include "ring/sweep.h"
#include "ring/window.h"

namespace nb = nanobind;
using namespace nb::literals;
using flashclient::aligned;
using flashclient::Array;
using flashclient::Leases;
using flashclient::owned_array;
using flashclient::require;
using flashclient::Session;
using flashclient::Sweep;
using flashclient::U16Array;
using flashclient::U32Array;
using flashclient::U64Array;
using flashclient::Window;

void bind_checksum(nb::module_& module);  // bindings_checksum.cpp
void bind_kernels(nb::module_& module);   // bindings_kernels.cpp

namespace {

constexpr uint32_t CELLS_MAX = 1U << 26;      // of a model: the tables have an entry for each
constexpr uint32_t WINDOW_TOKENS_MAX = 4096;  // far below what their counters hold
constexpr double TIMEOUT_S_MAX = 1e6;

std::span<const uint32_t> span_of(const U32Array& cells) { return {aligned(cells, "cells").data(), cells.size()}; }

// Every kernel checks the addresses that come of these; here a wrong one is told before it is asked for.
void require_layout(uint32_t bundles_per_cell, uint32_t stride_bytes, uint32_t cell_bytes) {
    require(bundles_per_cell > 0 && stride_bytes > 0, "bundles_per_cell and stride_bytes must be positive");
    require(uint64_t{bundles_per_cell - 1} * stride_bytes < cell_bytes, "a cell must hold its bundles");
}

void require_cells(const std::vector<uint32_t>& cells) {
    uint64_t sum = 0;
    for (const uint32_t count : cells) sum += count;
    require(sum <= CELLS_MAX, "a model has at most 67108864 cells");
}

void translate(const std::exception_ptr& pointer, void*) {
    try {
        std::rethrow_exception(pointer);
    } catch (const std::system_error& error) {
        const nb::object arguments = nb::make_tuple(error.code().value(), error.what());
        PyErr_SetObject(PyExc_OSError, arguments.ptr());
    }
}

// A method of Session, and one of what leases over it, while nobody else uses the session. Without the GIL.
template <auto method>
auto used(Session& session) {
    const auto use = session.use();
    return (session.*method)();
}

template <auto method, typename Leasing>
auto used_session(Leasing& leasing) {
    const auto use = leasing.session().use();
    return (leasing.*method)();
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

// (position of the first bundle, addresses of all of them), or None at the layer's end. The bundles are valid until the
// next call.
nb::object next_chunk(Sweep& sweep, uint32_t layer) {
    uint32_t first_position = 0;
    std::vector<uint64_t> addresses;
    {
        const nb::gil_scoped_release released;
        const auto use = sweep.session().use();
        const Sweep::Bundles* chunk = sweep.next(layer);
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

void bind_session(nb::module_& m) {
    nb::exception<flashclient::SessionLost>(m, "SessionLost", PyExc_ConnectionError);
    nb::exception<flashclient::NoAnswer>(m, "NoAnswer", PyExc_TimeoutError);
    nb::exception<flashclient::WrongProcess>(m, "WrongProcess", PyExc_RuntimeError);
    nb::exception<flashclient::CorruptBundle>(m, "CorruptBundle", PyExc_RuntimeError);
    nb::exception<flashclient::LeaseRefused>(m, "LeaseRefused", PyExc_RuntimeError);
    nb::class_<Session>(m, "Session", "One attachment to weightd's data socket.")
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
             "Opens another session of the same model in place of this one; nothing is held then.")
        .def_prop_ro("resident", &resident, nb::for_getter(nb::sig("def resident(self, /) -> NDArray[numpy.uint8]")),
                     "resident.safetensors as uint8[bytes], private and writable")
        .def_prop_ro("calibration", &calibration,
                     nb::for_getter(nb::sig("def calibration(self, /) -> NDArray[numpy.uint8]")),
                     "predictors.safetensors as uint8[bytes], read-only; empty for a model without")
        .def_prop_ro("share_slots", &Session::share_slots)
        .def_prop_ro("lease_limit", &used<&Session::lease_limit>, nb::call_guard<nb::gil_scoped_release>(),
                     "cells that may be held at once, now")
        .def_prop_ro(
            "counters",
            [](Session& session) {
                const nb::gil_scoped_release released;
                const flashclient::Counters counted = used<&Session::counters>(session);
                return std::make_tuple(counted.hits, counted.misses, counted.read_bytes);
            },
            "hits, misses and bytes read from flash, of this session and those before it in its place")
        .def("acquire", &acquire_cells, "layer"_a, "cells"_a.noconvert(),
             "Leases cells and waits; returns how many were granted.")
        .def("release", &release_cells, "layer"_a, "cells"_a.noconvert())
        .def("require_alive", &used<&Session::require_alive>, nb::call_guard<nb::gil_scoped_release>())
        .def("close", &Session::close, nb::call_guard<nb::gil_scoped_release>(),
             "Ends it for good, from any thread; only the resident weights stay mapped.");
}

void bind_sweep(nb::module_& m) {
    nb::class_<Sweep>(m, "Sweep", "A walk through all bundles, layer after layer, round and round.")
        .def(
            "__init__",
            [](Sweep* self, Session& session, uint32_t bundles_per_cell, uint32_t stride_bytes, uint32_t cell_bytes,
               std::vector<uint32_t> neurons) {
                require_layout(bundles_per_cell, stride_bytes, cell_bytes);
                require_cells(neurons);
                require(!neurons.empty() && std::find(neurons.begin(), neurons.end(), 0U) == neurons.end(),
                        "a model has layers, and each of them neurons");
                new (self) Sweep(session, {bundles_per_cell, stride_bytes, cell_bytes, std::move(neurons)});
            },
            "session"_a, "bundles_per_cell"_a, "stride_bytes"_a, "cell_bytes"_a, "neurons"_a, nb::keep_alive<1, 2>())
        .def("next", &next_chunk, "layer"_a,
             nb::sig("def next(self, layer: int) -> tuple[int, NDArray[numpy.uint64]] | None"))
        .def("idle", &used_session<&Sweep::idle, Sweep>, nb::call_guard<nb::gil_scoped_release>(),
             "Gives everything back.")
        .def("forget", &used_session<&Sweep::forget, Sweep>, nb::call_guard<nb::gil_scoped_release>(),
             "The session is another one: nothing is held or on its way.");
}

// ---- leases and window ----

// A copy of the layer's table would be out of date with the next grant: it is a view.
nb::object addresses(const nb::handle_t<Leases>& self, uint32_t layer) {
    const auto table = nb::cast<Leases&>(self).addresses(layer);
    using Array = nb::ndarray<nb::numpy, const uint64_t, nb::ndim<1>>;
    return nb::cast(Array(table.data(), {table.size()}, self));
}

void exchange(Leases& leases, uint32_t layer, const U32Array& acquire, const U32Array& release) {
    const auto asked = span_of(acquire), held = span_of(release);
    const nb::gil_scoped_release released;
    const auto use = leases.session().use();
    leases.exchange(layer, asked, held);
}

void bind_leases(nb::module_& m) {
    nb::class_<Leases>(m, "Leases", "The cells that a session holds one by one, and where they lie.")
        .def(
            "__init__",
            [](Leases* self, Session& session, uint32_t bundles_per_cell, uint32_t cell_bytes,
               const std::vector<uint32_t>& cells) {
                require_layout(bundles_per_cell, 1, cell_bytes);
                require_cells(cells);
                new (self) Leases(session, bundles_per_cell, cell_bytes, cells);
            },
            "session"_a, "bundles_per_cell"_a, "cell_bytes"_a, "cells"_a, nb::keep_alive<1, 2>())
        .def("addresses", &addresses, "layer"_a, nb::sig("def addresses(self, layer: int) -> NDArray[numpy.uint64]"),
             "uint64[cells], 0 where a cell is not held or has not arrived; a view that changes with every grant.")
        .def("exchange", &exchange, "layer"_a, "acquire"_a.noconvert(), "release"_a.noconvert(),
             "Gives back and asks for; does not wait.")
        .def("arrived", &used_session<&Leases::arrived, Leases>, nb::call_guard<nb::gil_scoped_release>(),
             "Waits for more of what was asked for; returns how many cells are still to come.")
        .def("release_all", &used_session<&Leases::release_all, Leases>, nb::call_guard<nb::gil_scoped_release>())
        .def("forget", &used_session<&Leases::forget, Leases>, nb::call_guard<nb::gil_scoped_release>(),
             "The session is another one: nothing is held or on its way.")
        .def_prop_ro("cells_held", &Leases::cells_held);
}

nb::object slide(Window& window, uint32_t layer, uint32_t past_tokens, uint32_t columns, const U32Array& positions,
                 const U16Array& row_masks, uint32_t limit) {
    const std::span masks(aligned(row_masks, "row_masks").data(), row_masks.size());
    Window::Slide slid = window.slide(layer, {past_tokens, columns, span_of(positions), masks}, limit);
    if (!slid.fits) return nb::none();
    nb::list elsewhere;
    for (auto& [other, cells] : slid.elsewhere) elsewhere.append(nb::make_tuple(other, owned_array(std::move(cells))));
    return nb::make_tuple(owned_array(std::move(slid.acquire)), owned_array(std::move(slid.release)), elsewhere);
}

// One pass over the bundles of a step that have no address yet.
size_t locate(const U64Array& table, const U32Array& positions, uint32_t bundles_per_cell, uint32_t stride_bytes,
              const Array<uint64_t, 1>& addresses, const Array<uint32_t, 1>& found) {
    require(bundles_per_cell > 0, "bundles_per_cell must be positive");
    require(addresses.size() == positions.size() && found.size() == positions.size(),
            "addresses and found must have a place for each position");
    aligned(table, "table"), aligned(positions, "positions"), aligned(addresses, "addresses"), aligned(found, "found");
    size_t count = 0;
    for (size_t i = 0; i < positions.size(); i++) {
        if (addresses.data()[i] != 0) continue;
        const uint32_t cell = positions.data()[i] / bundles_per_cell;
        require(cell < table.size(), "a position is beyond the layer's cells");
        if (table.data()[cell] == 0) continue;
        addresses.data()[i] = table.data()[cell] + uint64_t{positions.data()[i] % bundles_per_cell} * stride_bytes;
        found.data()[count++] = static_cast<uint32_t>(i);
    }
    return count;
}

void bind_window(nb::module_& m) {
    nb::class_<Window>(m, "Window", "Which cells stay leased: those that the last k tokens wanted.")
        .def(
            "__init__",
            [](Window* self, uint32_t tokens, uint32_t bundles_per_cell, std::vector<uint32_t> cells) {
                require(tokens <= WINDOW_TOKENS_MAX, "a window has at most 4096 tokens");
                require(bundles_per_cell > 0, "bundles_per_cell must be positive");
                require_cells(cells);
                new (self) Window(tokens, bundles_per_cell, std::move(cells));
            },
            "tokens"_a, "bundles_per_cell"_a, "cells"_a)
        .def("slide", &slide, "layer"_a, "past_tokens"_a, "columns"_a, "positions"_a.noconvert(),
             "row_masks"_a.noconvert(), "limit"_a,
             nb::sig("def slide(self, layer: int, past_tokens: int, columns: int, positions: NDArray[numpy.uint32], "
                     "row_masks: NDArray[numpy.uint16], limit: int) -> tuple[NDArray[numpy.uint32], "
                     "NDArray[numpy.uint32], list[tuple[int, NDArray[numpy.uint32]]]] | None"),
             "Cells to acquire, to release, and to release of other layers; None when the step alone exceeds `limit`, "
             "which leaves the window empty.")
        .def("clear", &Window::clear)
        .def_prop_ro("cells_held", &Window::cells_held);
    m.def("locate", &locate, "table"_a.noconvert(), "positions"_a.noconvert(), "bundles_per_cell"_a, "stride_bytes"_a,
          "addresses"_a.noconvert(), "found"_a.noconvert(),
          "Fills in the addresses that are still 0 and whose cells have arrived; writes their indices into `found` and "
          "returns how many there are.");
}

}  // namespace

NB_MODULE(_native, m) {
    // Tensors view resident weights, and a client that a script keeps to its end outlives this module.
    nb::set_leak_warnings(false);
    nb::register_exception_translator(&translate);
    bind_session(m);
    bind_sweep(m);
    bind_leases(m);
    bind_window(m);
    bind_checksum(m);
    bind_kernels(m);
}
