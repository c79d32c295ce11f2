// weightd._native: import and engine for Python. Every call that can block runs without the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cerrno>
#include <filesystem>
#include <optional>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "bundle/bundle.h"
#include "device/block_size.h"
#include "device/checksum.h"
#include "device/measure.h"
#include "device/populator.h"
#include "device/reader.h"
#include "device/shared_memory.h"
#include "encoding_argument.h"
#include "huge_pages.h"
#include "memory/model_cost.h"
#include "service/engine_thread.h"

namespace nb = nanobind;
using namespace nb::literals;
using weightd::EngineThread;

void bind_model(nb::module_& module);  // bindings_model.cpp

namespace {

using U32Array = nb::ndarray<const uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
// Flat, contiguous bytes in host memory: what np.frombuffer(buffer, np.uint8) gives.
using ReadBytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using WriteBytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using WriteChecksums = nb::ndarray<uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

const std::byte* data_of(const ReadBytes& bytes) { return reinterpret_cast<const std::byte*>(bytes.data()); }
std::byte* data_of(const WriteBytes& bytes) { return reinterpret_cast<std::byte*>(bytes.data()); }
std::span<const std::byte> span_of(const ReadBytes& bytes) { return {data_of(bytes), bytes.size()}; }

// Types of exceptions, which live as long as the module.
PyObject* corrupt_bundle = nullptr;
PyObject* unquantisable_value = nullptr;

// A failed system call becomes OSError with errno and path; what() of our errors is "path: reason".
void translate(const std::exception_ptr& pointer, void*) {
    try {
        std::rethrow_exception(pointer);
    } catch (const std::system_error& error) {
        const std::string text = error.what();
        const std::string reason = ": " + error.code().message();
        const std::filesystem::path path(text.substr(0, text.rfind(reason)));
        nb::object arguments = nb::make_tuple(error.code().value(), error.code().message(), nb::str(nb::cast(path)));
        PyErr_SetObject(PyExc_OSError, arguments.ptr());
    } catch (const weightd::NoRoom& error) {
        PyErr_SetString(PyExc_MemoryError, error.what());
    } catch (const weightd::Unanswered& error) {
        PyErr_SetString(PyExc_TimeoutError, error.what());
    } catch (const weightd::UnquantisableValue& error) {
        PyErr_SetObject(unquantisable_value, nb::make_tuple(error.neuron, error.what()).ptr());
    } catch (const weightd::CorruptBundle& error) {
        nb::object raised = nb::borrow(corrupt_bundle)(error.what());
        raised.attr("layer") = error.layer;
        raised.attr("position") = error.position;
        raised.attr("error") = error.error;
        PyErr_SetObject(corrupt_bundle, raised.ptr());
    }
}

// Bytes that are filled without the GIL.
template <typename F>
nb::bytes filled_bytes(size_t size, F fill) {
    nb::object result = nb::steal(PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(size)));
    if (!result.is_valid()) throw nb::python_error();
    const std::span<std::byte> out(reinterpret_cast<std::byte*>(PyBytes_AS_STRING(result.ptr())), size);
    {
        const nb::gil_scoped_release released;
        fill(out);
    }
    return nb::cast<nb::bytes>(result);
}

nb::tuple open_session(EngineThread& engine, uint32_t model, uint32_t slots_wanted, int64_t user_id, bool predicts) {
    weightd::Opened opened;
    const auto user = user_id < 0 ? std::nullopt : std::optional(static_cast<uid_t>(user_id));
    {
        const nb::gil_scoped_release released;
        opened = engine.open_session(model, slots_wanted, user, predicts);
    }
    return nb::make_tuple(nb::bytes(opened.token.data(), opened.token.size()), opened.share_slots);
}

nb::bytes fetch(EngineThread& engine, uint32_t model, uint32_t layer, const U32Array& cells, uint32_t cell_bytes) {
    return filled_bytes(cells.size() * cell_bytes, [&](std::span<std::byte> out) {
        engine.fetch(model, layer, std::span(cells.data(), cells.size()), out);
    });
}

