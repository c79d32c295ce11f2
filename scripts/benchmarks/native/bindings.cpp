// bench_native: what benchmarks compare the daemon with, for Python. Import weightd._native and flashclient._native
// first: they have the types.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <cstddef>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "in_process_engine.h"
#include "owned_array.h"
#include "part_reader.h"
#include "pool_replay.h"
#include "service/engine_thread.h"

namespace nb = nanobind;
using namespace nb::literals;
using flashclient::CellSource;
using flashclient::owned_array;
using weightd::EngineThread;
using weightd::InProcessEngine;
using weightd::PartReader;

namespace {

// Lends each segment to the client's kernels, as long as this lives: flashclient._native has the table of what they may
// read. Called without the GIL, and destroyed with it.
class Lent {
  public:
    Lent() : lent_memory_(nb::module_::import_("flashclient._native").attr("LentMemory")) {}
    void operator()(std::span<const std::byte> segment) {
        const nb::gil_scoped_acquire acquired;
        using Bytes = nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>>;
        const Bytes view(segment.data(), {segment.size()}, nb::none());
        segments_.append(lent_memory_(nb::cast(view, nb::rv_policy::reference)));
    }

  private:
    nb::object lent_memory_;
    nb::list segments_;
};

void make_in_process(InProcessEngine* self, uint64_t dram_bytes, const weightd::ModelSpec& spec,
                     const std::string& io_engine, uint32_t io_threads, uint32_t io_depth, uint32_t slots_wanted) {
    auto lent = std::make_shared<Lent>();
    const nb::gil_scoped_release released;
    new (self) InProcessEngine(dram_bytes, spec, {io_engine, io_threads, io_depth, false}, slots_wanted,
                               [lent](std::span<const std::byte> segment) { (*lent)(segment); });
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

void bind_unbundled(nb::module_& module) {
    nb::class_<UnbundledEngineThread, EngineThread>(module, "UnbundledEngineThread",
                                                    "Reads each part of a bundle alone.")
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

void bind_in_process(nb::module_& module) {
    using Release = nb::call_guard<nb::gil_scoped_release>;
    nb::class_<InProcessEngine, CellSource>(module, "InProcessEngine",
                                            "The engine in the caller's thread, with one model and session.")
        .def("__init__", &make_in_process, "dram_bytes"_a, "spec"_a, "io_engine"_a, "io_threads"_a, "io_depth"_a,
             "slots_wanted"_a, "Raises OSError where O_DIRECT is refused, MemoryError where dram_bytes do not do.")
        .def(
            "lease_range",
            [](InProcessEngine& engine, uint32_t layer, uint32_t first, uint32_t count) {
                std::vector<uint64_t> addresses;
                {
                    const nb::gil_scoped_release released;
                    addresses = engine.lease_range(layer, first, count);
                }
                return owned_array(std::move(addresses));
            },
            "layer"_a, "first"_a, "count"_a,
            "Leases neighbouring cells, waits for them and returns their addresses. Raises RuntimeError.")
        .def("release_range", &InProcessEngine::release_range, "layer"_a, "first"_a, "count"_a, Release())
        .def_prop_ro("cells_held", &InProcessEngine::cells_held)
        .def_prop_ro("misses", &InProcessEngine::misses, "cells that had to be read, since the start");
}

void bind_replay(nb::module_& module) {
    using Steps = nb::ndarray<nb::numpy, const uint32_t, nb::ndim<2>, nb::c_contig>;
    module.def(
        "replay",
        [](const Steps& steps, uint32_t cells, uint32_t slots, uint32_t experts) {
            std::vector<uint8_t> hits;
            {
                const nb::gil_scoped_release released;
                hits = weightd::replay({steps.data(), steps.size()}, static_cast<uint32_t>(steps.shape(1)), cells,
                                       slots, experts);
            }
            return owned_array(std::move(hits));
        },
        "steps"_a, "cells"_a, "slots"_a, "experts"_a = 0,
        "Plays steps [rows, cells of a row] in an empty pool. By use: 1 a hit, 0 a miss, 2 a repetition in its row.");
}

}  // namespace

NB_MODULE(bench_native, module) {
    bind_in_process(module);
    bind_unbundled(module);
    bind_replay(module);
}
