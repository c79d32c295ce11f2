// bench_native: what benchmarks compare the daemon with, for Python. Import weightd._native first: it has the types.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include "in_process_engine.h"
#include "part_reader.h"
#include "service/engine_thread.h"

namespace nb = nanobind;
using namespace nb::literals;
using weightd::EngineThread;
using weightd::InProcessEngine;
using weightd::PartReader;

namespace {

using U32Array = nb::ndarray<const uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

nb::object addresses(const nb::handle_t<InProcessEngine>& self, uint32_t layer) {
    const auto table = nb::cast<InProcessEngine&>(self).addresses(layer);
    using Array = nb::ndarray<nb::numpy, const uint64_t, nb::ndim<1>>;
    return nb::cast(Array(table.data(), {table.size()}, self));
}

nb::list segments(const nb::handle_t<InProcessEngine>& self) {
    using Array = nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>>;
    nb::list arrays;
    for (const auto& bytes : nb::cast<InProcessEngine&>(self).segments())
        arrays.append(nb::cast(Array(bytes.data(), {bytes.size()}, self)));
    return arrays;
}

void exchange(InProcessEngine& engine, uint32_t layer, const U32Array& acquire, const U32Array& release) {
    const nb::gil_scoped_release released;
    engine.exchange(layer, {acquire.data(), acquire.size()}, {release.data(), release.size()});
}

// An EngineThread that reads each part of a bundle alone.
class UnbundledEngineThread : public EngineThread {
  public:
    // `reader` is the one that `owned` owns.
    UnbundledEngineThread(weightd::EngineOptions options, const PartReader& reader, std::unique_ptr<PartReader> owned)
        : EngineThread(std::move(options), std::move(owned)), reader_(reader) {}

    uint64_t reads() const { return reader_.reads(); }
    uint64_t read_bytes() const { return reader_.read_bytes(); }

  private:
    const PartReader& reader_;
};

void bind_unbundled(nb::module_& m) {
    nb::class_<UnbundledEngineThread, EngineThread>(m, "UnbundledEngineThread", "Reads each part of a bundle alone.")
        .def(
            "__init__",
            [](UnbundledEngineThread* self, weightd::EngineOptions& options, size_t part_bytes) {
                const nb::gil_scoped_release released;
                const auto& choice = options.reader;
                std::string note;
                auto owned = std::make_unique<PartReader>(
                    weightd::make_reader(choice.kind, choice.threads, choice.depth, note), part_bytes);
                const PartReader& reader = *owned;
                new (self) UnbundledEngineThread(std::move(options), reader, std::move(owned));
            },
            "options"_a, "part_bytes"_a)
        .def_prop_ro("reads", &UnbundledEngineThread::reads, "requests to the device, since the start")
        .def_prop_ro("read_bytes", &UnbundledEngineThread::read_bytes, "what they read");
}

void bind_in_process(nb::module_& m) {
    nb::class_<InProcessEngine>(m, "InProcessEngine", "The engine in the caller's thread, with one model and session.")
        .def(
            "__init__",
            [](InProcessEngine* self, uint64_t dram_bytes, const weightd::ModelSpec& spec, const std::string& io_engine,
               uint32_t io_threads, uint32_t io_depth, uint32_t slots_wanted) {
                const nb::gil_scoped_release released;
                new (self) InProcessEngine(dram_bytes, spec, {io_engine, io_threads, io_depth, false}, slots_wanted);
            },
            "dram_bytes"_a, "spec"_a, "io_engine"_a, "io_threads"_a, "io_depth"_a, "slots_wanted"_a,
            "Raises OSError where O_DIRECT is refused, MemoryError where dram_bytes do not do.")
        .def("addresses", &addresses, "layer"_a, nb::sig("def addresses(self, layer: int) -> NDArray[numpy.uint64]"),
             "uint64[cells], 0 where a cell is not held or has not arrived; a view that changes with every grant.")
        .def("segments", &segments, nb::sig("def segments(self) -> list[NDArray[numpy.uint8]]"),
             "The memory of the pool in which cells have come to lie.")
        .def("exchange", &exchange, "layer"_a, "acquire"_a, "release"_a, "Gives back and asks for; does not wait.")
        .def("arrived", &InProcessEngine::arrived, nb::call_guard<nb::gil_scoped_release>(),
             "Waits for more of what was asked for; returns how many cells are still to come. Raises RuntimeError.")
        .def("release_all", &InProcessEngine::release_all, nb::call_guard<nb::gil_scoped_release>())
        .def_prop_ro("share_slots", &InProcessEngine::share_slots)
        .def_prop_ro("lease_limit", &InProcessEngine::lease_limit)
        .def_prop_ro("cells_held", &InProcessEngine::cells_held)
        .def_prop_ro("misses", &InProcessEngine::misses, "cells that had to be read, since the start");
}

}  // namespace

NB_MODULE(bench_native, m) {
    bind_in_process(m);
    bind_unbundled(m);
}