nb::bytes fetch_resident(EngineThread& engine, uint32_t model, uint64_t offset, uint64_t size) {
    return filled_bytes(size, [&](std::span<std::byte> out) { engine.fetch_resident(model, offset, out); });
}

nb::list latency_bounds_s() {
    nb::list bounds;
    for (size_t i = 0; i + 1 < weightd::LATENCY_BUCKETS; i++) bounds.append(weightd::Latencies::bound_s(i));
    return bounds;
}

template <typename T>
concept HasFields = requires(const T& report) {
    report.each_field([](const char*, const auto&) {});
};

template <typename T>
nb::object object_of(const T& value) {
    return nb::cast(value);
}

template <HasFields T>
nb::dict object_of(const T& report);

template <HasFields T>
nb::list object_of(const std::vector<T>& reports) {
    nb::list list;
    for (const T& report : reports) list.append(object_of(report));
    return list;
}

// The fields under the names that proto/weightd.proto gives them.
template <HasFields T>
nb::dict object_of(const T& report) {
    nb::dict fields;
    report.each_field([&](const char* name, const auto& value) { fields[name] = object_of(value); });
    return fields;
}

nb::dict stats(EngineThread& engine) {
    weightd::Report report;
    {
        const nb::gil_scoped_release released;
        report = engine.report();
    }
    return object_of(report);
}

uint64_t minimum_dram_bytes(uint64_t resident_bytes, uint32_t cell_bytes, uint32_t cells, uint32_t neurons,
                            uint32_t experts) {
    weightd::ModelSpec spec;
    spec.resident_bytes = resident_bytes;
    spec.cell_bytes = cell_bytes;
    spec.layers.push_back({0, neurons, cells, 0, 0, experts});
    return weightd::minimum_dram_bytes(spec);
}

uint64_t catalog_bytes(uint32_t cells, uint32_t neurons) {
    weightd::ModelSpec spec;
    spec.layers.push_back({0, neurons, cells, 0, 0, 0});
    return weightd::catalog_bytes(spec);
}

// Paths come as std::filesystem::path: its caster gives the bytes that the system knows, whatever the locale.
uint32_t block_size_bytes(const std::filesystem::path& path) { return weightd::block_size_bytes(path); }
uint32_t sector_size_bytes(const std::filesystem::path& path) { return weightd::sector_size_bytes(path); }

nb::dict measure_reads(const std::filesystem::path& path, uint64_t read_bytes, uint32_t depth, double seconds,
                       bool random, const std::string& io_engine, bool verify) {
    weightd::Measurement measured;
    {
        const nb::gil_scoped_release released;
        measured = weightd::measure_reads(path, {io_engine, read_bytes, depth, seconds, random, verify});
    }
    nb::dict result;
    result["reads"] = measured.reads;
    result["bytes"] = measured.bytes;
    result["seconds"] = measured.seconds;
    result["cpu_seconds"] = measured.cpu_seconds;
    return result;
}

nb::tuple probe_io_uring() {
    std::string note;
    try {
        const auto reader = weightd::make_uring_reader(weightd::DEPTH_DEFAULT, note);
        return nb::make_tuple(reader->level(), note);
    } catch (const std::system_error& error) {
        return nb::make_tuple("", std::string(error.what()));
    }
}

bool probe_huge_pages() {
    const weightd::SharedMemory memory("weightd-probe", weightd::HUGE_PAGE_BYTES);
    return weightd::give_huge_pages(memory.bytes());
}

void bind_errors(nb::module_& module) {
    nb::object bundle = nb::exception<weightd::CorruptBundle>(module, "CorruptBundle", PyExc_RuntimeError);
    bundle.attr("layer") = 0;
    bundle.attr("position") = 0;
    bundle.attr("error") = 0;
    corrupt_bundle = bundle.ptr();
    nb::exception<weightd::CorruptResident>(module, "CorruptResident", PyExc_RuntimeError);
    nb::exception<weightd::ModelRemoved>(module, "ModelRemoved", PyExc_RuntimeError);
    nb::exception<weightd::Stopping>(module, "Stopping", PyExc_RuntimeError);
    unquantisable_value =
        nb::exception<weightd::UnquantisableValue>(module, "UnquantisableValue", PyExc_ValueError).ptr();
    nb::register_exception_translator(&translate);  // the last is asked first: it gives CorruptBundle its numbers
}

