#include "memory/resident.h"

#include <sstream>
#include <system_error>

#include "device/block_size.h"
#include "device/checksum.h"
#include "device/clock.h"
#include "device/populator.h"
#include "device/reader.h"

namespace weightd {
namespace {

void read_all(const DirectFile& file, const SharedMemory& memory, const ReaderChoice& choice,
              const std::function<void()>& on_progress) {
    std::string note;
    const auto reader = make_reader(choice.kind, choice.threads, choice.depth, note);
    std::vector<Read> reads;
    const uint64_t length_bytes = memory.bytes().size();
    for (uint64_t offset = 0; offset < length_bytes; offset += READ_BYTES_MAX) {
        const uint64_t bytes = std::min<uint64_t>(READ_BYTES_MAX, length_bytes - offset);
        Read read;
        read.file = &file;
        read.offset_bytes = offset;
        read.pieces = {{memory.data() + offset, bytes}};
        reads.push_back(std::move(read));
    }
    const size_t count = reads.size();
    reader->submit(std::move(reads));
    std::vector<Completion> completions;
    while (completions.size() < count) {
        reader->wait();
        reader->reap(completions);
        on_progress();
    }
    for (const Completion& completion : completions) {
        if (completion.error == 0) continue;
        throw CorruptResident(file.path() + " cannot be read: " + std::generic_category().message(completion.error) +
                              ": check the device");
    }
}

DirectFile open_file(const std::string& path, const ReaderChoice& choice) {
    try {
        return DirectFile(path, choice.allow_buffered);
    } catch (const std::system_error& error) {
        if (error.code() != std::errc::no_such_file_or_directory) throw;
        throw CorruptResident(path + " is missing: import or calibrate the model again");
    }
}

// `check` throws CorruptResident. As with bundles, the file is read once more in case only the transfer failed.
SharedMemory load_file(const char* name, const std::string& path, uint64_t bytes, const ReaderChoice& choice,
                       const std::function<void()>& on_progress,
                       const std::function<void(const SharedMemory&)>& check) {
    const DirectFile file = open_file(path, choice);
    if (file.size_bytes() != bytes) {
        throw CorruptResident(path + " has " + std::to_string(file.size_bytes()) + " bytes where the catalog says " +
                              std::to_string(bytes) + ": import or calibrate the model again");
    }
    SharedMemory memory(name, whole_pages(bytes));
    Populator populator;
    populator.add(memory.bytes());
    const auto read = [&] {
        read_all(file, memory, choice, on_progress);
        check(memory);
    };
    try {
        read();
    } catch (const CorruptResident&) {
        read();
    }
    populator.withdraw(memory.bytes());
    give_huge_pages(memory.bytes());
    memory.seal();
    return memory;
}

std::string in_seconds(std::chrono::milliseconds time) {
    std::ostringstream text;
    text << seconds(time) << " s";
    return text.str();
}

}  // namespace

Unanswered::Unanswered(const std::string& model, std::chrono::milliseconds silent)
    : std::runtime_error("model " + model + ": the device has not answered for " + in_seconds(silent) +
                         ": check the device, then try again") {}

SharedMemory load_resident(const ModelSpec& spec, const ReaderChoice& choice,
                           const std::function<void()>& on_progress) {
    if (spec.resident_bytes == 0) {  // a table: sessions get a page that nobody touches, so it takes no memory
        SharedMemory none("weightd-resident", PAGE_BYTES);
        none.seal();
        return none;
    }
    const auto check = [&](const SharedMemory& memory) {
        for (const TensorSpec& tensor : spec.tensors) {
            on_progress();
            if (checksum({memory.data() + tensor.offset_bytes, tensor.size_bytes}) == tensor.checksum) continue;
            throw CorruptResident(spec.name + ": resident tensor " + tensor.name +
                                  " differs from its checksum: import the model again");
        }
    };
    return load_file("weightd-resident", spec.resident_path, spec.resident_bytes, choice, on_progress, check);
}

SharedMemory load_predictors(const std::string& model, const PredictorsFile& wanted, const ReaderChoice& choice,
                             const std::function<void()>& on_progress) {
    const auto check = [&](const SharedMemory& memory) {
        if (checksum({memory.data(), wanted.bytes}) == wanted.checksum) return;
        throw CorruptResident(model + ": " + wanted.path + " differs from its checksum: calibrate the model again");
    };
    return load_file("weightd-predictors", wanted.path, wanted.bytes, choice, on_progress, check);
}

}  // namespace weightd