void set_predictors(EngineThread& engine, uint32_t model, const std::filesystem::path& path, uint64_t bytes,
                    uint64_t checksum, uint32_t version) {
    const nb::gil_scoped_release released;
    engine.set_predictors(model, {path, bytes, checksum, version});
}

void seed(EngineThread& engine, uint32_t model, const ReadBytes& hotness) {
    const nb::gil_scoped_release released;
    engine.seed(model, std::span(hotness.data(), hotness.size()));
}

nb::bytes hotness(EngineThread& engine, uint32_t model) {
    std::vector<weightd::Hotness> result;
    {
        const nb::gil_scoped_release released;
        result = engine.hotness(model);
    }
    return nb::bytes(result.data(), result.size());
}

void make_options(weightd::EngineOptions* self, uint64_t dram_bytes, const std::string& io_engine, uint32_t io_threads,
                  uint32_t io_depth, bool allow_buffered, const std::filesystem::path& data_socket, bool warms,
                  uint64_t dram_floor_bytes, int machine_pressure_fd, int cgroup_pressure_fd, double answer_within_s) {
    weightd::EngineOptions options;
    options.dram_bytes = dram_bytes;
    options.reader.kind = io_engine;
    options.reader.threads = io_threads;
    options.reader.depth = io_depth;
    options.reader.allow_buffered = allow_buffered;
    options.reader.answer_within =
        std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::duration<double>(answer_within_s));
    options.data_socket = data_socket;
    options.warms = warms;
    options.pressure.floor_bytes = dram_floor_bytes;
    options.pressure.machine = weightd::Descriptor(machine_pressure_fd);
    options.pressure.cgroup = weightd::Descriptor(cgroup_pressure_fd);
    new (self) weightd::EngineOptions(std::move(options));
}

void bind_engine(nb::module_& module) {
    nb::class_<weightd::EngineOptions>(module, "EngineOptions", "What an EngineThread is made of.")
        .def("__init__", &make_options, nb::kw_only(), "dram_bytes"_a, "io_engine"_a, "io_threads"_a, "io_depth"_a,
             "allow_buffered"_a, "data_socket"_a, "warms"_a, "dram_floor_bytes"_a, "machine_pressure_fd"_a,
             "cgroup_pressure_fd"_a, "answer_within_s"_a,
             "Owns the triggers of pressure stall information (-1: none). They report pressure by POLLPRI.");
    nb::class_<EngineThread>(module, "EngineThread",
                             "An engine with its reader, pool and data socket, on its own thread.")
        .def(
            "__init__",
            [](EngineThread* self, weightd::EngineOptions& options) {
                const nb::gil_scoped_release released;
                new (self) EngineThread(std::move(options));
            },
            "options"_a, "Takes what the options own, so they serve for one EngineThread. Raises OSError.")
        .def_prop_ro("io_engine", &EngineThread::io_level, nb::call_guard<nb::gil_scoped_release>(),
                     "the reader's level, in words")
        .def_prop_ro("io_engine_note", &EngineThread::io_note, "why a better level was refused, or empty")
        .def("add_model", &EngineThread::add_model, "spec"_a, nb::call_guard<nb::gil_scoped_release>(),
             "Opens a model's files; returns its number.")
        .def(
            "remove_model", &EngineThread::remove_model, "model"_a, nb::call_guard<nb::gil_scoped_release>(),
            "Gives its memory back and closes its files. False: somebody uses the model. Its number is not used again.")
        .def("raise_dram", &EngineThread::raise_dram, "dram_bytes"_a, "floor_bytes"_a,
             nb::call_guard<nb::gil_scoped_release>(), "--dram and its floor from now on, unless it is more already.")
        .def("open_session", &open_session, "model"_a, "slots_wanted"_a, "user_id"_a, "predicts"_a = true,
             "Returns (token, share_slots). Only processes of the user can attach; -1: processes of any user. Loads "
             "resident weights and, for a session that predicts, predictors that are not in memory yet. Raises "
             "MemoryError, OSError "
             "(TimeoutError: the device does not answer), CorruptResident, Stopping.")
        .def("set_predictors", &set_predictors, "model"_a, "path"_a, "bytes"_a, "checksum"_a, "version"_a,
             "The predictors.safetensors for sessions that open from now on.")
        .def("seed", &seed, "model"_a, "hotness"_a,
             "How often each cell will be used: uint8 in the code of replacement.h. ValueError unless one for each.")
        .def("hotness", &hotness, "model"_a, "The hotness of each cell now: the seed, and what was seen since.")
        .def("fetch", &fetch, "model"_a, "layer"_a, "cells"_a, "cell_bytes"_a,
             "Whole cells, back to back. Raises OSError (TimeoutError: the device does not answer), CorruptBundle, "
             "IndexError, MemoryError, Stopping.")
        .def("fetch_resident", &fetch_resident, "model"_a, "offset"_a, "size"_a, "Bytes of the resident file.")
        .def("stats", &stats,
             "The fields of proto/weightd.proto's StatsResponse that the engine knows, as dicts and lists.")
        .def_prop_ro("failed_fd", &EngineThread::failed_fd, "readable once the engine has ended by a fault of its own")
        .def_prop_ro("failure", &EngineThread::failure, "what that fault was, or empty")
        .def("close", &EngineThread::stop, nb::call_guard<nb::gil_scoped_release>(),
             "Ends every session; can be repeated.")
        .def_static("minimum_dram_bytes", &minimum_dram_bytes, "resident_bytes"_a, "cell_bytes"_a, "cells"_a,
                    "neurons"_a, "experts"_a = 0,
                    "The smallest --dram with which such a model can be served; all its layers together. Its pool has "
                    "POOL_SLOTS_MIN slots.")
        .def_static("catalog_bytes", &catalog_bytes, "cells"_a, "neurons"_a,
                    "What such a model takes of --dram from the start, used or not; part of its minimum_dram_bytes().")
        .def_static("share_slots", &weightd::share_slots, "left"_a, "wanted"_a, "cells"_a,
                    "The share of a session that wants so many slots (0: no preference) of those that are left.");
}

// ---- import: cutting bundles ----

constexpr size_t QUANTISED_TOGETHER = 1 << 14;  // values that are converted before: whole blocks, half of an L2 cache

void require(bool condition, const char* what) {
    if (!condition) throw std::invalid_argument(what);
}

void convert_bytes(const ReadBytes& source, const std::string& source_dtype, const WriteBytes& target,
                   const std::string& target_dtype) {
    const weightd::Dtype from = weightd::compute_dtype_named(source_dtype);
    const weightd::Dtype to = weightd::compute_dtype_named(target_dtype);
    const size_t count = source.size() / weightd::bytes_of(from);
    require(count * weightd::bytes_of(from) == source.size(), "source is not a whole number of elements");
    require(count * weightd::bytes_of(to) == target.size(), "source and target differ in elements");
    const nb::gil_scoped_release released;
    weightd::convert(data_of(source), from, data_of(target), to, count);
}

std::pair<double, double> quantise_bytes(const ReadBytes& source, const std::string& source_dtype,
                                         const WriteBytes& target, const weightd::Encoding& encoding) {
    const weightd::Dtype from = weightd::compute_dtype_named(source_dtype);
    const std::optional<weightd::BlockFormat> format = encoding.block_format();
    require(format && weightd::has_quantiser(*format), "nothing is quantised to that encoding");
    const size_t count = target.size() / encoding.block_bytes * encoding.block_values;
    require(count * weightd::bytes_of(from) == source.size() && encoding.bytes_of(count) == target.size(),
            "source and target differ in blocks");
    const nb::gil_scoped_release released;
    weightd::QuantisationError error;
    std::vector<float> values(std::min(count, QUANTISED_TOGETHER));
    for (size_t first = 0; first < count; first += values.size()) {
        const size_t some = std::min(values.size(), count - first);
        weightd::convert(data_of(source) + first * weightd::bytes_of(from), from,
                         reinterpret_cast<std::byte*>(values.data()), weightd::Dtype::f32, some);
        weightd::quantise(*format, values.data(), some, data_of(target) + encoding.bytes_of(first), error);
    }
    return {error.squared_differences, error.squares};
}

uint64_t checksum_bytes(const ReadBytes& bytes) {
    const nb::gil_scoped_release released;
    return weightd::checksum(span_of(bytes));
}

void checksum_bundles(const weightd::BundleShape& shape, const ReadBytes& cells, const WriteChecksums& checksums) {
    require(shape.cells(checksums.size()) * shape.cell_bytes <= cells.size(), "cells are too few for the checksums");
    const nb::gil_scoped_release released;
    for (size_t i = 0; i < checksums.size(); i++) {
        checksums.data()[i] = weightd::checksum({data_of(cells) + shape.offset_bytes(i), shape.bundle_bytes()});
    }
}

// A part's matrix: data, dtype, whether the values are columns, the first neuron's row or column, and the step.
using CutPart = std::tuple<ReadBytes, std::string, bool, size_t, size_t>;

weightd::PartMatrix part_matrix(const weightd::BundleShape& shape, size_t part, const CutPart& given, size_t neurons) {
    const auto& [data, dtype_name, columns, first, step] = given;
    const weightd::Dtype dtype = weightd::compute_dtype_named(dtype_name);
    const size_t elements = data.size() / weightd::bytes_of(dtype);
    const size_t width = columns ? elements / shape.hidden_size : shape.hidden_size;
    require(elements * weightd::bytes_of(dtype) == data.size() && step > 0, "a part is not a matrix");
    // Divisions instead of products, which could overflow.
    if (columns) {
        require(width * shape.hidden_size == elements, "columns do not have hidden_size values");
        const auto plain = shape.parts[part].plain();
        require(!plain || *plain == dtype, "columns are not in the dtype of their part");
        require(step <= weightd::COLUMN_STEP_MAX, "columns lie too far apart");
        require(first / step <= width / step && neurons <= width / step - first / step, "neurons beyond the columns");
    } else {
        const size_t rows = elements / shape.hidden_size;
        require(neurons == 0 || (first < rows && (neurons - 1) <= (rows - 1 - first) / step),
                "neurons beyond the rows");
    }
    return {data_of(data), dtype, columns, width, first, step};
}

std::pair<double, double> cut(const weightd::BundleShape& shape, const std::vector<CutPart>& given,
                              const WriteBytes& cells, const WriteChecksums& checksums) {
    require(given.size() == shape.parts.size(), "parts do not fit the shape");
    require(shape.cells(checksums.size()) * shape.cell_bytes == cells.size(), "cells do not fit the bundles");
    std::vector<weightd::PartMatrix> parts;
    for (size_t i = 0; i < given.size(); i++) parts.push_back(part_matrix(shape, i, given[i], checksums.size()));
    const std::span<uint64_t> results(checksums.data(), checksums.size());
    const nb::gil_scoped_release released;
    const weightd::QuantisationError error = weightd::cut_bundles(shape, parts, data_of(cells), results);
    return {error.squared_differences, error.squares};
}

weightd::BundleShape make_shape(std::vector<weightd::Encoding> parts, size_t hidden_size, size_t stride_bytes,
                                size_t bundles_per_cell, size_t cell_bytes) {
    require(!parts.empty() && parts.size() <= 3, "parts are gate, up and down, up and down, or a row");
    const weightd::BundleShape shape{std::move(parts), hidden_size, stride_bytes, bundles_per_cell, cell_bytes};
    require(bundles_per_cell > 0 && shape.bundle_bytes() > 0, "an empty bundle or cell");
    for (const weightd::Encoding& part : shape.parts) {
        require(hidden_size % part.block_values == 0, "hidden_size is not a whole number of blocks");
    }
    require(stride_bytes >= shape.bundle_bytes(), "stride is smaller than a bundle");
    require(cell_bytes >= shape.bundle_bytes() + (bundles_per_cell - 1) * stride_bytes, "cell is too small");
    return shape;
}

void bind_bundle(nb::module_& module) {
    nb::class_<weightd::BundleShape>(module, "BundleShape", "The layout of bundles in cells; sizes in bytes.")
        .def_static("make", &make_shape, "parts"_a, "hidden_size"_a, "stride_bytes"_a, "bundles_per_cell"_a,
                    "cell_bytes"_a);
    nb::class_<weightd::Checksum>(module, "Checksum", "XXH3-64 of bytes that come in pieces.")
        .def(nb::init<>())
        .def(
            "update",
            [](weightd::Checksum& self, const ReadBytes& bytes) {
                const nb::gil_scoped_release released;
                self.update(span_of(bytes));
            },
            "bytes"_a)
        .def_prop_ro("value", &weightd::Checksum::value);
    module.def("checksum", &checksum_bytes, "bytes"_a, "XXH3-64 of a uint8 array.");
    module.def("convert", &convert_bytes, "source"_a, "source_dtype"_a, "target"_a, "target_dtype"_a,
               "Converts elements between F32, BF16 and F16; both arrays are uint8.");
    module.def("quantise", &quantise_bytes, "source"_a, "source_dtype"_a, "target"_a, "encoding"_a,
               "Quantises elements to blocks; both arrays are uint8. Returns and raises what cut_bundles() does.");
    module.def(
        "cut_bundles", &cut, "shape"_a, "parts"_a, "cells"_a, "checksums"_a,
        "Cuts len(checksums) neurons into cells. A part is (bytes of a matrix, dtype, whether neurons are columns, "
        "row or column of the first neuron, step to the next); arrays are uint8, checksums uint64. Returns the sums of "
        "squared differences and of squares of what is quantised. UnquantisableValue: (index of a neuron, what is "
        "wrong).");
    module.def("checksum_bundles", &checksum_bundles, "shape"_a, "cells"_a, "checksums"_a,
               "XXH3-64 of each bundle in cells (uint8) into checksums (uint64).");
    module.def("block_size_bytes", &block_size_bytes, "path"_a, nb::call_guard<nb::gil_scoped_release>(),
               "Granularity of direct I/O where the file lies: max(4096, statx's alignment).");
    module.def("sector_size_bytes", &sector_size_bytes, "path"_a, nb::call_guard<nb::gil_scoped_release>(),
               "The alignment that direct I/O demands there: max(512, statx's); 4096 where statx does not say.");
}

}  // namespace

NB_MODULE(_native, module) {
    bind_errors(module);
    bind_bundle(module);
    bind_model(module);
    bind_engine(module);
    module.attr("READ_LATENCY_BOUNDS_S") = latency_bounds_s();
    module.attr("PAGE_BYTES") = weightd::PAGE_BYTES;
    module.attr("POOL_SLOTS_MIN") = weightd::POOL_SLOTS_MIN;
    module.attr("SEGMENT_BYTES_MIN") = weightd::SEGMENT_BYTES_MIN;
    module.attr("SEGMENT_BYTES_MAX") = weightd::SEGMENT_BYTES_MAX;
    module.attr("SESSIONS_MAX") = weightd::SESSIONS_MAX;
    module.def("measure_reads", &measure_reads, "path"_a, "read_bytes"_a, "depth"_a, "seconds"_a, "random"_a,
               "io_engine"_a, "verify"_a, "Reads a file with O_DIRECT for a while; counts, seconds and CPU seconds.");
    module.def("probe_io_uring", &probe_io_uring,
               "(level, note): what io_uring gives this process; level is empty if nothing.");
    module.def("probe_huge_pages", &probe_huge_pages, "Whether weights in memory get huge pages.");
}
